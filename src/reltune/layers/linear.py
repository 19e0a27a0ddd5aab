"""Linear maps y = x Wᵀ + b: columns (input features), rows (output features), the bias, the whole matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from reltune.layers import per_example
from reltune.layers.padding import mask_of
from reltune.layers.per_example import Shared, Statistics
from reltune.layers.protocol import HeadLayout
from reltune.layers.single_weight import SingleWeight
from reltune.layers.units import ModuleInfo
from reltune.ops.squared_gradient import (
    Gram,
    accumulator_dtype,
    input_gram,
    is_fused,
    squared_gradient_sums,
    wants_gram,
)


class LinearType(SingleWeight):
    """nn.Linear, and what every module has that computes x Wᵀ + b with a weight stored in some way."""

    name = "linear"
    covers = "nn.Linear"
    trains = frozenset({"column", "row", "element", "direction", "weight", "bias"})
    head_layout: HeadLayout = "separate"

    def matches(self, module: nn.Module) -> bool:
        """Exactly nn.Linear with a plain weight of its own: a subclass or reparametrisation may compute otherwise."""
        return type(module) is nn.Linear and type(module._parameters.get("weight")) in (nn.Parameter, Tensor)

    def statistics(
        self,
        info: ModuleInfo,
        module: nn.Module,
        x: Tensor,
        g: Tensor,
        wanted: Collection[str],
        shared: Shared | None = None,
    ) -> Statistics:
        return statistics(self.weights(info, module), info.bias, x, g, wanted, shared)

    def squared_inputs(self, module: nn.Module, x: Tensor, mask: Tensor | None, route: Any) -> dict[str, Tensor]:
        """The weight has Σ x² over all positions of each input feature (in,)."""
        return squared_inputs(x, mask_of(x.shape[:-1], mask))


def statistics(
    weights: Mapping[str, Tensor],
    bias: bool,
    x: Tensor,
    g: Tensor,
    wanted: Collection[str],
    shared: Shared | None = None,
) -> Statistics:
    """Sums over the examples (layers/per_example.py) for inputs x (B, T, in) and output gradients g (B, T, out).

    Squares and products need no gradient of the weight's size. ``weights`` are read for products alone.
    """
    dtype = accumulator_dtype(x)
    sums: Statistics = {}
    bias_gradient = g.sum(1, dtype=dtype) if bias else None
    if "squares" in wanted:
        columns, rows = squared_gradient_sums(x, g, _shared_gram(shared, x, g))
        sums["squares"] = {"column": columns, "row": rows, "weight": rows.sum()}
        if bias_gradient is not None:
            sums["squares"]["bias"] = bias_gradient.square().sum()
    if "products" in wanted:
        weight = weights["weight"].to(dtype)
        xs, gs = x.to(dtype), g.to(dtype)
        columns = (xs * (gs @ weight)).sum(1)
        sums["products"] = {
            "column": columns.abs().sum(0),
            "row": (gs * (xs @ weight.mT)).sum(1).abs().sum(0),
            "weight": columns.sum(1).abs().sum(),
        }
        if bias_gradient is not None:
            sums["products"]["bias"] = (bias_gradient * weights["bias"].to(dtype)).sum(1).abs().sum()
    if "sums" in wanted:
        sums["sums"] = {"weight": g.to(dtype).flatten(0, 1).mT @ x.to(dtype).flatten(0, 1)}
        if bias_gradient is not None:
            sums["sums"]["bias"] = bias_gradient.sum(0)
    elements = set(wanted) & {"square_elements", "absolute_elements"}
    if elements:
        # One example at a time: a gradient of the weight's size is all the workspace this may take.
        for s in range(len(x)):
            gradients = {"weight": (g[s].to(dtype).mT @ x[s].to(dtype))[None]}
            if bias_gradient is not None:
                gradients["bias"] = bias_gradient[s][None]
            per_example.add(sums, per_example.element_statistics(gradients, elements))
    return sums


def _shared_gram(shared: Shared | None, x: Tensor, g: Tensor) -> Gram | None:
    """The Gram matrix of x, where several maps with this input have a use for it."""
    if shared is None or not wants_gram(x.shape[1], x.shape[2], g.shape[2], fused=is_fused(x)):
        return None
    if shared.gram is None and shared.others:
        shared.gram = input_gram(x)
    return shared.gram


def squared_inputs(x: Tensor, real: Tensor | None) -> dict[str, Tensor]:
    """Σ x² over all positions of each feature: weight (in,), and the number of positions: bias ().

    ``real`` (x.shape[:-1]) marks the positions that are not padding.
    """
    squares = x.to(accumulator_dtype(x)).square()
    if real is None:
        return {"weight": squares.flatten(0, -2).sum(0), "bias": squares.new_tensor(x.shape[:-1].numel())}
    kept = real.to(squares.dtype)
    return {"weight": (squares * kept[..., None]).flatten(0, -2).sum(0), "bias": kept.sum()}
