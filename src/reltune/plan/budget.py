"""What the user is willing to spend: trainable parameters, memory, the time of a step, hours; one of them or several."""

from __future__ import annotations

import dataclasses
import re
from decimal import Decimal

from reltune.errors import InputError, nearest
from reltune.names import LIMITS

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTES = {
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may be spent; None where nothing is said of it.

    Attributes:
        parameters: as ``parse_budget`` takes it.
        memory: bytes that training may take of the device.
        time: of a training step, relative to full fine-tuning of the same model, batch and length.
        hours: of the whole training.
    """

    parameters: str | None = None
    memory: int | None = None
    time: float | None = None
    hours: float | None = None

    @property
    def is_limited(self) -> bool:
        """Whether more is said than how many parameters."""
        return any(getattr(self, name) is not None for name in LIMITS)


def read_budget(budget: str | int | float) -> Budget:
    """The parts of a budget: "0.5%", "2M", "memory=12GiB", "time=0.5", "hours=2", or several with blanks between.

    Raises InputError for a part that cannot be read, and for one that is said twice.
    """
    text = str(budget)
    named = re.findall(r"(\S+?)\s*=\s*(\S*)", text)
    rest = re.sub(r"\S+?\s*=\s*\S*", " ", text).strip()
    parts: dict[str, str | int | float] = {}
    for name, value in named:
        name = name.lower()
        if name not in ("parameters", *LIMITS):
            raise InputError(f"budget {text!r}: {name!r} is nothing that can be limited; {nearest(name, LIMITS)}")
        if name in parts or (name == "parameters" and rest):
            raise InputError(f"budget {text!r} says twice how much {name} may be spent; keep one of them.")
        if name == "parameters":
            rest = value
        else:
            parts[name] = _bytes(text, value) if name == "memory" else _above_zero(text, name, value)
    if rest or not named:
        _read(rest if named else budget)
        parts["parameters"] = rest or text
    return Budget(**parts)  # type: ignore[arg-type]


_HOW = "write a share like 0.5% or a count like 100000 or 1.5M; or memory=12GiB, time=0.5, hours=2."


def _bytes(text: str, value: str) -> int:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kmgt]i?b?)", value.strip(), re.IGNORECASE)
    if not match:
        raise InputError(f"budget {text!r}: {value!r} is no size; write it like memory=12GiB or memory=800MiB.")
    unit = match[2].lower()
    unit = unit if unit.endswith("b") else f"{unit[0]}ib"  # 12G and 12Gi are meant as 12GiB
    count = int(Decimal(match[1]) * _BYTES[unit])
    if not count:
        raise InputError(f"budget {text!r} allows nothing; write it like memory=12GiB.")
    return count


def _above_zero(text: str, name: str, value: str) -> float:
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", value.strip()) or not float(value):
        example = "0.5, half of what full fine-tuning takes for a step" if name == "time" else "2"
        raise InputError(f"budget {text!r}: {name} must be a number above 0, like {name}={example}.")
    return float(value)


def check_budget(budget: str | int | float) -> None:
    """Raise InputError for a budget that cannot be read, is 0 or less, or more than 100%."""
    read_budget(budget)


def parse_budget(budget: str | int | float, base_parameters: int) -> int:
    """Parameters that a budget allows: a percentage of the base model ("0.5%") or a count (50000, "1.5M"); all, where it says nothing
    of parameters.

    Raises InputError for 0, less than one parameter, more than the model has, or no number.
    """
    if isinstance(budget, str) and "=" in budget:
        budget = read_budget(budget).parameters or "100%"
    value, unit = _read(budget)
    count = int(base_parameters * value / 100 if unit == "%" else value)
    if count > base_parameters:
        raise InputError(f"budget {budget!r} is more than the {base_parameters:,} parameters of the base model.")
    if count < 1:
        raise InputError(
            f"budget {budget!r} is less than one of the model's {base_parameters:,} parameters; write more."
        )
    return count


def _read(budget: str | int | float) -> tuple[Decimal, str]:
    """A budget's number, and "%" if it is a share; else it is a whole number of parameters, and this is empty."""
    # A comma only between thousands: "0,5%" could be meant as a half.
    text = re.sub(r"(?<=\d)[,_](?=\d{3}(?!\d))", "", str(budget).strip())
    match = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([%kKmMbB]?)", text)
    if not match:
        raise InputError(f"budget {budget!r} is no number; {_HOW}")
    # Exact decimals: 0.1% of 1,000,000 is 1,000 and 1.001k is 1,001, whatever floats make of them.
    value, unit = Decimal(match[1]), match[2].lower()
    if value <= 0:
        raise InputError(f"budget {budget!r} allows nothing; write a share like 0.5% or a count like 100000.")
    if unit == "%" and value > 100:
        raise InputError(f"budget {budget!r} is above 100% of the model; write at most 100%.")
    if unit == "%":
        return value, unit
    count = value * _SUFFIX[unit]
    if count != int(count):
        raise InputError(f"budget {budget!r} is no whole number of parameters; for a share write {match[1]}%.")
    return count, ""
