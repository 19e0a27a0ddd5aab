"""What the methods have in common that train what a plan names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reltune.errors import InputError
from reltune.methods.adapter import load_adapter, save_adapter
from reltune.methods.contract import Base, Method, Size, Trainable

if TYPE_CHECKING:
    from torch import nn

    from reltune.plan.plan import Plan


class Planned(Method):
    """Trains the units of a plan, by reltune's own PEFT method."""

    def check(self, base: Base) -> None:
        """Nothing: the choice is checked by choosing (runs/stages.py)."""

    def nearest(self, base: Base, count: int) -> Size:
        """The budget itself: what units leave of it is known when they are chosen."""
        return by_budget(count)

    def prepare(self, base: Base) -> Trainable:
        from peft import get_peft_model

        from reltune.tuner.config import ReltuneConfig

        assert base.plan is not None, "the plan was chosen before"
        check_plan(base)
        model = get_peft_model(base.model, ReltuneConfig(plan=base.plan, frozen_dtype=base.config.frozen_dtype))
        plan = base.plan
        return Trainable(model, *method_of(plan), plan.parameters, plan.head_parameters, plan.describe())

    def save(self, model: nn.Module, path: Path, state: Mapping[str, Any] | None = None) -> None:
        save_adapter(model, path, state)

    def load(self, base: nn.Module, path: Path) -> Any:
        return load_adapter(base, path)


def by_budget(count: int) -> Size:
    return Size({"budget": str(count)}, count, f"{count:,}")


def check_plan(base: Base) -> None:
    """Raise InputError where a base's plan is for another model, or leaves out its new heads."""
    from reltune.layers.fingerprint import Base as Recorded
    from reltune.layers.inventory import take_inventory

    plan, new_heads = base.plan, base.new_heads
    assert plan is not None
    if sorted(plan.always_trained) != sorted(new_heads):
        raise InputError(
            f"plan: always_trained must name this model's new heads ({', '.join(new_heads) or 'nothing'}); they cannot be left out."
        )
    plan.check_model(take_inventory(base.model, new_heads), Recorded.of(base.model, new_heads, bool(plan.weights)))


def method_of(plan: Plan) -> tuple[str, float]:
    """What the plan trains, as a key of ``LEARNING_RATES``, and which share of the matrices that it trains in.

    Whole matrices (``layer``) want a lower rate than input directions (``directions``), these one than columns and rows
    (``selection``), single weights (``weights``) a higher one; of a plan with several, the lowest counts.
    """
    modules = plan.modules.values()
    if any(module.weight and len(module.shape) == 2 for module in modules):
        return "layer", 1.0
    if any(module.directions for module in modules):
        return "directions", 1.0
    sizes = [math.prod(module.shape) for module in modules if len(module.elements)]
    if not sizes or any(len(module.columns) or len(module.rows) for module in modules):
        return "selection", 1.0
    return "weights", sum(len(module.elements) for module in modules) / sum(sizes)
