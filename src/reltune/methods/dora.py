"""Weight-decomposed low-rank adaptation (Liu et al. 2024): LoRA on the directions of a weight's rows, and their magnitudes."""

from __future__ import annotations

from typing import Any, ClassVar

from reltune.methods.lora import Lora


class DoRA(Lora):
    """No record; it takes LoRA's rate."""

    name = "dora"
    rates = "dora"
    variant: ClassVar[dict[str, Any]] = {"use_dora": True}
    title = "DoRA"

    def beside(self, shapes: list[tuple[int, int]]) -> int:
        return sum(rows for rows, _ in shapes)  # a magnitude for each row
