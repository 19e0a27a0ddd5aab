"""Give selected single weights of a linear map their gradient, at no cost in the forward pass.

As ops/attach.py does for columns and rows: the base weight holds the current values, y is handed on unchanged, and in the
backward pass the values get what the whole weight's gradient G has at their places. A weight of (rows, columns) as it is
stored has G = aᵀ b with a the gradient of y and b the input; where the weight is stored as (in, out), the other way
round. Places are flat indices into the stored weight, in ascending order.

Two exact ways to G at n places, for T vectors:

- dense: G itself, as many rows at a time as make BLOCK_NUMBERS, and of each block the places in it. 2·T·rows·columns
  operations at the speed of a matrix product.
- sampled: T products for each place and nothing else. 2·T·n operations, at the speed of shared memory where
  ops/kernels/sampled_groups.py takes them, else of the cache (ops/kernels/sampled_product.py, in Triton); on a CPU in
  ops/sampled_on_cpu.py.

x is needed in the backward pass, and autograd keeps it for no other purpose, as the frozen product needs the weight alone.
On an accelerator it is made again where that can be (ops/recompute.py), else it is kept by reference.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reltune.errors import InputError
from reltune.ops import kernels, recompute, sampled_on_cpu, stand_in
from reltune.ops.squared_gradient import accumulator_dtype

if TYPE_CHECKING:
    from reltune.ops.kernels.sampled_groups import Groups

Form = Literal["dense", "sampled"]

BLOCK_NUMBERS = 1 << 24  # of G at a time in the dense form: 32 MiB in bfloat16
ROWS = 256  # a block of the dense form has a multiple of them
GATHERED_NUMBERS = 1 << 22  # workspace of gathered vectors in products with the places alone

# What the sampled form costs, where an operation of a matrix product costs 1: for a vector at a place, and for each of its
# numbers, which have to be brought to where they can be picked. From times on an H200 at 8,192 vectors of 1,024 to 14,336
# numbers. In groups, with bfloat16: 1.3 to 2.1 µs for 1,000 random places, and half as much again where they crowd in some
# rows and columns; 0.02 to 0.03 ms for a matrix. A weight of the dense form takes 0.02 ns.
GROUPED_COST, GROUPED_COPY_COST = 120.0, 200.0
# The Triton kernel, by bytes per number: 0.55 of 5 TB/s from the cache, 2.5 TB/s for a copy, 25 and 30 × 10¹²
# multiplications with additions in float32 and float64; bfloat16 follows from a training step.
SAMPLED_COST = {2: 80.0, 4: 33.0, 8: 80.0}
COPY_COST = {2: 500.0, 4: 80.0, 8: 190.0}

_forced: list[Form] = []


class Places:
    """Where the chosen weights lie: flat indices (n,) into a weight of ``shape``, ascending, each named once."""

    def __init__(self, index: Tensor, shape: tuple[int, int], block_numbers: int = 0) -> None:
        self.index, self.shape, self._block_numbers = index, shape, block_numbers

    @property
    def step(self) -> int:
        """Rows of a block of the dense form: where there are many, a number for which a matrix product is quick."""
        rows = (self._block_numbers or BLOCK_NUMBERS) // self.shape[1]
        return max(1, min(self.shape[0], rows // ROWS * ROWS or rows))

    @functools.cached_property
    def starts(self) -> list[int]:
        """How many places lie before each block of rows; known to the host, so that no backward pass waits for it."""
        rows = self.shape[0]
        if self.index.is_meta:  # which places they are is not known: as many in every block
            blocks = -(-rows // self.step)
            return [len(self.index) * block // blocks for block in range(blocks + 1)]
        starts: list[int] = self._before(self.step).tolist()
        return starts

    @functools.cached_property
    def groups(self) -> Groups:
        """The places as ops/kernels/sampled_groups.py reads them. Made once, and waits for the device."""
        from reltune.ops.kernels.sampled_groups import grouped

        return grouped(self.index, self.shape)

    @functools.cached_property
    def before_rows(self) -> Tensor:
        """How many places lie before each row, and in all: (rows + 1,)."""
        return self._before(1).to(self.index.dtype)

    def _before(self, step: int) -> Tensor:
        """How many places lie before every ``step``-th row, and in all, in int64."""
        rows, columns = self.shape
        edges = torch.arange(0, rows + step, step, device=self.index.device) * columns
        return torch.searchsorted(self.index.long(), edges)

    def check(self) -> None:
        """Raise InputError for indices, read from a file, that cannot be what was written. Waits for the device."""
        if self.index.device.type == "meta" or not len(self.index):
            return
        index, numbers = self.index.long(), self.shape[0] * self.shape[1]
        if bool((index.diff() <= 0).any() | (index[0] < 0) | (index[-1] >= numbers)):
            raise InputError(
                f"an adapter's indices of single weights are not ascending numbers below {numbers:,}; its file is damaged, "
                "save it again."
            )

    def apply(self, function: Any) -> Places:
        """A copy whose indices went through ``function``, which moves them to another device, say."""
        return Places(function(self.index), self.shape, self._block_numbers)


def is_sampled(places: Places, a: Tensor) -> bool:
    """Whether the sampled form costs less, counted; on CUDA it needs one of its kernels.

    The number of vectors is on both sides.
    """
    if _forced:
        return _forced[-1] == "sampled"
    if not stand_in.on_accelerator(a):
        return sampled_on_cpu.is_cheaper(places, a)
    rows, columns = places.shape
    if _is_grouped(places, a):
        return GROUPED_COST * len(places.index) + GROUPED_COPY_COST * (rows + columns) < rows * columns
    if not (kernels.can_be_imported() or a.is_meta):
        return False
    size = a.element_size()
    return SAMPLED_COST[size] * len(places.index) + COPY_COST[size] * (rows + columns) < rows * columns


@contextmanager
def force(form: Form) -> Iterator[None]:
    """Take this form whatever it costs, in all forward passes until the context ends: for benchmarks and tests."""
    _forced.append(form)
    try:
        yield
    finally:
        _forced.pop()


def element_gradient(a: Tensor, b: Tensor, places: Places, form: Form | None = None) -> Tensor:
    """(aᵀ b) at the places: (n,) for a (T, rows) and b (T, columns) of one dtype. ``form``: the cheaper one by default."""
    if form is None:
        form = "sampled" if is_sampled(places, a) else "dense"
    if form == "dense":
        return _dense(a, b, places)
    if a.is_meta and stand_in.on_accelerator(a):
        return _sampled_on_meta(a, b, places)
    if len(places.index) and _is_grouped(places, a):
        from reltune.ops.kernels import sampled_groups

        if sampled_groups.fits(a, b):
            return sampled_groups.sampled_product(a, b, places.groups)
    if a.is_cuda and kernels.can_be_imported():
        # Imported where it is used: Triton takes a while to import.
        from reltune.ops.kernels.sampled_product import sampled_product

        return sampled_product(a, b, places.index)
    return sampled_on_cpu.sampled_product(a, b, places)


def _is_grouped(places: Places, a: Tensor) -> bool:
    """Whether ops/kernels/sampled_groups.py takes such places, with such numbers, on their device."""
    if a.is_meta:  # as on a Hopper GPU
        even = not (places.shape[0] | places.shape[1]) % 8
        return stand_in.on_accelerator(a) and even and a.dtype in (torch.bfloat16, torch.float16)
    if not a.is_cuda:
        return False
    from reltune.ops.kernels import sampled_groups

    return sampled_groups.suits(places.shape, a.dtype, a.get_device())


def _sampled_on_meta(a: Tensor, b: Tensor, places: Places) -> Tensor:
    size, count = a.element_size(), len(places.index)
    each, side = (GROUPED_COST, GROUPED_COPY_COST) if _is_grouped(places, a) else (SAMPLED_COST[size], COPY_COST[size])
    cost = each * count + side * sum(places.shape)
    sums = a.new_empty(count, dtype=torch.promote_types(a.dtype, torch.float32))
    return stand_in.kernel([a, b, places.index], [sums], int(2 * len(a) * cost))[0]


def _dense(a: Tensor, b: Tensor, places: Places) -> Tensor:
    chosen = a.new_empty(len(places.index))
    for block, (start, end) in enumerate(zip(places.starts, places.starts[1:], strict=False)):
        if start == end:
            continue
        first = block * places.step
        gradient = a[:, first : first + places.step].mT @ b
        inside = places.index[start:end] - first * places.shape[1]
        torch.index_select(gradient.view(-1), 0, inside, out=chosen[start:end])
    return chosen


class AttachElements(torch.autograd.Function):
    """(y (…, out), x (…, in), values (n,), places) -> y, with ∂values = G at the places.

    ``transposed``: the weight is stored as (in, out). The operators return y.detach(), for the reason ops/attach.py gives.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, values: Tensor, places: Places, transposed: bool) -> Tensor:
        recompute.keep(ctx, x)
        ctx.places, ctx.transposed, ctx.dtype = places, transposed, values.dtype
        ctx.form = "sampled" if is_sampled(places, y) else "dense"  # here: the backward pass may run in another thread
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient_at(g, recompute.kept(ctx)[0], ctx.places, ctx.transposed, ctx.form)
        return g, None, gradient.to(ctx.dtype), None, None


