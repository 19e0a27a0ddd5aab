"""Baseline: chance. Every unit gets its number of weights times a uniform draw, so relevance per weight is uniform.

Looks at no data and no weights. The draw depends on the seed and the module's name alone, not on which other modules
are measured.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from reltune.layers.inventory import ModuleInfo

NEEDS = None


def scores(info: ModuleInfo, module: nn.Module, sums: dict[str, Tensor], examples: int, seed: int) -> dict[str, Tensor]:
    digest = hashlib.sha256(f"{seed}/{info.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def draw(*size: int) -> Tensor:
        return torch.rand(size, generator=generator)

    if info.kind == "norm":
        return {"norm": draw() * (info.weight_parameters + info.bias_parameters)}
    rows, columns = info.shape
    result = {"column": draw(columns) * rows, "row": draw(rows) * columns, "weight": draw() * info.weight_parameters}
    if info.bias:
        result["bias"] = draw() * info.bias_parameters
    return result
