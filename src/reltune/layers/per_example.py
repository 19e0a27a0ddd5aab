"""Statistics of per-example gradients: what a layer type computes, and how from the gradients themselves.

Each statistic is a sum over the examples s of a batch, with G_s the gradient of example s's loss:

- squares: Σ_s Σ_{w ∈ u} G_s² for every unit u;
- products: Σ_s |Σ_{w ∈ u} w · G_s| for every unit u;
- sums: Σ_s G_s, one number per weight (weight, bias);
- square_elements, absolute_elements: Σ_s G_s² and Σ_s |G_s|, one number per weight.

The functions here take the gradients themselves, for layers whose gradients are small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import Tensor

from reltune.layers.units import ModuleInfo, by_unit, unit_shapes, weight_shapes
from reltune.ops.squared_gradient import Gram

STATISTICS = ("squares", "products", "sums", "square_elements", "absolute_elements")
BY_UNIT = ("squares", "products")  # statistics with one number per unit
WEIGHT_SIZED = ("sums", "square_elements", "absolute_elements")  # statistics with one number per weight
Statistics = dict[str, dict[str, Tensor]]  # statistic -> part of the module -> sum over the examples


@dataclasses.dataclass
class Shared:
    """What the statistics of several modules with one input share: its Gram matrix, kept while others are to come."""

    others: bool
    gram: Gram | None = None


def statistics(
    info: ModuleInfo, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], wanted: Collection[str]
) -> Statistics:
    """The statistics of ``gradients``: weight (B, *canonical shape) and bias (B, …)."""
    sums = element_statistics(gradients, wanted)
    if "squares" in wanted:
        squares = by_unit(info, {name: gradient.square() for name, gradient in gradients.items()})
        sums["squares"] = {part: value.sum(0) for part, value in squares.items()}
    if "products" in wanted:
        products = by_unit(info, {name: g * weights[name].to(g.dtype) for name, g in gradients.items()})
        sums["products"] = {part: value.abs().sum(0) for part, value in products.items()}
    if "sums" in wanted:
        sums["sums"] = {name: gradient.sum(0) for name, gradient in gradients.items()}
    return sums


def element_statistics(gradients: Mapping[str, Tensor], wanted: Collection[str]) -> Statistics:
    """Those of the wanted statistics that are sums over the examples of each weight's squared or absolute gradient."""
    sums: Statistics = {}
    if "square_elements" in wanted:
        sums["square_elements"] = {name: gradient.square().sum(0) for name, gradient in gradients.items()}
    if "absolute_elements" in wanted:
        sums["absolute_elements"] = {name: gradient.abs().sum(0) for name, gradient in gradients.items()}
    return sums


def shapes(info: ModuleInfo, statistic: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a statistic's parts."""
    return unit_shapes(info) if statistic in BY_UNIT else weight_shapes(info)


def add(total: Statistics, more: Statistics) -> None:
    """Add ``more`` to ``total`` in place."""
    for name, parts in more.items():
        into = total.setdefault(name, {})
        for part, value in parts.items():
            if part in into:
                into[part] += value
            else:
                into[part] = value
