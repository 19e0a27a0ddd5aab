"""Whether a training computes its frozen layers once (tuner/frozen_prefix.py), and the Trainer that does."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.files import discard, parse_size, stored
from reltune.notes import note
from reltune.processes import Processes
from reltune.report.numbers import size
from reltune.tasks.task import Examples, Task
from reltune.tuner.frozen_prefix import (
    TOLD,
    FrozenPart,
    FrozenPrefix,
    Identifying,
    Unsuited,
    frozen_blocks,
    known_blocks,
)
from reltune.tuner.kept_states import KeptStates

SPARE = 0.1  # of the free disk, which is left free


class PrefixCache:
    """The cache of one training: a file per process, in a directory that is removed when training is done.

    Attributes:
        facts: what was decided, and afterwards what was kept and read, for ``training_cost.json``.
    """

    def __init__(self, part: FrozenPart, directory: Path, limit: int) -> None:
        self.part, self.directory, self.limit = part, directory, limit
        self.facts: dict[str, Any] = {"frozen_layers": part.depth, "layers": part.of}
        self.kept: KeptStates | None = None

    @contextlib.contextmanager
    def used_by(self, trainer: Trainer) -> Iterator[None]:
        """Have a Trainer that trains inside keep and read hidden states. Of several processes each has a file of its own."""
        path = self.directory / f"process-{trainer.args.process_index}"
        with stored(self.directory):
            kept = KeptStates(path, self.part.width, self.part.dtype, self.limit, self.part.origin())
        self.kept, prefix = kept, FrozenPrefix(self.part, kept)
        loader, step = trainer.get_train_dataloader, trainer.training_step

        def get_train_dataloader() -> Any:
            collator = trainer.data_collator
            trainer.data_collator = Identifying(collator)
            try:
                return loader()
            finally:
                trainer.data_collator = collator

        def training_step(model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Any:
            with prefix.batch(inputs.pop(TOLD)):
                return step(model, inputs, *rest, **options)

        trainer.get_train_dataloader = get_train_dataloader  # type: ignore[method-assign]
        trainer.training_step = training_step  # type: ignore[method-assign]
        try:
            with prefix.installed():
                yield
        finally:
            trainer.get_train_dataloader, trainer.training_step = loader, step  # type: ignore[method-assign]
            self.kept = None
            kept.close()
        self.facts |= {"bytes": kept.size, "examples_read": prefix.read, "examples_computed": prefix.computed}
        if kept.full == "disk":
            warnings.warn(
                f"the disk of {self.directory} was full, so that only {size(kept.size)} of hidden states were kept.",
                stacklevel=2,
            )
        processes = Processes.joined()
        with processes.together():  # all have come here
            pass
        if processes.first:
            discard(self.directory)


class SavesIndex(TrainerCallback):
    """Has the hidden states that a checkpoint goes with reach the disk: from them a resumed training computes what one that was
    never stopped would. It comes before a callback that ends training at a checkpoint."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cache.kept is not None:
            with stored(self.cache.directory):
                self.cache.kept.save()


def check(config: RunConfig, task: Task, model: nn.Module) -> None:
    """Raise InputError where --cache_frozen_prefix on cannot be followed, as far as data and the untouched model say."""
    if config.cache_frozen_prefix != "on":
        return
    try:
        _check_data(config, task)
        known_blocks(model)
    except Unsuited as why:
        raise _refused(why) from why


