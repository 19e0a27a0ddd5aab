"""One training step, counted on the meta device: what it holds at most, for what, and how much work it is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reltune.cost import heap, stand_ins
from reltune.cost.blocks import block_lists
from reltune.cost.ledger import ROUNDING, Ledger, Span, Work
from reltune.errors import InputError, nearest
from reltune.ops.stand_in import standing_for_cuda

# What memory is for, in the order in which it is shown.
AREAS = {
    "weights": "weights, frozen",
    "trained": "weights, trained",
    "gradients": "gradients",
    "states": "optimizer states",
    "activations": "activations",
    "loss": "logits and loss",
    "passing": "gradients on their way",
    "batch": "the batch",
    "kernels": "kernels of products",
}
# oneDNN makes a kernel for each shape of a product of narrow numbers, and keeps the latest of them. On an AMD EPYC with AVX-512 in
# bfloat16 a process grew by 0.60 to 0.69 MiB with each new shape, from 256 × 256 to 2048 × 2048; with products in float32 not at all.
KERNEL, KERNELS = 655 << 10, 1024
CPU_ROUNDING = 64  # bytes: what PyTorch's allocator on a CPU aligns to
STORAGES = 50_000  # of a step that are gone through for the holes of a heap: more take seconds, and the small ones hardly move its top


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How a model is trained.

    Attributes:
        cuda: on a CUDA device, or else on a CPU.
        autocast: the type of products under mixed precision, or None.
        liger: with Liger's kernels.
        optimizer: a name that ``optim`` of transformers.TrainingArguments may have; see ``OPTIMIZERS``.
        accumulates: whether gradients of earlier batches are held while a batch is computed.
        gives_back: whether malloc gives back what is freed on a CPU (``memory.give_back_what_is_freed``), so that its heap has no holes.
    """

    cuda: bool = True
    autocast: torch.dtype | None = None
    liger: bool = False
    optimizer: str = "adamw_torch_fused"
    accumulates: bool = False
    gives_back: bool = False


@dataclasses.dataclass
class StepCount:
    """What was counted of a step, in bytes.

    Attributes:
        peak: what memory is for when most is held, by ``AREAS``.
        kept: alive when the forward pass ends, beyond what is held all the time.
        work: by part of the step (forward, backward), how often each operation's work is done.
        frozen: of the forward pass, the work of the ``frozen_blocks`` lowest blocks, which hold nothing that is trained; of ``blocks``.
        trained: numbers that are trained, ``trained_bytes`` their size, and ``tensors`` how many tensors they are in.
        state_bytes: the optimizer's states.
        tuned: modules in whose weight the tuner trains columns, rows or single weights.
        holes: beyond what tensors hold, of malloc's heap on a CPU.
    """

    conditions: Conditions
    peak: dict[str, int]
    kept: int
    work: dict[str, Counter[Work]]
    trained: int
    trained_bytes: int
    state_bytes: int
    tensors: int
    frozen: Counter[Work] = dataclasses.field(default_factory=Counter)
    frozen_blocks: int = 0
    blocks: int = 0
    tuned: int = 0
    holes: int = 0

    @property
    def bytes(self) -> int:
        """The most that tensors hold at a time."""
        return sum(self.peak.values())


def _plain(states: int) -> Callable[[Tensor], int]:
    return lambda p: states * p.numel() * p.element_size()


def _in_8_bits(states: int) -> Callable[[Tensor], int]:
    """bitsandbytes: a byte for each number and a scale for 256 of them; small tensors stay in float32."""

    def size(p: Tensor) -> int:
        return states * (p.numel() + 4 * math.ceil(p.numel() / 256) if p.numel() >= 4096 else 4 * p.numel())

    return size


def _adafactor(p: Tensor) -> int:
    return 4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel())


# ``optim`` of TrainingArguments -> bytes of its states for a trained tensor.
OPTIMIZERS: dict[str, Callable[[Tensor], int]] = {
    "adamw_torch": _plain(2),
    "adamw_torch_fused": _plain(2),
    "adamw_8bit": _in_8_bits(2),
    "adamw_bnb_8bit": _in_8_bits(2),
    "paged_adamw_8bit": _in_8_bits(2),
    "adafactor": _adafactor,
    "lion_32bit": _plain(1),
    "lion_8bit": _in_8_bits(1),
    "sgd": _plain(0),
}


ALL_AT_ONCE = ("adamw_torch",)  # those that make a copy of all that is trained in their step, on CUDA


