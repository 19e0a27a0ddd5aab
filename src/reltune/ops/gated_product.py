"""The product of a gated MLP, act(gate) · up, in one pass over memory forward and one backward.

Written out as in Transformers, the activation's result is kept for the backward pass and read and written once more in
each direction. Here gate and up are all that is kept, the product is made again where someone asks for it (ops/recompute.py),
and every step is rounded where PyTorch's operations round it. GLU variants: Shazeer 2020.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reltune.ops import kernels, stand_in

# Each with the gradient of its input, given that of its result and the input.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        functools.partial(F.gelu, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


class GatedProduct(torch.autograd.Function):
    """gate and up (…, features) of one dtype, the activation's name -> act(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_product(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return *gated_product_gradients(g, gate, up, ctx.activation), None


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.is_meta and stand_in.on_accelerator(gate):
        return stand_in.kernel([gate, up], [gate])[0]
    if _has_kernel(gate):
        from reltune.ops.kernels.gated_product import gated_product as by_kernel

        return by_kernel(gate, up, activation)
    return gated_product_reference(gate, up, activation)


def gated_product_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation][0](gate) * up


def gated_product_gradients(g: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, given that of the product."""
    if gate.is_meta and stand_in.on_accelerator(gate):
        to_gate, to_up = stand_in.kernel([g, gate, up], [gate, up])
        return to_gate, to_up
    if _has_kernel(gate):
        from reltune.ops.kernels.gated_product import gated_product_gradients as by_kernel

        return by_kernel(g, gate, up, activation)
    return gated_product_gradients_reference(g, gate, up, activation)


def gated_product_gradients_reference(g: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    act, act_backward = ACTIVATIONS[activation]
    return act_backward(g * up, gate), g * act(gate)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and kernels.can_be_imported()
