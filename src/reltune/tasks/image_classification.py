"""Image classification: one label per image, cross entropy; accuracy, macro F1 and Matthews' coefficient.

Images stay as they are stored and are decoded batch by batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainingArguments,
)

from reltune.data.images import image_needed, image_problem
from reltune.data.rows import Row, label_problem
from reltune.errors import InputError, first_line
from reltune.pretrained import load_config
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Columns, Examples, Written


@dataclass
class ImageClassification(SequenceClassification):
    """The task of giving each image one of ``labels``."""

    columns: Columns = field(default_factory=lambda: {"image": "image", "label": "label"})

    name: ClassVar[str] = "image_classification"
    peft_task_type: ClassVar[str | None] = None
    unit: ClassVar[str] = "image"
    auto_class: ClassVar[Any] = AutoModelForImageClassification
    mapping: ClassVar[Any] = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    head: ClassVar[str] = "image classification head"
    learning_rates: ClassVar[dict[str, float]] = {"weights": 2.5e-4}  # docs/selection.md, "Image"
    reads_last_token: ClassVar[bool] = False
    padding_sides: ClassVar[tuple[str, ...]] = ()

    def written(self, *_: Any) -> list[Written]:
        """Nothing: an image is no text."""
        return []

    def problem(self, row: Row) -> str | None:
        return image_problem(row.values, self.columns["image"]) or label_problem(row.values, self.columns["label"])

    def content(self, row: Row) -> str:
        """The image's path, or what its file holds."""
        image = row.values[self.columns["image"]]
        data = image.get("bytes") if isinstance(image, Mapping) else None
        if data is not None:
            return hashlib.sha256(data).hexdigest()
        return str(image["path"] if isinstance(image, Mapping) else image)

    def load_tokenizer(self, model_name_or_path: str | os.PathLike) -> Any:
        """The model's image processor, which resizes and normalises."""
        name = os.fspath(model_name_or_path)
        load_config(name)
        try:
            return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # a file that is missing or damaged, a package that is
            raise InputError(
                f"{name} has no usable image processor ({first_line(error)}). Save it there with "
                "image_processor.save_pretrained, or name a model that comes with one."
            ) from error

    def saved_tokenizer(self, model_name_or_path: str | os.PathLike) -> Any:
        return self.load_tokenizer(model_name_or_path)

    def encode(self, rows: Sequence[Row], processor: Any, max_length: int) -> Examples:
        """The images as they are stored, and their classes."""
        index = {label: position for position, label in enumerate(self.labels)}
        return Examples(_Stored(rows, self.columns["image"], [index[self.label(row)] for row in rows]))

    def collator(self, processor: Any) -> Callable[[list[Any]], dict[str, Any]]:  # type: ignore[override]
        """Decodes the images of a batch and makes them ``pixel_values`` (B, channels, height, width)."""

        def collate(items: list[Any]) -> dict[str, Any]:
            pixels = processor(images=[image_needed(item["image"]) for item in items], return_tensors="pt")
            return {**pixels, "labels": torch.tensor([item["labels"] for item in items])}

        return collate

    def make_arguments(self, **values: Any) -> TrainingArguments:
        return TrainingArguments(remove_unused_columns=False, **values)  # the collator uses them


class _Stored(Sequence[dict[str, Any]]):
    """Rows as examples, read when they are asked for."""

    def __init__(self, rows: Sequence[Row], column: str, labels: Sequence[int]) -> None:
        self.rows, self.column, self.labels = rows, column, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return {"image": self.rows[index].values[self.column], "labels": self.labels[index]}
