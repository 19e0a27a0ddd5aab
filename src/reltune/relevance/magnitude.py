"""Magnitude: the squared weights, summed over the unit. Looks at no data.

R(u) = Σ_{w ∈ u} w². Never negative; scales with the square of the weights. Memory: nothing beyond one module's
float32 copy; cost: one pass over the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reltune.layers.inventory import ModuleInfo
from reltune.relevance.gradient import by_unit

NEEDS = None


def scores(info: ModuleInfo, module: nn.Module, sums: dict[str, Tensor], examples: int, seed: int) -> dict[str, Tensor]:
    squares = {}
    for name, parameter in module.named_parameters(recurse=False):
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        squares[name] = parameter.detach().to(dtype).square()
    return by_unit(info, squares)
