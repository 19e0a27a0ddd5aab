"""What every block and every unit of a model adds to a training step, so that the cost of a plan is a sum.

The frozen model is counted once, with the backward pass going through all of it; what a plan adds follows from the shapes of the
modules. A plan then costs what its lowest block says (nothing below is kept or differentiated) and what its units say. A search can
ask thousands of times a second; ``count_step`` counts one plan exactly and takes about a second.

For a module of ``rows`` outputs and ``columns`` inputs that T vectors go through, in numbers: a column trains ``rows``, keeps T
(its inputs) and takes 2·T·rows operations; a row trains ``columns``, a single weight 1, and both keep the module's input
once, unless autograd keeps it or what it is made again from; a whole weight keeps the input too and takes 2·T·rows·columns; a
direction trains ``rows`` and keeps T. What is trained is held with a copy of the base's values (not of directions and whole
weights, which stand beside them), its gradient and its states.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reltune.cost.calibration import Calibration
from reltune.cost.ledger import HOST, Ledger, Span, Work
from reltune.cost.step import (
    KERNEL,
    Conditions,
    counting,
    forward_and_backward,
    held_by,
    kernels,
    output_weight,
    state_size,
)
from reltune.cost.timing import (
    LAUNCHED,
    dtype_name,
    moving,
    multiplying,
    optimizer_seconds,
    together,
    tuned_seconds,
    work_parts,
)
from reltune.layers import deferred_logits
from reltune.layers.fused import fused
from reltune.layers.inventory import Inventory
from reltune.ops import recompute, sampled_on_cpu

INDEX = 16  # bytes of a column's or row's place: in the adapter, and in what undoes it
ELEMENT_INDEX = 8  # of a single weight's
# Operations of a module's columns, rows or single weights, as they were counted of BERT's; of all of them those that are no views.
OPERATIONS = {"forward": 3, "backward": 6}
COMPUTING = 2


@dataclasses.dataclass(frozen=True)
class Chosen:
    """How many units of a module are trained."""

    columns: int = 0
    rows: int = 0
    elements: int = 0
    directions: int = 0
    weight: bool = False
    bias: bool = False

    def __add__(self, other: Chosen) -> Chosen:
        counts = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        return Chosen(**counts, weight=self.weight or other.weight, bias=self.bias or other.bias)

    def __mul__(self, times: int) -> Chosen:
        """So many units like this one, of which a whole weight and a bias are there once."""
        return dataclasses.replace(self, **{name: times * getattr(self, name) for name in COUNTS})


COUNTS = ("columns", "rows", "elements", "directions")


@dataclasses.dataclass(frozen=True)
class PlanCost:
    """What a plan takes: bytes that tensors hold at most, seconds of a step (nan without a calibration), numbers trained, and the
    lowest block that the backward pass reaches, counted from 0."""

    memory: int
    seconds: float
    trained: int
    lowest: int

    @property
    def bytes(self) -> int:
        return self.memory


@dataclasses.dataclass(frozen=True)
class UnitCost:
    """What units of one module add to a step, in bytes but for ``numbers``, which are trained, and ``seconds``.

    Attributes:
        place: the block that they are in, counted from 0.
        held: all the time, states of the optimizer included.
        kept: from the block's forward pass to its backward pass.
        gradient: from there on.
        source: what names the module's input, which is kept once for all that read it, and ``source_bytes`` what that takes.
    """

    place: int
    numbers: int
    held: int
    kept: int
    gradient: int
    source: int
    source_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Block:
    kept: int
    forward_peak: int  # above what is held when its forward pass begins
    backward_peak: int
    work: Mapping[str, Counter[Work]]


@dataclasses.dataclass(frozen=True)
class _Module:
    """``block``: its place; ``vectors``: that go through it; ``source``: the tensor it reads, ``source_bytes`` what keeping it takes, and
    ``remade`` whether the tuner makes it again instead; ``before``: what the block keeps for what lies before the module."""

    block: int
    rows: int
    columns: int
    vectors: int
    number: int  # bytes of one
    source: int
    source_bytes: int
    remade: bool
    before: int
    bias: int

    @property
    def trained_number(self) -> int:
        """PEFT trains in float32 at least."""
        return max(4, self.number)


class Profile:
    """The costs of a model's blocks and units, for one batch and one way to train."""

    def __init__(
        self,
        model: Any,
        batch: Mapping[str, Any],
        conditions: Conditions,
        inventory: Inventory,
        calibration: Calibration | None = None,
        usual: Mapping[str, Any] | None = None,
        accumulation: int = 1,
        replayed: bool = False,
    ) -> None:
        """Count the model, which is on the meta device, with nothing trained.

        Args:
            usual: the batch whose time is told, if not the same.
            accumulation: batches of an optimizer's step, of which seconds are one's share.
            replayed: whether both passes are replayed as a CUDA graph.
        """
        self.conditions, self.calibration = conditions, calibration
        self.accumulation, self.replayed = accumulation, replayed
        alike = usual is None or all(usual[name].shape == tensor.shape for name, tensor in batch.items())
        self._timed = (
            self
            if alike
            else Profile(model, usual or {}, conditions, inventory, calibration, None, accumulation, replayed)
        )
        model.requires_grad_(False).train()
        ledger = held_by(model, conditions, "attention_mask" in batch)
        reads: dict[str, _Read] = {}
        handles = _watch_inputs(model, inventory, reads, ledger)
        embedding = model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda _module, _args, y: y.requires_grad_()))
        try:
            deferred_logits.defer(model, batch)
            with counting(conditions), fused(model):
                forward_and_backward(model, batch, conditions, ledger, lambda: _look(reads, ledger))
        finally:
            deferred_logits.undo(model)
            for handle in handles:
                handle.remove()
        self.held = sum(ledger.spans[0].end.values()) + (0 if conditions.cuda else KERNEL * kernels(ledger))
        self._read_spans(ledger)
        order = {name: place for place, name in enumerate(self.names)}
        self.modules = {
            info.name: _Module(
                order.get(info.layer, 0),
                info.shape[0],
                math.prod(info.shape[1:]),
                reads[info.name].vectors,
                model.get_submodule(info.name).weight.element_size(),
                reads[info.name].source,
                reads[info.name].bytes,
                reads[info.name].remade,
                reads[info.name].before,
                info.shape[0] if info.bias else 0,
            )
            for info in inventory.modules
            if info.name in reads
        }
        self._sizes = tuple(
            np.array([getattr(block, name) for block in self.blocks], dtype=float)
            for name in ("kept", "forward_peak", "backward_peak")
        )
        # Seconds of the device and of its host by block, and behind them of what is in none.
        self._seconds = {
            way: [self._time(work) for work in (*(block.work[way] for block in self.blocks), self.rest[way])]
            for way in OPERATIONS
        }
        self._tuned = {way: self._host_of_a_module(way) for way in OPERATIONS}

    def _read_spans(self, ledger: Ledger) -> None:
        """Blocks in the order in which they are passed, and what lies between and behind them."""
        spans = ledger.spans[1:-1]
        self.names = [span.block for span in spans if span.name == "forward" and span.block]
        backward: dict[str, Span] = {span.block: span for span in spans if span.name == "backward" and span.block}
        self.blocks: list[_Block] = []
        self.rest: dict[str, Counter[Work]] = {"forward": Counter(), "backward": Counter()}
        self.tail_kept = self.tail_peak = 0
        for span in spans:
            start, end, peak = (sum(areas.values()) for areas in (span.start, span.end, span.peak))
            if span.block and span.name == "forward":
                back = backward.get(span.block)
                work = {"forward": span.work, "backward": back.work if back else Counter()}
                back_peak = sum(back.peak.values()) - sum(back.start.values()) if back else 0
                self.blocks.append(_Block(end - start, peak - start, back_peak, work))
            elif not span.block:
                self.rest["forward" if span.name == "forward" else "backward"].update(span.work)
                behind = len(self.blocks) == len(self.names)
                if span.name == "forward" and behind:
                    self.tail_kept, self.tail_peak = end - start, peak - start
                elif span.name == "backward" and behind:
                    self.tail_peak = max(self.tail_peak, self.tail_kept + peak - start)

    def _time(self, work: Mapping[Work, int]) -> tuple[float, float]:
        return (math.nan, math.nan) if self.calibration is None else work_parts(work, self.calibration)

    def cost(self, plan: Mapping[str, Chosen]) -> PlanCost:
        """The cost of training these units of these modules.

        Raises KeyError for a module that the profile does not have.
        """
        lowest = min((self.modules[name].block for name in plan), default=len(self.blocks))
        kept, gradients = np.zeros(len(self.blocks)), np.zeros(len(self.blocks))
        trained = extra = tuned = launched = tensors = 0
        seconds = 0.0
        sources: set[int] = set()
        for name, chosen in plan.items():
            unit = self.units(name, chosen)
            trained += unit.numbers
            extra += unit.held
            gradients[unit.place] += unit.gradient
            kept[unit.place] += unit.kept
            if unit.source_bytes and unit.source not in sources:
                sources.add(unit.source)
                kept[unit.place] += unit.source_bytes
            seconds += unit.seconds
            parts = sum(map(bool, (chosen.columns, chosen.rows, chosen.elements)))
            tuned += bool(parts)
            launched += self.conditions.cuda and bool(chosen.elements)  # the kernel of their gradients
            tensors += parts + bool(chosen.directions) + chosen.weight + chosen.bias
        if lowest < len(self.blocks):
            before = min(self.modules[name].before for name in plan if self.modules[name].block == lowest)
            kept[lowest] -= min(before, self.blocks[lowest].kept)
        memory = int(self._peak(lowest, kept, gradients)) + self.held + extra
        step = self._step_seconds(lowest, seconds, tuned, launched, int(gradients.sum()), tensors)
        return PlanCost(memory, step, trained, lowest)

    def units(self, name: str, chosen: Chosen) -> UnitCost:
        """What these units of a module add. Raises KeyError for a module that the profile does not have."""
        module = self.modules[name]
        numbers, held, kept = _of(module, chosen)
        reads = chosen.weight or (not module.remade and bool(chosen.rows or chosen.elements))
        return UnitCost(
            min(module.block, len(self.blocks) - 1),
            numbers,
            held + self._states(numbers),
            kept,
            numbers * module.trained_number,
            module.source,
            module.source_bytes if reads else 0,
            math.nan if self.calibration is None else self._unit_seconds(self._timed.modules[name], chosen),
        )

    def seconds(self, lowest: int) -> float:
        """Of a step that trains nothing, differentiated down to the block ``lowest``."""
        return self._step_seconds(lowest)

    def _step_seconds(
        self,
        lowest: int,
        units: float = 0.0,
        tuned: int = 0,
        launched: int = 0,
        trained: int = 0,
        tensors: int = 0,
    ) -> float:
        """With so much more for units of so many modules, kernels that are launched for them, and the optimizer's part of so many bytes in
        so many tensors."""
        if self.calibration is None:
            return math.nan
        found = optimizer_seconds(trained, tensors, self.calibration) / self.accumulation
        timed = self._timed
        for way, start in (("forward", 0), ("backward", lowest)):
            device, host = (math.fsum(parts) for parts in zip(*timed._seconds[way][start:], strict=True))
            if way == "backward":
                device, host = device + units, host + LAUNCHED * launched * self.calibration.per_operation
            found += together(device, host + tuned * timed._tuned[way], self.calibration, self.replayed)
        return found

    def _host_of_a_module(self, way: str) -> float:
        """What the host does in a pass for the tuner's operators of a module."""
        if self.calibration is None:
            return math.nan
        again = way == "backward" and any(each.way == "again" for block in self.blocks for each in block.work[way])
        ways = [way, *(["forward"] if again else [])]
        made = {Work(HOST, 0, 0, torch.int64, way=one if one == way else "again"): OPERATIONS[one] for one in ways}
        return work_parts(made, self.calibration)[1] + len(ways) * tuned_seconds(self.calibration)

    @functools.cached_property
    def once(self) -> float:
        """Seconds for training anything of a module, beside its units; none of them where a GPU is what the host waits for."""
        nothing = len(self.blocks)
        return (
            0.0 if self.calibration is None else self._step_seconds(nothing, tuned=1, tensors=1) - self.seconds(nothing)
        )

    def frozen_memory(self, lowest: int) -> int:
        """Bytes at most of the same step."""
        nothing = np.zeros(len(self.blocks))
        return int(self._peak(lowest, nothing, nothing)) + self.held

    def _states(self, numbers: int) -> int:
        """Of an optimizer that holds no more of a tensor than its numbers say."""
        return state_size(self.conditions.optimizer)(torch.empty(numbers, device="meta"))

    def _peak(self, lowest: int, kept: np.ndarray, gradients: np.ndarray) -> float:
        """The most that is held beyond what is held all the time, of what plans keep and have gradients of in each block."""
        if not self.blocks:
            return float(self.tail_peak)
        own, forward, backward = self._sizes
        reached = np.arange(len(self.blocks)) >= lowest
        kept, gradients = np.where(reached, kept, 0), np.where(reached, gradients, 0)
        live = np.cumsum(np.where(reached, own, 0) + kept)  # when each block's forward pass ends
        done = np.cumsum(gradients[::-1])[::-1]  # of gradients, when its backward pass ends
        begins = np.concatenate([[0.0], live[:-1]])
        forwards, backwards = begins + forward + kept, np.where(reached, live + backward + done, 0)
        return float(max(forwards.max(), live[-1] + self.tail_peak, backwards.max(), gradients.sum()))

    def _unit_seconds(self, module: _Module, chosen: Chosen) -> float:
        assert self.calibration is not None
        t, size = module.vectors, module.number
        dtype = "bfloat16" if size == 2 else "float32"
        flops = 2.0 * t * (chosen.columns * module.rows + chosen.rows * module.columns)
        flops += 4.0 * t * chosen.directions * (module.rows + module.columns)
        flops += 2.0 * t * module.rows * module.columns * chosen.weight
        moved = size * (3 * t * (chosen.columns + chosen.directions) + t * (module.rows + module.columns))
        single, whole = chosen.elements, module.rows * module.columns
        if self.conditions.cuda:
            flops += 2.0 * t * min(80.0 * single, whole)
            if not flops:
                return moving(self.calibration, dtype, "", moved)
            amount, speed = self.calibration.bandwidth[0]
            return COMPUTING * amount / speed + multiplying(self.calibration, dtype, flops, moved)
        sampled, shape = 0.0, (module.rows, module.columns)
        of = self.conditions.autocast or getattr(torch, dtype)
        if sampled_on_cpu.cost(single, shape, of) >= whole:
            flops += 2.0 * t * whole
        elif sampled_on_cpu.takes_dots(single, shape, of):
            flops += sampled_on_cpu.flops_of_dots(t, single, shape, of)
        else:
            size = of.itemsize
            sampled = moving(self.calibration, dtype_name(of), "gather", 4.0 * size * t * single)  # of both factors
            sampled += moving(self.calibration, "float32", "add", (16.0 + (12.0 if size < 4 else 0.0)) * t * single)
        return sampled + (multiplying(self.calibration, dtype, flops, moved) if flops else 0.0)


