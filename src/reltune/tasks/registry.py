"""All tasks by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from reltune.errors import InputError
from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.image_classification import ImageClassification
from reltune.tasks.masked_lm import MaskedLM
from reltune.tasks.multilabel_classification import MultilabelClassification
from reltune.tasks.preference import Preference
from reltune.tasks.question_answering import QuestionAnswering
from reltune.tasks.regression import Regression
from reltune.tasks.seq2seq import Seq2Seq
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Task
from reltune.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    "sequence_classification": SequenceClassification,
    "multilabel_classification": MultilabelClassification,
    "regression": Regression,
    "token_classification": TokenClassification,
    "question_answering": QuestionAnswering,
    "seq2seq": Seq2Seq,
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "preference": Preference,
    "image_classification": ImageClassification,
}


def task_of_record(record: Mapping[str, Any], **fields: Any) -> Task:
    """The task that ``Task.record`` was written of, with the values of a run's config for its other ``fields``.

    Raises:
        InputError: a record that no task has written, as a phrase.
    """
    kind = TASKS.get(str(record.get("name")))
    if kind is None or not isinstance(record.get("columns"), dict):
        raise InputError("it describes no task that this version of reltune knows")
    known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {"columns"}
    values = {name: value for name, value in record.items() if name in known}
    if not all(isinstance(label, str) for name in ("labels", "head_labels") for label in values.get(name) or []):
        raise InputError("it has labels that are no texts")
    task = kind(**values, **{name: fields[name] for name in kind.fields if name in fields})
    if record.get("padding_side") in kind.padding_sides:
        task.padding_side = record["padding_side"]
    return task
