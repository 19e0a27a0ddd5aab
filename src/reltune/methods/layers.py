"""Whole layers: the top one, or those that are named."""

from __future__ import annotations

from collections.abc import Sequence

from reltune.errors import InputError
from reltune.methods.contract import Base
from reltune.methods.freed import Freed, inside


class Layers(Freed):
    """docs/learning_rates.md, "top encoder layer": 1e-3 on both tasks, within the noise of 3e-3 on one."""

    name = "layers"
    rates = "layer"
    rate = 1e-3

    def parameters(self, base: Base) -> list[str]:
        from reltune.layers.inventory import choose, take_inventory

        config = base.config
        inventory = take_inventory(base.model, base.new_heads)
        if config.target_modules:
            modules = choose(inventory, config.target_modules, config.exclude_modules)
        else:
            blocks = [info.layer for info in inventory.modules if info.in_block]
            if not blocks:
                raise InputError("the model has no numbered layers; name what to train by --target_modules.")
            modules = [blocks[-1]]
            if config.exclude_modules:
                modules = [
                    n for n in choose(inventory, (), config.exclude_modules) if f"{n}.".startswith(f"{blocks[-1]}.")
                ]
        return [
            name
            for name, _ in base.model.named_parameters()
            if inside(name, modules) and not inside(name, [*base.new_heads, *base.not_tuned])
        ]

    def describe(self, base: Base, names: Sequence[str]) -> str:
        from reltune.layers.inventory import take_inventory

        inventory = take_inventory(base.model, base.new_heads)
        layers = dict.fromkeys(
            info.layer for info in inventory.modules if any(inside(name, [info.name]) for name in names)
        )
        shown = list(layers)[:3]
        return f"{len(names)} whole tensors of {', '.join(shown)}" + (
            f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        )
