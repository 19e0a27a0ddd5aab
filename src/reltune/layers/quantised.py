"""Linear maps whose weight is held in 4 or 8 bits: bitsandbytes' Linear4bit and Linear8bitLt, and torchao's weights.

Such a layer computes y = x Ŵᵀ + b with Ŵ the dequantised weight, and hands g Ŵ back to its input, so input and output
gradient are those of a plain linear map and the statistics are linear.py's. Ŵ itself, in its logical shape (out, in)
whatever the packed one is, is made for one module at a time, where a criterion asks for it. Units are columns, rows and
single weights of Ŵ.

bitsandbytes computes otherwise in evaluation mode on a CPU. 4-bit weights are packed anew, for good, where the
processor has AVX-512 BF16: the product with such a weight has no gradient, the scales are rounded to bfloat16, and
sizes that do not suit it end in an error. ``keep_as_loaded`` prevents that. 8-bit products then round their input
too; ``compute_as_in_training`` keeps to the form above. On a GPU the 8-bit product rounds its input in both modes; the
gradient then passes straight through that rounding, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reltune.errors import InputError
from reltune.layers.linear import LinearType
from reltune.layers.protocol import HeadLayout
from reltune.layers.units import ModuleInfo
from reltune.ops import autocast

FOUR_BIT = ("Linear4bit", "LinearFP4", "LinearNF4")


class QuantisedType(LinearType):
    """A quantised weight that the input's gradient passes through."""

    name = "quantised"
    covers = "quantised nn.Linear"
    trains = frozenset({"column", "row", "element", "direction", "bias"})
    packed = True
    head_layout: HeadLayout = ""

    def matches(self, module: nn.Module) -> bool:
        return (_is_4bit(module) or _is_8bit(module) or _is_torchao(module)) and not stops_the_gradient(module)

    def why_not(self, module: nn.Module) -> str:
        reason = stops_the_gradient(module)
        return f"that {reason}" if reason else ""

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """(out, in) as the layer computes, not as the weight is packed."""
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features

    def weights(self, info: ModuleInfo, module: nn.Module) -> Mapping[str, Tensor]:
        return Dequantised(self, module)

    def dequantised(self, module: nn.Module) -> Tensor:
        """Ŵ (out, in), a floating-point copy."""
        return dequantised(module)


class Dequantised(Mapping[str, Tensor]):
    """The module's weight, dequantised anew each time it is asked for, and its bias."""

    def __init__(self, layer_type: QuantisedType, module: nn.Module) -> None:
        self.layer_type, self.module = layer_type, module

    def __getitem__(self, name: str) -> Tensor:
        if name == "weight":
            return self.layer_type.dequantised(self.module)
        parameter = self.module._parameters.get(name)
        if parameter is None:
            raise KeyError(name)
        return parameter.detach()

    def __iter__(self) -> Iterator[str]:
        return (name for name in ("weight", "bias") if self.module._parameters.get(name) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def keep_as_loaded(model: nn.Module) -> None:
    """Have bitsandbytes keep the model's 4-bit weights as they are, also in evaluation mode on this CPU, for good."""
    for module in model.modules():
        if _is_4bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def compute_as_in_training(model: nn.Module) -> None:
    """Have quantised layers compute in evaluation mode what they compute in training.

    Sets the layers' own ``training`` flags, which the caller puts back.
    """
    for module in model.modules():
        if _is_4bit(module) or _is_8bit(module):
            module.training = True


def check_not_packed(model: nn.Module) -> None:
    """Raise InputError for a layer that gives its input no gradient: everything before it would look irrelevant."""
    for name, module in model.named_modules():
        if reason := stops_the_gradient(module):
            raise InputError(f"{name} ({type(module).__name__}) lets no gradient through, because it {reason}.")


def numel(parameter: Tensor) -> int:
    """How many weights a parameter stands for: a packed 4-bit one holds two in a number, or more."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def is_quantised(parameter: Tensor) -> bool:
    """Whether the parameter's numbers stand for weights and are not the weights themselves.

    Those of a float8 type have a scale somewhere.
    """
    plain = parameter.is_floating_point() and parameter.element_size() > 1
    return not plain or type(parameter) not in (nn.Parameter, Tensor)


def stops_the_gradient(module: nn.Module) -> str:
    """Why the layer gives its input no gradient; empty where it gives one."""
    weight: Any = module._parameters.get("weight")
    if _is_torchao(module):
        dynamic = getattr(weight, "act_quant_kwargs", None) is not None or "Activation" in type(weight).__name__
        return "rounds its inputs and not only its weight; quantise the weights only" if dynamic else ""
    if _is_4bit(module) and getattr(_state_of_4bit(module), "packing_format_for_cpu", False):
        return "was packed for inference by running in evaluation mode on this CPU; load the model again"
    return ""


@torch.no_grad()
def dequantised(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Ŵ (out, in), a floating-point copy; in the type that the library unpacks to (float32 of 8 bits), or in ``dtype``."""
    weight: Any = module._parameters["weight"]
    if _is_4bit(module):
        from bitsandbytes.functional import dequantize_4bit

        assert isinstance(module, nn.Linear)
        unpacked = dequantize_4bit(weight.data, _state_of_4bit(module)).reshape(module.out_features, module.in_features)
    elif _is_8bit(module):
        # Each row's scale is its largest weight, at 127; the first forward pass moves it to the module's state.
        state: Any = module.state
        scale = state.SCB if weight.SCB is None else weight.SCB
        unpacked = weight.data.to(dtype or torch.float32).mul_((scale.float() / 127)[:, None])
    else:
        unpacked = weight.dequantize()
    return unpacked.to(dtype or unpacked.dtype)


def product_dtypes(module: nn.Module, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The type in which x (…, in) is multiplied with Ŵ, and that of the output, which is as the layer itself gives it."""
    if _is_4bit(module):
        return module.compute_dtype or x.dtype, x.dtype  # type: ignore[return-value]
    if _is_torchao(module):
        return x.dtype, x.dtype
    dtype = autocast.product_dtype(x)
    return dtype, x.dtype if _is_8bit(module) and x.is_cuda else dtype


def _is_4bit(module: nn.Module) -> bool:
    if type(module).__name__ not in FOUR_BIT or not type(module).__module__.startswith("bitsandbytes."):
        return False
    return _state_of_4bit(module) is not None


def _state_of_4bit(module: nn.Module) -> Any:
    """What the packed numbers mean. The module has it too, for weights that FSDP2 gathers, which have lost theirs."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


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
