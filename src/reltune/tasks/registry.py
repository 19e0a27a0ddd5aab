"""All tasks by name."""

from __future__ import annotations

from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "sequence_classification": SequenceClassification,
    "causal_lm": CausalLM,
}
