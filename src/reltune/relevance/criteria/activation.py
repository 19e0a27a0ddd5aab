"""Activation-aware magnitude: each weight's absolute value times the norm of its input feature, summed over the unit.

R(u) = Σ_{w ∈ u} |w| · ‖x_w‖₂ with x_w the input that the weight multiplies, over all tokens of all examples that are not
padding (by ``attention_mask``, where the module's input has the mask's positions). The score of Wanda (Sun et al., ICLR
2024, eq. 1), per unit; a bias has input 1, an embedding's row its token's indicator, a norm's gain the normalised input.
Never negative; grows with the square root of the number of tokens. Looks at no labels. Memory: O(in) numbers per linear
map; cost: one forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reltune.layers.registry import layer_type
from reltune.layers.units import ModuleInfo, Parts, by_unit
from reltune.relevance.criteria.context import Context

NEEDS = ("inputs",)
ELEMENT_NEEDS = NEEDS


def quantities(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]], context: Context
) -> tuple[Parts]:
    return (by_unit(info, elements(info, weights, sums, context)),)


def elements(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]], context: Context
) -> Parts:
    squares = sums["inputs"]
    dtype = squares["weight"].dtype
    return layer_type(info.layer_type).input_weighted(info, {k: w.to(dtype) for k, w in weights.items()}, squares)
