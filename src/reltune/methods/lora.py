"""Low-rank adaptation (Hu et al. 2021), on every linear map or ranked by relevance; saved as plain PEFT saves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from reltune.methods.adapter import Adapter, shapes_of
from reltune.methods.contract import Base, Size
from reltune.methods.planned import by_budget, check_plan

if TYPE_CHECKING:
    from peft import LoraConfig


class Lora(Adapter):
    """The rate falls with the root of the rank: 4e-3 at rank 1, 2e-3 at 4, 1.4e-3 at 8.

    Records (docs/selection.md, benchmarks/results/selection_*.json): by mean validation metric the best rate on MiniLM was
    4e-3 (r = 1), 2e-3 (r = 4) and 1e-3 (r = 8); on SmolLM2-135M 8e-3 (r = 1) and 2e-3 (r = 8).
    """

    name = "lora"
    rates = "lora"
    rate = 4e-3  # over the root of the rank
    variant: ClassVar[dict[str, Any]] = {}
    title: ClassVar[str] = "LoRA"

    def targets(self, base: Base) -> list[str]:
        return super().targets(base) if base.plan is None else list(base.plan.modules)

    def check(self, base: Base) -> None:
        if base.config.rank_by is None:
            super().check(base)

    def nearest(self, base: Base, count: int) -> Size:
        """A rank costs the inputs and outputs of every map."""
        if base.config.rank_by is not None:
            return by_budget(count)
        shapes = shapes_of(base, self.targets(base))
        of_one, beside = sum(map(sum, shapes)), self.beside(shapes)
        most = max(map(min, shapes))  # beyond which a rank adds nothing
        r = min(max(1, round((count - beside) / of_one)), most)
        return Size({"lora_r": r}, r * of_one + beside, f"r={r}")

    def beside(self, shapes: list[tuple[int, int]]) -> int:
        """What is trained of maps of these shapes whatever the rank is."""
        return 0

    def peft_config(self, base: Base, names: list[str]) -> LoraConfig:
        from peft import LoraConfig

        from reltune.plan.lora import lora_config

        config = base.config
        if base.plan is not None:
            check_plan(base)
            return lora_config(base.plan, lora_dropout=config.lora_dropout, **self.variant)
        return LoraConfig(
            r=config.lora_r or 8,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout or 0.0,
            target_modules=exactly(names, base.model),
            **self.variant,
        )

    def divisor(self, base: Base, config: LoraConfig, trained: int) -> float:
        ranks = list((config.rank_pattern or {}).values()) or [config.r]
        return sum(ranks) / len(ranks)

    def describe(self, config: LoraConfig) -> str:
        ranks = sorted((config.rank_pattern or {}).values()) or [config.r]
        if ranks[0] != ranks[-1]:
            return f"{self.title} of ranks {ranks[0]} to {ranks[-1]}, alpha twice the rank,"
        return f"{self.title} of rank {ranks[0]}, alpha {config.lora_alpha:g},"


def exactly(names: list[str], model: Any) -> list[str] | str:
    """The names as PEFT's ``target_modules``, which takes a name for every module whose name ends in it: as a pattern where
    that would mean another one."""
    import re

    if any(name.endswith(f".{wanted}") for name, _ in model.named_modules() for wanted in names):
        return "|".join(map(re.escape, names))
    return names