def count_step(
    model: nn.Module, batch: Mapping[str, Any], conditions: Conditions, repeats: Mapping[str, int] | None = None
) -> StepCount:
    """Count forward, backward and what the optimizer holds, of a model and a batch on the meta device.

    The model must be as it will be trained, in training mode, with what is trained requiring a gradient. An adapter must
    have been put in inside of ``counting``.

    Args:
        batch: what the model is called with, labels included.
        repeats: what ``blocks.shorten`` gave, if it took blocks out.
    """
    size_of = state_size(conditions.optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("nothing in the model requires a gradient, so there is no training step to count.")
    base = base_of(model)
    blocks = {name: base.get_submodule(name) for name in repeats or ()}
    ledger = held_by(model, conditions, "attention_mask" in batch)
    forward_and_backward(model, batch, conditions, ledger)
    more = {name: (repeats or {})[name] - 1 for name in blocks}
    timeline = _Timeline(ledger.spans[0].end)
    for name, block in blocks.items():
        timeline.add(held_by(block, conditions).areas, more[name])
    before = sum(timeline.live.values())
    work: dict[str, Counter[Work]] = {"forward": Counter(), "backward": Counter()}
    kept = all_blocks = frozen_blocks = 0
    frozen: Counter[Work] = Counter()
    for span in ledger.spans[1:-1]:
        times = more.get(span.block, 0) + 1
        timeline.go(span, times)
        for done, count in span.work.items():
            work[span.name][done] += count * times
        if span.block and span.name == "forward":
            below = frozen_blocks == all_blocks
            all_blocks += times
            if below and not any(p.requires_grad for p in base.get_submodule(span.block).parameters()):
                frozen_blocks += times
                frozen.update({done: count * times for done, count in span.work.items()})
        if span.name == "forward":
            kept = sum(timeline.live.values()) - before
    if not conditions.cuda:
        timeline.peak["kernels"] = KERNEL * kernels(ledger, repeats)
    own = {name: [p for p in block.parameters() if p.requires_grad] for name, block in blocks.items()}

    def total(of: Callable[[Tensor], int]) -> int:
        return sum(map(of, trained)) + sum(more[name] * sum(map(of, own[name])) for name in own)

    trained_bytes = total(lambda p: p.numel() * p.element_size())
    if conditions.cuda and conditions.optimizer in ALL_AT_ONCE:
        timeline.add(Counter(states=trained_bytes), 1)
        timeline.look()
    holes = 0
    if not conditions.cuda and not conditions.gives_back:
        pieces = [size_of(p) // 2 for p in trained for _ in range(2)]
        pieces += [size_of(p) // 2 for name in own for p in own[name] for _ in range(2 * more[name])]
        least = _least(ledger, more)
        step = ((name, size, forward) for name, size, forward in _in_order(ledger, more) if abs(size) > least)
        holes = heap.holes(step, filter(None, pieces))
    return StepCount(
        conditions,
        {area: timeline.peak[area] for area in AREAS},
        kept,
        work,
        total(lambda p: p.numel()),
        trained_bytes,
        total(size_of),
        total(lambda p: 1),
        frozen,
        frozen_blocks,
        all_blocks,
        _tuned(model) + sum(more[name] * _tuned(block) for name, block in blocks.items()),
        holes,
    )


def _least(ledger: Ledger, more: Mapping[str, int]) -> int:
    """Bytes above which storages are gone through for holes, so that they are no more than ``STORAGES``."""
    sizes = sorted((size for _, size in ledger.events if size > 0), reverse=True)
    most = STORAGES // (1 + max(more.values(), default=0))
    return sizes[most] if len(sizes) > most else 0


def _in_order(ledger: Ledger, more: Mapping[str, int]) -> Iterator[tuple[tuple[int, int], int, bool]]:
    """The storages of a step as ``heap.holes`` takes them, with blocks as often as they are there.

    A block that is there again lets go of what it was let go of the block before: where that was made outside, of a storage of as many bytes
    that it made itself the time before and a neighbour let go.
    """
    spans = ledger.spans
    ends = [span.events for span in spans[1:]] + [len(ledger.events)]
    made_in: dict[int, int] = {}
    gone_in: dict[int, int] = {}
    for index, end in enumerate(ends):
        for number, size in ledger.events[spans[index].events : end]:
            (made_in if size > 0 else gone_in)[number] = index
    sizes = {number: size for number, size in ledger.events if size > 0}
    there: dict[int, list[int]] = {
        number: [] for number in sizes
    }  # the turns of a block that made a storage and hold it
    for index, span in enumerate(spans[1:], 1):
        events = ledger.events[span.events : ends[index]]
        forward, times = span.name == "forward", more.get(span.block, 0) + 1
        own = [i for i, one in enumerate(spans[: index + 1]) if one.block == span.block] if times > 1 else []
        outside = [
            number
            for number, made in made_in.items()
            if made in own and (gone := gone_in.get(number, 0)) != index and spans[gone].name == span.name
        ]
        for turn in range(times):
            handed: dict[int, list[int]] = {}
            for number in filter(there.get, outside):
                handed.setdefault(sizes[number], []).append(number)
            for number, size in events:
                if size > 0:
                    there[number].append(turn)
                    yield (number, turn), size, forward
                elif not made_in[number]:
                    continue  # it was there before the step
                elif span.name == "end":
                    for each in there.pop(number):
                        yield (number, each), size, forward
                elif there[number] and (made_in[number] in own or not turn):
                    yield (number, there[number].pop()), size, forward
                elif handed.get(-size):
                    other = handed[-size].pop(0)
                    yield (other, there[other].pop(0)), size, forward


def kernels(ledger: Ledger, repeats: Mapping[str, int] | None = None) -> int:
    """How many kernels oneDNN keeps of the products that were counted, with batches that are all of one shape.

    The rows that each of several matrices gets have another number in each block. As many are expected to differ as do where each row goes to
    any of the matrices by chance.
    """
    times: Counter[tuple[Any, int, int]] = Counter()
    for shape, rows, matrices, block in ledger.groups:
        times[shape, rows, matrices] += matrices * (repeats or {}).get(block, 1)
    count = float(len(ledger.shapes))
    for (_, rows, matrices), draws in times.items():
        of_rows = torch.distributions.Binomial(rows, torch.tensor(1 / matrices, dtype=torch.float64, device="cpu"))
        numbers = torch.arange(1, rows + 1, dtype=torch.float64, device="cpu")
        count += float((1 - (1 - of_rows.log_prob(numbers).exp()) ** draws).sum())
    return min(KERNELS, round(count))


def held_by(module: nn.Module, conditions: Conditions, padded: bool = False) -> Ledger:
    """A ledger with what a module, its gradients and its optimizer states hold all the time."""
    size_of, rounding = state_size(conditions.optimizer), ROUNDING if conditions.cuda else CPU_ROUNDING
    ledger = Ledger(rounding, padded)
    ledger.enter([*module.parameters(), *module.buffers(), *_hidden(module)], "weights")
    trained = [p for p in module.parameters() if p.requires_grad]
    ledger.enter(trained, "trained")
    for p in trained:
        ledger.hold(round_up(size_of(p), rounding) + rounding, "states")  # and a count of steps
        if conditions.accumulates:
            ledger.hold(round_up(p.numel() * p.element_size(), rounding), "gradients")
    return ledger


def forward_and_backward(
    model: nn.Module,
    batch: Mapping[str, Any],
    conditions: Conditions,
    ledger: Ledger,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Have the ledger count both passes, in spans from the second on. ``between`` them something may be looked at."""
    ledger.enter([t for t in batch.values() if isinstance(t, Tensor)], "batch")
    base, trained = base_of(model), [p for p in model.parameters() if p.requires_grad]
    with contextlib.ExitStack() as stack:
        stack.enter_context(counting(conditions))
        if conditions.liger:
            stack.enter_context(stand_ins.liger(base))
        stack.enter_context(ledger)
        behind = functools.partial(setattr, ledger, "area", "loss")
        stack.enter_context(stand_ins.Kernels(conditions.cuda, output_weight(base), behind))
        stack.enter_context(_checkpoints(base, conditions, ledger))
        stack.enter_context(_watched(trained, ledger, conditions.accumulates))
        ledger.mark("forward")
        ledger.area = "activations"
        stack.enter_context(_at_work(base, ledger))
        with (
            stand_ins.Autocast(conditions.autocast, conditions.cuda)
            if conditions.autocast
            else contextlib.nullcontext()
        ):
            loss = model(**batch).loss
        between()
        ledger.mark("backward")
        ledger.area = "passing"
        loss.backward()
        ledger.mark("end")
    for p in trained:
        p.grad = None


def state_size(optimizer: str) -> Callable[[Tensor], int]:
    """Bytes of an optimizer's states for a trained tensor. Raises InputError for one that is not known."""
    found = OPTIMIZERS.get(optimizer)
    if found is None:
        raise InputError(f"the states of optim {optimizer!r} are not known; {nearest(optimizer, OPTIMIZERS)}")
    return found


def base_of(model: Any) -> Any:
    """The model without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def round_up(count: int, rounding: int) -> int:
    return -(-count // rounding) * rounding


class _Timeline:
    """What is alive in the course of a step, put together from spans."""

    def __init__(self, live: Counter[str]) -> None:
        self.live = live.copy()
        self.peak: Counter[str] = live.copy()

    def add(self, areas: Counter[str], times: int) -> None:
        for area, count in areas.items():
            self.live[area] += times * count

    def look(self) -> None:
        """Take what is alive for the most, if it is."""
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = self.live.copy()

    def go(self, span: Span, times: int) -> None:
        """Add a span so many times in a row. What is held grows evenly, so that its most is in the first or in the last."""
        for turn in (0, times - 1):
            peak = self.live.copy()
            for area in {*span.start, *span.end, *span.peak}:
                peak[area] += turn * (span.end[area] - span.start[area]) + span.peak[area] - span.start[area]
            if sum(peak.values()) > sum(self.peak.values()):
                self.peak = peak
        for area in {*span.start, *span.end}:
            self.live[area] += times * (span.end[area] - span.start[area])


@contextlib.contextmanager
def _at_work(base: nn.Module, ledger: Ledger) -> Iterator[None]:
    """Begin a span of the ledger with each block, forward and backward."""
    names = {id(module): name for name, module in base.named_modules()}
    handles: list[Any] = []

    def before(block: nn.Module, *_: Any) -> None:
        if ledger.spans[-1].name == "forward":  # not where a checkpoint makes it again
            ledger.mark("forward", names[id(block)])

    def after(block: nn.Module, _: Any, output: Any) -> None:
        if ledger.spans[-1].name != "forward":
            return
        if block in last:  # what comes after another one is its own: its input is let go only then
            ledger.mark("forward")
        y = output if isinstance(output, Tensor) else output[0]
        if y.requires_grad:
            handles.append(y.register_hook(lambda _: ledger.mark("backward", names[id(block)])))

    last = set()
    for blocks in block_lists(base):
        last.add(blocks[-1])
        for block in blocks:
            handles.append(block.register_forward_pre_hook(before))
            handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def counting(conditions: Conditions) -> Iterator[None]:
    """Take the meta device for the one that is counted for, until the context ends."""
    with standing_for_cuda(conditions.cuda, conditions.autocast):
        yield


def _hidden(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold beside parameters and buffers: the tuner's copies of what it trains in the base."""
    for module in model.modules():
        for kept in getattr(module, "originals", {}).values():
            found: list[Tensor] = []
            kept.apply(lambda t, found=found: found.append(t) or t)
            yield from found


def _tuned(model: nn.Module) -> int:
    return sum(bool(getattr(module, "originals", None)) for module in model.modules())


@contextlib.contextmanager
def _watched(trained: Iterable[Tensor], ledger: Ledger, accumulates: bool) -> Iterator[None]:
    """Tell the ledger of gradients when they are done."""
    handles: list[Any] = []

    def done(p: Tensor) -> None:
        if p.grad is not None:
            ledger.enter([p.grad], "gradients" if not accumulates else "passing")

    handles += [p.register_post_accumulate_grad_hook(done) for p in trained]
    try:
        yield
    finally:
        ledger.area = "passing"
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _checkpoints(base: nn.Module, conditions: Conditions, ledger: Ledger) -> Iterator[None]:
    """Let checkpoints make blocks again as they were made: inside of a backward pass PyTorch switches stand-ins off."""

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(stand_ins.Kernels(conditions.cuda))
            if conditions.autocast:
                stack.enter_context(stand_ins.Autocast(conditions.autocast, conditions.cuda))
            ledger.again = True
            stack.callback(setattr, ledger, "again", False)
            yield

    function = functools.partial(
        checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again())
    )
    changed: list[tuple[Any, Any]] = []
    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            changed.append((module, module._gradient_checkpointing_func))
            module._gradient_checkpointing_func = function  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, own in changed:
            module._gradient_checkpointing_func = own


def output_weight(base: Any) -> Tensor | None:
    """The weight that makes logits over a vocabulary; what is made from there on is for the loss."""
    get = getattr(base, "get_output_embeddings", None)
    try:
        return getattr(get(), "weight", None) if get else None
    except NotImplementedError:
        return None
