"""Give selected rows (tokens) or columns (features) of an embedding their gradient, at no cost in the forward pass.

As ops/attach.py: the frozen look-up y = W[tokens] has already happened with the current values in W. Rows keep the
places at which a chosen token stands, columns keep the tokens. No gradient of the size of W is formed; the columns' own
is (tokens, c).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class AttachEmbeddingColumns(torch.autograd.Function):
    """(y (…, features), tokens (…), columns (all tokens, c), idx (c,), row_idx (r,) or None, padding) -> y.

    ∂columns[v] = Σ g[t, idx] over the places t of token v; of the padding token, and where rows cross, it is zero.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, tokens: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(tokens, idx, row_idx)
        ctx.padding, ctx.dtype, ctx.tokens = padding, columns.dtype, columns.shape[0]
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        tokens, idx, row_idx = ctx.saved_tensors
        selected = g.index_select(-1, idx).reshape(-1, len(idx)).to(ctx.dtype)
        gradient = selected.new_zeros(ctx.tokens, len(idx)).index_add_(0, tokens.reshape(-1), selected)
        if ctx.padding is not None:
            gradient[ctx.padding] = 0
        if row_idx is not None:
            gradient.index_fill_(0, row_idx, 0)
        return g, None, gradient, None, None, None


class AttachEmbeddingRows(torch.autograd.Function):
    """(y (…, features), tokens (…), rows (r, features), idx (r,), padding) -> y.

    ∂rows[k] = Σ g[t] over the places t of token idx[k]; of the padding token it is zero.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, tokens: Tensor, rows: Tensor, idx: Tensor, padding: int | None) -> Tensor:
        which = place_of_token(tokens.reshape(-1), idx)
        if padding is not None:
            which = which.masked_fill(tokens.reshape(-1) == padding, len(idx))
        places = (which < len(idx)).nonzero().squeeze(1)
        ctx.save_for_backward(places, which[places])
        ctx.dtype, ctx.rows = rows.dtype, rows.shape[0]
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        places, which = ctx.saved_tensors
        selected = g.reshape(-1, g.shape[-1]).index_select(0, places).to(ctx.dtype)
        gradient = selected.new_zeros(ctx.rows, g.shape[-1]).index_add_(0, which, selected)
        return g, None, gradient, None, None


def place_of_token(tokens: Tensor, idx: Tensor) -> Tensor:
    """For each token its place in ``idx``, and ``len(idx)`` for tokens that are not there."""
    order = idx.argsort()
    tokens = tokens.long()
    place = order[torch.searchsorted(idx[order], tokens).clamp_(max=len(idx) - 1)]
    return torch.where(idx[place] == tokens, place, len(idx))


def selected_embedding_reference(
    tokens: Tensor,
    weight: Tensor,
    columns: Tensor | None = None,
    column_idx: Tensor | None = None,
    rows: Tensor | None = None,
    row_idx: Tensor | None = None,
    padding: int | None = None,
) -> Tensor:
    """The same look-up by plain autograd: the trained parts are put into a copy of W, rows over columns."""
    if columns is not None and column_idx is not None:
        weight = weight.index_copy(1, column_idx, columns.to(weight.dtype))
    if rows is not None and row_idx is not None:
        weight = weight.index_copy(0, row_idx, rows.to(weight.dtype))
    return torch.nn.functional.embedding(tokens, weight, padding)
