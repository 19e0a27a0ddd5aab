"""What a config names, read and checked: the task, its data, and the model with its new heads."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import set_seed

from reltune.config.run_config import RunConfig
from reltune.errors import InputError, nearest
from reltune.layers.inventory import head_modules, take_inventory
from reltune.notes import Note, collecting
from reltune.runs import lm_evaluation, training
from reltune.runs.splits import Splits, encode, read_data, warn_of
from reltune.tasks.task import Examples, Task


@dataclasses.dataclass
class Materials:
    """What a config names, read and checked: the task, its data, the model with its new heads."""

    config: RunConfig
    task: Task
    tokenizer: Any  # or what else makes the model's inputs
    model: nn.Module | None  # until fresh_model has handed it out
    new_heads: list[str]
    not_tuned: list[str]  # modules that the task's Trainer cannot train parts of
    train: Any  # Examples, or an iterable data set where rows are streamed
    validation: Examples
    test: Examples
    sample: Examples  # of training: relevance is measured on them, and new heads are trained on them
    splits: Splits
    forgetting: Examples | None = None  # a second set for the same task
    notes: Sequence[str] = ()  # what was assumed or left out

    @property
    def collator(self) -> Any:
        return self.task.collator(self.tokenizer)

    @property
    def held_out(self) -> dict[str, Examples]:
        """Examples by the prefix of their metrics."""
        return {"eval": self.validation, "test": self.test}

    @functools.cached_property
    def lm_eval_tasks(self) -> list[Any]:
        """lm-evaluation-harness's tasks that the config names, with their data.

        Raises InputError for those that the model cannot be measured on, or that cannot be read.
        """
        if not self.config.lm_eval_tasks:
            return []
        lm_evaluation.check_model(self.task.peft_task_type, self.tokenizer, self.config.lm_eval_apply_chat_template)
        return lm_evaluation.load_tasks(self.config.lm_eval_tasks, self.config.lm_eval_limit)

    def arguments(self, method: str, **forced: Any) -> TrainingArguments:
        """Training arguments of the run for a method."""
        given = self.config.training
        if self.config.early_stopping_patience is not None:
            if given.get("eval_strategy") == "no":
                raise InputError(
                    "early_stopping_patience counts evaluations while training, and eval_strategy is no; write epoch or steps."
                )
            metric, largest = training.compared_by(given, self.task)  # also where the last model is to be kept
            given = {"load_best_model_at_end": True, **given}
            given |= {"metric_for_best_model": metric, "greater_is_better": largest}
        return training.arguments(self.config.output_dir, method, self.config.seed, given, self.task, **forced)

    def fresh_model(self) -> nn.Module:
        """The base model for the caller to change; its head starts from the same seed every time."""
        if self.model is None:
            set_seed(self.config.seed)
            return self.task.load_model(self.config.model_name_or_path, **quantisation(self.config))[0]
        model, self.model = self.model, None  # no second copy in memory while this one is trained
        return model

    def check_training(self, model: nn.Module | None = None) -> None:
        """Raise InputError for training fields that cannot work with the model (the base model if none is given)."""
        model = model or self.model or self.fresh_model()
        if found := self.task.misfit_of_model(model):
            raise InputError(found)
        args = self.arguments("selection")
        if args.load_best_model_at_end or self.config.early_stopping_patience is not None:
            name, known = str(args.metric_for_best_model).removeprefix("eval_"), self.task.training_metrics
            if name not in known:
                raise InputError(
                    f"metric_for_best_model {name!r} is not measured while {self.task.name} is trained; {nearest(name, known)}"
                )
        training.check_arguments(model, args, self.sample, self.collator)


def prepare(config: RunConfig) -> Materials:
    """Read the data and load the model. Raises InputError for whatever is wrong with either; writes nothing.

    A task that the config does not name is read off the columns and entered there.
    """
    config.check()
    config.check_data()
    with collecting() as notes:
        task, splits = read_data(config)
        config.task = task.name
        tokenizer = task.load_tokenizer(config.model_name_or_path)
        set_seed(config.seed)
        model, missing = task.load_model(config.model_name_or_path, **quantisation(config))
        data = encode(task, splits, tokenizer, config)
    for sentence in notes:
        warnings.warn(sentence, Note, stacklevel=2)
    warn_of(splits)
    new_heads = head_modules(model, missing)
    inventory = take_inventory(model, new_heads)
    not_tuned = [name for name in task.not_tuned(model) if name in inventory]
    return Materials(
        config,
        task,
        tokenizer,
        model,
        new_heads,
        not_tuned,
        data.train,
        data.validation,
        data.test,
        sample=data.sample,
        splits=splits,
        forgetting=data.forgetting,
        notes=notes,
    )


def quantisation(config: RunConfig) -> dict[str, Any]:
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


def placement(config: RunConfig) -> dict[str, Any]:
    """The training fields that evaluation follows too."""
    values = {**config.training, "use_cpu": True} if training.launched_on_cpus() else config.training
    return {key: values[key] for key in ("use_cpu", "per_device_eval_batch_size") if key in values}
