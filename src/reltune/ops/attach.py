"""Give selected columns or rows of a linear map their gradient, at no cost in the forward pass.

The base layer has already computed y = x Wᵀ + b with frozen W, whose selected columns (rows) hold the current
values of the trainable tensor. These operators hand y on unchanged and, in the backward pass, hand the trainable
tensor the gradient that W's selected part would have got. Autograd keeps x for neither purpose: the frozen product
needs only W, the columns keep x[:, idx], and the rows have x made again (ops/recompute.py) or keep a reference to it.

Same idea as PaCA (Woo et al., ICLR 2025) and S²FT (Yang et al., NeurIPS 2024).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reltune.ops import kernels, recompute

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
        gradient = gradient_of_columns(_flat(g), _flat(selected))
        if row_idx is not None:
            gradient[row_idx] = 0
        return g, None, gradient.to(ctx.dtype), None, None


class AttachRows(torch.autograd.Function):
    """(y (…, out), x (…, in), rows (r, in), idx (r,)) -> y, with ∂rows = g[:, idx]ᵀ x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor) -> Tensor:
        recompute.keep(ctx, x, idx)
        ctx.dtype = rows.dtype
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, idx = recompute.kept(ctx)
        gradient = _flat(g.index_select(-1, idx)).mT @ _flat(x.to(g.dtype))
        return g, None, gradient.to(ctx.dtype), None


def gradient_of_columns(g: Tensor, selected: Tensor) -> Tensor:
    """g (T, out), selected (T, c) -> gᵀ selected (out, c)."""
    if g.is_cuda and kernels.can_be_imported():
        from reltune.ops.kernels.column_gradient import column_gradient, fits

        if fits(g, selected.shape[1]):
            return column_gradient(g, selected)
    return g.mT @ selected


def _flat(x: Tensor) -> Tensor:
    """(…, features) -> (vectors, features), also for a single vector."""
    return x.reshape(-1, x.shape[-1])


class LiveGraphs:
    """The graphs that still need W as it was in their forward pass, and whether any has been differentiated of late."""

    def __init__(self) -> None:
        self._nodes: list[weakref.ref] = []
        self.differentiated = False  # set by a backward pass, cleared by whoever has acted on it

    def enter(self, node: Any) -> None:
        self._nodes = [*self._alive(), weakref.ref(node)]  # or the list would grow with every step

    def _alive(self) -> list[weakref.ref]:
        return [node for node in self._nodes if node() is not None]

    def __len__(self) -> int:
        return len(self._alive())


class HoldWeight(torch.autograd.Function):
    """y -> y, and enter the graph in ``graphs`` for as long as it lives: a node lives as long as its graph."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, graphs: LiveGraphs) -> Tensor:
        graphs.enter(ctx)
        ctx.graphs = graphs
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.graphs.differentiated = True
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