def _of(module: _Module, chosen: Chosen) -> tuple[int, int, int]:
    """Numbers that are trained, bytes held for them all the time but states, and bytes kept of the module's input."""
    size = module.number
    whole = module.rows * module.columns if chosen.weight else 0
    parts = chosen.columns * module.rows + chosen.rows * module.columns + chosen.elements
    along = chosen.directions * module.rows
    numbers = whole + parts + along + (module.bias if chosen.bias else 0)
    held = numbers * module.trained_number + parts * size
    held += INDEX * (chosen.columns + chosen.rows) + ELEMENT_INDEX * chosen.elements
    held += 4 * chosen.directions * module.columns
    kept = module.vectors * size * (chosen.columns + chosen.directions)
    if module.trained_number > size:  # the product reads a narrow copy
        kept += whole * size
    return numbers, held, kept


@dataclasses.dataclass
class _Read:
    """What a module reads; the fields are those of ``_Module``."""

    vectors: int
    source: int
    bytes: int
    remade: bool
    before: int
    storage: Any
    place: tuple[int, int]  # how many storages were made before its block, and before it


def _watch_inputs(model: nn.Module, inventory: Inventory, reads: dict[str, _Read], ledger: Ledger) -> list[Any]:
    """Note what each module reads in the next forward pass."""

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0] if args else None
            if isinstance(x, Tensor) and x.is_floating_point() and name not in reads:
                again = recompute.is_wanted(x) and recompute.recipe(x.grad_fn) is not None
                storage = x.untyped_storage()
                vectors, place = x.numel() // x.shape[-1], (ledger.spans[-1].made, ledger.made)
                reads[name] = _Read(vectors, storage._cdata, storage.nbytes(), again, 0, ledger.known(x), place)

        return hook

    output = output_weight(model)  # whose layer is not watched, or its logits would be made (layers/deferred_logits.py)
    modules = {info.name: model.get_submodule(info.name) for info in inventory.modules}
    return [
        module.register_forward_pre_hook(note(name)) for name, module in modules.items() if module.weight is not output
    ]


def _look(reads: Mapping[str, _Read], ledger: Ledger) -> None:
    """What is kept by autograd as it is need not be kept once more."""
    for read in reads.values():
        read.before = ledger.alive_of(*read.place)
        if read.storage is not None and ledger.is_alive(read.storage):
            read.bytes = 0
