"""Predictions of every task, against what Transformers alone reads off the merged model: its pipelines, or a plain forward pass."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from command_line import Answer, assert_refused, contents, reltune, review_rows
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.tasks.registry import TASKS
from task_cases import write_rows
from tiny_models import CHAT, WORDS, save_tiny_bert, save_tiny_llama, save_tiny_masked, tiny_tokenizer

TEXTS = ["good film", "very bad book not great", "dull", "film film film good"]
PROMPTS = ["film good not", "very bad", "book great film not"]


def save_tiny_t5(path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(path)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 3}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(path)


def save_tiny_vit(path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(path)
    for name in range(24):
        pixels = np.random.default_rng(name).integers(0, 255, (8, 8, 3)).astype("uint8")
        Image.fromarray(pixels).save(path.parent / f"{name}.png")


def of_classes(merged: Path, rows: list[dict[str, Any]], kind: str = "text", **options: Any) -> list[dict[str, Any]]:
    classify = pipeline(f"{kind}-classification", str(merged), top_k=None, **options)
    found = []
    for row in rows:
        scores = classify([row[kind] if kind == "text" else str(merged.parent / row[kind])])[0]
        best = max(scores, key=lambda one: one["score"])
        scores = {one["label"]: one["score"] for one in scores}
        found.append({"prediction": best["label"], "score": best["score"], "scores": scores})
    return found


def of_several(merged: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [one["scores"] for one in of_classes(merged, rows, function_to_apply="sigmoid")]
    return [{"prediction": [label for label in "abc" if one[label] > 0.5], "scores": one} for one in found]


def of_numbers(merged: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prediction": one["score"]} for one in of_classes(merged, rows, function_to_apply="none")]


def of_words(merged: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    tag = pipeline("token-classification", str(merged), ignore_labels=[])
    found = [tag(" ".join(row["tokens"])) for row in rows]
    return [
        {"prediction": [word["entity"] for word in one], "scores": [word["score"] for word in one]} for one in found
    ]


def of_answers(merged: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best of all pairs of places in the context, among all pairs of the whole input. Words are tokens here."""
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    found = []
    for row in rows:
        with torch.no_grad():
            outputs = model(**tokenizer(row["question"], row["context"], return_tensors="pt"))
        pairs = outputs.start_logits[0].softmax(-1)[:, None] * outputs.end_logits[0].softmax(-1)[None, :]
        first, words = len(row["question"].split()) + 2, row["context"].split()
        score, start, end = max(
            (pairs[first + i, first + j].item(), i, j) for i in range(len(words)) for j in range(i, len(words))
        )
        place = len(" ".join([*words[:start], ""])) if start else 0
        found.append({"prediction": " ".join(words[start : end + 1]), "score": score, "answer_start": place})
    return found


