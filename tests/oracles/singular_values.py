"""Criteria from singular values by full decompositions in float64. Imports nothing of reltune."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def marchenko_pastur_median(beta: float, points: int = 2_000_001) -> float:
    """By adding up the density between the law's ends."""
    low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2
    # more points at the ends, where the density is steep (and infinite at 0 for beta = 1)
    x = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, points))) / 2
    middle = (x[1:] + x[:-1]) / 2
    density = np.sqrt((high - middle) * (middle - low)) / (2 * np.pi * beta * middle)
    share = np.cumsum(density * np.diff(x))
    return float(np.interp(0.5, share / share[-1], x[1:]))


def parts_of_spectrum(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Singular values beyond the Marchenko-Pastur edge and the others; the matrix in the directions of each."""
    n, m = sorted(matrix.shape)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    middle = s.sort().values[(len(s) - 1) // 2]
    edge = middle / (m * marchenko_pastur_median(n / m)) ** 0.5 * (n**0.5 + m**0.5)
    signal = s > edge
    return s[signal], s[~signal], (u * s * signal) @ vh, (u * s * ~signal) @ vh


def published_parts(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Beyond and below the edge that Spectrum's code has: interquartile range / 1.349 and 1 + √β."""
    n, m = sorted(matrix.shape)
    s = torch.linalg.svdvals(matrix.double())
    sigma = (s.quantile(0.75) - s.quantile(0.25)) / 1.349
    signal = s > sigma * (1 + (n / m) ** 0.5)
    return s[signal], s[~signal]


def reduced(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]
