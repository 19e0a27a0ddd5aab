"""Baseline: chance. Every unit gets its number of weights times a uniform draw, so relevance per weight is uniform.

Looks at no data and no weights. The draw depends on the seed and the module's name alone, not on which other modules
are measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts, counts
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import ModuleSums

NEEDS = ()
ELEMENT_NEEDS = ()


def quantities(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> tuple[Parts]:
    generator = _generator(info, context)
    return ({part: torch.rand(count.shape, generator=generator) * count for part, count in counts(info).items()},)


def elements(info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
    generator = _generator(info, context, "elements")
    return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}


def _generator(info: ModuleInfo, context: Context, purpose: str = "units") -> torch.Generator:
    digest = hashlib.sha256(f"{context.seed}/{purpose}/{info.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
