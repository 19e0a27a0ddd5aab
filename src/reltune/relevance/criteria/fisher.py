"""Empirical Fisher information: mean over examples of the squared gradient, summed over the unit's weights.

F(u) = 1/N Σ_s Σ_{w ∈ u} (∂ℓ_s/∂w)². Squared per example, then averaged; never negative. The diagonal of the
empirical Fisher matrix as in FISH Mask (Sung, Nair, Raffel, NeurIPS 2021, eq. 3, with the observed labels).
Scales with the square of the loss. Memory: O(in + out) numbers per linear map, with elements one float32 number per
weight on the host; cost: one forward and one input-gradient backward pass, and the sums of ops/squared_gradient.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import ModuleSums

NEEDS = ("squares",)
ELEMENT_NEEDS = ("square_elements",)


def quantities(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> tuple[Parts]:
    return ({part: total / context.examples for part, total in sums["squares"].items()},)


def elements(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
    return {name: total / context.examples for name, total in sums["square_elements"].items()}
