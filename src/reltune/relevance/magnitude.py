"""Magnitude: the squared weights, summed over the unit. Looks at no data.

R(u) = Σ_{w ∈ u} w². Never negative; scales with the square of the weights. Memory: nothing beyond one module's
float32 copy; cost: one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts, by_unit
from reltune.ops.squared_gradient import accumulator_dtype
from reltune.relevance.context import Context

NEEDS = ()
ELEMENT_NEEDS = ()


def quantities(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]], context: Context
) -> tuple[Parts]:
    return (by_unit(info, elements(info, weights, sums, context)),)


def elements(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]], context: Context
) -> Parts:
    return {name: weight.to(accumulator_dtype(weight)).square() for name, weight in weights.items()}
