"""Full fine-tuning: every weight."""

from __future__ import annotations

from collections.abc import Sequence

from reltune.methods.contract import Base
from reltune.methods.freed import Freed, inside


class Full(Freed):
    """docs/learning_rates.md, "full fine-tuning", and docs/selection.md, "full": 1e-4 to 2e-4 on encoders, 1e-4 on a decoder."""

    name = "full"
    rates = "full"
    rate = 2e-4

    def parameters(self, base: Base) -> list[str]:
        return [
            name
            for name, p in base.model.named_parameters()
            if p.is_floating_point() and not inside(name, base.new_heads)
        ]

    def describe(self, base: Base, names: Sequence[str]) -> str:
        return "every weight of the model"