def decide(
    config: RunConfig,
    task: Task,
    model: nn.Module,
    args: TrainingArguments,
    examples: Any,
    first: dict[str, Any],
    directory: Path,
    pays: bool | None = None,
) -> PrefixCache | None:
    """The cache of a training with what the config says, or None; what a user could wonder about is noted.

    Args:
        model: as it is trained, on its device.
        first: a batch of one training example.
        pays: whether training was predicted to be done earlier by it (duration.py); None where nothing was predicted.

    Raises InputError where the cache is to be on and cannot be.
    """
    wanted = config.cache_frozen_prefix
    if wanted == "off" or config.cuda_graphs:
        return None
    try:
        frozen_blocks(model)
        _check_data(config, task)
        _check_arguments(args)
        part = FrozenPart(model, _taken_by(model, first), _autocast(args))
        if wanted == "on":
            return _cache(part, config, args, examples, task, directory)
        passes = _passes(args, len(examples))
        if passes < 2:
            raise Unsuited("there is no second pass over the data", remarkable=False)
        if pays is False:
            raise Unsuited(
                f"to read again what the {part.depth} frozen layers of {part.of} give takes as long as to compute it"
            )
        if part.draws:
            raise Unsuited(
                f"the {part.depth} frozen layers of {part.of} have dropout, which --cache_frozen_prefix on would turn off there"
            )
        return _cache(part, config, args, examples, task, directory)
    except Unsuited as why:
        if wanted == "on":
            raise _refused(why) from why
        if why.remarkable:
            note(f"Nothing is kept of the frozen layers: {why}.")
        return None


def _refused(why: Unsuited) -> InputError:
    return InputError(f"cache_frozen_prefix on: {why}; write auto, which then keeps nothing, or off.")


def _check_data(config: RunConfig, task: Task) -> None:
    if config.streaming:
        raise Unsuited("streamed rows are not known to come again")
    if changes := task.changes_inputs():
        raise Unsuited(changes)


def _check_arguments(args: TrainingArguments) -> None:
    if args.fsdp or args.deepspeed:
        raise Unsuited(f"{'FSDP' if args.fsdp else 'DeepSpeed'} takes every layer of the model in every step")
    if args.n_gpu > 1:
        raise Unsuited("one process uses several GPUs, and splits each batch; start one process per GPU with torchrun")
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise Unsuited("dispatch_batches has one process make the batches of all")
    if args.torch_compile:
        raise Unsuited("torch_compile compiles the whole model")
    if args.neftune_noise_alpha is not None:
        raise Unsuited("neftune_noise_alpha adds noise to the embeddings in every step")


def _cache(
    part: FrozenPart, config: RunConfig, args: TrainingArguments, examples: Examples, task: Task, directory: Path
) -> PrefixCache:
    """Raises Unsuited where not all examples fit, unless the cache is to be on."""
    allowed = parse_size(config.cache_size)
    processes = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)))
    row = part.width * part.dtype.itemsize
    needed = _tokens(task, examples, part) * row
    place = next(path for path in (directory, *directory.parents) if path.exists())
    free = int(shutil.disk_usage(place).free * (1 - SPARE))
    limit = min(allowed, free) // processes
    layers = f"the {part.depth} frozen layers of {part.of}"
    each = f" in each of {processes} processes" if processes > 1 else ""
    if needed > limit and config.cache_frozen_prefix == "auto":
        bound = f"--cache_size is {config.cache_size}" if allowed <= free else f"{size(free)} of the disk may be used"
        raise Unsuited(f"what {layers} give of all examples takes {size(needed)}{each}, and {bound}")
    part_of = "" if needed <= limit else f", of which {size(limit)} are kept"
    dropout = "; dropout is off in them" if part.draws else ""
    note(
        f"What {layers} give is computed once for each example and kept, {size(needed)}{each}{part_of}; of {_passes(args, len(examples)):g} "
        f"passes over the data the later ones begin above them{dropout}."
    )
    cache = PrefixCache(part, directory, min(limit, needed))
    cache.facts["bytes_expected"] = needed
    return cache


def _tokens(task: Task, examples: Examples, part: FrozenPart) -> int:
    """Of all examples; pictures have as many as the one that was looked at."""
    if not task.token_ids(examples[0]):
        return len(examples) * part.tokens
    return sum(len(ids) for item in examples.items for ids in task.token_ids(item))


def _passes(args: TrainingArguments, examples: int) -> float:
    """How often training goes over the data."""
    if args.max_steps > 0:
        of_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return args.max_steps * of_step / max(examples, 1)
    return args.num_train_epochs


def _autocast(args: TrainingArguments) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _taken_by(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What a batch has that the model's forward pass takes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = inspect.signature(base.forward).parameters
    return {name: value for name, value in batch.items() if name in names}
