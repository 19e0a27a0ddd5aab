"""Class names belong to a run: what it was made with decides what its outputs mean, not what today's files say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from command_line import assert_refused, contents, reltune, review_rows, write_csv
from reltune.config.run_config import RunConfig
from reltune.runs.cards import describe_merged
from reltune.runs.directory import RunDirectory
from reltune.tasks.sequence_classification import SequenceClassification
from tiny_models import save_tiny_bert, tiny_tokenizer

QUICK = ["--granularity", "column", "--budget", "5%", "--max_steps", 4]


def train_classifier(path: Path, names: tuple[str, str]) -> Path:
    """A checkpoint that tells the reviews apart, its outputs being ``names``, ("neg", "pos") in some order."""
    save_tiny_bert(path, labels=names)
    model, tokenizer = BertForSequenceClassification.from_pretrained(path), tiny_tokenizer()
    rows = review_rows(64, seed=5)
    batch: Any = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    wanted = torch.tensor([names.index(label) for _, label in rows])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        model(**batch, labels=wanted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose classes are in the other order than the data's, and a run on it."""
    place = tmp_path_factory.mktemp("place")
    train_classifier(place / "model", ("pos", "neg"))
    write_csv(place / "train.csv", review_rows(60))
    answer = new_run(place, "run")
    assert answer.code == 0, answer
    assert "the model's own sequence classification head is kept" in answer.err.lower()
    return place


def new_run(place: Path, name: str, *words: object, train: str = "train.csv", command: str = "run") -> Any:
    files = ["--model_name_or_path", place / "model", "--train_file", place / train]
    return reltune(command, *files, "--output_dir", place / name, *QUICK, *words)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(run: Path) -> dict[str, float]:
    return {k: v for k, v in read(run / "all_results.json").items() if k.startswith(("eval_", "test_"))}


@pytest.fixture
def moved(place: Path, tmp_path: Path) -> Path:
    """The run in another place, where its training file is gone."""
    shutil.copytree(place / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(place / "train.csv"), str(tmp_path / "gone.csv")))
    return tmp_path / "run"


def test_a_classifier_in_another_order_starts_as_good_as_it_is(place: Path) -> None:
    results = read(place / "run" / "all_results.json")
    assert results["test_before_accuracy"] == 1.0 and results["test_before_loss"] < 0.3
    assert results["head_parameters"] == 0  # nothing in it is new
    record = read(place / "run" / "task.json")
    assert (record["name"], record["labels"], record["num_labels"]) == ("sequence_classification", ["pos", "neg"], 2)
    assert record["problem_type"] == "single_label_classification"
    assert read(place / "run" / "adapter" / "task.json") == record
    card = (place / "run" / "adapter" / "README.md").read_text()
    assert "0 pos, 1 neg" in card
    assert "head is kept" in (place / "run" / "report.html").read_text()


def test_evaluate_report_and_export_without_the_training_file(place: Path, moved: Path, tmp_path: Path) -> None:
    before = metrics(moved)
    (moved / "all_results.json").unlink()
    for words in (["evaluate", moved], ["report", moved]):
        answer = reltune(*words)
        assert answer.code == 0, answer
    assert metrics(moved) == before
    for form in ("lora", "merged"):
        answer = reltune("export", moved, "--to", form, "--output_dir", tmp_path / form)
        assert answer.code == 0, answer
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "pos", 1: "neg"}
    assert read(tmp_path / "lora" / "task.json")["labels"] == ["pos", "neg"]
    assert "0 pos, 1 neg" in (tmp_path / "lora" / "README.md").read_text()
    base = AutoModelForSequenceClassification.from_pretrained(place / "model")
    lora = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    inputs = AutoTokenizer.from_pretrained(tmp_path / "merged")("good great film", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(lora.eval()(**inputs).logits, merged.eval()(**inputs).logits)
        assert merged(**inputs).logits.argmax().item() == 0


def test_a_renamed_class_does_not_relabel_a_model(place: Path, moved: Path, tmp_path: Path) -> None:
    renamed = {"neg": "aaa_good", "pos": "zzz_bad"}
    write_csv(tmp_path / "gone.csv", [(text, renamed[label]) for text, label in review_rows(60)])
    before = metrics(moved)
    assert reltune("evaluate", moved).code == 0
    assert metrics(moved) == before
    assert reltune("export", moved, "--to", "merged", "--output_dir", tmp_path / "merged").code == 0
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "pos", 1: "neg"}


