"""A linear map whose frozen weight is held in float8 (e4m3), with selected columns trained beside it in full precision.

    y = x̂ Ŵᵀ + b + x[:, idx] (D − Ŵ[:, idx])ᵀ

Ŵ has one scale per output, a power of two: Ŵ = q · 2^k is exact in every floating type, and so are the columns D − Ŵ[:, idx]
that a change is taken from. x̂ is x rounded to e4m3 with one scale per token, made anew in every call. In the backward pass
∂x = (g ⊙ scales of Ŵ)^ q + g (D − Ŵ[:, idx]) in the selected columns, with ^ the same rounding per token, and ∂D = gᵀ x[:, idx];
roundings pass gradients straight through. x[:, idx] is all that is kept for it, and references to q, D and Ŵ[:, idx].

Products of two float8 matrices run in tensor cores faster than in bfloat16 (torch._scaled_mm); Hopper wants the second
factor by columns, so the backward pass makes the transpose of q and frees it. Elsewhere the same numbers are multiplied
in float32: slow, and equal but for the order of additions. The rounding of rows is that of torchao's rowwise float8
training, which cannot be used here: its Float8Linear keeps the weight in high precision and all of x, and the product of its
Float8Tensor, which does neither, has no derivative.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reltune.ops import kernels
from reltune.ops.attach import gradient_of_columns
from reltune.ops.autocast import product_dtype, without_autocast

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST = 1e-30  # of a row's largest number, so that its scale is a normal float32
LOWEST_EXPONENT = -24  # of a weight's scale: float16's smallest number
FAST_ACCUMULATION = True  # sums within a tensor core's instruction are kept at fewer bits, which is faster

Rounded = tuple[Tensor, Tensor]  # e4m3 (T, n), and scales (T, 1) in float32 that it is multiplied by


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W (out, in) -> q (out, in) in e4m3 and scales (out,) of W's dtype, powers of two, with Ŵ = q · scales[:, None].

    Each row's largest number lies in 224 … 448, the upper half of what e4m3 can hold. Quantising Ŵ gives q again.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    largest = wide.abs().amax(1).float()
    mantissa, exponent = torch.frexp(largest / LARGEST)
    exponent = (exponent - (mantissa == 0.5).int()).clamp(
        min=LOWEST_EXPONENT
    )  # of 448 itself, to which rows may be rounded
    scale = (exponent + 127).bitwise_left_shift(23).view(torch.float32)  # 2^exponent; exp2 may be off by a bit
    return (wide / scale[:, None]).to(E4M3), scale.to(weight.dtype)


def quantise_rows_reference(x: Tensor, factor: Tensor | None = None) -> Rounded:
    """Like quantise_rows, in PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if factor is not None:
        wide = wide * factor
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST).float()
    up = (
        torch.full_like(largest, LARGEST) / largest
    )  # of a plain number torch multiplies the reciprocal: it rounds twice
    return (wide * up).to(E4M3), largest / LARGEST


def quantise_rows(x: Tensor, factor: Tensor | None = None) -> Rounded:
    """x (T, n), factor (n,) in float32 or None -> x · factor, rounded per row with its largest number at 448."""
    if _has_kernels(x):
        from reltune.ops.kernels.float8 import LONGEST, quantise_rows

        if x.shape[1] <= LONGEST:
            return quantise_rows(x, factor, LARGEST, SMALLEST)
    return quantise_rows_reference(x, factor)


def transposed(weight: Tensor) -> Tensor:
    """q (out, in) as int8 -> a contiguous (in, out)."""
    if _has_kernels(weight):
        from reltune.ops.kernels.float8 import transposed

        return transposed(weight)
    return weight.t().contiguous()


def _has_kernels(x: Tensor) -> bool:
    """Whether the device multiplies float8 matrices with a scale per row: Ada, Hopper and Blackwell's B200."""
    return x.is_cuda and x.numel() > 0 and _multiplies_float8(x.get_device())


@functools.cache
def _multiplies_float8(device: int) -> bool:
    if torch.version.hip is not None or not kernels.can_be_imported():  # AMD's float8 is another one
        return False
    # cuBLAS refuses scales per row on compute capability 12 (pytorch/pytorch#192707).
    return (8, 9) <= torch.cuda.get_device_capability(device) < (12, 0)


