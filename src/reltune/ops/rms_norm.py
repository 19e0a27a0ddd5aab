"""Root mean square norm y = w · x/√(mean x² + ε) with x cast to float32 and back before the gain, as Llama has it.

Written out in PyTorch operations, as in Transformers, the norms of an 8B model take 0.07 s more of a frozen forward and
backward pass of 0.54 s (one H200, benchmarks/results/relevance_overhead.json) and keep float32 copies of their input; here
x itself is all that is kept, and y is made again where someone asks for it (ops/recompute.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reltune.ops import kernels, stand_in

LARGEST = 16384  # features that the kernel takes: a row stands in the registers of one program


class RMSNorm(torch.autograd.Function):
    """x (…, features), gain (features,) of the same dtype -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.epsilon = epsilon
        return rms_norm(x, gain, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, gain = ctx.saved_tensors
        return *rms_norm_gradients(g, x, gain, ctx.epsilon, ctx.needs_input_grad[1]), None


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    if x.is_meta and stand_in.on_accelerator(x):
        return stand_in.kernel([x, gain], [x])[0]
    if _has_kernel(x):
        from reltune.ops.kernels.rms_norm import rms_norm as by_kernel

        return by_kernel(x, gain, epsilon)
    return rms_norm_reference(x, gain, epsilon)


def rms_norm_reference(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rms_norm_gradients(
    g: Tensor, x: Tensor, gain: Tensor, epsilon: float, of_gain: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and, if wanted, of the gain, given that of y."""
    if x.is_meta and stand_in.on_accelerator(x):
        to_x, to_gain = stand_in.kernel([g, x, gain], [x, gain])
        return to_x, to_gain if of_gain else None
    if _has_kernel(x):
        from reltune.ops.kernels.rms_norm import rms_norm_gradients as by_kernel

        return by_kernel(g, x, gain, epsilon, of_gain)
    x, gain = x.detach().requires_grad_(), gain.detach().requires_grad_(of_gain)
    with torch.enable_grad():
        y = rms_norm_reference(x, gain, epsilon)
    to_x, *gains = torch.autograd.grad(y, [x, gain] if of_gain else [x], g)
    return to_x, gains[0] if of_gain else None


def _has_kernel(x: Tensor) -> bool:
    known = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.shape[-1] <= LARGEST
    return known and kernels.can_be_imported()
