"""Train a linear map along fixed directions of its input, beside its own product: y + (x Aᵀ) Bᵀ.

A (r, in) holds the directions and is fixed; B (out, r) is trained. That is a LoRA adapter of scale 1 whose A does not move, and
what it needs in the backward pass is z = x Aᵀ, r numbers a vector: ∂B = gᵀ z, ∂x = (g B) A. x is not kept, and the base weight is
neither read nor written, so the map may hold it in any form.

Cost beside the base's product: 2 · T · r · (in + out) operations forward, and as many and T · r · out backward, for T vectors; z is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reltune.ops.attach import gradient_of_columns


class AddDirections(torch.autograd.Function):
    """(y (…, out), x (…, in), directions A (r, in), change B (out, r)) -> y + (x Aᵀ) Bᵀ, in y's type."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, directions: Tensor, change: Tensor) -> Tensor:
        z = F.linear(x.to(y.dtype), directions.to(y.dtype))
        ctx.save_for_backward(z, directions, change)
        ctx.dtype = x.dtype
        return y + F.linear(z, change.to(z.dtype)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, directions, change = ctx.saved_tensors
        to_x = to_change = None
        if ctx.needs_input_grad[1]:
            to_x = ((g @ change.to(g.dtype)) @ directions.to(g.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            to_change = gradient_of_columns(_flat(g), _flat(z.to(g.dtype))).to(change.dtype)
        return g, to_x, None, to_change


def add_directions_reference(y: Tensor, x: Tensor, directions: Tensor, change: Tensor) -> Tensor:
    """The same by plain autograd, with the change of the weight in full."""
    return y + F.linear(x, change @ directions)


def _flat(x: Tensor) -> Tensor:
    """(…, features) -> (vectors, features), also for a single vector."""
    return x.reshape(-1, x.shape[-1])
