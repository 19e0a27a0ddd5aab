"""The relevance of an attention head from one gradient per example, by the definition. Imports nothing of reltune."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Piece = tuple[Tensor, Tensor]  # what a head holds of one module: gradients (examples, units, n) and weights (units, n)


def head_relevance(criterion: str, pieces: Sequence[Piece]) -> float:
    """``units`` are the rows, or the columns, that the head holds; a head adds up over them."""
    gradient = torch.cat([g.flatten(1) for g, _ in pieces], 1)
    weight = torch.cat([w.flatten() for _, w in pieces])
    mean = gradient.mean(0)
    if criterion == "fisher":
        return float(gradient.square().mean(0).sum())
    if criterion == "gradient":
        return float(mean.abs().sum())
    if criterion == "magnitude":
        return float(weight.square().sum())
    if criterion == "taylor":
        return float(sum((g * w).sum(2).abs().mean(0).sum() for g, w in pieces))
    if criterion == "relative_gradient":
        return float(mean.norm() / weight.norm())
    if criterion == "gradient_snr":
        return float(mean.square().sum() / gradient.var(0).sum())
    raise ValueError(criterion)
