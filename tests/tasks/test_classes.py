"""Whose classes a checkpoint's head has: its order is kept where they are the data's, else a new head is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPConfig,
    CLIPForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from reltune.notes import collecting
from reltune.tasks.classes import in_checkpoint_order
from reltune.tasks.image_classification import ImageClassification
from reltune.tasks.multilabel_classification import MultilabelClassification
from reltune.tasks.registry import TASKS, task_of_record
from reltune.tasks.regression import Regression
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Task
from reltune.tasks.token_classification import TokenClassification
from tiny_models import tiny_tokenizer

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {"vocab_size": 20, "max_position_embeddings": 16, **SMALL}


@pytest.mark.parametrize(
    ("labels", "theirs", "order"),
    [
        (["neg", "pos"], ["pos", "neg"], ["pos", "neg"]),
        (["neg", "neutral", "pos"], ["Positive", "Neutral", "Negative"], None),
        (["negative", "neutral", "positive"], ["POSITIVE", "Negative", "NEUTRAL"], ["positive", "negative", "neutral"]),
        (["entailment", "not_entailment"], ["not entailment", "Entailment"], ["not_entailment", "entailment"]),
        (["0", "1", "10", "2"], [f"LABEL_{i}" for i in range(4)], None),
        (["0", "1"], ["LABEL_0", "LABEL_1"], ["0", "1"]),
        (["1", "2"], ["LABEL_0", "LABEL_1"], None),
        (["neg", "pos"], ["LABEL_0", "LABEL_1"], None),
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], ["LABEL_1", "LABEL_0"]),
        (["0", "1"], ["1", "0"], ["1", "0"]),
        (["0", "1"], ["neg", "pos"], None),
        (["a", "b"], ["a", "b", "c"], None),
        (["a", "b", "c"], ["a", "b"], None),
        (["a", "A"], ["A", "a"], ["A", "a"]),  # to the letter
        (["a", "A"], ["a", "B"], None),
        (["a", "A"], ["a", "a"], None),
        (["a", "b"], ["A", "a"], None),  # which of the two?
        (["好评", "差评"], ["差评", "好评"], ["差评", "好评"]),
    ],
)
def test_the_order_of_classes(labels: list[str], theirs: list[str], order: list[str] | None) -> None:
    assert in_checkpoint_order(labels, theirs) == order


def save(path: Path, model_class: Any, config: Any, names: list[str], problem_type: str | None = None) -> Path:
    torch.manual_seed(0)
    config.num_labels = len(names)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = problem_type
    model_class(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


CHECKPOINTS: dict[str, tuple[Any, Any, type[Task], str | None]] = {
    "sequence": (
        BertForSequenceClassification,
        BertConfig(**BERT),
        SequenceClassification,
        "single_label_classification",
    ),
    "multilabel": (
        BertForSequenceClassification,
        BertConfig(**BERT),
        MultilabelClassification,
        "multi_label_classification",
    ),
    "token": (BertForTokenClassification, BertConfig(**BERT), TokenClassification, None),
    "image": (ViTForImageClassification, ViTConfig(image_size=8, patch_size=4, **SMALL), ImageClassification, None),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_head_for_the_same_classes_is_kept_with_its_order(kind: str, tmp_path: Path) -> None:
    model_class, config, task_class, problem_type = CHECKPOINTS[kind]
    path = save(tmp_path, model_class, config, ["POS", "neg", "so-so"], problem_type)
    with collecting() as notes:
        task: Any = task_class(labels=["neg", "pos", "so so"], columns={}).suited_to(AutoConfig.from_pretrained(path))
    assert task.labels == ["pos", "neg", "so so"]
    assert len(notes) == 1 and "is kept" in notes[0] and "pos, neg, so so" in notes[0]
    again = task_of_record(task.record())
    for one in (task, again):
        model, missing = one.load_model(path)
        assert missing == []
        assert torch.equal(model.classifier.weight, load_file(path / "model.safetensors")["classifier.weight"])
        assert model.config.id2label == {0: "pos", 1: "neg", 2: "so so"}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_head_for_other_classes_is_made_anew(kind: str, tmp_path: Path) -> None:
    """Not only listed as new: its rows must not start as somebody else's classes."""
    model_class, config, task_class, problem_type = CHECKPOINTS[kind]
    path = save(tmp_path, model_class, config, ["cat", "dog"], problem_type)
    with collecting() as notes:
        task: Any = task_class(labels=["neg", "pos"], columns={}).suited_to(AutoConfig.from_pretrained(path))
    assert task.labels == ["neg", "pos"]
    assert len(notes) == 1 and "cat, dog" in notes[0] and "neg, pos" in notes[0] and "a new one is made" in notes[0]
    torch.manual_seed(3)
    model, missing = task.load_model(path)
    assert missing == ["classifier.bias", "classifier.weight"]
    assert not torch.equal(model.classifier.weight, load_file(path / "model.safetensors")["classifier.weight"])
    assert model.classifier.weight.std().item() == pytest.approx(config.initializer_range, rel=0.5)
    assert not model.classifier.bias.any()
    torch.manual_seed(3)
    assert torch.equal(task.load_model(path)[0].classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    ("task", "before"),
    [
        (SequenceClassification(["a", "b"]), "multi_label_classification"),
        (MultilabelClassification(["a", "b"]), "single_label_classification"),
        (MultilabelClassification(["a", "b"]), None),
        (Regression(), "single_label_classification"),
    ],
)
def test_a_head_for_another_kind_of_answer_is_made_anew(task: Task, before: str | None, tmp_path: Path) -> None:
    save(tmp_path, BertForSequenceClassification, BertConfig(**BERT), ["a", "b"], before)
    with collecting() as notes:
        suited = task.suited_to(AutoConfig.from_pretrained(tmp_path))
    assert len(notes) == 1 and "a new one is made" in notes[0]
    model, missing = suited.load_model(tmp_path)
    assert missing == ["classifier.bias", "classifier.weight"]
    saved = load_file(tmp_path / "model.safetensors")["classifier.weight"]
    assert not torch.equal(model.get_parameter("classifier.weight")[:1], saved[:1])


def test_no_word_about_checkpoints_without_a_head(tmp_path: Path) -> None:
    save(tmp_path, BertForTokenClassification, BertConfig(**BERT), ["a", "b"])
    with collecting() as notes:
        SequenceClassification(["x", "y"]).suited_to(AutoConfig.from_pretrained(tmp_path))
        SequenceClassification(["x", "y"]).suited_to(BertConfig())
    assert notes == []


def test_a_model_whose_body_has_no_name_of_its_own(tmp_path: Path) -> None:
    sizes = {"image_size": 8, "patch_size": 4, **SMALL}
    config = CLIPConfig(vision_config=sizes, text_config=SMALL)
    path = save(tmp_path, CLIPForImageClassification, config, ["cat", "dog"])
    model, missing = ImageClassification(labels=["neg", "pos"]).load_model(path)
    assert missing == ["classifier.bias", "classifier.weight"]
    assert not torch.equal(model.classifier.weight, load_file(path / "model.safetensors")["classifier.weight"])
    assert ImageClassification(labels=["cat", "dog"]).load_model(path)[1] == []


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_made_again_of_its_record(name: str) -> None:
    kind: Any = TASKS[name]
    task = kind()
    fields = {field: getattr(task, field) for field in kind.fields}
    assert task_of_record(task.record(), **fields, seed=1) == task
    assert not set(task.record()) & set(kind.fields)
