"""Baseline: top layers first, the rule that tutorials follow. Relevance per weight is the depth, counted from the input.

Looks at no data and no weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reltune.layers.inventory import ModuleInfo

NEEDS = None


def scores(info: ModuleInfo, module: nn.Module, sums: dict[str, Tensor], examples: int, seed: int) -> dict[str, Tensor]:
    per_weight = float(info.depth + 1)
    if info.kind == "norm":
        return {"norm": torch.tensor(per_weight * (info.weight_parameters + info.bias_parameters))}
    rows, columns = info.shape
    result = {
        "column": torch.full((columns,), per_weight * rows),
        "row": torch.full((rows,), per_weight * columns),
        "weight": torch.tensor(per_weight * info.weight_parameters),
    }
    if info.bias:
        result["bias"] = torch.tensor(per_weight * info.bias_parameters)
    return result