def of_masks(merged: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fill = pipeline("fill-mask", str(merged), top_k=1)
    found = []
    for row in rows:
        ones = [one[0] for one in fill(row["text"])] if row["text"].count("[MASK]") > 1 else fill(row["text"])
        words, filled = [one["token_str"] for one in ones], row["text"]
        for word in words:
            filled = filled.replace("[MASK]", word, 1)
        found.append({"prediction": filled, "words": words, "scores": [one["score"] for one in ones]})
    return found


def of_continuations(merged: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    write = pipeline("text-generation", str(merged), max_new_tokens=6, do_sample=False, return_full_text=False)
    return [{"prediction": write(row.get("prompt") or row["text"])[0]["generated_text"]} for row in rows]


def of_chats(merged: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    write = pipeline("text-generation", str(merged), max_new_tokens=6, do_sample=False)
    return [{"prediction": write(row["messages"][:1])[0]["generated_text"][-1]["content"]} for row in rows]


def of_targets(merged: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    found = []
    for row in rows:
        inputs = tokenizer(row["source"], return_tensors="pt").to(model.device)
        tokens = model.generate(inputs["input_ids"], max_new_tokens=6, do_sample=False)
        found.append({"prediction": tokenizer.decode(tokens[0], skip_special_tokens=True)})
    return found


def save_tiny_reader(path: Path) -> None:
    from tokenizers import processors
    from transformers import BertConfig, BertForQuestionAnswering

    tokenizer = tiny_tokenizer([*WORDS, "what", "is", "?", "the"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForQuestionAnswering(
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    ).save_pretrained(path)


@dataclasses.dataclass
class Case:
    """A task: a tiny model, rows to train on, rows to predict, and what Transformers alone makes of these."""

    save: Callable[[Path], None]
    train: list[dict[str, Any]]
    ask: list[dict[str, Any]]
    expected: Callable[[Path, list[dict[str, Any]]], list[dict[str, Any]]]


REVIEWS = review_rows(40)
ASKED = [{"text": text} for text in TEXTS]
ANSWERED = [{"question": "what is ?", "context": text, "answers": text.split()[0]} for text, _ in REVIEWS]
CASES = {
    "sequence_classification": Case(
        save_tiny_bert, [{"text": text, "label": label} for text, label in REVIEWS], ASKED, of_classes
    ),
    "multilabel_classification": Case(
        save_tiny_bert,
        [{"text": text, "label": [["a"], ["b", "c"], []][i % 3]} for i, (text, _) in enumerate(REVIEWS)],
        ASKED,
        of_several,
    ),
    "regression": Case(
        save_tiny_bert, [{"text": text, "label": len(text) / 10} for text, _ in REVIEWS], ASKED, of_numbers
    ),
    "token_classification": Case(
        save_tiny_bert,
        [
            {"tokens": text.split(), "ner_tags": ["B-X" if word == "good" else "O" for word in text.split()]}
            for text, _ in REVIEWS
        ],
        [{"tokens": text.split()} for text in TEXTS],
        of_words,
    ),
    "question_answering": Case(
        save_tiny_reader,
        ANSWERED,
        [{"question": "what is ?", "context": text} for text in TEXTS],
        of_answers,
    ),
    "image_classification": Case(
        save_tiny_vit,
        [{"image": f"{i}.png", "label": ["up", "down"][i % 2]} for i in range(24)],
        [{"image": f"{i}.png"} for i in (2, 0, 1)],
        lambda merged, rows: of_classes(merged, rows, "image"),
    ),
    "seq2seq": Case(
        save_tiny_t5,
        [{"source": text, "target": text.split()[0]} for text, _ in REVIEWS],
        [{"source": text} for text in TEXTS],
        of_targets,
    ),
    "masked_lm": Case(
        save_tiny_masked,
        [{"text": text} for text, _ in REVIEWS],
        [{"text": "good [MASK] film"}, {"text": "[MASK]"}, {"text": "very [MASK] not [MASK]"}],
        of_masks,
    ),
    "causal_lm": Case(
        save_tiny_llama,
        [{"prompt": text, "completion": " good"} for text, _ in REVIEWS],
        [{"prompt": text} for text in PROMPTS],
        of_continuations,
    ),
    "causal_lm-text": Case(
        save_tiny_llama, [{"text": text} for text, _ in REVIEWS], [{"text": text} for text in PROMPTS], of_continuations
    ),
    "causal_lm-chat": Case(
        lambda path: save_tiny_llama(path, chat_template=CHAT),
        [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "good"}]}
            for text, _ in REVIEWS
        ],
        [{"messages": [{"role": "user", "content": PROMPTS[0]}]}]
        + [  # an answer that is there already is not shown to the model
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "dull"}]}
            for text in PROMPTS[1:]
        ],
        of_chats,
    ),
    "preference": Case(
        save_tiny_llama,
        [{"prompt": text, "chosen": " good", "rejected": " bad"} for text, _ in REVIEWS],
        [{"prompt": text} for text in PROMPTS],
        of_continuations,
    ),
}


def tuned(place: Path, name: str, *words: object) -> Path:
    """A run of a few large steps, so that the model is another than its base."""
    case = CASES[name]
    torch.manual_seed(0)
    case.save(place / "model")
    train = write_rows(place / "train.jsonl", case.train)
    kind = name.partition("-")[0]
    steps: tuple[object, ...] = ("--max_steps", 3, "--learning_rate", 3e-3, "--per_device_train_batch_size", 8)
    if "max_new_tokens" in TASKS[kind].fields:
        steps += ("--max_new_tokens", 6)
    task = ("--task", kind, "--model_name_or_path", place / "model", "--train_file", train)
    answer = reltune("run", *task, *steps, "--output_dir", place / "run", *(words or ("--method", "full")))
    assert answer.code == 0, answer.err
    return place / "run"