def _product(rounded: Rounded, weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x̂ (T, k) and q (n, k) as int8 -> x̂ qᵀ · scale (n,) or 1, (T, n) in ``dtype``. Both are read along k."""
    q, scales = rounded
    if _has_kernels(q):
        other = _ones(len(weight), q.device) if scale is None else scale.float()
        y = torch._scaled_mm(
            q,
            weight.view(E4M3).t(),
            scale_a=scales,
            scale_b=other[None],
            out_dtype=torch.bfloat16,  # the only one that scales per row are sure to have; far finer than e4m3
            use_fast_accum=FAST_ACCUMULATION,
        )
        return y.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    y = q.to(wide) @ weight.view(E4M3).to(wide).mT * scales
    return (y if scale is None else y * scale).to(dtype)


def _add_columns(y: Tensor, selected: Tensor, columns: Tensor, own: Tensor) -> None:
    """y (T, out) += selected (T, c) (columns − own)ᵀ (c, out)."""
    if _has_column_kernels(y, selected, columns):
        from reltune.ops.kernels.float8 import add_columns

        add_columns(y, selected, columns.contiguous(), own.contiguous())
    else:
        y.addmm_(selected, _change(columns, own, y.dtype).mT)


def _add_change(dx: Tensor, idx: Tensor, g: Tensor, columns: Tensor, own: Tensor) -> None:
    """dx (T, in)[:, idx] += g (T, out) (columns − own) (out, c)."""
    if _has_column_kernels(dx, g, columns):
        from reltune.ops.kernels.float8 import add_change

        add_change(dx, idx, g.contiguous(), columns.contiguous(), own.contiguous())
    else:
        dx.index_copy_(1, idx, dx.index_select(1, idx).addmm_(g, _change(columns, own, g.dtype)))


def _change(columns: Tensor, own: Tensor, dtype: torch.dtype) -> Tensor:
    """The difference, rounded once."""
    return torch.sub(columns, own, out=torch.empty(columns.shape, dtype=dtype, device=columns.device))


def _has_column_kernels(result: Tensor, factor: Tensor, columns: Tensor) -> bool:
    if not _has_kernels(result) or not result.dtype == factor.dtype == torch.bfloat16:
        return False
    from reltune.ops.kernels.float8 import MOST

    return columns.shape[1] <= MOST


@functools.lru_cache(maxsize=64)
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)


class Latest:
    """Keeps the input that was rounded last, so that the next map does not round it again if it has the same one.

    The query, key and value projections have, and so have the gate and up projections.
    """

    def __init__(self) -> None:
        self._seen: tuple[Any, tuple[int, int], Rounded] | None = None  # the input is held weakly

    def rounded(self, x: Tensor) -> Rounded:
        if x.is_inference():  # has no count of its changes
            return quantise_rows(_flat(x))
        seen, state = self._seen, (x._version, x.data_ptr() if x.device.type != "meta" else 0)
        if seen is not None and seen[0]() is x and seen[1] == state:
            return seen[2]
        made = quantise_rows(_flat(x))
        self._seen = weakref.ref(x, self._forget), state, made
        return made

    def _forget(self, reference: Any) -> None:
        if self._seen is not None and self._seen[0] is reference:
            self._seen = None


_latest = Latest()


def _output(
    x: Tensor,
    rounded: Rounded,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    columns: Tensor | None,
    idx: Tensor | None,
    own: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """y, and x[:, idx] in ``dtype`` where there are columns."""
    selected = None
    with without_autocast(x.device.type):
        y = _product(rounded, weight, scale, dtype)
        if bias is not None:
            y += bias.to(dtype)
        if columns is not None and idx is not None and own is not None:
            selected = x.index_select(1, idx).to(dtype)
            _add_columns(y, selected, columns, own)
    return y, selected


class Float8Product(torch.autograd.Function):
    """One map; x (T, in), its rounding, q (out, in) as int8, scale (out,) in float32, bias (out,) or None, and of c columns the
    trained values D (out, c), idx (c,) and Ŵ[:, idx] (out, c), or None -> y (T, out) in ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rounded: Rounded,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        columns: Tensor | None,
        idx: Tensor | None,
        own: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        y, selected = _output(x, rounded, weight, scale, bias, columns, idx, own, dtype)
        differentiates_x, trains = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        ctx.save_for_backward(
            *((weight, scale, columns, idx, own) if differentiates_x else (None,) * 5), selected if trains else None
        )
        ctx.dtypes = x.dtype, None if columns is None else columns.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, columns, idx, own, selected = ctx.saved_tensors
        of_x, of_columns, of_bias = ctx.dtypes
        gradients: list[Tensor | None] = [None] * 9
        with without_autocast(g.device.type):
            if selected is not None:
                gradients[5] = gradient_of_columns(g, selected).to(of_columns)
            if ctx.needs_input_grad[4]:
                gradients[4] = g.sum(0).to(of_bias)
            if weight is not None:
                dx = _product(quantise_rows(g, scale.float()), transposed(weight), None, g.dtype)
                if columns is not None:
                    _add_change(dx, idx, g, columns, own)
                gradients[0] = dx.to(of_x)
        return tuple(gradients)


def float8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    columns: Tensor | None = None,
    idx: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """x (…, in) -> y (…, out), of x's dtype or autocast's: the map at the top of this file.

    ``weight`` is q (out, in) as int8 and ``scale`` (out,) in float32; ``columns`` D (out, c), ``idx`` (c,) int64, all different, and ``own``
    Ŵ[:, idx] (out, c) come together or not at all.
    """
    with torch.no_grad():
        rounded = _latest.rounded(x)
    given = (_flat(x), rounded, weight, scale, bias, columns, idx, own, product_dtype(x))
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, columns))
    if needed:
        y = Float8Product.apply(*given)
    else:  # below the lowest column nothing is differentiated
        with torch.no_grad():
            y = _output(*given)[0]
    return y.view(*x.shape[:-1], y.shape[-1])


def _flat(x: Tensor) -> Tensor:
    """(…, features) -> (vectors, features), also for a single vector."""
    return x.reshape(-1, x.shape[-1])
