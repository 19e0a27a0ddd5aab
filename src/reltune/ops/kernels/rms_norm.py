"""The root mean square norm and its gradients, each in one pass over memory: Triton kernels of ops/rms_norm.py."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

PROGRAMS = 512  # at most, where the gain's gradient is added up: each has a sum of its own


@triton.jit
def forward_kernel(x, w, y, features, epsilon, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * features
    d = tl.arange(0, BLOCK)
    row = tl.load(x + at + d, mask=d < features, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(row * row, 0) / features + epsilon)
    normalised = (row * scale).to(y.dtype.element_ty)
    gain = tl.load(w + d, mask=d < features, other=0.0)
    tl.store(y + at + d, normalised * gain, mask=d < features)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    x, w, g, out, sums, rows, features, epsilon, each, GAIN: tl.constexpr, BLOCK: tl.constexpr
):
    """out = ∂ℓ/∂x = s·h − x · s³ · mean(h·x), with h = w·g and s the scale that x was multiplied by.

    With GAIN a program also adds g · (s·x, rounded as in the forward pass) up over its rows, ``each`` of them.
    """
    first = tl.program_id(0) * each
    d = tl.arange(0, BLOCK)
    gain = tl.load(w + d, mask=d < features, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    at = first.to(tl.int64) * features
    for _ in range(tl.minimum(each, rows - first)):
        row = tl.load(x + at + d, mask=d < features, other=0.0).to(tl.float32)
        own = tl.load(g + at + d, mask=d < features, other=0.0)
        scale = 1.0 / tl.sqrt(tl.sum(row * row, 0) / features + epsilon)
        h = (gain * own).to(tl.float32)
        mean = tl.sum(h * row, 0) / features
        tl.store(out + at + d, scale * h - row * (scale * scale * scale * mean), mask=d < features)
        if GAIN:
            total += own.to(tl.float32) * (row * scale).to(x.dtype.element_ty).to(tl.float32)
        at += features
    if GAIN:
        tl.store(sums + tl.program_id(0).to(tl.int64) * features + d, total, mask=d < features)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    x = x.contiguous()
    features, out = x.shape[-1], torch.empty_like(x)
    block, warps = _sizes(features)
    with torch.cuda.device_of(x):
        forward_kernel[(x.numel() // features,)](
            x, gain.contiguous(), out, features, epsilon, BLOCK=block, num_warps=warps
        )
    return out


def rms_norm_gradients(
    g: Tensor, x: Tensor, gain: Tensor, epsilon: float, of_gain: bool
) -> tuple[Tensor, Tensor | None]:
    x, g, gain = x.contiguous(), g.contiguous(), gain.contiguous()
    features, out = x.shape[-1], torch.empty_like(x)
    rows = x.numel() // features
    each = triton.cdiv(rows, PROGRAMS) if of_gain else 1
    programs = triton.cdiv(rows, each) if rows else 0
    sums = torch.empty(programs if of_gain else 0, features, dtype=torch.float32, device=x.device)
    block, warps = _sizes(features)
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            x, gain, g, out, sums, rows, features, epsilon, each, GAIN=of_gain, BLOCK=block, num_warps=warps
        )
    return out, sums.sum(0).to(gain.dtype) if of_gain else None


def _sizes(features: int) -> tuple[int, int]:
    """Of a block, and how many warps work on it."""
    block = triton.next_power_of_2(features)
    return block, max(1, min(16, block // 512))
