"""Fisher information: as ``fisher``, with labels drawn from the model's own predictions instead of the observed ones.

F(u) = 1/N Σ_s Σ_{w ∈ u} (∂ℓ(x_s, ŷ_s)/∂w)² with ŷ_s ~ p(y | x_s), one draw per example, from the seed. The empirical
Fisher information is another quantity, large where the model is wrong (Kunstner, Hennig, Balles, NeurIPS 2019).
Squared per example, then averaged; never negative. Memory and cost: those of ``fisher``, in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import ModuleSums

NEEDS = ("sampled_squares",)
ELEMENT_NEEDS = ("sampled_square_elements",)


def quantities(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> tuple[Parts]:
    return ({part: total / context.examples for part, total in sums["sampled_squares"].items()},)


def elements(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
    return {name: total / context.examples for name, total in sums["sampled_square_elements"].items()}
