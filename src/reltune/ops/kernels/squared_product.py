"""Column and row sums of squared products Σ_b (g_bᵀ x_b)², with no product ever written to memory.

A Triton kernel: each program makes one block of g_bᵀ x_b (out × in) in registers, example after example, squares it and
adds it up; what it writes are the block's column and row sums. Products of bfloat16 (or float16) numbers, added up in
float32: nothing cancels here, so the sums are as exact as float32 makes them. 2·B·T·in·out operations, workspace
in · out / 64 numbers.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# Fastest of 16 settings tried on one H200 (4096 → 1024 and 4096 features, 16 × 512 tokens), in a variant that loads by
# tensor descriptors; with the loads below they were not compared.
OUT, IN, TOKENS = 128, 128, 32
WARPS, STAGES = 4, 4


@triton.jit
def squares_kernel(  # type: ignore[no-untyped-def]
    x,
    g,
    columns,
    rows,
    examples,
    tokens,
    in_features,
    out_features,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """columns[p, i] and rows[q, o]: the sums over the p-th block of outputs and the q-th of inputs."""
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    i = tl.program_id(1) * IN + tl.arange(0, IN)
    squares = tl.zeros((OUT, IN), tl.float32)
    for _ in range(examples):
        product = tl.zeros((OUT, IN), tl.float32)
        for start in tl.range(0, tokens, TOKENS, num_stages=STAGES):
            t = start + tl.arange(0, TOKENS)
            left = tl.load(
                g + t[None, :] * out_features + o[:, None],
                mask=(t[None, :] < tokens) & (o[:, None] < out_features),
                other=0.0,
            )
            right = tl.load(
                x + t[:, None] * in_features + i[None, :],
                mask=(t[:, None] < tokens) & (i[None, :] < in_features),
                other=0.0,
            )
            product = tl.dot(left, right, product, input_precision="ieee")
        squares += product * product
        x += tokens * in_features
        g += tokens * out_features
    tl.store(columns + tl.program_id(0) * in_features + i, tl.sum(squares, 0), mask=i < in_features)
    tl.store(rows + tl.program_id(1) * out_features + o, tl.sum(squares, 1), mask=o < out_features)


def squared_product_sums(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums (in,) and row sums (out,), float32, of Σ_b (g_bᵀ x_b)² for x (B, T, in) and g (B, T, out) of one dtype.

    The reference is ops/squared_gradient.py's `squared_gradient_sums_reference`.
    """
    examples, tokens, in_features = x.shape
    out_features = g.shape[2]
    x, g = x.contiguous(), g.contiguous()
    grid = triton.cdiv(out_features, OUT), triton.cdiv(in_features, IN)
    columns = torch.empty(grid[0], in_features, device=x.device)
    rows = torch.empty(grid[1], out_features, device=x.device)
    with torch.cuda.device_of(x):
        squares_kernel[grid](
            x,
            g,
            columns,
            rows,
            examples,
            tokens,
            in_features,
            out_features,
            OUT=OUT,
            IN=IN,
            TOKENS=TOKENS,
            STAGES=STAGES,
            num_warps=WARPS,
        )
    return columns.sum(0), rows.sum(0)
