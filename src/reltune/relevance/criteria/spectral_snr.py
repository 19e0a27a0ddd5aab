"""Spectral signal-to-noise ratio: singular values beyond what noise can have over those that noise explains.

R(W) = Σ_{σ_k > edge} σ_k / Σ_{σ_k ≤ edge} σ_k, with σ_k the singular values of the weight matrix W (n × m, n ≤ m) and the
edge that of the Marchenko-Pastur law: the idea of Spectrum (Hartford et al., arXiv:2406.06623). Looks at no data.
Never negative; the same for W and c · W. A layer's relevance is the ratio of its matrices' sums, no sum of theirs.

It departs from the published code in two things.
- The edge. Entries of standard deviation s give singular values up to s (√n + √m). s is taken from the median singular
  value over that of the law, s = median(σ) / √(m μ(n/m)) with μ the law's median (Gavish & Donoho, IEEE Trans. Inf. Theory
  2014: the noise level where it is unknown), which few signals move. Published are s = IQR(σ) / 1.349, right for numbers
  that are normal and not for singular values, and the edge s (1 + √(n/m)), which lacks √m; the two errors do not cancel.
  Pure noise beyond the published edge: 24 % of 1000 × 1000, 65 % of 500 × 1000, all of 300 × 3000 (ratios 0.8, 3.9 and
  ∞); beyond this one: none of the three. (The largest value of noise passes it in about one matrix of six, which makes the
  ratio about 2/n at the most.) Of 5 planted signals at 3 times the edge in 300 × 3000 the published code sees 300, this
  one 5.
- No division by the largest singular value, which would make a matrix less relevant by being scaled up.

Columns and rows: the norm of the column's (row's) part in the signal's singular directions over that of its rest; the same
dimension and no adding up to the matrix's ratio; an attention head's the sums of its rows' and columns' norms. Biases, norms and single weights have no spectrum and get nothing. A 2-D
convolution is taken as (out, in · height · width), each group for itself; an embedding as it is. Where there is no noise
(more than half of the singular values are 0) the ratio stops at 1 over the rounding of its type. A short side of a few
(BERT's two token types) has no bulk to tell noise by, and its ratio means little.
Memory and cost: ops/singular_vectors.py, per matrix; with ``principal`` in the same analysis they are paid for once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts, matrices
from reltune.ops.row_blocks import PRODUCT_NUMBERS, row_blocks
from reltune.ops.singular_vectors import tall
from reltune.ops.squared_gradient import accumulator_dtype
from reltune.relevance.criteria.context import Context

NEEDS = ()
ELEMENT_NEEDS = ()


def quantities(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]], context: Context
) -> tuple[Parts, Parts]:
    if info.is_vector:
        return {}, {}
    weight = weights["weight"]
    dtype = accumulator_dtype(weight)
    groups = [
        _signal_and_noise(*decomposition) for decomposition in context.decompositions.of(weight, matrices(info, weight))
    ]
    signal, noise = ({part: [group[i][part] for group in groups] for part in groups[0][i]} for i in (0, 1))
    return _joined(info, signal, dtype), _joined(info, noise, dtype)


def combine(signal: Tensor, noise: Tensor) -> Tensor:
    least = torch.finfo(noise.dtype).eps * signal
    return torch.where(signal > 0, signal / torch.maximum(noise, least), 0)


def edge(values: Tensor, n: int, m: int) -> float:
    """The largest singular value that noise explains, from singular values (min(n, m),) of an n × m matrix."""
    noise = float(values.median()) / math.sqrt(max(n, m) * marchenko_pastur_median(min(n, m) / max(n, m)))
    return noise * (math.sqrt(n) + math.sqrt(m))


@functools.lru_cache(1024)
def marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko-Pastur law for the shape ratio 0 < beta ≤ 1 and entries of variance 1.

    With x = 1 + β + 2 √β cos θ the law's share above x has a closed form in θ, which is halved by bisection.
    """
    root = math.sqrt(beta)

    def above(theta: float) -> float:
        turn = math.atan((1 - root) / (1 + root) * math.tan(theta / 2))
        return 2 / math.pi * (((1 + beta) * theta - 2 * (1 - beta) * turn) / (4 * beta) - math.sin(theta) / (2 * root))

    low, high = 0.0, math.pi
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) < 0.5 else (low, middle)
    return 1 + beta + 2 * root * math.cos(low)


def _signal_and_noise(matrix: Tensor, values: Tensor, vectors: Tensor) -> tuple[Parts, Parts]:
    """Of one matrix: sums of singular values (weight), squared norms by column and by row."""
    a = tall(matrix)
    first = int((values <= edge(values, *a.shape)).sum())  # of the signals
    squares = values.square()
    short_signal, short_noise = torch.zeros_like(squares), torch.zeros_like(squares)
    for total, some in ((short_noise, slice(first)), (short_signal, slice(first, None))):
        for at, block in row_blocks(vectors.mT[some], values.dtype):  # a vector per row, as they lie in memory
            total += squares[some][at] @ block.square()
    directions = vectors[:, first:]
    long_signal, long_noise = values.new_empty(len(a)), values.new_empty(len(a))
    for at, block in row_blocks(a, values.dtype, PRODUCT_NUMBERS):
        inside = block @ directions
        long_signal[at] = inside.square().sum(1)
        long_noise[at] = (block - inside @ directions.mT).square().sum(1)  # a difference of squares would cancel
    of_short, of_long = ("column", "row") if a is matrix else ("row", "column")
    return (
        {of_short: short_signal, of_long: long_signal, "weight": values[first:].sum()},
        {of_short: short_noise, of_long: long_noise, "weight": values[:first].sum()},
    )


def _joined(info: ModuleInfo, groups: Mapping[str, list[Tensor]], dtype: torch.dtype) -> Parts:
    """The groups' sums as the module's, squared norms as norms."""
    column = torch.cat(groups["column"])
    column = column.unflatten(0, (info.columns, -1)).sum(1)  # over the places in a convolution's kernel
    return {
        "column": column.sqrt().to(dtype),
        "row": torch.cat(groups["row"]).sqrt().to(dtype),
        "weight": torch.stack(groups["weight"]).sum().to(dtype),
    }
