"""Linear maps whose weight is held in 4 or 8 bits: bitsandbytes' Linear4bit and Linear8bitLt, torchao's weights,
reltune's own Float8Linear.

Such a layer computes y = x Ŵᵀ + b with Ŵ the dequantised weight, and hands g Ŵ back to its input, so input and output
gradient are those of a plain linear map and the statistics are linear.py's. Ŵ itself, in its logical shape (out, in)
whatever the packed one is, is made for one module at a time, where a criterion asks for it. Units are columns and rows
of Ŵ. bitsandbytes computes in another way in evaluation on a CPU: 4-bit weights are packed anew for a product without a
gradient, and 8-bit products round their input too. ``compute_as_in_training`` keeps to the form above. On a GPU the
8-bit product rounds its input in both; the gradient then passes straight through that rounding, as in training; so it does in Float8Linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reltune.layers.float8 import Float8Linear
from reltune.layers.linear import by_example, input_weighted, squared_inputs, statistics

__all__ = ["by_example", "input_weighted", "matches", "squared_inputs", "statistics"]

FOUR_BIT = ("Linear4bit", "LinearFP4", "LinearNF4")


def matches(module: nn.Module) -> bool:
    """A quantised weight that the input's gradient passes through."""
    held = _is_4bit(module) or _is_8bit(module) or _is_torchao(module) or isinstance(module, Float8Linear)
    return held and not stops_the_gradient(module)


def compute_as_in_training(model: nn.Module) -> None:
    """Set the quantised layers' own ``training`` flags; the caller puts them back."""
    for module in model.modules():
        if matches(module):
            module.training = True


def shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) as the layer computes, not as the weight is packed."""
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features


def numel(parameter: Tensor) -> int:
    """How many weights a parameter stands for: a packed 4-bit one holds two in a number, or more."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def is_quantised(parameter: Tensor) -> bool:
    """Whether the numbers that the parameter holds are no weights."""
    return not parameter.is_floating_point() or type(parameter) not in (nn.Parameter, Tensor)


def stops_the_gradient(module: nn.Module) -> str:
    """Why the layer gives its input no gradient; empty where it gives one."""
    weight: Any = module._parameters.get("weight")
    if _is_torchao(module):
        dynamic = getattr(weight, "act_quant_kwargs", None) is not None or "Activation" in type(weight).__name__
        return "rounds its inputs and not only its weight; quantise the weights only" if dynamic else ""
    if _is_4bit(module) and getattr(weight.quant_state, "packing_format_for_cpu", False):
        return "was packed for inference by running in evaluation mode on this CPU; load the model again"
    return ""


class Weights(Mapping[str, Tensor]):
    """The module's weight, dequantised anew each time it is asked for, and its bias."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getitem__(self, name: str) -> Tensor:
        if name == "weight":
            return dequantised(self.module)
        if name not in self.module._parameters or self.module._parameters[name] is None:
            raise KeyError(name)
        return self.module._parameters[name].detach()  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[str]:
        return (name for name in ("weight", "bias") if self.module._parameters.get(name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@torch.no_grad()
def dequantised(module: nn.Module) -> Tensor:
    """Ŵ (out, in), a floating-point copy."""
    if isinstance(module, Float8Linear):
        return module.dequantised()
    weight: Any = module._parameters["weight"]
    if _is_4bit(module):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).reshape(shape(module))
    if _is_8bit(module):
        # Each row's scale is its largest weight, at 127; the first forward pass moves it to the module's state.
        state: Any = module.state
        scale = state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * (scale.float() / 127)[:, None]
    return weight.dequantize()


def _is_4bit(module: nn.Module) -> bool:
    if type(module).__name__ not in FOUR_BIT or not type(module).__module__.startswith("bitsandbytes."):
        return False
    return getattr(module._parameters.get("weight"), "quant_state", None) is not None


def _is_8bit(module: nn.Module) -> bool:
    if type(module).__name__ != "Linear8bitLt" or not type(module).__module__.startswith("bitsandbytes."):
        return False
    weight = module._parameters.get("weight")  # with has_fp16_weights it stays a floating-point one
    return weight is not None and weight.dtype == torch.int8


def _is_torchao(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        type(module) is nn.Linear and type(weight).__module__.startswith("torchao.") and hasattr(weight, "dequantize")
    )
