"""Rounding rows to float8 and transposing a matrix of one-byte numbers, in Triton for a GPU; see ops/float8.py.

Both are limited by memory: a row is read once and written once, at half of its size, and a transposed tile goes through
shared memory, so that reads and writes are of whole cache lines.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

LONGEST = 32768  # features: a row stands in the registers of one program
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
            num_warps=max(1, min(16, block // 512)),
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
