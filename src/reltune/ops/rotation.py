"""Rotary position embedding of queries and keys, forward and backward in one pass over memory each.

A feature x_i of an attention head and its partner x_{i + d/2} turn by the token's angle: x_i cos − x_{i + d/2} sin and
x_{i + d/2} cos + x_i sin (Su et al. 2021, equation 34, with the halves paired as in Llama). Written out as in Transformers it takes a dozen
operations, each of which reads and writes queries and keys. The gradient turns back by the same angle; nothing of the queries
and keys is kept for it. Every step is rounded where PyTorch's operations round it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reltune.ops import kernels, stand_in

LARGEST = 1024  # features of an attention head that the kernel takes


class Rotation(torch.autograd.Function):
    """q (B, heads, T, d), k (B, key heads, T, d), cos and sin (B or 1, T, d), all of one dtype -> q and k, rotated."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return rotated(q, cos, sin), rotated(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_q: Tensor, to_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(to_q, cos, sin, back=True), rotated(to_k, cos, sin, back=True), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x (B, heads, T, d) turned by the angles, or ``back``: the gradient of x, given that of what was turned."""
    if x.is_meta and stand_in.on_accelerator(x):
        return stand_in.kernel([x, cos, sin], [x])[0]
    if x.is_cuda and kernels.can_be_imported():
        from reltune.ops.kernels.rotation import rotated as by_kernel

        return by_kernel(x, cos, sin, back)
    return rotated_reference(x, cos, sin, back)


def rotated_reference(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]
    if back:
        first, second = (x * sin).chunk(2, -1)
        return x * cos + torch.cat([second, -first], -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
