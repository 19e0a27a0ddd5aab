"""Sparse high-rank adapters (Bhardwaj et al. 2024): single weights of every linear map, drawn at random."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from reltune.errors import InputError
from reltune.methods.adapter import Adapter, shapes_of
from reltune.methods.contract import Base, Size
from reltune.methods.lora import exactly
from reltune.methods.weights import Weights

if TYPE_CHECKING:
    from peft import ShiraConfig


class Shira(Adapter):
    """The rule of single weights, which random ones follow too (for all tasks): docs/selection.md, "random 0.25%" 2e-2 and "random 1%" 1e-2."""

    name = "shira"
    rates = "shira"
    rate = Weights.rate  # over the root of the share
    most = Weights.most
    few_bits = False
    lora_file = False

    def targets(self, base: Base) -> list[str]:
        from torch import nn

        names = super().targets(base)
        modules = dict(base.model.named_modules())
        fit = [name for name in names if type(modules[name]) is nn.Linear]
        if len(fit) < len(names) and (base.config.target_modules or not fit):
            wrong = next(name for name in names if name not in fit)
            raise InputError(
                f"the method shira trains nn.Linear only, and {wrong} is a {type(modules[wrong]).__name__}; choose lora."
            )
        large = [name for name in fit if self._share(modules[name].weight, base) <= 1]
        if not large or (base.config.target_modules and len(large) < len(fit)):
            small = next(name for name in fit if name not in large)
            raise InputError(f"lora_r {base.config.lora_r} wants more weights of {small} than it has; write less.")
        return large

    def nearest(self, base: Base, count: int) -> Size:
        """A rank costs what LoRA's does; maps that have fewer weights than that are left out."""
        smallest = dataclasses.replace(base, config=dataclasses.replace(base.config, lora_r=1, lora_alpha=None))
        shapes = shapes_of(base, self.targets(smallest))
        most = max(rows * columns // (rows + columns) for rows, columns in shapes)

        def trained(r: int) -> int:
            return sum(r * (rows + columns) for rows, columns in shapes if r * (rows + columns) <= rows * columns)

        r = min(range(1, most + 1), key=lambda r: abs(trained(r) - count))
        return Size({"lora_r": r}, trained(r), f"r={r}")

    @staticmethod
    def _share(weight: Any, base: Base) -> float:
        return (base.config.lora_r or 8) * sum(weight.shape) / weight.numel()

    def peft_config(self, base: Base, names: list[str]) -> ShiraConfig:
        from peft import ShiraConfig

        return ShiraConfig(
            r=base.config.lora_r or 8, random_seed=base.config.seed, target_modules=exactly(names, base.model)
        )

    def divisor(self, base: Base, config: Any, trained: int) -> float:
        modules = dict(base.model.named_modules())
        return trained / sum(modules[name].get_base_layer().weight.numel() for name in self.targets_of(base))

    def targets_of(self, base: Base) -> list[str]:
        """The modules that have the adapter."""
        return [name for name, module in base.model.named_modules() if hasattr(module, "shira_weight")]

    def describe(self, config: ShiraConfig) -> str:
        return f"random single weights (SHiRA, as many as LoRA of rank {config.r} has)"
