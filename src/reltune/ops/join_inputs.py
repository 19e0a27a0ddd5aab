"""Frozen linear maps that read one input, whose gradient they add up in their products.

Autograd adds what the query, key and value projections, or gate and up, each give for their common input: a pass over three
tensors as large as it, per map after the first. Here each map's product g W is added to what is there already in the product
itself (``addmm``). The maps give autograd nothing for x; what they have added up is handed on when autograd comes to `Joined`,
which is when all maps that take part in the backward pass have been.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reltune.ops import stand_in

LEAST_NUMBERS = 1 << 23  # of an input: below, the addition costs little beside what Python costs here
JOINED = "_reltune_joined"  # where a tensor has itself as its readers see it


class Total:
    """The gradient of an input so far, in the backward pass (one of possibly several through a graph) it is of."""

    def __init__(self) -> None:
        self._gradient: Tensor | None = None
        self._backward = -1

    def add(self, g: Tensor, weight: Tensor) -> None:
        """Add g (…, out) @ weight (out, in)."""
        current = torch._C._current_graph_task_id()
        if self._gradient is None or self._backward != current:
            self._gradient, self._backward = g @ weight, current
        else:
            self._gradient.view(-1, weight.shape[1]).addmm_(g.reshape(-1, weight.shape[0]), weight)

    def take(self) -> Tensor | None:
        gradient, self._gradient = self._gradient, None
        return gradient if self._backward == torch._C._current_graph_task_id() else None


class Joined(torch.autograd.Function):
    """x -> x, with ∂x what its readers have added up in ``total``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Total) -> Tensor:
        ctx.total = total
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        total = ctx.total.take()
        return (g if total is None else total if g is None else total + g), None


class JoinedLinear(torch.autograd.Function):
    """x (…, in), as `Joined` gives it, weight (out, in), bias (out,) or None, both frozen -> x Wᵀ + b (…, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Total) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.total = total
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:
        ctx.total.add(g, *ctx.saved_tensors)
        return None, None, None, None


def joins(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether it is worth it, and the same as the plain product."""
    return (
        stand_in.on_accelerator(x)
        and x.grad_fn is not None  # a leaf would be held by what it holds
        and x.numel() >= LEAST_NUMBERS
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and not (stand_in.autocast_dtype() is not None if x.is_meta else torch.is_autocast_enabled("cuda"))
        and x.dtype == weight.dtype
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )


def joined_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b; x's gradient is added up with that of all other maps that read this very tensor through here."""
    # Of one stream: autograd makes a stream wait for another where it hands a gradient on, and these maps hand on none.
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    found = getattr(x, JOINED, None)
    if found is None or found[2] != stream:
        total = Total()
        found = Joined.apply(x, total), total, stream
        setattr(x, JOINED, found)  # goes when x goes, which its readers do not keep
    return JoinedLinear.apply(found[0], weight, bias, found[1])
