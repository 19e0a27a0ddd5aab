"""Give selected columns or rows of a linear map their gradient, at no cost in the forward pass.

The base layer has already computed y = x Wᵀ + b with frozen W, whose selected columns (rows) hold the current
values of the trainable tensor. These operators hand y on unchanged and, in the backward pass, hand the trainable
tensor the gradient that W's selected part would have got. Autograd keeps x for neither purpose: the frozen product
needs only W, the columns keep x[:, idx], and the rows keep a reference to x.

Same idea as PaCA (Woo et al., ICLR 2025) and S²FT (Yang et al., NeurIPS 2024).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The operators return y.detach(), not y: an input that is returned counts as a view made inside the function, and
# autograd then refuses the next in-place operation on it (a residual added in place, say).


class AttachColumns(torch.autograd.Function):
    """(y (…, out), x (…, in), columns (out, c), idx (c,), row_idx (r,) or None) -> y, with ∂columns = gᵀ x[:, idx].

    Cells that also lie in a trainable row belong to the row: their gradient here is zero.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None) -> Tensor:
        ctx.save_for_backward(x.index_select(-1, idx).to(y.dtype), row_idx)
        ctx.dtype = columns.dtype
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        selected, row_idx = ctx.saved_tensors
        gradient = _flat(g).mT @ _flat(selected)
        if row_idx is not None:
            gradient[row_idx] = 0
        return g, None, gradient.to(ctx.dtype), None, None


class AttachRows(torch.autograd.Function):
    """(y (…, out), x (…, in), rows (r, in), idx (r,)) -> y, with ∂rows = g[:, idx]ᵀ x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor) -> Tensor:
        ctx.save_for_backward(x, idx)
        ctx.dtype = rows.dtype
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, idx = ctx.saved_tensors
        gradient = _flat(g.index_select(-1, idx)).mT @ _flat(x.to(g.dtype))
        return g, None, gradient.to(ctx.dtype), None


def _flat(x: Tensor) -> Tensor:
    """(…, features) -> (vectors, features), also for a single vector."""
    return x.reshape(-1, x.shape[-1])


# Graphs that still need W as it was in their forward pass. A node lives as long as its graph.
LiveGraphs = list[weakref.ref]


def prune(graphs: LiveGraphs) -> LiveGraphs:
    """The graphs that are still alive."""
    return [graph for graph in graphs if graph() is not None]


class HoldWeight(torch.autograd.Function):
    """y -> y, and enter the graph in ``graphs`` for as long as it lives."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, graphs: LiveGraphs) -> Tensor:
        graphs[:] = [*prune(graphs), weakref.ref(ctx)]  # or the list would grow with every step
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def selected_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor | None = None,
    column_idx: Tensor | None = None,
    rows: Tensor | None = None,
    row_idx: Tensor | None = None,
) -> Tensor:
    """The same map by plain autograd: the trained parts are put into a copy of W, rows over columns."""
    if columns is not None and column_idx is not None:
        weight = weight.index_copy(1, column_idx, columns.to(weight.dtype))
    if rows is not None and row_idx is not None:
        weight = weight.index_copy(0, row_idx, rows.to(weight.dtype))
    return torch.nn.functional.linear(x, weight, bias)
