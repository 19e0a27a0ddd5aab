"""Baseline: top layers first, the rule that tutorials follow. Relevance per weight is the depth, counted from the input.

Looks at no data and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts, counts
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import ModuleSums

NEEDS = ()
ELEMENT_NEEDS = ()


def quantities(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> tuple[Parts]:
    return ({part: (info.depth + 1) * count for part, count in counts(info).items()},)


def elements(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
    return {name: torch.full(weight.shape, float(info.depth + 1)) for name, weight in weights.items()}
