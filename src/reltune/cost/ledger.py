"""Counts what operations on the meta device would hold and do: bytes alive, their peak, and the work of every operation.

The operations are those that autograd and the model really call, so that what is counted is what would be kept: a tensor
counts from the operation that makes its storage until nothing refers to it any more, as it does in a device's allocator.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from reltune.ops import stand_in

COUNTED = "counted_bytes"  # an attribute of tensors that stand for ones of another size, such as weights in few bits
KERNEL, EXPERT = "reltune::kernel", "reltune::expert"  # ops/stand_in.py
HOST = "host"  # the name of what the device has no work with
ATTENTION_ON_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"
FUSED = "aten::_scaled_dot_product"  # how the names of fused attention begin, on any device
BLOCK = 128  # queries, and keys, that a GPU's fused attention takes at a time
EXPERTS = "transformers::grouped_mm_fallback"  # products of each token with its own expert's weight
ROUNDING = 512  # bytes: CUDA's caching allocator hands out multiples of it


@dataclasses.dataclass(frozen=True)
class Work:
    """One operation's work.

    Attributes:
        name: aten's name of it.
        flops: multiplications and additions, of products, convolutions and attention alone; of fused attention on a GPU those of its blocks.
        bytes: numbers read and written.
        dtype: of the numbers it multiplies.
        made: bytes of the storages that it makes.
        vectors: of attention, half of the queries and keys of all heads.
        plain: whether it goes through tensors that lie alike number by number, as what a calibration measures of memory does.
        way: "forward", "backward", or "again", in a forward pass that checkpointing does in the backward pass.
    """

    name: str
    flops: int
    bytes: int
    dtype: torch.dtype
    made: int = 0
    vectors: int = 0
    way: str = "forward"
    plain: bool = False


@dataclasses.dataclass
class Span:
    """What happened between two marks.

    Attributes:
        name: the part of the step.
        block: the block of the model that was at work; empty between blocks.
        start, end, peak: bytes alive at its start, at its end, and when they were most, by what they were for.
        work: how often each work was done.
        made: how many storages were counted before it, and ``events`` how often one was made or let go.
    """

    name: str
    block: str
    start: Counter[str]
    end: Counter[str]
    peak: Counter[str]
    work: Counter[Work] = dataclasses.field(default_factory=Counter)
    most: int = 0
    made: int = 0
    events: int = 0


@dataclasses.dataclass
class _Storage:
    size: int
    area: str
    made: int  # how many were made before
    alive: weakref.ref


# Operations that make a view, or nothing but room: work of the host alone.
_NO_WORK = {
    "aten::view", "aten::_unsafe_view", "aten::t", "aten::transpose.int", "aten::permute", "aten::expand", "aten::slice.Tensor",
    "aten::select.int", "aten::unsqueeze", "aten::squeeze.dim", "aten::detach", "aten::alias", "aten::empty.memory_format",
    "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::split.Tensor",
    "aten::split_with_sizes", "aten::unbind.int", "aten::as_strided", "aten::lift_fresh", "aten::_local_scalar_dense",
    "aten::unfold", "aten::diagonal", "aten::view_as_complex", "aten::view_as_real", "aten::view.dtype",
}  # fmt: skip
# What is added to a tensor takes as many operations as a new one; flop_counter does not know of them.
_WRITTEN_INTO = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
# Products for which oneDNN makes a kernel of each shape on a CPU, where their numbers are narrow.
_PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::baddbmm",
    "aten::baddbmm_",
    "aten::convolution",
}
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::clone"}
_GROUPED = "aten::_grouped_mm"  # each row of the first with one matrix of the second, or of their product
# Of these, no more is read than is asked for.
_LOOK_UPS = ("aten::embedding", "aten::index_select", "aten::gather", "aten::index.Tensor")


class Ledger(TorchDispatchMode):
    """Counts inside its context.

    Attributes:
        padded: whether the batch has padding, where a model asks whether its mask is all ones.
        area: what new tensors are for, until it is set to another one.
        again: whether a forward pass is done again.
        made: how many storages were counted so far.
        areas: bytes alive, of the tensors that were entered or made inside, by what they are for.
        shapes: of products of narrow numbers.
        groups: of those of rows with one of several matrices each: shape, rows, matrices, and in which block.
        spans: one for each ``mark``.
        events: of storages, in the order in which they were made (their number and bytes) and let go (and less than zero).
    """

    def __init__(self, rounding: int = ROUNDING, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded
        self.rounding = rounding
        self.area = "activations"
        self.again = False
        self.live = self.made = 0
        self.areas: Counter[str] = Counter()
        self.shapes: set[Any] = set()
        self.groups: set[tuple[Any, int, int, str]] = set()
        self.spans: list[Span] = []
        self.events: list[tuple[int, int]] = []
        self.mark("start")
        self._known: dict[int, _Storage] = {}

    def mark(self, name: str, block: str = "") -> None:
        """Begin a span."""
        if self.spans:
            self.spans[-1].end = self.areas.copy()
        start, end, peak = (self.areas.copy() for _ in range(3))
        self.spans.append(Span(name, block, start, end, peak, most=self.live, made=self.made, events=len(self.events)))

    def enter(self, tensors: Iterable[Tensor], area: str) -> None:
        """Count tensors that were made outside, such as weights; of those that are known, change the area."""
        for tensor in tensors:
            self._enter(tensor, area)
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is not None:
                self._move(known, area)

    def known(self, tensor: Tensor) -> _Storage | None:
        """What the ledger has of the tensor's storage, to ask ``is_alive`` of later."""
        return self._known.get(tensor.untyped_storage()._cdata)

    def alive_of(self, first: int, end: int) -> int:
        """Bytes alive of the storages that were made from the ``first``-th on and before the ``end``-th."""
        return sum(storage.size for storage in self._known.values() if first <= storage.made < end)

    def is_alive(self, storage: _Storage) -> bool:
        return any(each is storage for each in self._known.values())

    def _move(self, storage: _Storage, area: str) -> None:
        self.areas[storage.area] -= storage.size
        self.areas[area] += storage.size
        storage.area = area

    def hold(self, count: int, area: str) -> None:
        """Count so many bytes that no tensor stands for."""
        self.live += count
        self.areas[area] += count
        span = self.spans[-1]
        if self.live > span.most:
            span.most, span.peak = self.live, self.areas.copy()

    def _enter(self, tensor: Tensor, area: str) -> int:
        """Count the tensor's storage, if it is not known. Gives the bytes that were counted."""
        if not tensor.is_meta:  # the few numbers that stay on the host
            return 0
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return 0
        size = getattr(tensor, COUNTED, storage.nbytes())
        size = -(-size // self.rounding) * self.rounding

        def gone(_: Any) -> None:
            known = self._known.pop(key)
            self.live -= known.size
            self.areas[known.area] -= known.size
            if known.size:  # without bytes it would be taken for one that is made
                self.events.append((known.made, -known.size))

        self._known[key] = _Storage(size, area, self.made, weakref.ref(storage, gone))
        if size:
            self.events.append((self.made, size))
        self.made += 1
        self.hold(size, area)
        return size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # What a model asks of numbers is whether sequences are whole.
            return not self.padded if args[0].dtype == torch.bool else 0
        result = func(*args, **kwargs)
        name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        written = [t for t in tree_iter(result) if isinstance(t, Tensor)]
        made = sum(self._enter(tensor, self.area) for tensor in written)
        if name not in _NO_WORK and (name in (KERNEL, EXPERT) or any(t.is_meta for t in written)):
            self._work(func, name, written, args, kwargs, result, made)
        elif any(t.is_meta for t in written):  # what has numbers is a look at whether modules compute the same, once
            self.spans[-1].work[Work(HOST, 0, 0, torch.int64, made, way=self._way())] += stand_in.repeats()
        return result

    def _way(self) -> str:
        if self.spans[-1].name != "backward":
            return "forward"
        return "again" if self.again else "backward"

    def _work(
        self, func: Any, name: str, written: list[Tensor], args: Any, kwargs: Any, result: Any, made: int
    ) -> None:
        read = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        flops = vectors = 0
        packet = _WRITTEN_INTO.get(func._overloadpacket, func._overloadpacket)
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        elif name in (KERNEL, EXPERT):
            flops, read = (args[2] if len(args) > 2 else 0), args[0]
        elif name.startswith(EXPERTS):
            flops = 2 * args[0].shape[0] * args[1].shape[1] * args[1].shape[2] * max(1, len(written))
        elif name == _GROUPED:
            flops = 2 * args[0].shape[-2] * args[0].shape[-1] * args[1].shape[-1]
        elif name == ATTENTION_ON_CPU:
            flops, vectors = 4 * args[0].numel() * args[1].shape[-2], _vectors(args[0], args[1])
        elif name == f"{ATTENTION_ON_CPU}_backward":
            flops, vectors = 10 * args[0].numel() * args[2].shape[-2], _vectors(args[1], args[2])
        if name.startswith(FUSED) and not name.startswith(ATTENTION_ON_CPU):
            given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
            queries, keys = given["query"], given["key"]
            flops = int(flops * computed_share(queries.shape[-2], keys.shape[-2], given.get("is_causal", False)))
            vectors = _vectors(queries, keys)
        moved = sum(_bytes(t) for t in (*read, *written))
        if name.startswith(_LOOK_UPS):
            moved = 2 * sum(_bytes(t) for t in written)
        elif name in ("aten::index_copy_", "aten::scatter_add_"):
            moved = 2 * _bytes(args[3])
        floats = [t.dtype for t in (*read, *written) if t.is_floating_point()]
        if flops and floats[0] in (torch.bfloat16, torch.float16):
            self._note_shape(name, read, written)
        dtype = floats[0] if floats else torch.int64
        plain = _is_plain(func, name, read, written)
        work = Work(name, int(flops), moved, dtype, made, vectors, self._way(), plain)
        self.spans[-1].work[work] += stand_in.repeats()

    def _note_shape(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        if name in _PRODUCTS:
            self.shapes.add((name, *((tuple(t.shape), t.stride()) for t in read)))
        elif name == _GROUPED:
            matrices = next(t for t in (read[1], *written) if t.ndim == 3)
            rows = read[0].shape[0 if matrices is read[1] else 1]
            own = (*matrices.shape[1:], *matrices.stride()[1:])
            self.groups.add((own, rows, len(matrices), self.spans[-1].block))


def _is_plain(func: Any, name: str, read: list[Tensor], written: list[Tensor]) -> bool:
    some = [t for t in (*read, *written) if t.numel() > 1]
    if len({t.shape for t in some}) != 1 or not all(t.is_contiguous() for t in some):
        return False
    one_type = len({t.dtype for t in some}) == 1
    if (
        name in _COPIES
    ):  # PyTorch has a kernel of its own for casts from float32 to narrow types, and not for those back
        return one_type or read[-1].dtype == torch.float32
    return one_type and torch.Tag.pointwise in func.tags


def computed_share(queries: int, keys: int, causal: bool) -> float:
    """How many scores fused attention computes on a GPU, over those of every query with every key: whole blocks of them, and where it is
    causal the blocks that reach the diagonal or lie below it."""
    down, across = math.ceil(queries / BLOCK), math.ceil(keys / BLOCK)
    blocks = sum(min(across, row + 1) for row in range(down)) if causal else down * across
    return blocks * BLOCK**2 / (queries * keys)


def _vectors(queries: Tensor, keys: Tensor) -> int:
    return (queries.numel() // queries.shape[-1] + keys.numel() // keys.shape[-1]) // 2


def _bytes(tensor: Tensor) -> int:
    """Of the numbers that are there: a tensor that was expanded has fewer than its shape says."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
