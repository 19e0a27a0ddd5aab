"""Rounding rows to float8, transposing a matrix of one-byte numbers, and the columns' part of the products, in Triton for a
GPU; see ops/float8.py.

All are limited by memory: a row is read once and written once, at half of its size, a transposed tile goes through
shared memory, so that reads and writes are of whole cache lines, and y and g are passed over once for their columns, where a
general product of so few columns takes longer.
"""

from __future__ import annotations

import functools

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

LONGEST = 32768  # features: a row stands in the registers of one program
PER_WARP = 2048  # numbers of a row
TILE = 128  # numbers along either side


@triton.jit
def rows_kernel(  # type: ignore[no-untyped-def]
    x, factor, rounded, scales, features, LARGEST, SMALLEST, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < features
    wide = tl.load(x + row * features + d, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        wide *= tl.load(factor + d, mask=inside, other=0.0)
    largest = tl.maximum(tl.max(tl.abs(wide), 0), SMALLEST)
    tl.store(scales + row, tl.div_rn(largest, LARGEST))
    wide *= tl.div_rn(LARGEST, largest)
    tl.store(rounded + row * features + d, wide.to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def transpose_kernel(weight, out, rows, columns, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    j = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    tile = tl.load(weight + i[:, None] * columns + j[None, :], mask=(i[:, None] < rows) & (j[None, :] < columns))
    tl.store(out + j[:, None] * rows + i[None, :], tl.trans(tile), mask=(j[:, None] < columns) & (i[None, :] < rows))


def quantise_rows(x: Tensor, factor: Tensor | None, largest: float, smallest: float) -> tuple[Tensor, Tensor]:
    """x (T, n), factor (n,) in float32 or None -> x · factor in e4m3 (T, n) and its scales (T, 1) in float32."""
    x = x.contiguous()
    tokens, features = x.shape
    rounded = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = torch.empty(tokens, 1, device=x.device)
    block = triton.next_power_of_2(features)
    with torch.cuda.device_of(x):
        rows_kernel[(tokens,)](
            x,
            x if factor is None else factor,
            rounded,
            scales,
            features,
            largest,
            smallest,
            HAS_FACTOR=factor is not None,
            BLOCK=block,
            num_warps=max(1, min(16, block // PER_WARP)),
        )
    return rounded, scales


def transposed(weight: Tensor) -> Tensor:
    """weight (m, n), of one-byte numbers -> a contiguous copy (n, m) of its transpose."""
    rows, columns = weight.shape
    out = torch.empty(columns, rows, dtype=weight.dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        transpose_kernel[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
            weight.contiguous(), out, rows, columns, TILE=TILE, num_warps=8
        )
    return out


ADDED = (64, 128, 8, 1)  # tokens and outputs in one step, warps, stages of the pipeline
CHANGED = (64, 128, 4, 5)  # as many stages as the device's shared memory has room for
MOST = 128  # columns: above, a general product has enough to do


@triton.jit
def difference(values, own, o, c, out_features, columns):  # type: ignore[no-untyped-def]
    """values − own (…, c) in float32, of the rows o and the columns c; 0 outside."""
    place = o[:, None] * columns + c[None, :]
    inside = (o[:, None] < out_features) & (c[None, :] < columns)
    one = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    return one - tl.load(own + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def add_kernel(  # type: ignore[no-untyped-def]
    y, selected, values, own, tokens, out_features, columns, T: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr
):
    """y (T, out) += selected (T, c) (values − own)ᵀ (c, out)."""
    t = (tl.program_id(1) * T + tl.arange(0, T)).to(tl.int64)
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    c = tl.arange(0, C)
    left = tl.load(
        selected + t[:, None] * columns + c[None, :], mask=(t[:, None] < tokens) & (c[None, :] < columns), other=0.0
    )
    right = difference(values, own, o, c, out_features, columns).to(left.dtype)
    at = y + t[:, None] * out_features + o[None, :]
    inside = (t[:, None] < tokens) & (o[None, :] < out_features)
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total = tl.dot(left, tl.trans(right), before, input_precision="ieee")
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def change_kernel(  # type: ignore[no-untyped-def]
    g,
    values,
    own,
    dx,
    idx,
    tokens,
    out_features,
    in_features,
    columns,
    T: tl.constexpr,
    OUT: tl.constexpr,
    C: tl.constexpr,
):
    """dx[:, idx] += g (T, out) (values − own) (out, c)."""
    t = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64)
    c = tl.arange(0, C)
    total = tl.zeros((T, C), tl.float32)
    for start in range(0, out_features, OUT):
        o = start + tl.arange(0, OUT)
        left = tl.load(
            g + t[:, None] * out_features + o[None, :],
            mask=(t[:, None] < tokens) & (o[None, :] < out_features),
            other=0.0,
        )
        right = difference(values, own, o, c, out_features, columns).to(left.dtype)
        total = tl.dot(left, right, total, input_precision="ieee")
    column = tl.load(idx + c, mask=c < columns, other=0)
    at = dx + t[:, None] * in_features + column[None, :]
    inside = (t[:, None] < tokens) & (c[None, :] < columns)
    tl.store(at, (tl.load(at, mask=inside, other=0.0).to(tl.float32) + total).to(dx.dtype.element_ty), mask=inside)


def add_columns(y: Tensor, selected: Tensor, values: Tensor, own: Tensor) -> None:
    """y (T, out) += selected (T, c) (values − own)ᵀ, both (out, c); all contiguous, y and selected of one dtype."""
    tokens, out_features = y.shape
    columns = selected.shape[1]
    of_tokens, of_outputs, warps, stages = ADDED
    grid = (triton.cdiv(out_features, of_outputs), triton.cdiv(tokens, of_tokens))
    with torch.cuda.device_of(y):
        add_kernel[grid](
            y,
            selected,
            values,
            own,
            tokens,
            out_features,
            columns,
            T=of_tokens,
            OUT=of_outputs,
            C=_padded(columns),
            num_warps=warps,
            num_stages=stages,
        )


def add_change(dx: Tensor, idx: Tensor, g: Tensor, values: Tensor, own: Tensor) -> None:
    """dx (T, in)[:, idx] += g (T, out) (values − own), both (out, c), idx (c,) int64; all contiguous, dx and g of one dtype."""
    tokens, out_features = g.shape
    columns = values.shape[1]
    of_tokens, of_outputs, warps, stages = change_blocks(
        columns, g.element_size(), values.element_size() + own.element_size(), _shared_memory(g.device)
    )
    with torch.cuda.device_of(g):
        change_kernel[(triton.cdiv(tokens, of_tokens),)](
            g,
            values,
            own,
            dx,
            idx,
            tokens,
            out_features,
            dx.shape[1],
            columns,
            T=of_tokens,
            OUT=of_outputs,
            C=_padded(columns),
            num_warps=warps,
            num_stages=stages,
        )


def change_blocks(columns: int, of_g: int, of_columns: int, shared: int) -> tuple[int, int, int, int]:
    """CHANGED with as many stages, and where one takes too much, as many outputs, as ``shared`` bytes have room for.

    Numbers of g take ``of_g`` bytes, those of values and own together ``of_columns``. Triton holds both factors of the product at hand in
    g's type, and for each stage beside it what was loaded.
    """
    of_tokens, of_outputs, warps, stages = CHANGED
    padded = _padded(columns)
    factors, loaded = (of_tokens + padded) * of_g, of_tokens * of_g + padded * of_columns  # bytes of one output
    while of_outputs > 16 and factors * of_outputs > shared:
        of_outputs //= 2
    ahead = max(0, shared - factors * of_outputs) // (loaded * of_outputs)
    return of_tokens, of_outputs, warps, min(stages, 1 + ahead)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block may have; a GPU's smallest where Triton interprets."""
    if device.type != "cuda":
        return 48 << 10
    found: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined, unused-ignore]
    return found


def _padded(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))
