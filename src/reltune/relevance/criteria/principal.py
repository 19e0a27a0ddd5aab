"""Principal weights: the absolute weights after rank reduction, summed over the unit. Looks at no data.

R(u) = Σ_{w ∈ u} |W_r|, with W_r the best approximation of the weight matrix W by a matrix of rank r: the score of LIFT (Liu
et al., ICML 2025, arXiv:2506.00772; its elements are what LIFT ranks). Never negative; scales with the weights.

r is 128, as the authors recommend for their matrices (short sides of 2048 and more), and a 16th of the short side where
that is less, but at least 1. Biases and norms have no rank and get nothing. A 2-D convolution is taken as
(out, in · height · width), each group for itself; an embedding as it is, where LIFT keeps to linear maps.

The r singular directions come from ops/singular_vectors.py, which states memory, cost and rounding, and are shared with
``spectral_snr``; W_r is formed a block of rows at a time, elements one number per weight. Where σ_r = σ_{r+1} the best approximation is not unique, nor is R.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts, matrices
from reltune.ops.row_blocks import PRODUCT_NUMBERS, row_blocks
from reltune.ops.singular_vectors import tall
from reltune.ops.squared_gradient import accumulator_dtype
from reltune.relevance.criteria.context import Context

NEEDS = ()
ELEMENT_NEEDS = ()
RANK, SHARE = 128, 16


def rank(matrix: Tensor) -> int:
    return min(RANK, max(1, min(matrix.shape) // SHARE))


def quantities(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]], context: Context
) -> tuple[Parts]:
    if info.is_vector:
        return ({},)
    weight = weights["weight"]
    dtype = accumulator_dtype(weight)
    columns, rows = [], []
    for matrix, _, vectors in context.decompositions.of(weight, matrices(info, weight)):
        a = tall(matrix)
        short = torch.zeros(a.shape[1], dtype=torch.float64, device=a.device)
        long = short.new_empty(len(a))
        for at, block in _reduced(a, vectors):
            short += block.sum(0)
            long[at] = block.sum(1)
        columns.append(short if a is matrix else long)
        rows.append(long if a is matrix else short)
    column, row = torch.cat(columns), torch.cat(rows)
    column = column.unflatten(0, (info.columns, -1)).sum(1)  # over the places in a convolution's kernel
    return ({"column": column.to(dtype), "row": row.to(dtype), "weight": row.sum().to(dtype)},)


def elements(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]], context: Context
) -> Parts:
    if info.is_vector:
        return {}
    weight = weights["weight"]
    whole = torch.empty(info.shape, dtype=accumulator_dtype(weight), device=weight.device)
    decompositions = context.decompositions.of(weight, matrices(info, weight))
    for (matrix, _, vectors), target in zip(decompositions, matrices(info, whole), strict=True):
        into = tall(target)
        for at, block in _reduced(tall(matrix), vectors):
            into[at] = block
    return {"weight": whole}


def _reduced(a: Tensor, vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """|W_r| of ``a`` (long, short) in float64, by blocks of rows."""
    directions = vectors[:, -rank(a) :]
    for at, block in row_blocks(a, torch.float64, PRODUCT_NUMBERS):
        yield at, (block @ directions @ directions.mT).abs()
