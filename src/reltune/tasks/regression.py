"""Regression: one number per text, squared error; Pearson's and Spearman's correlation and the mean squared error."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.notes import note
from reltune.pretrained import load_model
from reltune.tasks.classes import ANEW, has_head
from reltune.tasks.prediction import Outputs, rounded
from reltune.tasks.task import Columns, Examples, Task
from reltune.tasks.texts import TextTask, encode_texts, number_of

FAR_APART = 10.0  # a standard deviation of labels that squared error is slow to learn


@dataclass
class Regression(TextTask):
    """The task of giving each text a number. Numbers are learned as they are: scale large ones before."""

    columns: Columns = field(default_factory=lambda: {"text": "text", "label": "label"})

    name: ClassVar[str] = "regression"
    loss: ClassVar[str] = "regression"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman", "mse")
    peft_task_type: ClassVar[str] = "SEQ_CLS"
    predicts: ClassVar[tuple[str, ...]] = ("prediction",)

    def problem(self, row: Row) -> str | None:
        column = self.columns["label"]
        value = row.values.get(column)
        if problem := self.text_problem(row):
            return problem
        if value is None or (isinstance(value, str) and not value.strip()):
            return f"an empty {column!r}"
        return None if number_of(value) is not None else f"a {column!r} that is no number"

    def fitted(self, rows: Iterable[Row]) -> Regression:
        column = self.columns["label"]
        numbers = np.array([number_of(row.values[column]) for row in rows], np.float64)
        if np.ptp(numbers) == 0:
            raise InputError(f"All training rows have the label {numbers[0]:g} in {column!r}; check the label column.")
        if numbers.std() > FAR_APART:
            note(
                f"The labels in {column!r} lie between {numbers.min():g} and {numbers.max():g} and are learned as they are; divide numbers "
                "this far apart before, so that they lie between about 0 and 1."
            )
        return self

    def suited_to(self, config: PreTrainedConfig) -> Task:
        if has_head(config, AutoModelForSequenceClassification) and not is_one_number(config):
            note(f"The model's own head is for classes and not for one number; {ANEW}.")
        return self

    def adapt(self, config: Any) -> bool:
        """One output, trained by squared error."""
        same = is_one_number(config)
        config.num_labels = 1
        config.problem_type = "regression"
        return same

    def load_model(
        self, model_name_or_path: str | os.PathLike, dtype: torch.dtype | str | None = None, **options: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        return load_model(
            os.fspath(model_name_or_path),
            AutoModelForSequenceClassification,
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
            "sequence classification head",
            self.adapt,
            dtype,
            lambda: self.load_tokenizer(model_name_or_path).pad_token_id,
            **options,
        )

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        encoded = encode_texts(rows, [self.texts(row) for row in rows], processor, max_length)
        for item, row in zip(encoded.items, encoded.rows, strict=True):
            item["labels"] = number_of(row.values[self.columns["label"]])
        return Examples(encoded.items, encoded.n_truncated, lost=encoded.lost)

    def wanted(self, item: Mapping[str, Any], processor: Any) -> str:
        return f"number {item['labels']:g}"

    def told_of(self, item: Mapping[str, Any]) -> float:
        return float(item["labels"])

    def untold(self, row: Row) -> Row:
        return replace(row, values={**row.values, self.columns["label"]: 0})

    def read_off(
        self, outputs: Sequence[Outputs], rows: Sequence[Row], examples: Examples, processor: Any
    ) -> list[dict[str, Any]]:
        """The number, in the unit of the labels of training."""
        return [{self.predicts[0]: rounded(output["logits"])} for output in outputs]

    def compute_metrics(
        self, prediction: EvalPrediction, examples: Examples | None = None, processor: Any = None
    ) -> dict[str, float]:
        """Correlations are 0 where they are not defined, because all predictions (or all labels) are the same."""
        from scipy.stats import pearsonr, spearmanr  # scikit-learn brings it

        predicted = np.asarray(prediction.predictions, np.float64).reshape(-1)
        labels = np.asarray(prediction.label_ids, np.float64).reshape(-1)
        defined = len(labels) > 1 and np.ptp(predicted) > 0 and np.ptp(labels) > 0
        return {
            "pearson": float(pearsonr(predicted, labels).statistic) if defined else 0.0,
            "spearman": float(spearmanr(predicted, labels).statistic) if defined else 0.0,
            "mse": float(np.square(predicted - labels).mean()),
        }


def is_one_number(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint's head has one output that was trained by squared error."""
    return config.num_labels == 1 and getattr(config, "problem_type", None) in (None, "regression")
