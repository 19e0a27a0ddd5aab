"""BitFit (Ben Zaken et al. 2022): every bias, those of norms too."""

from __future__ import annotations

from collections.abc import Sequence

from reltune.errors import InputError
from reltune.methods.contract import Base
from reltune.methods.freed import Freed, inside


class BitFit(Freed):
    """docs/selection.md, "BitFit" on five tasks: the best rate by mean validation accuracy of 1e-3 to 1.6e-2."""

    name = "bitfit"
    rates = "bitfit"
    rate = 4e-3

    def parameters(self, base: Base) -> list[str]:
        names = [
            name
            for name, p in base.model.named_parameters()
            if name.rpartition(".")[2] == "bias" and p.is_floating_point() and not inside(name, base.new_heads)
        ]
        if not names:
            raise InputError("the method bitfit trains biases, and this model has none; choose lora or weights.")
        return names

    def describe(self, base: Base, names: Sequence[str]) -> str:
        return f"{len(names)} biases (BitFit)"
