"""Chosen numbers of a product aᵀ b, without the rest of it: the sampled dense-dense product (SDDMM), as a Triton kernel.

Each program takes a few chosen places, reads the columns of a and b that they name and adds up their products in float32
(float64 for float64). Columns are read from transposed copies, where they lie in one piece; the copies are made for as
many vectors at a time as stay in the cache, because a column of b is read once for every place in it. 2·T·n operations,
about T·n numbers read, workspace two copies of CACHED_NUMBERS numbers.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

PLACES, VECTORS = 16, 128  # per program and step
CACHED_NUMBERS = 12 << 20  # of a and b together at a time: 24 MiB in bfloat16, half of an H200's level-2 cache
LEAST = 256  # vectors at a time, however wide a and b are
TILE = 64  # of the transposed copies


@triton.jit
def transpose_kernel(x, copy, vectors, features, stride, feature_stride, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """copy (features, vectors) from x (vectors, features), tile by tile, both read and written in one piece."""
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (t[:, None] < vectors) & (i[None, :] < features)
    tile = tl.load(x + t[:, None].to(tl.int64) * stride + i[None, :] * feature_stride, mask=inside, other=0.0)
    to = copy + i[:, None].to(tl.int64) * vectors + t[None, :]
    tl.store(to, tl.trans(tile), mask=(i[:, None] < features) & (t[None, :] < vectors))


@triton.jit
def sampled_kernel(  # type: ignore[no-untyped-def]
    a,
    b,
    index,
    sums,
    places,
    vectors,
    columns,
    PLACES: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Add a[row] · b[column] to ``found`` for a (rows, vectors), b (columns, vectors) and places row · columns + column."""
    at = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = at < places
    flat = tl.load(index + at, mask=inside, other=0).to(tl.int64)
    left = a + (flat // columns * vectors)[:, None]
    right = b + (flat % columns * vectors)[:, None]
    total = tl.load(sums + at, mask=inside, other=0.0)
    for start in range(0, vectors, VECTORS):
        t = start + tl.arange(0, VECTORS)[None, :]
        mask = inside[:, None] & (t < vectors)
        products = tl.load(left + t, mask=mask, other=0.0).to(total.dtype) * tl.load(
            right + t, mask=mask, other=0.0
        ).to(total.dtype)
        total += tl.sum(products, 1)
    tl.store(sums + at, total, mask=inside)


def transposed(x: Tensor) -> Tensor:
    """x.mT in one piece; PyTorch's own copy of a transposed matrix either reads or writes number by number."""
    vectors, features = x.shape
    copy = torch.empty(features, vectors, device=x.device, dtype=x.dtype)
    grid = triton.cdiv(vectors, TILE), triton.cdiv(features, TILE)
    transpose_kernel[grid](x, copy, vectors, features, x.stride(0), x.stride(1), TILE=TILE)
    return copy


def sampled_product(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """(aᵀ b).view(-1)[index] in float32 (float64 for float64), for a (T, rows), b (T, columns) and places (n,).

    The reference is ops/sampled_on_cpu.py's `gathered`.
    """
    sums = torch.zeros(len(index), device=a.device, dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)
    if not len(index):
        return sums
    step = max(LEAST, CACHED_NUMBERS // (a.shape[1] + b.shape[1]) // VECTORS * VECTORS)
    with torch.cuda.device_of(a):
        for start in range(0, len(a), step):
            left, right = (transposed(factor[start : start + step]) for factor in (a, b))
            sampled_kernel[(triton.cdiv(len(index), PLACES),)](
                left,
                right,
                index,
                sums,
                len(index),
                left.shape[1],
                b.shape[1],
                PLACES=PLACES,
                VECTORS=VECTORS,
            )
    return sums