class SparseProduct(torch.autograd.Function):
    """(x (…, in), delta (n,), places) -> x Δᵀ (…, out) for the sparse matrix Δ that has ``delta`` at the places.

    Row after row of gathered vectors, added up in float32 (float64 for float64): about 3·T·n numbers moved and never Δ
    in full. With ``transposed`` Δ is stored as (in, out), and the product is x Δ.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, places: Places, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, delta)
        ctx.places, ctx.transposed = places, transposed
        ctx.form = "sampled" if is_sampled(places, x) else "dense"
        return _spread(x, delta, places, to_rows=not transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, delta = ctx.saved_tensors
        to_x = to_delta = None
        if ctx.needs_input_grad[0]:
            to_x = _spread(g, delta, ctx.places, to_rows=ctx.transposed).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_delta = gradient_at(g, x, ctx.places, ctx.transposed, ctx.form).to(delta.dtype)
        return to_x, to_delta, None, None


def gradient_at(g: Tensor, x: Tensor, places: Places, transposed: bool, form: Form) -> Tensor:
    """G at the places, for the gradient g (…, out) of y and the input x (…, in); ``transposed`` as above."""
    a, b = _flat(g), _flat(x.to(g.dtype))
    return element_gradient(b, a, places, form) if transposed else element_gradient(a, b, places, form)


def _spread(x: Tensor, delta: Tensor, places: Places, to_rows: bool) -> Tensor:
    """x Δᵀ (``to_rows``) or x Δ, in x's dtype."""
    rows, columns = places.shape
    wide = accumulator_dtype(x)
    vectors = _flat(x).mT.to(wide).contiguous()
    total = vectors.new_zeros(rows if to_rows else columns, vectors.shape[1])
    step = max(1, GATHERED_NUMBERS // max(1, vectors.shape[1]))
    for start in range(0, len(places.index), step):
        at = places.index[start : start + step].long()
        row, column = at // columns, at % columns
        source, target = (column, row) if to_rows else (row, column)
        total.index_add_(0, target, vectors[source] * delta[start : start + step, None].to(wide))
    return total.mT.to(x.dtype).reshape(*x.shape[:-1], total.shape[0])


def _flat(x: Tensor) -> Tensor:
    """(…, features) -> (vectors, features), also for a single vector."""
    return x.reshape(-1, x.shape[-1])
