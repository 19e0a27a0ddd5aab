"""Normalisations with a gain, and perhaps a bias, per feature: LayerNorm and the RMSNorm family."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from reltune.ops.squared_gradient import accumulator_dtype


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


def _per_example(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Per-example gradients (B, features) of the gain and of the bias.

    The output is normalised(x) · gain + bias (Gemma: · (1 + gain)), so the derivative with respect to the gain is
    the output at gain 1 less the output at gain 0, whatever the class computes inside.
    """
    dtype = accumulator_dtype(x)
    zero = {name: torch.zeros_like(p) for name, p in module.named_parameters(recurse=False)}
    one = {**zero, "weight": torch.ones_like(zero["weight"])}
    with torch.no_grad():
        normalised = functional_call(module, one, (x,)).to(dtype) - functional_call(module, zero, (x,)).to(dtype)
    gradients = {"weight": (g.to(dtype) * normalised).sum(1)}
    if "bias" in zero:
        gradients["bias"] = g.to(dtype).sum(1)
    return gradients


def squared_gradients(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Sums over the examples of squared per-example gradients: weight (features,), bias (features,)."""
    return {name: gradient.square().sum(0) for name, gradient in _per_example(module, x, g).items()}


def summed_gradients(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Sums over the examples of the gradients: weight (features,), bias (features,)."""
    return {name: gradient.sum(0) for name, gradient in _per_example(module, x, g).items()}
