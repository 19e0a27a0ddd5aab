"""What a config names, read and checked: the task, the base model with its new heads, and the data.

Stages want different amounts of it: an export the model alone, an evaluation held-out data too, training everything.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import set_seed

from reltune.config.model import ModelConfig
from reltune.config.run_config import RunConfig
from reltune.config.training import TrainingConfig
from reltune.config.training_fields import checked_training_fields
from reltune.errors import InputError, nearest
from reltune.layers.inventory import new_head_modules, take_inventory
from reltune.layers.quantised import keep_as_loaded
from reltune.notes import Note, collecting, note
from reltune.pretrained import load_config
from reltune.runs import lm_evaluation, training
from reltune.runs.bad_rows import warn_of
from reltune.runs.data_record import read_task
from reltune.runs.directory import RunDirectory
from reltune.runs.graphed_step import check_graphs
from reltune.runs.samples import Samples
from reltune.runs.sizes import Sizes
from reltune.runs.splits import HeldOut, Splits, encode, encode_held_out, read_data, read_held_out, sizes_of
from reltune.tasks.fit import check_tokens, settle_padding
from reltune.tasks.task import Examples, Task


class BaseModel:
    """A run's untouched base model, loaded whenever there is none in memory: to look at, or to take and change.

    Attributes:
        new_heads: the modules that no checkpoint has values for. They start from the same values with every load.
    """

    def __init__(self, config: RunConfig, task: Task) -> None:
        self.config, self.task = config, task
        self._model: nn.Module | None
        self._model, missing = self._load()
        self.new_heads = new_head_modules(self._model, missing)

    def _load(self) -> tuple[nn.Module, list[str]]:
        set_seed(self.config.seed)
        model, missing = self.task.load_model(self.config.model_name_or_path, **quantisation(self.config))
        keep_as_loaded(model)
        return model, missing

    def look(self) -> nn.Module:
        """The model, for a caller that leaves it as it is."""
        if self._model is None:
            with collecting():  # what there is to note was noted the first time
                self._model, _ = self._load()
        return self._model

    def like(self, config: RunConfig) -> BaseModel:
        """The same base model for another config, which may have another seed; not loaded yet."""
        other = copy.copy(self)
        other.config, other._model = config, None
        return other

    def forget(self) -> None:
        """Leave the model to those that hold it; it is loaded again when it is asked for."""
        self._model = None

    def take(self) -> nn.Module:
        """The model, for a caller that changes it. Nothing else holds it from then on, so that one copy is in memory."""
        model, self._model = self.look(), None
        return model


@dataclasses.dataclass
class ModelMaterials:
    """The task and the model of a run.

    Attributes:
        tokenizer: the tokenizer, or the image processor, that makes the model's inputs.
    """

    config: RunConfig
    task: Task
    tokenizer: Any
    base: BaseModel

    @property
    def new_heads(self) -> list[str]:
        return self.base.new_heads

    def saved_tokenizer(self) -> Any:
        """The tokenizer as it came with the model, for directories that others load."""
        return self.task.saved_tokenizer(self.config.model_name_or_path)

    @property
    def longest(self) -> int:
        """How many tokens an example may have."""
        return min(self.config.max_length, getattr(self.tokenizer, "model_max_length", self.config.max_length))

    def check_fit(self, settled: bool, first: Examples, *others: Examples | None) -> None:
        """Raise InputError where model, tokenizer and examples do not fit one another.

        On which side the tokenizer pads is ``settled`` where the task was recorded; else the first examples are tried.
        """
        model = self.base.look()
        check_tokens(self.task, model, self.tokenizer, [first, *(some for some in others if some is not None)])
        if not settled:
            if not getattr(model, "is_quantized", False):  # else it is where it has to be
                model.to(self.task.make_arguments(output_dir=self.config.output_dir, **placement(self.config)).device)
            settle_padding(self.task, model, self.tokenizer, first)
            for sentence in self.task.remarks(model, self.tokenizer, first):
                note(sentence)

    @property
    def collator(self) -> Any:
        return self.task.collator(self.tokenizer)

    @functools.cached_property
    def lm_eval_tasks(self) -> list[Any]:
        """lm-evaluation-harness's tasks that the config names, with their data.

        Raises InputError for those that the model cannot be measured on, or that cannot be read.
        """
        if not self.config.lm_eval_tasks:
            return []
        lm_evaluation.check_model(self.task.peft_task_type, self.tokenizer, self.config.lm_eval_apply_chat_template)
        return lm_evaluation.load_tasks(self.config.lm_eval_tasks, self.config.lm_eval_limit)


@dataclasses.dataclass
class EvaluationMaterials(ModelMaterials):
    """The task, the model and the held-out data of a run.

    Attributes:
        forgetting: a second set for the same task.
    """

    validation: Examples
    test: Examples
    forgetting: Examples | None

    @property
    def held_out(self) -> dict[str, Examples]:
        """Examples by the prefix of their metrics."""
        return {"eval": self.validation, "test": self.test}


@dataclasses.dataclass
class Materials(EvaluationMaterials):
    """Everything that a run trains with.

    Attributes:
        train: ``Examples``, or an iterable data set where rows are streamed.
        sample: the training examples that relevance is measured on and new heads are trained on.
        splits: the rows that all of these were made of.
        not_tuned: modules that the task's Trainer cannot train parts of.
        notes: what was assumed or left out.
    """

    train: Any
    sample: Examples
    splits: Splits
    not_tuned: list[str]
    notes: Sequence[str] = ()

    @functools.cached_property
    def sizes(self) -> Sizes:
        """How many examples there are, and how long they are."""
        return sizes_of(self.task, self.train, self.validation, self.test)

    def arguments(self, method: str, share: float = 1.0, **forced: Any) -> TrainingArguments:
        """Training arguments of the run for a method, for a share of single weights."""
        given = self.config.training
        if self.config.early_stopping_patience is not None:
            if given.get("eval_strategy") == "no":
                raise InputError(
                    "early_stopping_patience counts evaluations while training, and eval_strategy is no; write epoch or steps."
                )
            metric, largest = training.compared_by(given, self.task)  # also where the last model is to be kept
            given = {"load_best_model_at_end": True, **given}
            given |= {"metric_for_best_model": metric, "greater_is_better": largest}
        return training.arguments(self.config.output_dir, method, self.config.seed, given, self.task, share, **forced)

    @functools.cached_property
    def samples(self) -> Samples | None:
        """The prompts that are answered while the model trains, made ready. Raises InputError for those that cannot be."""
        return Samples(self) if self.config.sample_prompts else None

    def check_training(self, model: nn.Module | None = None) -> None:
        """Raise InputError for training fields that cannot work with the model (the base model if none is given)."""
        model = model or self.base.look()
        if misfit := self.task.misfit_of_model(model):
            raise InputError(misfit)
        _ = self.samples  # checked here, and asked while it trains
        args = self.arguments("selection")
        if args.load_best_model_at_end or self.config.early_stopping_patience is not None:
            name, known = str(args.metric_for_best_model).removeprefix("eval_"), self.task.training_metrics
            if name not in known:
                raise InputError(
                    f"metric_for_best_model {name!r} is not measured while {self.task.name} is trained; {nearest(name, known)}"
                )
        training.check_arguments(model, args, self.sample, self.collator, self.config.streaming)


def prepare(config: RunConfig, run: RunDirectory | None = None) -> Materials:
    """Read the data and load the model. Writes nothing.

    A task that the config does not name is read off the columns and entered there.

    Args:
        run: an existing run, whose task is kept with its classes; None for a new run.

    Raises:
        InputError: whatever is wrong with either.
    """
    config.training = checked_training_fields(config.training)
    config.check()
    config.check_data()
    if config.activation_offloading:
        training.check_offloading(config.training)
    with noting() as notes:
        recorded = read_task(run, config) if run else None
        task, splits = read_data(config, recorded)
        config.task = task.name
        if config.cuda_graphs:
            check_graphs(config.training, task.name)
        if run is None:
            task = task.suited_to(load_config(config.model_name_or_path))
        tokenizer = task.load_tokenizer(config.model_name_or_path)
        base = BaseModel(config, task)
        data = encode(task, splits, tokenizer, config)
        inventory = take_inventory(base.look(), base.new_heads)
        materials = Materials(
            config,
            task,
            tokenizer,
            base,
            data.validation,
            data.test,
            data.forgetting,
            train=data.train,
            sample=data.sample,
            splits=splits,
            not_tuned=[name for name in task.not_tuned(base.look()) if name in inventory],
            notes=notes,
        )
        materials.check_fit(recorded is not None, data.sample, data.validation, data.test, data.forgetting)
    warn_of(splits)
    return materials


def prepare_evaluation(config: RunConfig, run: RunDirectory) -> EvaluationMaterials:
    """Read a run's held-out data and load its base model. Writes nothing.

    The training data are not read, unless the run has kept no held-out rows and no file of them is named.

    Raises:
        InputError: whatever is wrong with either.
    """
    with noting():
        recorded = read_task(run, config)
        task, rows = _held_out(config, recorded, run.kept_rows)
        config.task = task.name
        tokenizer = task.load_tokenizer(config.model_name_or_path)
        base = BaseModel(config, task)
        validation, test, *second = encode_held_out(task, rows, tokenizer, config)
        materials = EvaluationMaterials(config, task, tokenizer, base, validation, test, second[0] if second else None)
        materials.check_fit(recorded is not None, validation, test, *second)
    warn_of(rows)
    return materials


def _held_out(config: RunConfig, recorded: Task | None, kept_rows: Path) -> tuple[Task, HeldOut]:
    if recorded is not None:
        return recorded, read_held_out(config, recorded, kept_rows)
    config.check_data()
    task, splits = read_data(config)  # an older version made the run, and wrote down neither its classes nor these rows
    return task, HeldOut(splits.validation, splits.test, splits.forgetting)


def prepare_export(config: RunConfig, run: RunDirectory) -> ModelMaterials:
    """Load a run's tokenizer and base model; no data are read.

    Raises:
        InputError: whatever is wrong with them.
    """
    task = task_of_run(config, run)
    return ModelMaterials(config, task, task.load_tokenizer(config.model_name_or_path), BaseModel(config, task))


def task_of_run(config: RunConfig, run: RunDirectory) -> Task:
    """The task that a run was made with, whose name enters the config."""
    task = read_task(run, config)
    if task is None:
        config.check_data()
        task = read_data(config)[0]  # an older version made the run, and did not write down its classes
    config.task = task.name
    return task


@contextlib.contextmanager
def noting() -> Iterator[Sequence[str]]:
    """Collect the notes that are made inside, and say them at the end."""
    with collecting() as notes:
        yield notes
    for sentence in notes:
        warnings.warn(sentence, Note, stacklevel=2)


def quantisation(config: ModelConfig) -> dict[str, Any]:
    """What ``from_pretrained`` is told to hold the base model in few bits."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit and load_in_8bit need bitsandbytes; run: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": nf4}


def placement(config: TrainingConfig) -> dict[str, Any]:
    """The training fields that evaluation follows too."""
    values = {**config.training, "use_cpu": True} if training.launched_on_cpus() else config.training
    return {key: values[key] for key in ("use_cpu", "per_device_eval_batch_size") if key in values}
