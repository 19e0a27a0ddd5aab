"""Sequence classification: one label per text, cross entropy; accuracy, macro F1 and Matthews' coefficient."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from reltune.data.rows import Row, label_of, label_problem
from reltune.errors import InputError, nearest
from reltune.tasks.classes import ClassTask
from reltune.tasks.prediction import Outputs, by_label, rounded
from reltune.tasks.task import Columns, Examples
from reltune.tasks.texts import TextTask, encode_texts


@dataclass
class SequenceClassification(ClassTask, TextTask):
    """The task of giving each text one of ``labels``."""

    columns: Columns = field(default_factory=lambda: {"text": "text", "label": "label"})

    name: ClassVar[str] = "sequence_classification"
    loss: ClassVar[str] = "sequence_classification"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1_macro", "matthews")
    peft_task_type: ClassVar[str | None] = "SEQ_CLS"
    problem_type: ClassVar[str | None] = "single_label_classification"
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    mapping: ClassVar[Any] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    head: ClassVar[str] = "sequence classification head"
    learning_rates: ClassVar[dict[str, float]] = {
        "weights": 5e-4
    }  # docs/selection.md, "Learning rates of single weights"
    reads_last_token: ClassVar[bool] = True

    def problem(self, row: Row) -> str | None:
        return self.text_problem(row) or label_problem(row.values, self.columns["label"])

    def label(self, row: Row) -> str:
        return label_of(row.values[self.columns["label"]])

    def answer(self, row: Row) -> str:
        return self.label(row)

    def fitted(self, rows: Iterable[Row]) -> SequenceClassification:
        """The task with the labels that occur in ``rows``: numbers by value, then words by character."""
        labels = sorted({self.label(row) for row in rows}, key=label_order)
        if len(labels) == 1:
            raise InputError(
                f"All training rows have the label {labels[0]!r}; "
                "a classifier needs at least two classes, so check the label column."
            )
        return replace(self, labels=labels)

    def misfit(self, row: Row) -> str | None:
        label = self.label(row)
        return None if label in self.labels else self.unknown(label)

    def describe(self) -> str:
        return f"{len(self.labels)} classes"

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        """Token ids of each text, cut to ``max_length`` tokens or the tokenizer's limit if that is less."""
        encoded = encode_texts(rows, [self.texts(row) for row in rows], processor, max_length)
        index = {label: position for position, label in enumerate(self.labels)}
        for item, row in zip(encoded.items, encoded.rows, strict=True):
            label = self.label(row)
            if label not in index:
                raise InputError(
                    f"The label {label!r} on line {row.line} is none of the task's; {nearest(label, self.labels)}"
                )
            item["labels"] = index[label]
        return Examples(encoded.items, encoded.n_truncated, lost=encoded.lost)

    def wanted(self, item: Mapping[str, Any], processor: Any) -> str:
        return f"class {item['labels']}, {self.labels[item['labels']]}"

    def told_of(self, item: Mapping[str, Any]) -> str:
        return self.labels[item["labels"]]

    def untold(self, row: Row) -> Row:
        return replace(row, values={**row.values, self.columns["label"]: self.labels[0]})

    def read_off(
        self, outputs: Sequence[Outputs], rows: Sequence[Row], examples: Examples, processor: Any
    ) -> list[dict[str, Any]]:
        """The likeliest label, its probability and those of all labels."""
        records = []
        for output in outputs:
            probabilities = torch.softmax(output["logits"], -1)
            best = int(probabilities.argmax())
            scores = by_label(self.labels, probabilities)
            records.append(
                dict(zip(self.predicts, (self.labels[best], rounded(probabilities[best]), scores), strict=True))
            )
        return records

    def compute_metrics(
        self, prediction: EvalPrediction, examples: Examples | None = None, processor: Any = None
    ) -> dict[str, float]:
        """Accuracy, F1 averaged over all classes (one neither present nor predicted counts as 0), and the correlation
        of Matthews (1975)."""
        logits: Any = prediction.predictions
        labels = prediction.label_ids
        predicted = logits.argmax(-1)
        f1 = f1_score(labels, predicted, labels=range(logits.shape[-1]), average="macro", zero_division=0)
        return {
            "accuracy": float(accuracy_score(labels, predicted)),
            "f1_macro": float(f1),
            "matthews": float(matthews_corrcoef(labels, predicted)),
        }


def label_order(label: str) -> tuple[bool, float, str]:
    number = re.fullmatch(r"[+-]?\d+(\.\d+)?", label)
    return number is None, float(label) if number else 0.0, label
