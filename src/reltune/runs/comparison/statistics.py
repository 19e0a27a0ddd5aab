"""What several seeds say of a method, and of its difference to another one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from reltune.report.record import Difference

DRAWS, DRAW_SEED, LEVEL = 10_000, 0, 0.95


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation between seeds (of a sample); None of a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """The mean difference over the seeds that both have, and its percentile bootstrap interval: pairs are drawn with replacement
    ``DRAWS`` times (Efron 1979). None without a pair; no interval of a single one."""
    pairs = np.array([one[seed] - other[seed] for seed in sorted(one) if seed in other])
    if not len(pairs):
        return None
    if len(pairs) == 1:
        return Difference(float(pairs[0]), None, None)
    draws = np.random.default_rng(DRAW_SEED).integers(len(pairs), size=(DRAWS, len(pairs)))
    low, high = np.quantile(pairs[draws].mean(1), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Difference(float(pairs.mean()), float(low), float(high))
