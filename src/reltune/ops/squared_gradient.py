"""Sums of squared per-example weight gradients of a linear map, by column and by row.

For y = x Wᵀ the gradient of example s is G_s = g_sᵀ x_s, with x_s (T × in) and g_s = ∂ℓ_s/∂y_s (T × out).
Wanted are Σ_s Σ_o G_s[o, i]² (columns) and Σ_s Σ_i G_s[o, i]² (rows). Two exact ways:

- Gram: with K_g = g gᵀ and K_x = x xᵀ (T × T), column i is Σ_t x[t, i] (K_g x)[t, i] and row o is
  Σ_t g[t, o] (K_x g)[t, o]; about 4·B·T²·(in + out) operations, O(T²) workspace per example.
- direct: G_s itself, a few examples at a time; about 2·B·T·in·out operations.

The Gram form is the identity behind "ghost norms" (Goodfellow, arXiv:1510.01799; Li et al., arXiv:2110.05679),
kept apart by column and by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Workspace of one block of examples, in numbers (not bytes): 64 Mi float32 numbers are 256 MiB.
BLOCK_NUMBERS = 1 << 26


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gram_is_cheaper(tokens: int, in_features: int, out_features: int) -> bool:
    """Whether T × T Gram matrices need fewer operations than the gradients themselves (both sums wanted)."""
    return 2 * tokens * (in_features + out_features) < in_features * out_features


def squared_gradient_sums(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums (in,) and row sums (out,) of Σ_s G_s², for inputs x (B, T, in) and output gradients g (B, T, out).

    Computed in float32, or float64 when the inputs are: sums of squares through Gram matrices cancel, and in
    bfloat16 they cancel badly. Never negative.
    """
    dtype = accumulator_dtype(x)
    batch, tokens, in_features = x.shape
    out_features = g.shape[2]
    columns = torch.zeros(in_features, dtype=dtype, device=x.device)
    rows = torch.zeros(out_features, dtype=dtype, device=x.device)
    gram = gram_is_cheaper(tokens, in_features, out_features)
    per_example = tokens * (tokens + in_features + out_features) if gram else in_features * out_features
    step = max(1, BLOCK_NUMBERS // per_example)
    for start in range(0, batch, step):
        xs = x[start : start + step].to(dtype)
        gs = g[start : start + step].to(dtype)
        if gram:
            columns += (xs * ((gs @ gs.mT) @ xs)).sum((0, 1))
            rows += (gs * ((xs @ xs.mT) @ gs)).sum((0, 1))
        else:
            squared = (gs.mT @ xs).square_()
            columns += squared.sum((0, 1))
            rows += squared.sum((0, 2))
    return columns.clamp_min_(0), rows.clamp_min_(0)


def squared_gradient_sums_reference(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the definition: one example at a time."""
    total = sum((gs.mT @ xs).square() for xs, gs in zip(x, g, strict=True))
    assert isinstance(total, Tensor)
    return total.sum(0), total.sum(1)
