"""Rank-stabilised LoRA (Kalajdzievski 2023): what is trained counts alpha / √r times, not alpha / r."""

from __future__ import annotations

from typing import Any, ClassVar

from reltune.methods.contract import Base
from reltune.methods.lora import Lora


class RsLora(Lora):
    """No record. At the same alpha it counts √r times more than LoRA, so that it takes LoRA's rate over √r."""

    name = "rslora"
    rates = "rslora"
    rate = Lora.rate  # over the rank
    variant: ClassVar[dict[str, Any]] = {"use_rslora": True}
    title = "rank-stabilised LoRA"

    def divisor(self, base: Base, config: Any, trained: int) -> float:
        return super().divisor(base, config, trained) ** 2
