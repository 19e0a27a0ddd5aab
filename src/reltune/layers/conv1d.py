"""GPT-2's Conv1D: a linear map that stores its weight as (in, out)."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from reltune.layers.linear import by_example, input_weighted, squared_inputs, statistics

__all__ = ["by_example", "input_weighted", "matches", "squared_inputs", "statistics"]


def matches(module: nn.Module) -> bool:
    return type(module) is Conv1D
