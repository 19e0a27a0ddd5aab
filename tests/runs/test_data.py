"""Runs on data of every kind: what reaches training, what is skipped, and what the run's directory says of it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from command_line import Answer, reltune, review_rows, write_csv
from reltune.config.file import read_config
from reltune.config.run_config import RunConfig
from reltune.runs.materials import prepare
from tiny_models import CHAT, save_tiny_bert, save_tiny_llama

QUICK = ("--criteria", "depth", "--budget", "5%", "--max_steps", "1", "--head_epochs", "0", "--eval_strategy", "no")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    save_tiny_bert(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def texts(examples: object) -> list[tuple[int, ...]]:
    return sorted(tuple(example["input_ids"]) for example in examples)  # type: ignore[attr-defined]


def run(model: Path, run_directory: Path, *words: object) -> Answer:
    answer = reltune("run", "--model_name_or_path", model, "--output_dir", run_directory, *QUICK, *words)
    assert answer.code == 0, answer.err
    return answer


def test_formats_give_the_same_examples(tmp_path: Path, model: Path) -> None:
    pairs = review_rows(40)
    records = [{"text": text, "label": label} for text, label in pairs]
    data = datasets.Dataset.from_list(records)
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(tmp_path / "saved")
    write_csv(tmp_path / "data.csv", pairs)
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = []
    for name in ("data.csv", "data.json", "data.jsonl", "data.parquet", "saved"):
        config = RunConfig(str(model), str(tmp_path / "run"), train_file=str(tmp_path / name))
        made = prepare(config)
        found.append([texts(made.train), texts(made.validation), texts(made.test)])
    assert [len(split) for split in found[0]] == [28, 6, 6] and all(other == found[0] for other in found)


def test_splits_of_the_source(tmp_path: Path, model: Path) -> None:
    records = [{"text": text, "label": label} for text, label in review_rows(40)]
    whole = datasets.Dataset.from_list(records)
    parts = {"train": range(20), "val": range(20, 26), "test": range(26, 40)}
    datasets.DatasetDict({name: whole.select(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "saved")
    config = RunConfig(str(model), str(tmp_path / "run"), train_file=str(tmp_path / "saved"))
    made = prepare(config)
    assert [len(split) for split in (made.train, made.validation, made.test)] == [20, 6, 14]
    # a file that is named wins over the source's own split
    config.test_file = str(write_csv(tmp_path / "test.csv", review_rows(4)))
    assert len(prepare(config).test) == 4
    # and a source with several gives the one that is asked for
    config.validation_file = str(tmp_path / "saved")
    assert len(prepare(config).validation) == 6


def test_chinese_in_gbk_with_bad_rows(tmp_path: Path, model: Path) -> None:
    pairs = [(f"很 好 {text}" if label == "好评" else text, label) for text, label in review_rows(40, ("差评", "好评"))]
    pairs[4:4] = [("", "好评"), ("不 坏", " "), ("", "差评")]
    data = write_csv(tmp_path / "评论.csv", pairs, ("评论", "情感"), "gbk")
    held = write_csv(
        tmp_path / "dev.csv", [*review_rows(6, ("差评", "好评")), ("好 film", "")], ("评论", "情感"), "gbk"
    )
    columns = ("--encoding", "gbk", "--text_column", "评论", "--label_column", "情感", "--train_file", data)
    words = (*columns, "--validation_file", held)
    refused = reltune("run", "--model_name_or_path", model, "--output_dir", tmp_path / "run", *QUICK, *words)
    assert refused.code == 2 and not (tmp_path / "run").exists()
    assert "评论.csv has an empty '评论' on 2 lines (6, 8); an empty '情感' on line 7. Mend" in refused.err
    answer = run(model, tmp_path / "run", *words, "--on_bad_rows", "skip")
    assert "评论.csv: skipped an empty '评论' on 2 lines (6, 8); an empty '情感' on line 7." in answer.err
    assert json.loads((tmp_path / "run" / "bad_rows.json").read_text(encoding="utf-8")) == {
        "train": {
            "source": str(data),
            "skipped": {
                "an empty '评论'": {"count": 2, "lines": [6, 8]},
                "an empty '情感'": {"count": 1, "lines": [7]},
            },
        },
        "validation": {"source": str(held), "skipped": {"an empty '情感'": {"count": 1, "lines": [8]}}},
    }
    assert "an empty '评论' on 2 lines (6, 8)" in answer.out and "dev.csv" in answer.out
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "on 2 lines (6, 8)" in report


def test_columns_that_are_left_out_are_named_once(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "reviews.jsonl"
    rows = [{"text": text, "label": label, "id": n, "": n} for n, (text, label) in enumerate(review_rows(40))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = run(model, tmp_path / "run", "--train_file", data)
    sentence = "reviews.jsonl: not used: columns 'id', 'an unnamed one'."
    assert answer.err.count(sentence) == 1 and f"reltune: note: {sentence}" in answer.err
    assert json.loads((tmp_path / "run" / "notes.json").read_text()) == {"notes": [sentence]}
    assert "not used: columns" in answer.out and "not used: columns" in (tmp_path / "run" / "report.html").read_text()


def test_a_config_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "train.csv", review_rows(40))
    (tmp_path / "run.yaml").write_text(
        f"""
