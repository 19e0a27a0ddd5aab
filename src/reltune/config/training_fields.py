"""Command-line words as fields of transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from reltune.errors import InputError, nearest

RESERVED = ("output_dir", "seed")  # fields that reltune sets itself, from flags of its own
NOT_FOR_RUNS = (*RESERVED, "resume_from_checkpoint")  # a new run has none

# Where reltune's defaults are not those of transformers.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "average_tokens_across_devices": False,  # else Trainer multiplies a mean loss by the number of processes
}


def training_field_kinds() -> dict[str, Any]:
    """The fields of TrainingArguments with their annotations, which HfArgumentParser changes in the dataclass's own fields."""
    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments)}


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


def checked_training_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TrainingArguments as YAML has them, with the type checks that flags have; None means the default.

    Raises:
        InputError: a name that is no field (naming the nearest), or a value of the wrong kind.
    """
    fields = {name: str(kind) for name, kind in training_field_kinds().items()}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(f"{name!r} is no field of transformers.TrainingArguments; {nearest(str(name), fields)}")
        if name in RESERVED:
            raise InputError(f"{name} is a field of the run, not of its training; write it outside training.")
        if isinstance(value, dict | list):
            if type(value).__name__ not in fields[name]:
                raise InputError(f"{name} is {value!r}; it must be a single value.")
            found[name] = value
        elif value is not None:
            word = str(value).lower() if isinstance(value, bool) else str(value)
            if value is False and "bool" not in fields[name]:  # what YAML 1.1 makes of a plain no
                word = "no"
            try:
                found |= parse_training_fields([f"--{name}={word}"], [])
            except InputError as error:
                raise InputError(str(error).removeprefix("--")) from error
    return found


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (--\w+)\S*: (.*?)\.*", message, re.DOTALL)
        flag, reason = match.groups() if match else ("training fields", message)
        choice = re.fullmatch(r"invalid choice: '(.*)' \(choose from (.*)\)", reason, re.DOTALL)
        if choice:
            known = re.findall(r"[\w-]+", choice[2])
            raise InputError(f"{flag} {choice[1]!r} is unknown; {nearest(choice[1], known)}")
        raise InputError(f"{flag}: {reason}.")
