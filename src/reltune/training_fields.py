"""Command-line words as fields of transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from reltune.records import InputError, nearest

# Fields that reltune sets itself, from flags of its own or because nothing else would work.
RESERVED = {"output_dir", "seed"}


def parse_training_fields(words: Sequence[str], own_flags: Sequence[str]) -> dict[str, Any]:
    """The fields given in ``words`` ("--learning_rate", "1e-3", …), with TrainingArguments' own types.

    Raises InputError for a flag that is none (naming the nearest, of the command's own too) or a value of the wrong type.
    """
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - RESERVED
    given: list[str] = []
    normal: list[str] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            if name.removeprefix("no_") not in fields:
                known = [*own_flags, *(f"--{field}" for field in sorted(fields))]
                raise InputError(f"unknown flag --{flag}; {nearest('--' + flag, known)}")
            given.append(name.removeprefix("no_") if name not in fields else name)
            normal.extend([f"--{name}", *([value] if equals else [])])
        else:
            normal.append(word)
    parser = _Parser([TrainingArguments], allow_abbrev=False)  # type: ignore[list-item]
    values, rest = parser.parse_known_args(normal)
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; put values that belong together in quotes.")
    parsed = {name: getattr(values, name) for name in given}
    try:
        TrainingArguments(output_dir="unused", **parsed)
    except (ValueError, TypeError) as error:
        raise InputError(f"training fields: {' '.join(str(error).split())}") from error
    # Enum members and the like go to YAML as what the user wrote.
    return {name: getattr(value, "value", value) for name, value in parsed.items()}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"training fields: {message}.")
