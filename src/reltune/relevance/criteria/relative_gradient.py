"""Relative gradient norm: the norm of the mean gradient over the norm of the weights, per unit.

R(u) = ‖1/N Σ_s ∂ℓ_s/∂u‖₂ / ‖u‖₂, the rule by which surgical fine-tuning chooses layers (Lee et al., ICLR 2023, section 4,
Auto-RGN). Averaged with sign before the square; never negative; both norms over all of the unit's weights, so a layer's is
no sum of its modules'. A unit whose weights are all zero (a fresh bias) has relevance 0: the ratio says nothing there.
Memory and cost: those of ``gradient``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts, by_unit
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import ModuleSums

NEEDS = ("sums",)
ELEMENT_NEEDS = NEEDS


def quantities(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context
) -> tuple[Parts, Parts]:
    means = {name: total / context.examples for name, total in sums["sums"].items()}
    return (
        by_unit(info, {name: mean.square() for name, mean in means.items()}),
        by_unit(info, {name: weights[name].to(mean).square() for name, mean in means.items()}),
    )


def combine(gradient: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0, gradient / weight, 0).sqrt()


def elements(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
    squares = {name: (total / context.examples).square() for name, total in sums["sums"].items()}
    return {name: combine(square, weights[name].to(square).square()) for name, square in squares.items()}
