"""GPT-2's Conv1D: a linear map that stores its weight as (in, out)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reltune.layers.linear import LinearType
from reltune.layers.protocol import HeadLayout
from reltune.layers.units import ModuleInfo


class Conv1DType(LinearType):
    name = "conv1d"
    covers = "Transformers' Conv1D"
    head_layout: HeadLayout = "fused"

    def matches(self, module: nn.Module) -> bool:
        return type(module) is Conv1D

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return super().shape(module)[::-1]

    def laid_out(self, info: ModuleInfo, module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.mT if key == "weight" else value for key, value in values.items()}
