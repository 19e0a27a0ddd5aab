"""Signal to noise of the gradient: the squared mean gradient over its variance between examples, per unit.

S(u) = Σ_{w ∈ u} ḡ_w² / Σ_{w ∈ u} v_w with ḡ_w the mean over the examples of ∂ℓ_s/∂w and v_w its unbiased variance:
how much the examples agree on a direction. Averaged with sign before the square; never negative; numerator and
denominator each over all of the unit's weights, so a layer's is no sum of its modules'. 0 where the variance is 0 and the
mean too. The ratio of the gradient noise scale (McCandlish et al. 2018, arXiv:1812.06162, eq. 2.9), inverted and per
unit. Does not change when the loss is scaled. Needs two examples. Memory: as ``gradient``; cost: as ``gradient`` and
``fisher`` together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reltune.errors import InputError
from reltune.layers.units import ModuleInfo, Parts, by_unit
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import ModuleSums

NEEDS = ("sums", "squares")
ELEMENT_NEEDS = ("sums", "square_elements")


def quantities(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context
) -> tuple[Parts, Parts]:
    signal = by_unit(info, _squared_means(sums, context))
    mean_squares = {part: total / context.examples for part, total in sums["squares"].items()}
    return signal, {part: _variance(mean_squares[part], signal[part], context.examples) for part in signal}


def combine(signal: Tensor, noise: Tensor) -> Tensor:
    # Exact zeros: examples that all agree have a variance of rounding errors at most.
    tiny = torch.finfo(noise.dtype).tiny
    return torch.where(signal > 0, signal / noise.clamp(min=tiny), 0).clamp(max=torch.finfo(noise.dtype).max)


def elements(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
    signal = _squared_means(sums, context)
    return {
        name: combine(mean, _variance(sums["square_elements"][name] / context.examples, mean, context.examples))
        for name, mean in signal.items()
    }


def _squared_means(sums: ModuleSums, context: Context) -> Parts:
    if context.examples < 2:
        raise InputError("gradient_snr compares examples and got one; give it more data.")
    return {name: (total / context.examples).square() for name, total in sums["sums"].items()}


def _variance(mean_square: Tensor, squared_mean: Tensor, examples: int) -> Tensor:
    return (mean_square - squared_mean).clamp(min=0) * (examples / (examples - 1))
