"""First-order Taylor importance: how much each example's loss would change if the unit were set to zero, to first order.

T(u) = 1/N Σ_s |Σ_{w ∈ u} w · ∂ℓ_s/∂w|. Summed over the unit with sign, made positive per example, then averaged: the
group form of Molchanov et al. (CVPR 2019, eq. 8), with the absolute value in place of the square, so that it scales
with the loss. A layer's is the sum of its matrices' and biases', a head's that of its rows and columns. For elements
1/N Σ_s |w · ∂ℓ_s/∂w|. Memory: O(in + out) numbers per linear map (Σ_o w g over a column is Σ_t x · ∂x of that map alone),
elements one per weight; cost: one forward and one input-gradient backward pass and two more products per map.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import ModuleSums

NEEDS = ("products",)
ELEMENT_NEEDS = ("absolute_elements",)


def quantities(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> tuple[Parts]:
    return ({part: total / context.examples for part, total in sums["products"].items()},)


def elements(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
    means = {name: total / context.examples for name, total in sums["absolute_elements"].items()}
    return {name: weights[name].to(mean).abs() * mean for name, mean in means.items()}
