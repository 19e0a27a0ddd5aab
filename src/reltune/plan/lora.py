"""A LoRA configuration from a plan: low-rank adapters on the plan's modules, with a rank that the plan gives each.

A LoRA of rank r on a map of (out, in) trains r (out + in) numbers; on a convolution r (out / groups + in · height · width),
with a rank that the groups divide; on an embedding r (tokens + features). Each module of the plan gets the rank
that comes nearest to what the plan trains of it, and at least 1, so that the two can be compared at the same
number of trained parameters.
"""

from __future__ import annotations

import math
import re
from typing import Any

from peft import LoraConfig

from reltune.errors import InputError
from reltune.plan.plan import ModulePlan, Plan


def lora_config(plan: Plan, scaling: float = 2.0, **fields: Any) -> LoraConfig:
    """A LoraConfig with the plan's modules as ``target_modules`` and a rank for each as ``rank_pattern``.

    Columns, rows, elements, directions and whole matrices turn into ranks; new heads into ``modules_to_save``. ``scaling`` is lora_alpha
    over the rank in every module; ``fields`` are other fields of LoraConfig. Raises InputError for a plan of biases or
    norms, which no low-rank adapter trains.
    """
    plan.check()
    without = [name for name, module in plan.modules.items() if module.bias or len(module.shape) == 1]
    if without:
        raise InputError(
            f"LoRA trains no biases or norms, and the plan does (in {len(without)} modules, {without[0]} the first); select "
            "without them."
        )
    ranks = {name: rank(module) for name, module in plan.modules.items()}
    names = list(ranks)
    # PEFT takes a name for any module whose name ends in it. Where that would mean another of the plan's, be exact.
    ends = {name[at + 1 :] for name in names for at in range(len(name)) if name[at] == "."}
    exact = not ends.isdisjoint(names)
    keys = {name: f"^{re.escape(name)}" if exact else name for name in names}
    values: dict[str, Any] = {
        "r": max(ranks.values()),
        "lora_alpha": _alpha(max(ranks.values()), scaling),
        "target_modules": "|".join(map(re.escape, names)) if exact else names,
        "rank_pattern": {keys[name]: r for name, r in ranks.items()},
        "alpha_pattern": {keys[name]: _alpha(r, scaling) for name, r in ranks.items()},
        "modules_to_save": plan.always_trained or None,
        "task_type": plan.task_type,
    }
    return LoraConfig(**{**values, **fields})


def rank(module: ModulePlan) -> int:
    """The rank whose LoRA trains about as many numbers as the plan does of this module."""
    of_one = module.shape[0] // module.groups + module.groups * math.prod(module.shape[1:])
    return module.groups * max(1, round(module.parameters / of_one / module.groups))


def _alpha(r: int, scaling: float) -> int | float:
    alpha = r * scaling
    return int(alpha) if alpha == int(alpha) else alpha
