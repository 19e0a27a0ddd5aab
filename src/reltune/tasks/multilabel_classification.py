"""Multi-label classification: any number of labels per text, a sigmoid for each; micro and macro F1, subset accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from reltune.data.rows import Row, label_of
from reltune.errors import InputError
from reltune.notes import note
from reltune.tasks.classes import ClassTask
from reltune.tasks.prediction import Outputs, by_label
from reltune.tasks.sequence_classification import label_order
from reltune.tasks.task import Columns, Examples
from reltune.tasks.texts import TextTask, encode_texts

SEPARATOR = "|"  # between labels where a column holds text: CSV has no lists


@dataclass
class MultilabelClassification(ClassTask, TextTask):
    """The task of giving each text those of ``labels`` that fit, which may be none."""

    columns: Columns = field(default_factory=lambda: {"text": "text", "label": "label"})

    name: ClassVar[str] = "multilabel_classification"
    loss: ClassVar[str] = "multilabel_classification"
    metrics: ClassVar[tuple[str, ...]] = ("f1_micro", "f1_macro", "subset_accuracy")
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    problem_type: ClassVar[str | None] = "multi_label_classification"
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    mapping: ClassVar[Any] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    head: ClassVar[str] = "sequence classification head"
    reads_last_token: ClassVar[bool] = True
    predicts: ClassVar[tuple[str, ...]] = ("prediction", "scores")

    def problem(self, row: Row) -> str | None:
        column = self.columns["label"]
        value = row.values.get(column)
        if problem := self.text_problem(row):
            return problem
        if value is None:
            return f"an empty {column!r}"
        if isinstance(value, str):
            return None
        if not isinstance(value, list) or not all(isinstance(one, str | int) for one in value):
            return f"a {column!r} that is no list of strings or integers"
        return None if all(label_of(one) for one in value) else f"an empty label in {column!r}"

    def labels_of(self, row: Row) -> list[str]:
        """The row's labels; those of a text are separated by ``|``."""
        value = row.values[self.columns["label"]]
        labels = value.split(SEPARATOR) if isinstance(value, str) else value
        return [label_of(one) for one in labels if label_of(one)]

    def fitted(self, rows: Iterable[Row]) -> MultilabelClassification:
        """The task with its labels and those that occur in ``rows``: numbers by value, then words by character."""
        occurring = {label for row in rows for label in self.labels_of(row)}
        if not occurring:
            raise InputError("No training row has a label; check the label column.")
        if never := [label for label in self.labels if label not in occurring]:
            note(
                f"No row of training has the {'label' if len(never) == 1 else 'labels'} {', '.join(map(repr, never))}."
            )
        return replace(self, labels=sorted({*self.labels, *occurring}, key=label_order))

    def misfit(self, row: Row) -> str | None:
        unknown = next((label for label in self.labels_of(row) if label not in self.labels), None)
        return None if unknown is None else self.unknown(unknown)

    def describe(self) -> str:
        return f"{len(self.labels)} labels"

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        """Token ids of each text, and 1.0 for each label that it has, 0.0 for the others."""
        encoded = encode_texts(rows, [self.texts(row) for row in rows], processor, max_length)
        for item, row in zip(encoded.items, encoded.rows, strict=True):
            own = set(self.labels_of(row))
            item["labels"] = [float(label in own) for label in self.labels]
        return Examples(encoded.items, encoded.n_truncated, lost=encoded.lost)

    def told_of(self, item: Mapping[str, Any]) -> list[str]:
        return [label for label, has in zip(self.labels, item["labels"], strict=True) if has]

    def wanted(self, item: Mapping[str, Any], processor: Any) -> str:
        own = self.told_of(item)
        return f"labels {', '.join(own)}" if own else "no label"

    def untold(self, row: Row) -> Row:
        return replace(row, values={**row.values, self.columns["label"]: []})

    def read_off(
        self, outputs: Sequence[Outputs], rows: Sequence[Row], examples: Examples, processor: Any
    ) -> list[dict[str, Any]]:
        """The labels whose probability is above 1/2, and the probability of each label."""
        records = []
        for output in outputs:
            fit = [label for label, logit in zip(self.labels, output["logits"].tolist(), strict=True) if logit > 0]
            scores = by_label(self.labels, output["logits"].sigmoid())
            records.append(dict(zip(self.predicts, (fit, scores), strict=True)))
        return records

    def compute_metrics(
        self, prediction: EvalPrediction, examples: Examples | None = None, processor: Any = None
    ) -> dict[str, float]:
        """A label is predicted where its probability is above 1/2. Subset accuracy: the share of texts with all labels right."""
        logits: Any = prediction.predictions
        labels: Any = prediction.label_ids
        predicted, labels = logits > 0, labels > 0.5
        # scikit-learn takes one column for two classes, whose mean would count its absence as a label too
        one = labels.shape[1] == 1
        return {
            "f1_micro": float(f1_score(labels, predicted, average="binary" if one else "micro", zero_division=0)),
            "f1_macro": float(f1_score(labels, predicted, average="binary" if one else "macro", zero_division=0)),
            "subset_accuracy": float(accuracy_score(labels, predicted)),
        }
