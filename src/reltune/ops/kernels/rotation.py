"""Rotary position embedding in one pass over memory: the Triton kernel of ops/rotation.py.

Computed in float32, and rounded to the operands' type after each product, as PyTorch's operations do one after the other.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor


@triton.jit
def token_kernel(  # type: ignore[no-untyped-def]
    x, out, cos, sin, tokens, heads, half,
    x_example, x_head, x_token, out_example, out_head, out_token, angle_example, angle_token,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token's features of some attention heads, which share its angles."""
    example, token = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    angle = example.to(tl.int64) * angle_example + token.to(tl.int64) * angle_token + d
    known = d < half
    cos_1, cos_2 = tl.load(cos + angle, mask=known, other=0.0), tl.load(cos + angle + half, mask=known, other=0.0)
    sin_1, sin_2 = tl.load(sin + angle, mask=known, other=0.0), tl.load(sin + angle + half, mask=known, other=0.0)
    inside = known & (head < heads)
    at = example.to(tl.int64) * x_example + token.to(tl.int64) * x_token + head * x_head + d
    to = example.to(tl.int64) * out_example + token.to(tl.int64) * out_token + head * out_head + d
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + half, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    if BACK:
        other_1 = (second * sin_2.to(tl.float32)).to(kind).to(tl.float32)
        other_2 = -(first * sin_1.to(tl.float32)).to(kind).to(tl.float32)
    else:
        other_1 = -(second * sin_1.to(tl.float32)).to(kind).to(tl.float32)
        other_2 = (first * sin_2.to(tl.float32)).to(kind).to(tl.float32)
    tl.store(out + to, (first * cos_1.to(tl.float32)).to(kind).to(tl.float32) + other_1, mask=inside)
    tl.store(out + to + half, (second * cos_2.to(tl.float32)).to(kind).to(tl.float32) + other_2, mask=inside)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    examples, heads, tokens, features = x.shape
    cos, sin = (angles.contiguous().expand(examples, tokens, features) for angles in (cos, sin))
    out = torch.empty_like(x)  # which keeps the order of x in memory, tokens before attention heads
    half = triton.next_power_of_2(features // 2)
    each = max(1, min(triton.next_power_of_2(heads), 2048 // half))
    if x.numel():
        with torch.cuda.device_of(x):
            token_kernel[(examples * tokens, triton.cdiv(heads, each))](
                *(x, out, cos, sin, tokens, heads, features // 2),
                *(*x.stride()[:3], *out.stride()[:3], *cos.stride()[:2]),
                BACK=back,
                HEADS=each,
                HALF=half,
                num_warps=max(1, min(8, each * half // 256)),
                enable_fp_fusion=False,  # else products of float16 are not rounded before they are added
            )
    return out