def predicted(run: Path, file: Path, *words: object) -> list[dict[str, Any]]:
    answer = reltune("predict", run, "--input_file", file, "--output_file", "-", *words)
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.out.splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_every_task_says_what_transformers_alone_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    run = tuned(tmp_path, name)
    assert reltune("export", run, "--to", "merged", "--output_dir", tmp_path / "merged").code == 0
    file = write_rows(tmp_path / "ask.jsonl", case.ask)
    found = predicted(run, file, "--per_device_eval_batch_size", 2)
    for row, record, expected in zip(case.ask, found, case.expected(tmp_path / "merged", case.ask), strict=True):
        assert {key: record.pop(key) for key in row} == row
        assert list(record) == list(expected)
        for key, value in expected.items():
            if isinstance(value, str | int) or (isinstance(value, list) and value and isinstance(value[0], str)):
                assert record[key] == value, key
            else:
                assert record[key] == pytest.approx(value, abs=1e-5), key
    assert predicted(tmp_path / "merged", file) == predicted(run, file)


# -- one run, kept in every way -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    tuned(place, "sequence_classification", "--granularity", "column", "--budget", "30%")
    write_rows(place / "ask.jsonl", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    return place


def test_a_run_its_adapter_and_its_exports_say_the_same(place: Path, tmp_path: Path) -> None:
    found = predicted(place / "run", place / "ask.jsonl")
    assert [record["id"] for record in found] == [0, 1, 2, 3]
    assert predicted(place / "run" / "adapter", place / "ask.jsonl") == found
    for form in ("lora", "merged"):
        assert reltune("export", place / "run", "--to", form, "--output_dir", tmp_path / form).code == 0
        for record, expected in zip(predicted(tmp_path / form, place / "ask.jsonl"), found, strict=True):
            assert record["prediction"] == expected["prediction"]
            assert record["scores"] == pytest.approx(expected["scores"], abs=1e-5)


def test_predictions_are_those_that_evaluation_counts(place: Path, tmp_path: Path) -> None:
    """Accuracy on the test rows that the run has kept, by hand."""
    kept = (place / "run" / "held_out" / "test.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line)["values"] for line in kept.splitlines()]
    found = predicted(place / "run", write_rows(tmp_path / "test.jsonl", rows))
    right = sum(record["prediction"] == row["label"] for record, row in zip(found, rows, strict=True))
    assert right / len(rows) == json.loads((place / "run" / "all_results.json").read_text())["test_accuracy"]


def test_tables_in_and_out(place: Path, tmp_path: Path) -> None:
    (tmp_path / "ask.csv").write_text('text,note\n"good, film",1\n"bad ""book""",\n', encoding="utf-8")
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        answer = reltune(
            "predict", place / "run", "--input_file", tmp_path / "ask.csv", "--output_file", tmp_path / f"out.{suffix}"
        )
        assert answer.code == 0 and answer.out == f"Predicted 2 rows: {tmp_path / f'out.{suffix}'}\n", answer
        with (tmp_path / f"out.{suffix}").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter=delimiter))
        assert list(rows[0]) == ["text", "note", "prediction", "score", "scores.neg", "scores.pos"]
        assert [(row["text"], row["note"]) for row in rows] == [("good, film", "1"), ('bad "book"', "")]
        assert float(rows[0]["scores.neg"]) + float(rows[0]["scores.pos"]) == pytest.approx(1, abs=1e-5)
    (tmp_path / "ask.json").write_text(json.dumps([{"text": "good"}, {"text": "bad"}]))
    assert [record["text"] for record in predicted(place / "run", tmp_path / "ask.json")] == ["good", "bad"]


