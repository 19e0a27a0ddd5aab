"""Values of a config's fields, from YAML and from command-line words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from reltune.errors import InputError, nearest


def checked_kinds(values: Mapping[str, Any], fields: Iterable[dataclasses.Field]) -> dict[str, Any]:
    """Values of a config's fields as YAML has them, each as the kind that its field wants; None means the default.

    Numbers may be words ("1e-3" is one in YAML 1.1) where a number is wanted, and lists may be words with commas between.

    Raises:
        InputError: a name that is no field, or a value of another kind.
    """
    known = {about.name: about for about in fields}
    found = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{name!r} is no field; {nearest(str(name), known)}")
        if value is not None:
            found[name] = _of_kind(known[name], value)
    return found


def _of_kind(about: dataclasses.Field, value: Any) -> Any:
    kind = str(about.type).removesuffix(" | None")
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    try:
        if kind == "str" and plain:
            return str(value)
        if kind == "bool" and isinstance(value, bool):
            return value
        if kind == "int" and plain and int(value) == float(value):
            return int(value)
        if kind == "float" and plain:
            return float(value)
        if kind == "list[str]" and (plain or isinstance(value, list)):
            return parts(map(str, value) if isinstance(value, list) else [str(value)])
        if kind == "dict[str, Any]" and isinstance(value, Mapping):
            return dict(value)
        if kind == "dict[str, list[str]]" and isinstance(value, Mapping):
            return {str(name): _words(of) for name, of in value.items()}
    except ValueError:  # a word that is no number, a list of more than words
        pass
    raise InputError(f"{about.name} is {value!r}; it must be {KINDS[kind]}.")


KINDS = {
    "str": "text",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list[str]": "a list of words",
    "dict[str, Any]": "a mapping of fields of transformers.TrainingArguments",
    "dict[str, list[str]]": "a mapping of fields to lists of values",
}


def _words(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(of, str | int | float) for of in values):
        raise ValueError
    return parts(map(str, values))


def assignments(words: Iterable[str]) -> dict[str, list[str]]:
    """Words like ``learning_rate=1e-4,1e-3`` as a mapping of names to values. Raises InputError for others."""
    found: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.strip().replace("-", "_")
        if not name or not parts([values]):
            raise InputError(f"{word!r} names no values of a field; write it like learning_rate=1e-4,1e-3.")
        if name in found:
            raise InputError(f"{name} is given twice; write all its values at once, with commas between.")
        found[name] = parts([values])
    return found


def parts(values: Iterable[str]) -> list[str]:
    """Words that may come with commas between; a comma in brackets belongs to a regex."""
    found = [part.strip() for value in values for part in re.split(r",(?![^\[({]*[\])}])", value)]
    return [part for part in found if part]
