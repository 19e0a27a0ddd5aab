"""Quadratic forms x_dᵀ K x_d of all feature columns of x with one symmetric matrix, summed over the batch.

Wanted is Σ_b Σ_t x[b, t, d] (K_b x_b)[t, d] for every feature d. The Triton kernel never writes K x (T × D) and reads
the lower triangle of K only. Products are made of bfloat16 numbers: x as it is, K as the sum of two (16 bits of
mantissa together), added up in float32. One bfloat16 for K, or one float16, would be faster (×0.7, ×0.85) and is not
enough: the forms cancel where the columns of x lie in directions in which K is small.

Largest relative error of a column's and of a row's sum against float64 (one H200, 512 tokens, 4096 → 1024 features):

| K | random inputs | inputs shifted by ten standard deviations, gradients that sum to zero over the tokens |
|---|---|---|
| as here | 3e-6, 1e-5 | 1e-4, 1e-3 |
| float32, with float32 products | 3e-6, 1e-5 | 2e-4, 4e-4 |
| one float16 | 5e-5, 5e-5 | 2e-3, 6e-2 |
| one bfloat16 | 4e-4, 5e-4 | 2e-2, 7e-1 |
| the direct form (no K) | 1e-6, 1e-6 | 6e-7, 8e-7 |
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# Fastest of 32 settings tried on one H200 with torch 2.11 and Triton 3.6, at D = 4096 and 14336. The limit is the second-level
# cache: more tokens and features per program read less from it, more programs per multiprocessor hide its latency.
TOKENS, INNER_TOKENS, FEATURES = 128, 32, 128
WARPS, STAGES = 4, 3
# The same for K itself: rows and columns of a block (rows = TOKENS), features at a time, warps, stages.
TRIANGLE = 128, 64, 64, 4, 3

Triangle = tuple[Tensor, Tensor]


@triton.jit
def triangle_kernel(  # type: ignore[no-untyped-def]
    x,
    high,
    low,
    tokens,
    padded,
    features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """high + low (B, padded, padded): the lower triangle of K = x xᵀ, what lies below the diagonal doubled."""
    b = tl.program_id(1).to(tl.int64)
    # Block number -> its row i and column j in the triangle of blocks, i·(i + 1)/2·(ROWS/COLUMNS) of which lie above row i.
    per_row: tl.constexpr = ROWS // COLUMNS
    block = tl.program_id(0) // per_row
    i = ((tl.sqrt(8.0 * block + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > block, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= block, i + 1, i)
    j = (block - i * (i + 1) // 2) * per_row + tl.program_id(0) % per_row
    x += b * tokens * features
    t = i * ROWS + tl.arange(0, ROWS)
    u = j * COLUMNS + tl.arange(0, COLUMNS)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, features, FEATURES, num_stages=STAGES):
        d = start + tl.arange(0, FEATURES)
        left = tl.load(
            x + t[:, None] * features + d[None, :], mask=(t[:, None] < tokens) & (d[None, :] < features), other=0.0
        )
        right = tl.load(
            x + u[None, :] * features + d[:, None], mask=(u[None, :] < tokens) & (d[:, None] < features), other=0.0
        )
        product = tl.dot(left, right, product, input_precision="ieee")
    value = tl.where(u[None, :] < t[:, None], 2 * product, product)
    value = tl.where(u[None, :] > t[:, None], 0.0, value)
    rounded = value.to(high.dtype.element_ty)
    at = b * padded * padded + t[:, None] * padded + u[None, :]
    tl.store(high + at, rounded)
    tl.store(low + at, (value - rounded.to(tl.float32)).to(low.dtype.element_ty))


@triton.jit
def forms_kernel(  # type: ignore[no-untyped-def]
    high,
    low,
    x,
    out,
    tokens,
    padded,
    features,
    TOKENS: tl.constexpr,
    INNER_TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[b, i, d]: the part of the forms that belongs to the i-th block of rows of the triangle."""
    b = tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(1)
    i = blocks - 1 - tl.program_id(1)  # the longest rows first
    high += b * padded * padded
    low += b * padded * padded
    x += b * tokens * features
    d = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    t = i * TOKENS + tl.arange(0, TOKENS)
    product = tl.zeros((TOKENS, FEATURES), tl.float32)
    for start in tl.range(0, (i + 1) * TOKENS, INNER_TOKENS, num_stages=STAGES):
        u = start + tl.arange(0, INNER_TOKENS)
        mask = (u[:, None] < tokens) & (d[None, :] < features)
        inner = tl.load(x + u[:, None] * features + d[None, :], mask=mask, other=0.0)
        at = t[:, None] * padded + u[None, :]
        product = tl.dot(tl.load(high + at), inner, product, input_precision="ieee")
        product = tl.dot(tl.load(low + at), inner, product, input_precision="ieee")
    mask = (t[:, None] < tokens) & (d[None, :] < features)
    outer = tl.load(x + t[:, None] * features + d[None, :], mask=mask, other=0.0)
    total = tl.sum(product * outer.to(tl.float32), 0)
    tl.store(out + (b * blocks + i) * features + d, total, mask=d < features)


def triangle(x: Tensor) -> Triangle:
    """K = x xᵀ of x (B, T, D) bfloat16, as `quadratic_forms` takes it: two (B, T', T') with T' the next multiple of TOKENS.

    What lies above the diagonal blocks is not set.
    """
    batch, tokens, features = x.shape
    x = x.contiguous()
    blocks = triton.cdiv(tokens, TOKENS)
    padded = blocks * TOKENS
    high, low = torch.empty(2, batch, padded, padded, dtype=x.dtype, device=x.device)
    rows, columns, depth, warps, stages = TRIANGLE
    with torch.cuda.device_of(x):
        triangle_kernel[(blocks * (blocks + 1) // 2 * (rows // columns), batch)](
            x,
            high,
            low,
            tokens,
            padded,
            features,
            ROWS=rows,
            COLUMNS=columns,
            FEATURES=depth,
            STAGES=stages,
            num_warps=warps,
        )
    return high, low


def quadratic_forms(k: Triangle, x: Tensor) -> Tensor:
    """Forms (D,) float32 of the symmetric K that `triangle` gave with x (B, T, D).

    x is bfloat16. (float32 and, where K is within its range, float16 give the same by the same code.)
    """
    batch, tokens, features = x.shape
    x = x.contiguous()
    high, low = k
    padded = high.shape[1]
    blocks = padded // TOKENS
    parts = torch.empty(batch, blocks, features, device=x.device)
    with torch.cuda.device_of(x):
        forms_kernel[(triton.cdiv(features, FEATURES), blocks, batch)](
            high,
            low,
            x,
            parts,
            tokens,
            padded,
            features,
            TOKENS=TOKENS,
            INNER_TOKENS=INNER_TOKENS,
            FEATURES=FEATURES,
            STAGES=STAGES,
            num_warps=WARPS,
        )
    return parts.sum((0, 1)).clamp_min_(0)


def quadratic_forms_reference(k: Tensor, x: Tensor) -> Tensor:
    """The same with K (B, T, T) and K x written out, in K's precision."""
    x = x.to(k.dtype)
    return (x * (k @ x)).sum((0, 1)).clamp_min(0)
