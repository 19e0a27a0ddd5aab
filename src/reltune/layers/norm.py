"""Normalisations with a gain, and perhaps a bias, per feature: LayerNorm and the RMSNorm family."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reltune.layers import linear, per_example
from reltune.layers.padding import mask_of
from reltune.layers.per_example import Shared, Statistics
from reltune.layers.single_weight import SingleWeight
from reltune.layers.units import ModuleInfo
from reltune.ops.squared_gradient import accumulator_dtype


class NormType(SingleWeight):
    """nn.LayerNorm, nn.RMSNorm, and any class called …RMSNorm whose only parameter is a gain vector.

    Transformers defines an RMSNorm class per architecture (LlamaRMSNorm, Qwen2RMSNorm, T5LayerNorm …), so these are
    known by their names. The output of all of them is affine in the gain, which the statistics below rely on.
    """

    name = "norm"
    covers = "nn.LayerNorm and the RMSNorm family"
    trains = frozenset({"weight", "bias"})

    def matches(self, module: nn.Module) -> bool:
        parameters = dict(module.named_parameters(recurse=False))
        if type(module) in (nn.LayerNorm, nn.RMSNorm):
            return bool(parameters) and all(p.ndim == 1 for p in parameters.values())
        by_name = type(module).__name__.endswith("RMSNorm") or type(module).__name__ == "T5LayerNorm"
        return by_name and list(parameters) == ["weight"] and parameters["weight"].ndim == 1

    def statistics(
        self,
        info: ModuleInfo,
        module: nn.Module,
        x: Tensor,
        g: Tensor,
        wanted: Collection[str],
        shared: Shared | None = None,
    ) -> Statistics:
        """From inputs x and output gradients g, both (B, T, features), by way of each example's gradient."""
        g = g.to(accumulator_dtype(x))
        gradients = {"weight": (g * normalised(module, x)).sum(1)}
        if info.bias:
            gradients["bias"] = g.sum(1)
        return per_example.statistics(info, self.weights(info, module), gradients, wanted)

    def squared_inputs(self, module: nn.Module, x: Tensor, mask: Tensor | None, route: Any) -> dict[str, Tensor]:
        """The weight has Σ of the squared normalised input over all positions (features,)."""
        return linear.squared_inputs(normalised(module, x), mask_of(x.shape[:-1], mask))

    def neutral(
        self, info: ModuleInfo, module: nn.Module, x: Tensor, y: Tensor, mean: Tensor | None, route: Any
    ) -> Tensor:
        """The normalised input without gain and bias, also where a mean is given: a constant would remove all that passes through."""
        return normalised(module, x)


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What the gain is multiplied by: the derivative of the output with respect to the gain.

    The output is normalised(x) · gain + bias (Gemma: · (1 + gain)), so it is the output at gain 1 less the output at
    gain 0, whatever the class computes inside.
    """
    zero = {name: torch.zeros_like(p) for name, p in module.named_parameters(recurse=False)}
    one = {**zero, "weight": torch.ones_like(zero["weight"])}
    dtype = accumulator_dtype(x)
    with torch.no_grad():
        return functional_call(module, one, (x,)).to(dtype) - functional_call(module, zero, (x,)).to(dtype)
