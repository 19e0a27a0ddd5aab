"""What a task is: how rows become examples, which model and Trainer they go to, and how well it does.

One file per task implements this; everything outside ``tasks`` knows this interface only. ``registry.TASKS`` lists them.
"""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from reltune.data.rows import Row
from reltune.losses import Loss
from reltune.notes import collecting
from reltune.pretrained import load_tokenizer, saved_tokenizer
from reltune.tasks.prediction import Outputs, Predictions, check_numbers, check_outputs, not_numbers, outputs_of

Columns = Mapping[str, str]  # role -> the column that plays it


class RowProblem(Exception):
    """What is wrong with a row, as a phrase, where it shows when the row is encoded."""


class Written(NamedTuple):
    """What a model wrote for an example by itself: the prompt to read, the text that should follow, the text that did."""

    prompt: str
    reference: str
    text: str


class Seen(NamedTuple):
    """Tokens of an example that the model has one after another.

    Attributes:
        name: what they are to the model: "input", "target", …
        ids: token ids (T).
        learned: of each token whether the loss is taken of it.
        tags: of each token what it is to be called, or "".
    """

    name: str
    ids: Sequence[int]
    learned: Sequence[bool]
    tags: Sequence[str] = ()


class Examples(Dataset):
    """Encoded rows: what the collator takes of each, and how many were cut to the model's length.

    ``sources`` holds, in the same order, what metrics need beyond the model's inputs (an example's reference, say), and
    ``lost`` the lines of rows that turned out to be no examples, by a phrase that says why.
    """

    def __init__(
        self,
        items: Sequence[dict[str, Any]],
        n_truncated: int = 0,
        sources: Sequence[Any] | None = None,
        lost: Mapping[str, list[int]] | None = None,
    ) -> None:
        self.items = items
        self.n_truncated = n_truncated
        self.sources = sources
        self.lost = lost or {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class Task(abc.ABC):
    """One task on one data set. It is made for the columns of the data, then ``fitted`` to the training rows.

    Attributes:
        columns: role -> column, of the layouts in ``columns.py``.
        name: key of ``registry.TASKS``.
        loss: key of ``losses.LOSSES``: the loss per example that relevance is measured by.
        metrics: names of what ``compute_metrics`` and ``written_metrics`` give, the main one first; keys of ``metrics.METRICS``.
        peft_task_type: a value of ``peft.TaskType``, or None.
        unit: what one example is called.
        trainer_class: the Trainer that evaluates, and that trains where ``trainer`` is not another one.
        defaults: this task's defaults for its arguments.
        learning_rates: method -> rate, where those of ``training.LEARNING_RATES`` do not suit (docs/learning_rates.md).
        fields: fields of ``RunConfig`` that the task has too.
        padding_sides: where its collator may pad, the preferred side first; none where nothing is padded.
        padding_side: where it pads, as ``fit.settle_padding`` found.
        draws_tokens: whether training draws tokens from the whole vocabulary.
        told: roles of the columns that training has and that a prediction is made without: the label, say.
        predicts: names of what a prediction consists of, the answer itself first.
    """

    name: ClassVar[str]
    loss: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    peft_task_type: ClassVar[str | None]
    unit: ClassVar[str] = "text"
    trainer_class: ClassVar[type[Trainer]] = Trainer
    defaults: ClassVar[Mapping[str, Any]] = {}
    learning_rates: ClassVar[Mapping[str, float]] = {}
    fields: ClassVar[tuple[str, ...]] = ()
    padding_sides: ClassVar[tuple[str, ...]] = ("right", "left")
    draws_tokens: ClassVar[bool] = False
    told: ClassVar[tuple[str, ...]] = ("label",)
    predicts: ClassVar[tuple[str, ...]] = ("prediction", "score", "scores")

    columns: Columns
    padding_side = "right"

    def __init__(self, columns: Columns, **fields: Any) -> None:
        """For the columns of rows, with the values of ``fields``; dataclasses have one of their own."""
        self.columns = columns

    @property
    def best(self) -> str:
        """The metric of an evaluation during training by which checkpoints are compared."""
        return self.metrics[0]

    @property
    def training_metrics(self) -> tuple[str, ...]:
        """What an evaluation during training measures."""
        return ("loss", *self.metrics)

    @property
    def relevance_loss(self) -> str | Loss:
        """The loss per example with the task's own settings, where it has any."""
        return self.loss

    # -- rows --

    @abc.abstractmethod
    def problem(self, row: Row) -> str | None:
        """What is wrong with a row, as a phrase ("an empty 'text'"), or None."""

    @abc.abstractmethod
    def content(self, row: Row) -> str:
        """What makes two rows copies of each other, which must not be in different splits."""

    def label(self, row: Row) -> str:
        """The row's class, of which splits keep the proportions; the same for all where there are no classes."""
        return ""

    def answer(self, row: Row) -> str:
        """What training has of a row and a prediction is made without."""
        return " ".join(str(row.values.get(self.columns[role])) for role in self.told if role in self.columns)

    def labels_of(self, row: Row) -> list[str]:
        """All labels of a row, which training must have too for the row to be measured."""
        return [self.label(row)]

    def fitted(self, rows: Iterable[Row]) -> Task:
        """The task that training rows without a problem make: with their labels, say.

        Raises InputError for rows that nothing can be learned from.
        """
        return self

    def misfit(self, row: Row) -> str | None:
        """What keeps a held-out row from this task, as a phrase: a label that training does not have, say; or None."""
        return None

    def suited_to(self, config: PreTrainedConfig) -> Task:
        """The task for a new run on the checkpoint with this config: with its classes in the order of the checkpoint's own head,
        say. A run that exists keeps the task that it was made with."""
        return self

    def record(self) -> dict[str, Any]:
        """What the task learned from its training rows and its checkpoint, for ``task.json``: all of its fields that a run's
        config does not have. ``registry.task_of_record`` makes the task again."""
        names = [field.name for field in dataclasses.fields(self)] if dataclasses.is_dataclass(self) else ["columns"]
        values = {name: getattr(self, name) for name in names if name not in self.fields}
        padding = {"padding_side": self.padding_side} if self.padding_sides else {}
        return {"name": self.name, **values, "columns": dict(self.columns), **padding}

    def facts(self) -> list[str]:
        """Lines for a reader of the adapter: what it is for, and what the model's outputs mean."""
        return [f"Task: {self.name}"]

    def describe(self) -> str:
        """What sets this task apart from others of its name ("3 classes"), or nothing."""
        return ""

    # -- model, examples, metrics --

    def adapt(self, config: Any) -> bool:
        """Set the fields of a checkpoint's config for the task's head, and say whether the checkpoint's own one was made for the same."""
        return True

    @abc.abstractmethod
    def load_model(
        self, model_name_or_path: str | os.PathLike, dtype: torch.dtype | str | None = None, **options: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        """The model with the task's head, and the sorted names of the parameters that must be learned.

        ``dtype`` None keeps the checkpoint's own; ``options`` go to ``from_pretrained``. New parameters come from torch's
        global generator: seed it first.
        """

    @abc.abstractmethod
    def encode(self, rows: Sequence[Row], processor: Any, max_length: int) -> Examples:
        """The model's inputs and labels of each row, cut to ``max_length`` tokens or the model's limit if that is less."""

    @abc.abstractmethod
    def collator(self, processor: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """What makes a batch of examples."""

    @abc.abstractmethod
    def compute_metrics(self, prediction: EvalPrediction, examples: Examples, processor: Any) -> dict[str, float]:
        """The metrics of predictions on the examples, in their order."""

    def _checked_metrics(self, prediction: EvalPrediction, examples: Examples, processor: Any) -> dict[str, float]:
        """Raises ArithmeticError where the outputs for an example are no numbers: they are no answer, right or wrong."""
        check_numbers(self.spoilt(prediction, examples), self.unit)
        return self.compute_metrics(prediction, examples, processor)

    # -- with an answer that fits most tasks --

    def spoilt(self, prediction: EvalPrediction, examples: Examples) -> Any:
        """Of each example (N) whether what the metrics are made of is no number."""
        values: Any = prediction.predictions
        return not_numbers(values[0] if isinstance(values, tuple) else values)

    def load_tokenizer(self, model_name_or_path: str | os.PathLike) -> Any:
        """The tokenizer, or whatever else makes the model's inputs."""
        return load_tokenizer(os.fspath(model_name_or_path), padding_side=self.padding_side)

    def saved_tokenizer(self, model_name_or_path: str | os.PathLike) -> Any:
        """What ``load_tokenizer`` loads as it came with the model, to be saved again: without what it is told for training."""
        with collecting():  # whatever there is to note was noted when it was loaded
            return saved_tokenizer(os.fspath(model_name_or_path))

    def token_ids(self, item: Mapping[str, Any]) -> list[Sequence[int]]:
        """The lists of token ids that an example has; one after another is read by the model."""
        return [item["input_ids"]] if "input_ids" in item else []

    def lengths(self, item: Mapping[str, Any]) -> tuple[int, ...]:
        """How many tokens an example has in each tensor of a batch that is padded apart from others."""
        return (max(map(len, self.token_ids(item))),)

    def seen(self, item: Mapping[str, Any], processor: Any) -> list[Seen]:
        """What the model has of an example, token by token; nothing where it has no tokens."""
        return [Seen("input", ids, [False] * len(ids)) for ids in self.token_ids(item)]

    def wanted(self, item: Mapping[str, Any], processor: Any) -> str:
        """What is to be learned of an example as a whole, in words: its label, say. Nothing where it is tokens."""
        return ""

    def not_tuned(self, model: nn.Module) -> list[str]:
        """Modules that the task's Trainer cannot train parts of, beside new heads."""
        return []

    def misfit_of_model(self, model: nn.Module) -> str | None:
        """What keeps the task's Trainer from training the model as the task's fields say, as a sentence; or None."""
        return None

    def changes_inputs(self) -> str | None:
        """What keeps the model from reading the same of an example in every pass of training, as a phrase; or None."""
        return None

    def remarks(self, model: nn.Module, processor: Any, examples: Examples) -> list[str]:
        """Sentences on what a user should know of this model together with the task's examples."""
        return []

    def reduced(self, logits: Any, labels: torch.Tensor) -> Any:
        """What metrics need of a batch's outputs, so that they alone are kept until the end."""
        return logits[0] if isinstance(logits, tuple) else logits  # models that also return hidden states

    def held_out(self, examples: Examples, processor: Any) -> Examples:
        """Examples as evaluation sees them, every time the same."""
        return examples

    def make_arguments(self, **values: Any) -> TrainingArguments:
        """The Trainer's arguments."""
        return TrainingArguments(**values)

    def make_trainer(
        self,
        trainer_class: type[Trainer],
        model: nn.Module,
        args: TrainingArguments,
        processor: Any,
        held_out: Examples | None = None,
        **options: Any,
    ) -> Trainer:
        """A Trainer of the class with what the task's batches and metrics need; ``options`` are its own."""
        compute_metrics = None
        if held_out is not None:
            compute_metrics = partial(self._checked_metrics, examples=held_out, processor=processor)
        return trainer_class(
            model=model,
            args=args,
            data_collator=self.collator(processor),
            eval_dataset=held_out,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=self.reduced,
            **options,
        )

    def trainer(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processor: Any,
        train: Examples,
        held_out: Examples | None = None,
        **options: Any,
    ) -> Trainer:
        """The Trainer that trains the model on ``train`` with what ``make_arguments`` made."""
        return self.make_trainer(self.trainer_class, model, args, processor, held_out, train_dataset=train, **options)

    def written(
        self, model: nn.Module, examples: Examples, processor: Any, batch_size: int, predictions: Any
    ) -> list[Written]:
        """What the model writes by itself for the examples, or for the first of them that have a prompt.

        Taken of ``predictions`` (what ``compute_metrics`` sees) where the Trainer had the model write already. Elsewhere it
        takes longer than they do, and is asked for before and after training only.
        """
        return []

    # -- prediction --

    @property
    def asked(self) -> Columns:
        """role -> column, of what a row must have to be predicted."""
        return {role: column for role, column in self.columns.items() if role not in self.told}

    def untold(self, row: Row) -> Row:
        """The row with something in place of what a prediction is made without, so that it is checked and encoded as rows of
        training are."""
        return row

    def question_problem(self, row: Row) -> str | None:
        """What keeps a row from being predicted, as a phrase, or None."""
        return self.problem(self.untold(row))

    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        max_new_tokens: int = 64,
    ) -> Predictions:
        """What the model says of rows without a problem, from one forward pass of each example.

        ``max_length`` is that of ``encode``, ``batch_size`` counts examples. Models that write texts write at most
        ``max_new_tokens`` tokens.
        """
        examples = self.encode([self.untold(row) for row in rows], processor, max_length)
        lost = {line for lines in examples.lost.values() for line in lines}
        kept = [row for row in rows if row.line not in lost]
        outputs = outputs_of(model, examples, self.collator(processor), batch_size)
        check_outputs(outputs, self.unit)
        records = self.read_off(outputs, kept, examples, processor)
        return Predictions(dict(zip((row.line for row in kept), records, strict=True)), examples.lost)

    def read_off(
        self, outputs: Sequence[Outputs], rows: Sequence[Row], examples: Examples, processor: Any
    ) -> list[dict[str, Any]]:
        """What the outputs of the model for examples say of their rows, in the names of ``predicts``. ``outputs`` are as
        ``outputs_of`` gives them."""
        raise NotImplementedError

    # -- what a model writes --

    def written_metrics(self, written: Sequence[Written]) -> dict[str, float]:
        """Metrics of what the model wrote, beside those of ``compute_metrics``."""
        return {}
