"""Mean gradient: the absolute value of the gradient averaged over the examples, summed over the unit's weights.

R(u) = Σ_{w ∈ u} |1/N Σ_s ∂ℓ_s/∂w|. Averaged with sign, then made positive: weights whose gradients disagree between
examples count little. The score of GPS (Zhang et al., CVPR 2024), per unit. Scales with the loss. Memory: one
float32 number per weight of every measured module, on the host where the model is on an accelerator; cost: one
forward pass, one input-gradient backward pass and one weight-gradient product.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts, by_unit
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import ModuleSums

NEEDS = ("sums",)
ELEMENT_NEEDS = NEEDS


def quantities(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> tuple[Parts]:
    return (by_unit(info, elements(info, weights, sums, context)),)


def elements(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
    return {name: (total / context.examples).abs() for name, total in sums["sums"].items()}
