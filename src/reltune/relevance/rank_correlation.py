"""Spearman's rank correlation."""

from __future__ import annotations

import torch
from torch import Tensor


def spearman(x: Tensor, y: Tensor) -> float:
    """The correlation, −1 to 1, of the ranks of x (n,) and y (n,), equal values at their mean rank; nan if one side is
    constant."""
    ranks = torch.stack([_ranks(x), _ranks(y)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    return float((ranks[0] @ ranks[1]) / (ranks[0].norm() * ranks[1].norm()))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 on, equal values at the mean of theirs."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count + 1) / 2)[place]
