"""gᵀ x[:, idx], the gradient of selected columns of a frozen linear map, in Triton for a GPU.

It reads all of g for c numbers per output, so that memory is its limit. g is cut along the tokens too, to have work for
the whole GPU, and the parts are added up in a fixed order. The sum stays in float32, in which columns are trained. On
one H200 (8,192 tokens, 32 columns, bfloat16; 1,024, 4,096 and 14,336 outputs) it takes 0.87 to 0.92 of cuBLAS's time
with a cast; a gather in Triton was no faster than index_select.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

LARGEST = 128  # columns: above, a general product has enough to do
# Fastest of 108 settings tried for these three shapes.
OUT, TOKENS = 64, 128  # of g, in one step of the product
PROGRAMS = 264
WARPS, STAGES = 8, 3


def fits(g: Tensor, columns: int) -> bool:
    """Whether the kernels take such tensors."""
    return g.is_cuda and g.dtype in (torch.bfloat16, torch.float16) and columns <= LARGEST


@triton.jit
def gradient_kernel(  # type: ignore[no-untyped-def]
    g,
    selected,
    parts,
    tokens,
    out_features,
    columns,
    share,
    OUT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """parts[p] = gᵀ selected over the p-th ``share`` of the tokens, for one block of outputs."""
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    j = tl.arange(0, COLUMNS)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, tokens)
    total = tl.zeros((OUT, COLUMNS), tl.float32)
    for start in tl.range(first, last, TOKENS, num_stages=STAGES):
        t = (start + tl.arange(0, TOKENS)).to(tl.int64)
        left = tl.load(
            g + t[:, None] * out_features + o[None, :],
            mask=(t[:, None] < last) & (o[None, :] < out_features),
            other=0.0,
        )
        right = tl.load(
            selected + t[:, None] * columns + j[None, :], mask=(t[:, None] < last) & (j[None, :] < columns), other=0.0
        )
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * out_features + o)[:, None] * columns + j[None, :]
    tl.store(parts + at, total, mask=(o[:, None] < out_features) & (j[None, :] < columns))


def column_gradient(g: Tensor, selected: Tensor) -> Tensor:
    """g (T, out), selected (T, c) -> gᵀ selected (out, c) in float32."""
    tokens, out_features = g.shape
    columns = selected.shape[1]
    g, selected = g.contiguous(), selected.contiguous()
    blocks = triton.cdiv(out_features, OUT)
    parts = max(1, min(PROGRAMS // blocks, triton.cdiv(tokens, TOKENS)))
    share = max(triton.cdiv(triton.cdiv(tokens, parts), TOKENS), 1) * TOKENS
    parts = max(1, triton.cdiv(tokens, share))
    sums = torch.empty(parts, out_features, columns, device=g.device)
    with torch.cuda.device_of(g):
        gradient_kernel[(blocks, parts)](
            g,
            selected,
            sums,
            tokens,
            out_features,
            columns,
            share,
            OUT=OUT,
            TOKENS=TOKENS,
            COLUMNS=max(16, triton.next_power_of_2(columns)),
            STAGES=STAGES,
            num_warps=WARPS,
        )
    return sums[0] if parts == 1 else sums.sum(0)
