"""What tasks with classes share: the classes' names and order, and whether a checkpoint's own head is for the same ones.

A checkpoint that is already a classifier has an output for each class, in an order of its own. Its head is kept, and its
order taken over, where its classes are certainly those of the data; elsewhere a new head is made.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from reltune.errors import nearest
from reltune.notes import note
from reltune.pretrained import class_names, load_model, means_the_same
from reltune.tasks.task import Columns, Task

SHOWN = 6  # classes in a sentence
ANEW = "a new one is made and trained"


@dataclass
class ClassTask(Task):
    """A task whose model has one output for each of ``labels``; a label's place in the list is its class index.

    Attributes:
        head_labels: what the checkpoint calls the same classes, in the same order, where its own head is kept and uses other
            names; None where it uses the same names.
        problem_type: Transformers' name for what the outputs mean, or None where there is only one meaning.
        auto_class, mapping, head: as for ``pretrained.load_model``.
        reads_last_token: whether a head on a decoder looks for the last token that is not padding.
    """

    labels: list[str] = field(default_factory=list)
    columns: Columns = field(default_factory=dict)
    head_labels: list[str] | None = None

    problem_type: ClassVar[str | None] = None
    auto_class: ClassVar[Any]
    mapping: ClassVar[Any]
    head: ClassVar[str]
    reads_last_token: ClassVar[bool] = False

    def suited_to(self, config: PreTrainedConfig) -> Task:
        """With the labels in the order of the checkpoint's own head, where it is for the same classes. Notes what becomes of
        the head."""
        if not has_head(config, self.auto_class):
            return self
        if not means_the_same(config, self.problem_type):
            note(f"The model's own {self.head} is for another kind of answer; {ANEW}.")
            return self
        theirs = class_names(config)
        order = in_checkpoint_order(self.labels, theirs)
        if order is None:
            data = _listed(self.labels)
            note(
                f"The model's own {self.head} is for other classes ({_listed(theirs)}) than the data's ({data}); {ANEW}."
            )
            return self
        if order == self.labels == theirs:
            return self
        note(f"The model's own {self.head} is kept, and its order of the classes: {_listed(order)}.")
        return dataclasses.replace(self, labels=order, head_labels=None if order == theirs else theirs)

    def record(self) -> dict[str, Any]:
        return {**super().record(), "num_labels": len(self.labels), "problem_type": self.problem_type}

    def facts(self) -> list[str]:
        classes = ", ".join(f"{index} {label}" for index, label in enumerate(self.labels))
        return [*super().facts(), f"Classes, in the order of the model's outputs: {classes}"]

    def adapt(self, config: Any) -> bool:
        """One output for each label, a label's place in the list being its index. A head was made for the same labels if its own names
        for them are ``head_labels``, in the same order, and if its outputs mean the same kind of answer."""
        same = class_names(config) == (self.head_labels or self.labels) and means_the_same(config, self.problem_type)
        config.num_labels = len(self.labels)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: index for index, label in enumerate(self.labels)}
        config.problem_type = self.problem_type
        return same

    def load_model(
        self, model_name_or_path: str | os.PathLike, dtype: torch.dtype | str | None = None, **options: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        return load_model(
            os.fspath(model_name_or_path),
            self.auto_class,
            self.mapping,
            self.head,
            self.adapt,
            dtype,
            (lambda: self.load_tokenizer(model_name_or_path).pad_token_id) if self.reads_last_token else None,
            **options,
        )

    def unknown(self, label: str, kind: str = "label") -> str:
        """The phrase for a row's label that is none of ``labels``."""
        return f"the {kind} {label!r}, which does not occur in training ({nearest(label, self.labels).rstrip('.')})"


def has_head(config: PreTrainedConfig, auto_class: Any) -> bool:
    """Whether the checkpoint was saved with a head of the kind that this Auto class loads."""
    return any(auto_class.__name__.removeprefix("AutoModel") in name for name in config.architectures or [])


def in_checkpoint_order(labels: Sequence[str], theirs: Sequence[str]) -> list[str] | None:
    """The data's labels in the order of a checkpoint's names for them; None unless both are certainly the same classes.

    Names may differ in case and in whether a space, ``_`` or ``-`` stands between words. ``LABEL_0``, ``LABEL_1``, …, which
    Transformers writes where nobody named the classes, are class numbers: they stand for the labels 0, 1, … alone.
    """
    numbers = [str(index) for index in range(len(theirs))]
    if list(theirs) == [f"LABEL_{number}" for number in numbers] and sorted(labels) == sorted(numbers):
        return numbers
    for same in (str, _plain):
        ours = {same(label): label for label in labels}
        order = [ours.get(same(name)) for name in theirs]
        if len(ours) == len(labels) == len(theirs) == len(set(order)) and None not in order:
            return [label for label in order if label is not None]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:SHOWN]))
    return f"{shown}, … {len(names)} in all" if len(names) > SHOWN else shown
