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

from reltune.errors import AnalysisError, InputError, blaming, nearest
from reltune.layers.inventory import Inventory
from reltune.losses import Loss, rows_of
from reltune.processes import Processes
from reltune.relevance.batches import batch_size, forward, moved, part_of
from reltune.relevance.behaviour.kept_outputs import KeptOutputs
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


class MeanMetric(float):
    """The mean metric of a pass over the data."""

    of_examples: Tensor
    """The metric of each example (n,), in float64."""

    @classmethod
    def over(cls, metrics: Sequence[Tensor]) -> MeanMetric:
        of_examples = torch.cat(list(metrics))
        mean = cls(of_examples.mean())
        mean.of_examples = of_examples
        return mean


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
    kept: KeptOutputs | None = None  # of the unchanged model, for passes that change it

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
    def tables(self) -> dict[str, Tensor]:
        """What is measured so far, by name: numbers (passes,), or tables (passes, examples) with nan where nothing is yet."""
        found = self.resumed()
        return {} if found is None else found[1]

    def table(self, name: str, passes: int, examples: int) -> Tensor:
        """A table to be filled, with what an interrupted call has measured."""
        table = torch.full((passes, examples), torch.nan, dtype=torch.float64)
        found = self.tables.get(name)
        if found is not None and found.shape[1:] == table.shape[1:] and len(found) <= passes:
            table[: len(found)] = found
        self.tables[name] = table
        return table

    @property
    def layers(self) -> list[str]:
        """Names of the blocks that hold measured modules, from the input on."""
        return list(dict.fromkeys(info.layer for info in self.inventory.modules if info.in_block))

    def metric(self, what: str = "the model") -> MeanMetric:
        """The task metric, the mean over all examples, in one pass over the data. ``what`` names it in errors."""
        found = []
        for index, (part, metrics) in enumerate(self.forward()):
            if not torch.isfinite(metrics).all():
                raise blaming(AnalysisError(f"the metric of batch {index} is not finite with {what}."), part)
            found.append(metrics)
        return MeanMetric.over(found)

    def forward(
        self, before: Callable[[Any], None] | None = None, keep: bool = False, losses: list[Tensor] | None = None
    ) -> Iterator[tuple[Any, Tensor]]:
        """One pass: every batch (halved where memory does not hold it) with the metric of each of its examples.

        ``before`` is told what the model sees of the batch before its forward pass. ``keep``: the model is unchanged, and what
        its pieces give is kept. ``losses`` gets the examples' losses.
        """
        seeded(self.device, self.seed)
        for batch in self.batches:
            here = moved(batch, self.device)

            def metrics(part: Any, batch: Any = batch, whole: Any = here) -> Tensor:
                if before is not None:
                    before(rows_of(part, self.loss))
                outputs = self._outputs(part, batch if part is whole else None, keep)
                if losses is not None:
                    losses.append(self.loss.per_example(outputs, part).cpu().double())
                return self._metrics(outputs, part).cpu().double()

            yield from in_halves(here, metrics)

    def _outputs(self, batch: Any, key: Any, keep: bool) -> Any:
        """``key``: the batch that this is the whole of, as ``batches`` has it; None for a part of one."""
        inputs = rows_of(batch, self.loss)
        if self.kept is None or key is None:
            return forward(self.model, inputs)
        if not keep:
            with self.kept.used(key):
                return forward(self.model, inputs)
        return self.kept.keep(key, lambda: forward(self.model, inputs))

    @torch.no_grad()
    def check_kept(self) -> None:
        """Let ``kept`` see that it changes nothing. The pass calls the model's forward itself: it is none over the data."""
        if self.kept is not None:
            self.kept.check(
                lambda batch: forward(self.model, rows_of(moved(batch, self.device), self.loss), self.model.forward)
            )

    def _metrics(self, outputs: Any, batch: Any) -> Tensor:
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
        values: list[float] = self.tables.get(name, torch.empty(0)).tolist()
        bar = tqdm(
            total=total, initial=len(values), desc=f"{self.criterion} {name}", unit="pass", disable=not self.progress
        )
        try:
            with bar:
                while len(values) < total and not enough(values):
                    values.append(perform(len(values)))
                    self.tables[name] = torch.tensor(values, dtype=torch.float64)
                    bar.update()
                    self.save_if_due()
        except BaseException:
            self.save()
            raise
        return values

    def save_if_due(self) -> None:
        if self.partial and self.partial.due():
            self.save()

    def save(self) -> None:
        """Keep what is measured so far for a call that goes on with it."""
        tensors = {}
        for name, table in self.tables.items():
            begun = (~table.isnan()).flatten(1).any(1).nonzero() if table.ndim > 1 else torch.arange(len(table))
            if len(begun):
                tensors[name] = table[: int(begun.max()) + 1]
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
