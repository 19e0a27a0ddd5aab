"""Training goes on where memory holds no whole batch: in parts of it, whose gradients add up to those of the whole."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from reltune.losses import IGNORED
from reltune.tasks.sft_step import COUNTED
from reltune.tuner.frozen_prefix import TOLD, identified

MEND = "pass a smaller --per_device_train_batch_size, a shorter --max_length, or --gradient_checkpointing"


def halve_where_memory_ends(trainer: Trainer, model: nn.Module, spare: Callable[[], bool] | None = None) -> None:
    """Have a Trainer take a batch that does not fit in halves, and all later ones in parts of that size. First ``spare`` is asked to
    give back memory of recorded steps; whole batches are tried again if it says that it did.

    The batches of an optimizer's step are taken again where one of them does not fit: what was added to the gradients by then is
    forgotten, since the part that failed has added some. Of several processes each would have to do the same, so that there the
    error stays.
    """
    if trainer.accelerator.num_processes == 1 and not trainer.args.deepspeed:
        halving = _Halving(trainer, model, spare or (lambda: False))
        trainer.compute_loss = halving.weighted(trainer.compute_loss)  # type: ignore[method-assign]
        trainer.training_step = halving.step(trainer.training_step)  # type: ignore[method-assign]


class _Halving:
    """
    Attributes:
        most: examples of a part; None for whole batches.
        adds_up: whether the loss is a sum, divided by the number of labels of the whole step, as Trainer tells it to models whose loss asks
            for it: those of parts add up. Else it is a mean, of which each part has a share.
        again: whether all batches of the step are to be taken once more.
        weight: what the loss of the part at hand counts for in that of its batch, where that is a mean.
        taken: the batches of the optimizer's step so far, with what else the step was given.
    """

    def __init__(self, trainer: Trainer, model: nn.Module, spare: Callable[[], bool]) -> None:
        self.trainer, self.model, self.spare = trainer, model, spare
        self.loss_of = trainer.compute_loss
        self.adds_up: bool | None = None
        self.again = False
        self.most: int | None = None
        self.weight = 1.0
        self.taken: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = []
        self.of_step = -1

    def weighted(self, loss_of: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loss_of)
        def compute_loss(*given: Any, **options: Any) -> Any:
            found = loss_of(*given, **options)
            if self.weight == 1:
                return found
            return (found[0] * self.weight, *found[1:]) if isinstance(found, tuple) else found * self.weight

        return compute_loss

    def step(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(step)
        def halved(model: nn.Module, inputs: dict[str, Any], *rest: Any, **options: Any) -> Tensor:
            if self.of_step != self.trainer.state.global_step:
                self.of_step = self.trainer.state.global_step
                self.taken.clear()
            self.taken.append((dict(inputs), rest, options))
            while True:
                batches, self.again = (self.taken if self.again else self.taken[-1:]), False
                try:
                    return [self._in_parts(step, model, *one) for one in batches][-1]
                except (torch.OutOfMemoryError, MemoryError):
                    size = _examples(inputs)
                    spared = self.spare()
                    if not spared:
                        if size < 2 or (self.most or size) < 2:
                            raise
                        self.most = min(self.most or size, size) // 2
                # Not inside the handler, which keeps what the failed pass holds.
                self._start_anew(size, spared)

        return halved

    def _start_anew(self, size: int, spared: bool) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        self.again = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        goes_on = (
            "without CUDA graphs, whose recordings take memory"
            if spared
            else f"with {self.most} at a time, whose gradients are added up to those of the batch. To spare the time of it, {MEND}"
        )
        warnings.warn(
            f"out of memory with {size} examples in a batch; training goes on {goes_on}.",
            stacklevel=2,
        )

    def _in_parts(
        self,
        step: Callable[..., Tensor],
        model: nn.Module,
        inputs: dict[str, Any],
        rest: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Tensor:
        size = _examples(inputs)
        if self.most is None or size <= self.most:
            return step(model, dict(inputs), *rest, **options)
        losses = []
        try:
            for part, share in _parts(inputs, size, self.most):
                if self.adds_up is None:
                    self.adds_up = self._follows_count(model, part, rest, options)
                self.weight = 1.0 if self.adds_up else share
                losses.append(step(model, part, *rest, **options))
        finally:
            self.weight = 1.0
        return torch.stack([loss.detach() for loss in losses]).sum()

    def _follows_count(
        self, model: nn.Module, part: dict[str, Any], rest: tuple[Any, ...], options: Mapping[str, Any]
    ) -> bool:
        """Whether the loss is halved where it is told of twice as many labels."""
        items = rest[0] if rest else options.get("num_items_in_batch")
        if items is None:
            return False
        losses = []
        for count in (items, 2 * items):
            with torch.random.fork_rng():
                model.train()
                given = self.trainer._prepare_inputs({key: value for key, value in part.items() if key != TOLD})
                loss: Any = self.loss_of(model, given, num_items_in_batch=count)
                losses.append(float(loss.detach()))
        return losses[1] < 0.75 * losses[0]


def _examples(inputs: Mapping[str, Any]) -> int:
    """Examples in a batch; 1 of packed ones, which cannot be told apart."""
    rows = min((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), default=1)
    return rows // 2 if _has_pairs(inputs) else rows


def _has_pairs(inputs: Mapping[str, Any]) -> bool:
    """Whether the rows are those of TRL's preference pairs: first all chosen answers, then all rejected ones."""
    return "completion_mask" in inputs and "labels" not in inputs


def _parts(inputs: Mapping[str, Any], size: int, most: int) -> Iterator[tuple[dict[str, Any], float]]:
    """Parts of a batch with the share of its labels (or examples) that each has."""
    labels = inputs.get("labels")
    per_token = isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point()
    counted = (labels != IGNORED).flatten(1).sum(1) if per_token else None  # type: ignore[union-attr]

    def cut(value: Any, start: int, stop: int) -> Any:
        if not isinstance(value, Tensor | list) or (isinstance(value, Tensor) and not value.ndim):
            return value
        if isinstance(value, Tensor) and len(value) == 2 * size and _has_pairs(inputs):
            return torch.cat([value[start:stop], value[size + start : size + stop]])
        return value[start:stop] if len(value) == size else value

    for start in range(0, size, most):
        stop = min(start + most, size)
        part = {key: cut(value, start, stop) for key, value in inputs.items() if key not in (TOLD, COUNTED)}
        if TOLD in inputs:
            part[TOLD] = identified({key: one.cpu() if isinstance(one, Tensor) else one for key, one in part.items()})
        share = (
            (stop - start) / size if counted is None else float(counted[start:stop].sum() / counted.sum().clamp(min=1))
        )
        yield part, share
