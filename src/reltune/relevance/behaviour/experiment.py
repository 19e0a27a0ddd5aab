"""What a criterion measured from behaviour works with: a model, its data, its metric, and passes that survive Ctrl-C.

All batches are held in host memory, so that every pass sees the same data in the same order, whatever the loader shuffles
or augments. Every pass runs in evaluation mode, without gradients and from the same random state, which is put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from reltune.errors import AnalysisError, InputError, nearest
from reltune.layers.inventory import Inventory
from reltune.losses import Loss, rows_of
from reltune.processes import Processes
from reltune.relevance.batches import batch_size, forward, moved, part_of
from reltune.relevance.resumption import Partial


def whole_number(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}.")


def known_words(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(values, str) or not values:
        raise InputError(f"{name} is {values!r}; give a list of {', '.join(known)}.")
    for value in values:
        if value not in known:
            raise InputError(f"{name} {value!r} is unknown; {nearest(str(value), known)}")


@dataclasses.dataclass
class Experiment:
    """``options`` are the criterion's own; ``inventory`` holds the modules and heads that may be measured."""

    criterion: str
    model: nn.Module
    loss: Loss
    inventory: Inventory
    batches: list[Any]
    options: Any
    seed: int
    progress: bool
    partial: Partial | None
    data: str  # hash of the batches
    elements: bool = False  # whether single weights are asked for, of criteria that score them

    processes: Processes = dataclasses.field(default_factory=Processes)
    same_batches: bool = True  # whether all processes have these batches, or each has batches of its own

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device

    def resumed(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What an interrupted call with the same arguments has saved. InputError where its data was another."""
        found = self.partial.load() if self.partial else None
        if found is not None and found[0]["data"] != self.data:
            raise InputError(
                f"the data is not what the interrupted analysis in {self.partial and self.partial.path.parent} has seen; "
                "give it the same data, or remove that directory."
            )
        return found

    @functools.cached_property
    def passes_done(self) -> dict[str, list[float]]:
        """What ``passes`` has, by its names."""
        found = self.resumed()
        return {} if found is None else {name: tensor.tolist() for name, tensor in found[1].items()}

    @property
    def layers(self) -> list[str]:
        """Names of the blocks that hold measured modules, from the input on."""
        return list(dict.fromkeys(info.layer for info in self.inventory.modules if info.in_block))

    def metric(self, what: str = "the model") -> float:
        """The task metric, the mean over all examples, in one pass over the data. ``what`` names it in errors."""
        total, examples = 0.0, 0
        for index, (_, metrics) in enumerate(self.forward()):
            if not torch.isfinite(metrics).all():
                raise AnalysisError(f"the metric of batch {index} is not finite with {what}.")
            total += float(metrics.sum())
            examples += len(metrics)
        return total / examples

    def forward(self, before: Callable[[Any], None] | None = None) -> Iterator[tuple[Any, Tensor]]:
        """One pass: every batch (halved where memory does not hold it) with the metric of each of its examples.

        ``before`` is told what the model sees of the batch before its forward pass.
        """
        seeded(self.device, self.seed)

        def metrics(batch: Any) -> Tensor:
            if before is not None:
                before(rows_of(batch, self.loss))
            return self._metrics(batch).cpu().double()

        for batch in self.batches:
            yield from in_halves(moved(batch, self.device), metrics)

    def _metrics(self, batch: Any) -> Tensor:
        outputs = forward(self.model, rows_of(batch, self.loss))
        metric = getattr(self.loss, "metric", None)
        metrics = -self.loss.per_example(outputs, batch) if metric is None else metric(outputs, batch)
        if metrics.shape != (batch_size(batch),):
            raise InputError(
                f"the metric has shape {tuple(metrics.shape)} for {batch_size(batch)} examples; it must be one number per "
                "example: leave out the reduction."
            )
        return metrics

    @property
    def metric_name(self) -> str:
        return getattr(self.loss, "metric_name", "negative loss")

    def passes(
        self,
        name: str,
        total: int,
        perform: Callable[[int], float],
        enough: Callable[[list[float]], bool] = lambda values: False,
    ) -> list[float]:
        """``perform(0)``, ``perform(1)`` and so on until there are ``total`` values or ``enough`` of them.

        What an interrupted call with the same ``name`` got is not performed again; what is performed is kept every few
        minutes and on the way out. A pass cut short leaves nothing: it is performed whole the next time.
        """
        values = self.passes_done.setdefault(name, [])
        bar = tqdm(
            total=total, initial=len(values), desc=f"{self.criterion} {name}", unit="pass", disable=not self.progress
        )
        try:
            with bar:
                while len(values) < total and not enough(values):
                    values.append(perform(len(values)))
                    bar.update()
                    if self.partial and self.partial.due():
                        self._save()
        except BaseException:
            self._save()
            raise
        return values

    def _save(self) -> None:
        tensors = {k: torch.tensor(values, dtype=torch.float64) for k, values in self.passes_done.items() if values}
        if self.partial and tensors:
            self.partial.save({"data": self.data}, tensors)


def in_halves(batch: Any, compute: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """The batch with what is computed of it, without gradients; halves of it where memory does not hold the whole."""
    try:
        with torch.no_grad():
            found = compute(batch)
    except (torch.OutOfMemoryError, MemoryError):
        if batch_size(batch) < 2:
            raise
    else:
        yield batch, found
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = batch_size(batch) // 2
    for part in (part_of(batch, 0, half), part_of(batch, half, batch_size(batch))):
        yield from in_halves(part, compute)


def with_untouched(model: nn.Module, loss: Loss, batches: list[Any]) -> list[Any]:
    """The batches with what the loss needs of the model as it is now, if anything: a few numbers per example. What they
    have already, of a reference of the caller's own, stays."""
    note = getattr(loss, "of_untouched", None)
    if note is None:
        return batches
    device = next(model.parameters()).device

    def noted(batch: Any) -> dict[str, Tensor]:
        return {k: v.cpu() for k, v in note(forward(model, rows_of(batch, loss)), batch).items()}

    found = []
    for batch in batches:
        parts = [of for _, of in in_halves(moved(batch, device), noted)]
        found.append({**{key: torch.cat([part[key] for part in parts]) for key in parts[0]}, **batch})
    return found


def seeded(device: torch.device, seed: int) -> None:
    """A model that draws numbers in evaluation mode draws the same ones in every pass."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """The caller's random state is put back, however the context ends."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        yield
