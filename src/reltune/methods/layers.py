"""Whole layers: the top one, or those that are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from reltune.errors import InputError
from reltune.methods.contract import Base, Size
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

    def nearest(self, base: Base, count: int) -> Size | None:
        """So many layers from the top. Those that the user names have one size."""
        from reltune.layers.inventory import take_inventory

        if base.config.target_modules or base.config.exclude_modules:
            return None
        sizes = {name: p.numel() for name, p in base.model.named_parameters()}
        inventory = take_inventory(base.model, base.new_heads)
        blocks = list(dict.fromkeys(info.layer for info in inventory.modules if info.in_block))[::-1]
        found = []
        for top in range(1, len(blocks) + 1):
            fields: dict[str, Any] = {"target_modules": blocks[:top]} if top > 1 else {}
            names = self.parameters(dataclasses.replace(base, config=dataclasses.replace(base.config, **fields)))
            words = f"top {top}" if top > 1 else "top"
            found.append(Size(fields, sum(sizes[name] for name in names), words))
        return min(found, key=lambda size: abs(size.parameters - count), default=None)

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
