"""Magnitude: the squared weights, summed over the unit. Looks at no data.

R(u) = Σ_{w ∈ u} w². Never negative; scales with the square of the weights. Memory: O(in + out) numbers per matrix and one
block of its rows in float32, elements one number per weight; cost: one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts, by_unit
from reltune.ops.row_blocks import row_blocks
from reltune.ops.squared_gradient import accumulator_dtype
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import ModuleSums

NEEDS = ()
ELEMENT_NEEDS = ()


def quantities(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> tuple[Parts]:
    weight = weights["weight"]
    if weight.ndim != 2:
        return (by_unit(info, elements(info, weights, sums, context)),)
    column = torch.zeros(info.columns, dtype=accumulator_dtype(weight), device=weight.device)
    row = column.new_empty(info.rows)
    for at, block in row_blocks(weight, column.dtype):
        square = block.square()
        column += square.sum(0)
        row[at] = square.sum(1)
    parts = {"column": column, "row": row, "weight": row.sum()}
    if info.bias:
        parts["bias"] = weights["bias"].to(column.dtype).square().sum()
    return (parts,)


def elements(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
    return {name: weight.to(accumulator_dtype(weight)).square() for name, weight in weights.items()}