model_name_or_path: {model}
output_dir: run
train_file: train.csv
criteria: [depth]
budget: 5%
head_epochs: 0
max_steps: 3
training: {{eval_strategy: no, learning_rate: 1e-3}}
"""
    )
    monkeypatch.chdir(tmp_path)  # relative paths are relative to here, wherever the file is
    answer = reltune("run", "--config", tmp_path / "run.yaml", "--budget", "4%", "--max_steps", 1)
    assert answer.code == 0, answer.err
    saved = RunConfig.load("run/config.yaml")
    assert (saved.budget, saved.train_file, saved.head_epochs) == ("4%", "train.csv", 0.0)
    assert saved.training == {"eval_strategy": "no", "learning_rate": 1e-3, "max_steps": 1}
    assert RunConfig(**read_config("run/config.yaml")) == saved, "the saved config is a config file"
    assert json.loads(Path("run/all_results.json").read_text())["train_steps"] == 1


def test_config_files_that_are_refused(tmp_path: Path, model: Path) -> None:
    config = tmp_path / "run.yaml"
    for text, words in {
        "max_lenght: 1": "'max_length'",
        "output_dir: run": "--model_name_or_path is missing",
        f"model_name_or_path: {model}\noutput_dir: run\nresume_from_checkpoint: x": "reltune tune",
        f"model_name_or_path: {model}\noutput_dir: run": "train_file and dataset_name",
    }.items():
        config.write_text(text)
        answer = reltune("run", "--config", config)
        assert answer.code == 2 and words in answer.err and answer.err.count("\n") == 1
    assert reltune("analyze", "--config", tmp_path / "none.yaml").code == 2


def test_streaming(tmp_path: Path, model: Path) -> None:
    pairs = [*review_rows(30), ("", "neg"), *review_rows(30, seed=1)]
    data = write_csv(tmp_path / "train.csv", pairs)
    data.write_text(data.read_text() + "a film,pos,more\n")
    held = write_csv(tmp_path / "dev.csv", review_rows(10, seed=2))
    words = ("--train_file", data, "--streaming", "--on_bad_rows", "skip", "--head_epochs", 1, "--max_steps", 3)
    files = ("--validation_file", held, "--test_file", held)
    answer = run(model, tmp_path / "run", *words, *files)
    assert "streamed" in answer.out
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["train_steps"] == 3 and results["eval_samples"] == 10
    record = json.loads((tmp_path / "run" / "bad_rows.json").read_text())
    assert record["train"]["skipped"] == {
        "an empty 'text'": {"count": 1, "lines": [32]},
        "another number of fields than the header's 2": {"count": 1, "lines": [63]},
    }
    # a third step would have ended the first pass over 60 rows in batches of 32; the log's last line was cut short
    log = tmp_path / "run" / "train_log.jsonl"
    log.write_text(log.read_text() + '{"step": 3, "lo')
    answer = reltune(
        "tune", tmp_path / "run", "--overwrite_output_dir", "--resume_from_checkpoint", "true", "--max_steps", 4
    )
    assert answer.code == 0, answer
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()][-1] == 4
    place = ("--model_name_or_path", model, "--output_dir", tmp_path / "new", "--train_file", held, "--streaming")
    for more, named in (((*files,), "--max_steps"), (("--max_steps", 1), "--validation_file")):
        answer = reltune("run", *place, *more)
        assert answer.code == 2 and named in answer.err and answer.err.count("\n") == 1, answer.err


PAIRS = review_rows(40, ("neg", "pos"))
SETS = [["a", "b"] if label == "pos" else ["c"] if "bad" in text else [] for text, label in PAIRS]


def listed(labels: list[str]) -> str:
    return "[" + " ".join(str(int(name in labels)) for name in "abc") + "]"


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("text,label", [f'"{labels!r}"' for labels in SETS]),
        ("text,label", ['"' + json.dumps(labels).replace('"', '""') + '"' for labels in SETS]),
        ("text,label", ["|".join(labels) for labels in SETS]),
        ("text,label", [listed(labels) for labels in SETS]),
        ("comment,a,b,c", [listed(labels)[1:-1].replace(" ", ",") for labels in SETS]),
    ],
)
def test_forms_of_several_labels_give_the_same_examples(
    tmp_path: Path, model: Path, header: str, cells: list[str]
) -> None:
    """The labels' vectors are the sets that the data mean, whatever form they are written in."""
    lines = [header, *(f"{text},{cell}" for (text, _), cell in zip(PAIRS, cells, strict=True))]
    data = tmp_path / "data.csv"
    data.write_text("\n".join(lines) + "\n")
    made = prepare(RunConfig(str(model), str(tmp_path / "run"), train_file=str(data)))
    assert made.task.name == "multilabel_classification"
    found = {}
    for examples in (made.train, made.validation, made.test):
        found |= {tuple(example["input_ids"]): example["labels"] for example in examples}
    ids = made.tokenizer([text for text, _ in PAIRS])["input_ids"]
    wanted = {tuple(own): [float(name in labels) for name in "abc"] for own, labels in zip(ids, SETS, strict=True)}
    assert found == wanted


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny_llama(folder, chat_template=CHAT)
    return folder


