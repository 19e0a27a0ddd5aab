"""What the user is willing to spend, as a number of trainable parameters."""

from __future__ import annotations

import re
from decimal import Decimal

from reltune.errors import InputError

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def check_budget(budget: str | int | float) -> None:
    """Raise InputError for a budget that is no number, 0 or less, or more than 100%."""
    _read(budget)


def parse_budget(budget: str | int | float, base_parameters: int) -> int:
    """Parameters that a budget allows: a percentage of the base model ("0.5%") or a count (50000, "1.5M").

    Raises InputError for 0, less than one parameter, more than the model has, or no number.
    """
    value, unit, written = _read(budget)
    if unit == "%":
        count = int(base_parameters * value / 100)
    else:
        exact = value * _SUFFIX[unit]
        if exact < 1 or exact != int(exact):
            raise InputError(f"budget {budget!r} is no whole number of parameters; for a share write {written}%.")
        count = int(exact)
    if count > base_parameters:
        raise InputError(f"budget {budget!r} is more than the {base_parameters:,} parameters of the base model.")
    if count < 1:
        raise InputError(
            f"budget {budget!r} is less than one of the model's {base_parameters:,} parameters; write more."
        )
    return count


def _read(budget: str | int | float) -> tuple[Decimal, str, str]:
    """The number of a budget, its unit (% or a key of ``_SUFFIX``), and the number as it was written."""
    # A comma only between thousands: "0,5%" could be meant as a half.
    text = re.sub(r"(?<=\d)[,_](?=\d{3}(?!\d))", "", str(budget).strip())
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([%kKmMbB]?)", text)
    if not match:
        raise InputError(f"budget {budget!r} is no number; write a share like 0.5% or a count like 100000 or 1.5M.")
    # Exact decimals: 0.1% of 1,000,000 is 1,000 and 1.001k is 1,001, whatever floats make of them.
    value, unit = Decimal(match[1]), match[2].lower()
    if value <= 0:
        raise InputError(f"budget {budget!r} allows nothing; write a share like 0.5% or a count like 100000.")
    if unit == "%" and value > 100:
        raise InputError(f"budget {budget!r} is above 100% of the model; write at most 100%.")
    return value, unit, match[1]
