"""The two products by which selected columns of a frozen linear map are trained, in Triton for a GPU.

``gather_columns`` keeps x[:, idx] in the forward pass, ``column_gradient`` gives gᵀ x[:, idx] in the backward pass. The
latter reads all of g for c numbers per output, so that memory is its limit: it is cut along the tokens as well, which
a general product does not do for so few columns, and its parts are added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

LARGEST = 128  # columns: above, a general product has enough to do
ROWS = 128  # of x, in one program of the gather
OUT, TOKENS = 128, 64  # of g, in one step of the product
PROGRAMS = 512  # enough to fill any GPU of today


def fits(g: Tensor, columns: int) -> bool:
    """Whether the kernels take such tensors."""
    return g.is_cuda and g.dtype in (torch.bfloat16, torch.float16) and columns <= LARGEST


@triton.jit
def gather_kernel(x, idx, out, tokens, features, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = tl.arange(0, COLUMNS)
    inside = (t[:, None] < tokens) & (j[None, :] < columns)
    i = tl.load(idx + j, mask=j < columns, other=0)
    tl.store(
        out + t[:, None] * columns + j[None, :],
        tl.load(x + t[:, None] * features + i[None, :], mask=inside, other=0.0),
        mask=inside,
    )


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


def gather_columns(x: Tensor, idx: Tensor) -> Tensor:
    """x (T, in) contiguous, idx (c,) -> x[:, idx] (T, c)."""
    tokens, features = x.shape
    out = x.new_empty(tokens, len(idx))
    if out.numel():
        with torch.cuda.device_of(x):
            gather_kernel[(triton.cdiv(tokens, ROWS),)](
                x, idx, out, tokens, features, len(idx), ROWS=ROWS, COLUMNS=triton.next_power_of_2(len(idx))
            )
    return out


def column_gradient(g: Tensor, selected: Tensor) -> Tensor:
    """g (T, out), selected (T, c) -> gᵀ selected (out, c) in float32."""
    tokens, out_features = g.shape
    columns = selected.shape[1]
    g, selected = g.contiguous(), selected.contiguous()
    blocks = triton.cdiv(out_features, OUT)
    parts = max(1, min(PROGRAMS // blocks, triton.cdiv(tokens, 4 * TOKENS)))
    share = max(triton.cdiv(triton.cdiv(tokens, parts), TOKENS), 1) * TOKENS
    parts = max(1, triton.cdiv(tokens, share))
    found = torch.empty(parts, out_features, columns, device=g.device)
    with torch.cuda.device_of(g):
        gradient_kernel[(blocks, parts)](
            g,
            selected,
            found,
            tokens,
            out_features,
            columns,
            share,
            OUT=OUT,
            TOKENS=TOKENS,
            COLUMNS=max(16, triton.next_power_of_2(columns)),
            STAGES=4,
            num_warps=4,
        )
    return found[0] if parts == 1 else found.sum(0)
