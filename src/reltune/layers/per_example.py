"""Statistics of per-example gradients, from the gradients themselves: for layers whose gradients are small.

What layer types compute, each as sums over the examples s of a batch, with G_s the gradient of example s's loss:

- squares: Σ_s Σ_{w ∈ u} G_s² for every unit u;
- products: Σ_s |Σ_{w ∈ u} w · G_s| for every unit u;
- sums: Σ_s G_s, one number per weight (weight, bias);
- square_elements, absolute_elements: Σ_s G_s² and Σ_s |G_s|, one number per weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import Tensor

from reltune.layers.units import ModuleInfo, by_unit
from reltune.ops.squared_gradient import Gram

STATISTICS = ("squares", "products", "sums", "square_elements", "absolute_elements")
WEIGHT_SIZED = ("sums", "square_elements", "absolute_elements")
Statistics = dict[str, dict[str, Tensor]]


@dataclasses.dataclass
class Shared:
    """What the statistics of several modules with one input share: its Gram matrix, kept while others are to come."""

    others: bool
    gram: Gram | None = None


def statistics(
    info: ModuleInfo, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], wanted: Collection[str]
) -> Statistics:
    """The sums of ``gradients``: weight (B, *canonical shape) and bias (B, …)."""
    found: Statistics = {}
    if "squares" in wanted:
        squares = by_unit(info, {name: of.square() for name, of in gradients.items()})
        found["squares"] = {part: value.sum(0) for part, value in squares.items()}
    if "products" in wanted:
        products = by_unit(info, {name: of * weights[name].to(of.dtype) for name, of in gradients.items()})
        found["products"] = {part: value.abs().sum(0) for part, value in products.items()}
    if "sums" in wanted:
        found["sums"] = {name: of.sum(0) for name, of in gradients.items()}
    if "square_elements" in wanted:
        found["square_elements"] = {name: of.square().sum(0) for name, of in gradients.items()}
    if "absolute_elements" in wanted:
        found["absolute_elements"] = {name: of.abs().sum(0) for name, of in gradients.items()}
    return found


def add(total: Statistics, more: Statistics) -> None:
    """Add ``more`` to ``total`` in place."""
    for name, parts in more.items():
        into = total.setdefault(name, {})
        for part, value in parts.items():
            if part in into:
                into[part] += value
            else:
                into[part] = value