def test_a_new_class_in_todays_file_is_a_bad_row(moved: Path, tmp_path: Path) -> None:
    rows: Iterable[tuple[str, str]] = [*review_rows(60), ("dull film", "mixed")]
    write_csv(tmp_path / "gone.csv", rows)
    assert reltune("evaluate", moved).code == 0
    before = contents(moved)
    assert_refused(reltune("tune", moved, "--overwrite_output_dir"), "'mixed'", "line 62")
    assert contents(moved) == before
    test = write_csv(tmp_path / "test.csv", [*review_rows(20, seed=3), ("dull film", "mixed")])
    assert_refused(reltune("evaluate", moved, "--test_file", test), "'mixed'", "line 22", "test.csv")
    answer = reltune("evaluate", moved, "--test_file", test, "--on_bad_rows", "skip")
    assert answer.code == 0, answer
    assert read(moved / "all_results.json")["test_samples"] == 20


def test_tune_again_is_for_the_same_classes(place: Path, moved: Path, tmp_path: Path) -> None:
    """One class is missing from today's file; the model keeps its output for it. What is held out is split off today's file."""
    write_csv(tmp_path / "gone.csv", [(text, label) for text, label in review_rows(80, seed=2) if label == "neg"])
    assert reltune("tune", moved, "--overwrite_output_dir").code == 0
    assert reltune("evaluate", moved).code == 0
    assert read(moved / "task.json")["labels"] == ["pos", "neg"]
    kept = [json.loads(line) for line in (moved / "held_out" / "test.jsonl").read_text().splitlines()]
    assert {row["values"]["label"] for row in kept} == {"neg"}
    assert len(kept) == read(moved / "all_results.json")["test_samples"]


def test_a_run_without_the_record_is_read_as_before(place: Path, tmp_path: Path) -> None:
    """Runs of older versions have sorted classes, and read the training file for everything."""
    train_classifier(tmp_path / "model", ("neg", "pos"))
    write_csv(tmp_path / "train.csv", review_rows(60))
    assert new_run(tmp_path, "run").code == 0
    run = tmp_path / "run"
    before = metrics(run)
    (run / "task.json").unlink()
    shutil.rmtree(run / "held_out")
    assert reltune("evaluate", run).code == 0
    assert metrics(run) == before
    assert reltune("export", run, "--to", "merged", "--output_dir", tmp_path / "merged").code == 0
    (tmp_path / "train.csv").unlink()
    assert_refused(reltune("evaluate", run), "train.csv")


def test_a_damaged_record(moved: Path) -> None:
    for text in ("{", "[]", '{"name": "juggling", "columns": {}}', '{"name": "sequence_classification"}'):
        (moved / "task.json").write_text(text)
        assert_refused(reltune("evaluate", moved), "task.json", "reltune analyze")


def test_the_card_of_an_adapter_tells_data_training_and_results(place: Path) -> None:
    card = (place / "run" / "adapter" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": str(place / "model"),
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["reltune", f"base_model:adapter:{place / 'model'}"],
    }
    record = read(place / "run" / "data.json")["train"]
    assert f"| train | train.csv | {record['rows']} | {record['fingerprint']} |" in text
    assert "| steps | 4 |" in text and "peft 0." in text
    results = metrics(place / "run")
    assert f"| test\\_accuracy | 100.00 % | {100 * results['test_accuracy']:.2f} % |" in text
    assert reltune("evaluate", place / "run").code == 0
    assert (place / "run" / "adapter" / "README.md").read_text() == card  # its results once


def test_names_from_the_data_are_text_in_a_card(place: Path, tmp_path: Path) -> None:
    task = SequenceClassification(labels=["<script>x</script>", "a|b*"], columns={"text": "text", "label": "label"})
    describe_merged(tmp_path, RunConfig.load(place / "run" / "config.yaml"), RunDirectory(tmp_path), task, "")
    card = (tmp_path / "README.md").read_text()
    assert "0 &lt;script&gt;x&lt;/script&gt;, 1 a\\|b\\*" in card and "<script>" not in card
