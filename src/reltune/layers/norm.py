"""Normalisations with a gain, and perhaps a bias, per feature: LayerNorm and the RMSNorm family."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reltune.layers import per_example
from reltune.layers.linear import by_example, input_weighted
from reltune.layers.units import ModuleInfo
from reltune.ops.squared_gradient import accumulator_dtype

__all__ = ["by_example", "input_weighted", "matches", "squared_inputs", "statistics"]


def matches(module: nn.Module) -> bool:
    """nn.LayerNorm, nn.RMSNorm, and any class called …RMSNorm whose only parameter is a gain vector.

    Transformers defines an RMSNorm class per architecture (LlamaRMSNorm, Qwen2RMSNorm, T5LayerNorm …), so these go
    by name; all of them are affine in the gain, which is what the statistics below rely on.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        return bool(parameters) and all(p.ndim == 1 for p in parameters.values())
    by_name = type(module).__name__.endswith("RMSNorm") or type(module).__name__ == "T5LayerNorm"
    return by_name and list(parameters) == ["weight"] and parameters["weight"].ndim == 1


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The output is normalised(x) · gain + bias (Gemma: · (1 + gain)), so the derivative with respect to the gain is
    the output at gain 1 less the output at gain 0, whatever the class computes inside."""
    zero = {name: torch.zeros_like(p) for name, p in module.named_parameters(recurse=False)}
    one = {**zero, "weight": torch.ones_like(zero["weight"])}
    dtype = accumulator_dtype(x)
    with torch.no_grad():
        return functional_call(module, one, (x,)).to(dtype) - functional_call(module, zero, (x,)).to(dtype)


def statistics(
    info: ModuleInfo,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    g: Tensor,
    wanted: Collection[str],
    shared: per_example.Shared | None = None,
) -> per_example.Statistics:
    """Sums over the examples (layers/per_example.py) for inputs x and output gradients g, both (B, T, features)."""
    g = g.to(accumulator_dtype(x))
    gradients = {"weight": (g * normalised(module, x)).sum(1)}
    if info.bias:
        gradients["bias"] = g.sum(1)
    return per_example.statistics(info, weights, gradients, wanted)


def squared_inputs(module: nn.Module, x: Tensor, real: Tensor | None) -> dict[str, Tensor]:
    """Σ of the squared normalised input over all tokens: weight (features,), and the number of tokens: bias ()."""
    squares = normalised(module, x).square()
    kept = squares.new_ones(x.shape[:-1]) if real is None else real.to(squares.dtype)
    return {"weight": (squares * kept[..., None]).flatten(0, -2).sum(0), "bias": kept.sum()}