def test_rows_are_read_and_written_in_parts(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than one part has, so that order is kept within and between parts; and never more than a part at a time."""
    from reltune.tasks.sequence_classification import SequenceClassification

    rows = [{"id": i, "text": " ".join(["film"] * (1 + i * 7 % 11))} for i in range(100)]
    sizes = []
    predict = SequenceClassification.predict
    monkeypatch.setattr(
        SequenceClassification,
        "predict",
        lambda self, model, some, *rest: (sizes.append(len(some)), predict(self, model, some, *rest))[1],
    )
    found = predicted(place / "run", write_rows(tmp_path / "many.jsonl", rows), "--per_device_eval_batch_size", 4)
    assert [{"id": one["id"], "text": one["text"]} for one in found] == rows
    assert sizes == [32, 32, 32, 4]
    scores = {one["text"]: one["score"] for one in found}  # texts of one length say the same, whatever their batch
    assert all(one["score"] == pytest.approx(scores[one["text"]], abs=1e-5) for one in found)


def test_bad_rows_are_named_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "ask.jsonl"
    file.write_text('{"text": "good"}\n{"text": ""}\nnonsense\n{"text": "bad"}\n')
    before = contents(tmp_path)
    words = ("predict", place / "run", "--input_file", file, "--output_file", tmp_path / "out.csv")
    answer = reltune(*words)
    assert answer.code == 2 and "an empty 'text' on line 2" in answer.err and contents(tmp_path) == before, answer
    answer = reltune(*words, "--on_bad_rows", "skip")
    assert answer.code == 0 and "2 bad rows are left out" in answer.err and "no valid JSON" in answer.err, answer
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 3


def test_a_prediction_that_fails_leaves_no_file(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reltune.tasks.sequence_classification import SequenceClassification

    (tmp_path / "out.csv").write_text("before")

    def fails(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(SequenceClassification, "read_off", fails)
    words = ("predict", place / "run", "--input_file", place / "ask.jsonl", "--output_file", tmp_path / "out.csv")
    assert reltune(*words).code == 1
    assert contents(tmp_path).keys() == {"out.csv"} and (tmp_path / "out.csv").read_text() == "before"


def test_what_cannot_be_predicted_is_refused(place: Path, tmp_path: Path) -> None:
    run, ask = place / "run", place / "ask.jsonl"
    (tmp_path / "taken.csv").write_text("text,prediction\ngood,1\n")
    (tmp_path / "other.csv").write_text("txt,n\ngood,1\n")
    shutil.copytree(run, tmp_path / "untuned", ignore=shutil.ignore_patterns("adapter"))

    def refused(*words: object, named: str) -> None:
        answer: Answer = reltune("predict", *words)
        assert_refused(Answer(answer.code, answer.out, answer.err[answer.err.index("reltune: error") :]), named)

    before = contents(tmp_path)
    out = ("--output_file", tmp_path / "new.csv")
    refused(tmp_path, "--input_file", ask, *out, named="holds neither a run")
    refused(place / "model", "--input_file", ask, *out, named="no task.json")
    refused(tmp_path / "untuned", "--input_file", ask, *out, named="holds no adapter")
    refused(run, "--input_file", tmp_path / "absent.csv", *out, named="absent.csv does not exist")
    refused(run, "--input_file", ask, "--output_file", tmp_path / "new.xlsx", named="'.xlsx'")
    refused(run, "--input_file", ask, "--output_file", ask, named="is the input file")
    trained_on = RunConfig.load(run / "config.yaml").train_file
    refused(run, "--input_file", ask, "--output_file", trained_on, named="is the run's train_file")
    refused(run, "--input_file", ask, "--output_file", tmp_path / "absent" / "new.csv", named="does not exist")
    refused(run, "--input_file", ask, *out, "--on_bad_rows", "ignore", named="'ignore'")
    refused(run, "--input_file", tmp_path / "taken.csv", *out, named="a column 'prediction'")
    refused(run, "--input_file", tmp_path / "other.csv", *out, named="no column 'text'")
    assert contents(tmp_path) == before


def test_words_in_rows_of_their_own_are_refused(tmp_path: Path) -> None:
    """They would be tagged one by one, without the words around them."""
    from reltune.runs.prediction import read_questions
    from reltune.tasks.token_classification import TokenClassification

    file = tmp_path / "words.csv"
    file.write_text("sentence_id,word,tag\n1,good,O\n1,film,O\n2,bad,O\n")
    task = TokenClassification(labels=["O", "B-X"], columns={"tokens": "word", "tags": "tag"})
    with pytest.raises(InputError, match="one word in each row"):
        read_questions(task, str(file), "utf-8")
    file.write_text("word\ngood film\nbad\n")
    assert [row.values["word"] for row in read_questions(task, str(file), "utf-8")] == ["good film", "bad"]
