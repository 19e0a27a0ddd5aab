"""Command-line words as fields of transformers.TrainingArguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from reltune.records import InputError, nearest

RESERVED = ("output_dir", "seed")  # fields that reltune sets itself, from flags of its own


def parse_training_fields(words: Sequence[str], own_flags: Sequence[str]) -> dict[str, Any]:
    """The fields given in ``words`` ("--learning_rate", "1e-3", …), with TrainingArguments' own types.

    Raises InputError for a flag that is none (naming the nearest, of the command's own too) or a value of the wrong type.
    """
    parser = _Parser([TrainingArguments], allow_abbrev=False, add_help=False)  # type: ignore[list-item]
    fields = {flag: action.dest for flag, action in parser._option_string_actions.items() if "-" not in flag[2:]}
    given: list[str] = []
    normal: list[str] = []
    for word in words:
        if not word.startswith("--"):
            normal.append(word)
            continue
        flag, *value = word.split("=", 1)
        flag = "--" + flag[2:].replace("-", "_")
        if flag not in fields:
            known = [*own_flags, *sorted(fields)]
            raise InputError(f"unknown flag {flag}; {nearest(flag, known)}")
        if fields[flag] in RESERVED:
            raise InputError(f"{flag} is fixed in the run's config.yaml; make another run for another {flag[2:]}.")
        given.append(fields[flag])
        normal.extend([flag, *value])
    values, rest = parser.parse_known_args(normal)
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; put values that belong together in quotes.")
    # Enum members and the like go to YAML as what the user wrote.
    return {name: getattr(getattr(values, name), "value", getattr(values, name)) for name in given}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (--\w+)\S*: (.*?)\.*", message, re.DOTALL)
        flag, reason = match.groups() if match else ("training fields", message)
        choice = re.fullmatch(r"invalid choice: '(.*)' \(choose from (.*)\)", reason, re.DOTALL)
        if choice:
            known = re.findall(r"[\w-]+", choice[2])
            raise InputError(f"{flag} {choice[1]!r} is unknown; {nearest(choice[1], known)}")
        raise InputError(f"{flag}: {reason}.")