def chat(form: str, asked: str, answer: str) -> dict[str, object]:
    """One conversation in a form that data sets have."""
    turns = [
        {"role": "system", "content": "very"},
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]
    shared = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    parts = [
        {**turn, "content": [{"type": "text", "text": part} for part in (turn["content"][:2], turn["content"][2:])]}
        for turn in turns
    ]
    return {
        "messages": {"messages": turns},
        "conversations": {"conversations": turns},
        "ShareGPT": {"system": "very", "conversations": shared},
        "parts": {"messages": parts},
        "text": {"messages": json.dumps(turns)},
    }[form]


@pytest.mark.parametrize("form", ["conversations", "ShareGPT", "parts", "text"])
def test_forms_of_conversations_give_the_same_examples(tmp_path: Path, llama: Path, form: str) -> None:
    found = []
    for name in ("messages", form):
        rows = [chat(name, text, label) for text, label in review_rows(20, ("bad", "good"))]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = prepare(RunConfig(str(llama), str(tmp_path / "run"), train_file=str(tmp_path / "data.jsonl")))
        found.append([(item["input_ids"], item["labels"]) for item in made.train])
    assert len(found[0]) == 14 and found[1] == found[0]


def test_quotes_in_a_tsv_swallow_no_rows(tmp_path: Path, model: Path) -> None:
    pairs = [(f'"{text}' if number in (3, 15) else text, label) for number, (text, label) in enumerate(PAIRS)]
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in pairs))
    made = prepare(RunConfig(str(model), str(tmp_path / "run"), train_file=str(data)))
    assert sum(map(len, (made.train, made.validation, made.test))) == 40
    assert [row.values["text"] for row in made.splits.train if '"' in row.values["text"]]


def test_a_test_file_without_labels_is_left_out_for_good(tmp_path: Path, model: Path) -> None:
    """The run, and each evaluation of it, measure the same part of the training data in its place."""
    data = write_csv(tmp_path / "train.csv", [(text, str(int(label == "pos"))) for text, label in PAIRS])
    test = write_csv(tmp_path / "test.csv", [(f"{text} film", "-1") for text, _ in PAIRS])
    answer = run(model, tmp_path / "run", "--train_file", data, "--test_file", test)
    assert "test.csv: no row of the test split has a label; the split is left out" in answer.err
    first = json.loads((tmp_path / "run" / "all_results.json").read_text())
    data.unlink()
    again = reltune("evaluate", tmp_path / "run")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["test_loss"] == first["test_loss"]
    assert first["test_samples"] == 6
