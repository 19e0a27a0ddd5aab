"""What the fields of a configuration have in common: how they are declared, and the one check that every value passes.

A value may come from a flag, a YAML file, a run's ``config.yaml`` or Python; ``checked`` is asked about it in each case.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from reltune.errors import InputError, nearest

SHOWN = reprlib.Repr()  # of a wrong value in a message
SHOWN.maxstring, SHOWN.maxlong, SHOWN.maxother = 100, 40, 100
BY_RECIPE: Any = None  # the default of a field that RunConfig fills in (recipes.py), so that every config has a value
AUTO = "auto"
Texts = list[str]  # the type of a field that holds whole texts, in which a comma is a comma
MOST = 2**31 - 1  # of whole numbers, unless a field declares another: what every library counts with


def about(help: str, metavar: str = "", choices: Sequence[str] = (), **limits: float) -> dict[str, Any]:
    """The metadata of a field: all that its flag, the commented defaults, the JSON Schema and the check know of it.

    Args:
        help: a sentence that can be understood on its own.
        metavar: what stands for the value in the flag's help.
        choices: the words that the value, or each word of a list, must be one of.
        limits: ``least`` and ``most`` of a number (both allowed), ``above``, which a number must exceed; ``least`` of a
            list is the number of words that it must have.
    """
    return {"help": help, "metavar": metavar, "choices": tuple(choices), **limits}


def kind_of(field: dataclasses.Field) -> str:
    """The field's type without ``None``: a key of ``KINDS``."""
    return str(field.type).removesuffix(" | None")


def limits_of(field: dataclasses.Field) -> dict[str, float]:
    """The limits that a field declares; whole numbers have a ``most`` in any case."""
    general = {"most": MOST} if kind_of(field) in ("int", "int | str") else {}
    return general | {name: field.metadata[name] for name in ("least", "most", "above") if name in field.metadata}


def checked_fields(values: Mapping[str, Any], fields: Iterable[dataclasses.Field]) -> dict[str, Any]:
    """Values as YAML has them, checked. None stands for the default and is left out.

    Raises InputError for a name that is no field (naming the nearest) and for a value that its field cannot have.
    """
    known = {field.name: field for field in fields}
    for name in values:
        if name not in known:
            raise InputError(f"{name!r} is no field; {nearest(str(name), known)}")
    return {name: checked(known[name], value) for name, value in values.items() if value is not None}


def checked(field: dataclasses.Field, value: Any) -> Any:
    """The value in the type of its field.

    Numbers may be written as words ("1e-3" is a word in YAML 1.1), and lists as words with commas between.

    Raises InputError for a value of another kind, an empty word, an unknown word, NaN, infinity, or a number outside the
    field's limits.
    """
    kind = kind_of(field)
    if value is None and field.default is None:
        return None
    read, phrase = KINDS[kind]
    try:
        result = read(value)
    except _Empty as error:
        raise InputError(f"{field.name} {error}.") from error
    except (TypeError, ValueError, OverflowError) as error:
        mend = " (put it in quotes)" if kind == "str" and isinstance(value, bool) else ""
        raise InputError(f"{field.name} is {SHOWN.repr(value)}; it must be {phrase}{mend}.") from error
    choices, limits = field.metadata["choices"], limits_of(field)
    for word in result if isinstance(result, list) else [result]:
        if choices and word not in choices:
            raise InputError(f"{field.name} {word!r} is unknown; {nearest(str(word), choices)}")
    if isinstance(result, list):
        if len(result) < limits.get("least", 0):
            raise InputError(f"{field.name} is empty; name at least one word.")
        return result
    if isinstance(result, str):
        return result
    if "least" in limits and result < limits["least"]:
        raise InputError(f"{field.name} is {SHOWN.repr(result)}; it must be at least {limits['least']}.")
    if "above" in limits and result <= limits["above"]:
        raise InputError(f"{field.name} is {SHOWN.repr(result)}; it must be above {limits['above']}.")
    if "most" in limits and result > limits["most"]:
        raise InputError(f"{field.name} is {SHOWN.repr(result)}; it must be at most {limits['most']}.")
    return result


# -- kinds of value -------------------------------------------------------------------------------------------------


class _Empty(ValueError):
    """A word without a character that can be seen."""


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    if not str(value).strip():
        raise _Empty("is empty; give it a value or leave it out")
    return str(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole_number(value: Any) -> int:
    number = int(value)
    if isinstance(value, bool) or (not isinstance(value, str) and number != value):
        raise ValueError
    return number


def _whole_number_or_auto(value: Any) -> int | str:
    return AUTO if value == AUTO else _whole_number(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value) + 0.0  # which makes a negative zero a plain one


def _list(value: Any) -> list[str]:
    return split_words(_text(item) for item in (value if isinstance(value, list | tuple) else [value]))


def _texts(value: Any) -> list[str]:
    return [_text(item) for item in (value if isinstance(value, list | tuple) else [value])]


def _training(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


def _swept(value: Any) -> dict[str, list[str]]:
    if not isinstance(value, Mapping):
        raise TypeError
    return {_text(name): _swept_values(values) for name, values in value.items()}


def _swept_values(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    words = split_words(str(item) if isinstance(item, bool) else _text(item) for item in values)
    if not words:
        raise ValueError
    return words


# Type of a field -> how a value is read as one, and what such a value is called.
KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "str": (_text, "text"),
    "bool": (_truth, "true or false"),
    "int": (_whole_number, "a whole number"),
    "int | str": (_whole_number_or_auto, f"a whole number or {AUTO}"),
    "float": (_number, "a finite number"),
    "list[str]": (_list, "a list of words"),
    "Texts": (_texts, "a list of texts"),
    "dict[str, Any]": (_training, "a mapping of fields of transformers.TrainingArguments"),
    "dict[str, list[str]]": (_swept, "a mapping of fields to lists of values"),
}


def split_words(values: Iterable[str]) -> list[str]:
    """Words that may come with commas between them; a comma inside brackets belongs to a regular expression."""
    words = [part.strip() for value in values for part in re.split(r",(?![^\[({]*[\])}])", value)]
    if "" in words:
        raise _Empty("has an empty word; remove it, and the comma beside it")
    return words


def assignments(words: Iterable[str]) -> dict[str, list[str]]:
    """Words like ``learning_rate=1e-4,1e-3`` as a mapping of names to values. Raises InputError for others."""
    fields: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.strip().replace("-", "_")
        if not name or not values.strip():
            raise InputError(f"{word!r} names no values of a field; write it like learning_rate=1e-4,1e-3.")
        if name in fields:
            raise InputError(f"{name} is given twice; write all its values at once, with commas between.")
        fields[name] = [values]
    return fields


# -- a subject ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Subject:
    """The fields of one subject, such as data or training. A subject whose fields hold wrong values cannot be made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, checked(field, getattr(self, field.name)))

    def check(self) -> None:
        """Raise InputError for values that contradict one another, and for wrong ones that were set after it was made."""
        for field in dataclasses.fields(self):
            checked(field, getattr(self, field.name))
