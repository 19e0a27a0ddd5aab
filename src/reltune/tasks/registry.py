"""All tasks by name."""

from __future__ import annotations

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
