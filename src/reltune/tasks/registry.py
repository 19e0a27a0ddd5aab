"""All tasks by name."""

from __future__ import annotations

from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.multilabel_classification import MultilabelClassification
from reltune.tasks.regression import Regression
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Task
from reltune.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    "sequence_classification": SequenceClassification,
    "multilabel_classification": MultilabelClassification,
    "regression": Regression,
    "token_classification": TokenClassification,
    "causal_lm": CausalLM,
}
