"""Frozen linear maps whose weight is held in float8 (ops/float8.py).

They take half of bfloat16's memory, and their products are faster on a GPU that multiplies float8. Their
statistics are those of other quantised linear maps (layers/quantised.py).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from reltune.errors import InputError
from reltune.layers.linear import LinearType
from reltune.layers.quantised import QuantisedType
from reltune.ops.float8 import E4M3, float8_linear, quantise_weight

MULTIPLE = 16  # of features: what the tensor cores' products ask for


class Float8Linear(nn.Linear):
    """An nn.Linear that was converted by ``to_float8``; its weight is frozen for good.

    ``weight`` (out, in) holds the float8 numbers as int8, which libraries take for numbers that they must not cast, and
    ``weight_scale`` (out,) a power of two per output, which no cast of the model changes. A weight that is loaded in another
    type is rounded.
    """

    weight_scale: Tensor

    def forward(
        self, input: Tensor, columns: Tensor | None = None, idx: Tensor | None = None, own: Tensor | None = None
    ) -> Tensor:
        """``columns`` D (out, c) at ``idx`` (c,) in place of the weight's own, Ŵ[:, idx], which are given too."""
        run = self._uncompiled if torch.compiler.is_compiling() else self._forward
        return run(input, columns, idx, own)

    @torch.compiler.disable  # remembers its last input in Python
    def _uncompiled(self, *args: Any) -> Tensor:
        return self._forward(*args)

    def _forward(self, input: Tensor, columns: Tensor | None, idx: Tensor | None, own: Tensor | None) -> Tensor:
        scale = self.weight_scale
        state = 0 if scale.is_inference() else scale._version
        wide = self.__dict__.get("_wide_scale")
        if wide is None or wide[0] is not scale or wide[1] != state:
            with torch.inference_mode(False):  # it may have to enter a graph later
                wide = self.__dict__["_wide_scale"] = scale, state, scale.float()  # what the products take
        return float8_linear(input, self.weight, wide[2], self.bias, columns, idx, own)

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """Ŵ (out, in) in the type that the model has, or in ``dtype``: exact, but for what is too small for float16."""
        dtype = dtype or self.weight_scale.dtype
        return self.weight.detach().view(E4M3).to(dtype).mul_(self.weight_scale[:, None].to(dtype))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.is_floating_point():
            rounded, scale = quantise_weight(weight.to(self.weight_scale.dtype))
            state_dict = {
                **{key: value for key, value in state_dict.items() if key.startswith(prefix)},
                f"{prefix}weight": rounded.view(torch.int8),
                f"{prefix}weight_scale": scale,
            }
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Float8Type(QuantisedType):
    name = "float8"
    covers = "nn.Linear held in float8"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Float8Linear)

    def why_not(self, module: nn.Module) -> str:
        return ""

    def dequantised(self, module: nn.Module) -> Tensor:
        assert isinstance(module, Float8Linear)
        return module.dequantised()


@torch.no_grad()
def to_float8(module: nn.Linear) -> None:
    """Round the module's weight where it is, and free it. Its name, hooks and bias stay."""
    rounded, scale = quantise_weight(module.weight)
    module.__class__ = Float8Linear
    # Registered, it would be put on the meta device while PEFT loads an adapter with low_cpu_mem_usage.
    module._parameters["weight"] = nn.Parameter(rounded.view(torch.int8), requires_grad=False)
    module.register_buffer("weight_scale", scale)


def convertible(model: nn.Module, without: Collection[str] = ()) -> dict[str, nn.Linear]:
    """The linear maps of the model that ``to_float8`` is for, by their names. Raises InputError where there are none.

    Left alone are output layers, weights that two modules share, what ``without`` names (a module's full name, or
    its end, or a module that it lies in), sizes that are not multiples of 16, and modules with a forward of their own.
    """
    get_output: Any = getattr(model, "get_output_embeddings", None)
    output = get_output() if get_output is not None else None
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    linear = LinearType()
    maps: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if (
            linear.matches(module)
            and isinstance(module, nn.Linear)
            and module is not output
            and module.weight.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
            and not any(size % MULTIPLE for size in module.weight.shape)
            and owners[id(module.weight)] == 1
            and not any(f".{kept}." in f".{name}." for kept in without)
            and "forward" not in vars(module)
        ):
            maps[name] = module
    if not maps:
        raise InputError(
            "frozen_dtype: this model has no linear map that can be held in float8, of a floating-point type (not in 4 or 8 bits) and "
            f"with sizes that are multiples of {MULTIPLE}; leave frozen_dtype out."
        )
    return maps
