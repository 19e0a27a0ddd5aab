"""Root mean square norm y = w · x/√(mean x² + ε) with x cast to float32 and back before the gain, as Llama has it.

Forward and the gradient with respect to x, each in one pass over memory, in Triton. Written out in PyTorch operations,
as in Transformers, the norms of an 8B model take 0.07 s more of a frozen forward and backward pass of 0.54 s (one H200,
benchmarks/results/relevance_overhead.json) and keep float32 copies of their input; here x itself is all that is kept, and y is made again where someone asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

LARGEST = 16384  # features: a row stands in the registers of one program


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
def backward_kernel(x, w, g, out, features, epsilon, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out = ∂ℓ/∂x = s·h − x · s³ · mean(h·x), with h = w·g and s the scale that x was multiplied by."""
    at = tl.program_id(0).to(tl.int64) * features
    d = tl.arange(0, BLOCK)
    row = tl.load(x + at + d, mask=d < features, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(row * row, 0) / features + epsilon)
    gain = tl.load(w + d, mask=d < features, other=0.0)
    h = (gain * tl.load(g + at + d, mask=d < features, other=0.0)).to(tl.float32)
    mean = tl.sum(h * row, 0) / features
    tl.store(out + at + d, scale * h - row * (scale * scale * scale * mean), mask=d < features)


class RMSNorm(torch.autograd.Function):
    """x (…, features), gain (features,) of the same dtype, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.epsilon = epsilon
        return rms_norm(x, gain, epsilon)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, gain = ctx.saved_tensors
        return _launch(backward_kernel, x, gain, g.contiguous(), epsilon=ctx.epsilon), None, None


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return _launch(forward_kernel, x, gain, epsilon=epsilon)


def _launch(kernel: Any, x: Tensor, *others: Tensor, epsilon: float) -> Tensor:
    x = x.contiguous()
    features = x.shape[-1]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(features)
    with torch.cuda.device_of(x):
        kernel[(x.numel() // features,)](
            x, *others, out, features, epsilon, BLOCK=block, num_warps=max(1, min(16, block // 512))
        )
    return out


def rms_norm_reference(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
