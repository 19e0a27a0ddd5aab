"""The task's head alone, with everything below frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from reltune.errors import InputError
from reltune.methods.contract import Base
from reltune.methods.freed import Freed

WRITES = "what follows the model there is the output over its vocabulary, which is no head of the task's own; choose lora or weights"


class Head(Freed):
    """docs/learning_rates.md, "head only": the largest rate tried, on both tasks."""

    name = "head"
    rates = "head"
    rate = 3e-2
    not_for: ClassVar[Mapping[str, str]] = dict.fromkeys(("causal_lm", "masked_lm", "seq2seq", "preference"), WRITES)

    def parameters(self, base: Base) -> list[str]:
        if base.new_heads:
            return []
        body = getattr(base.model, "base_model_prefix", "")
        names = [name for name, _ in base.model.named_parameters() if body and not name.startswith(f"{body}.")]
        if not names:
            raise InputError("the method head finds no head in this model; choose another method, such as lora.")
        return names

    def describe(self, base: Base, names: Sequence[str]) -> str:
        heads = list(base.new_heads) or dict.fromkeys(name.rpartition(".")[0] for name in names)
        return f"the head alone: {', '.join(heads)}"
