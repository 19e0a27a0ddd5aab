"""Fields of transformers.TrainingArguments, from command-line words and from YAML."""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import importlib.util
import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from reltune.errors import InputError, nearest

TRUTHS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # as transformers reads them
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
    "logging_nan_inf_filter": False,  # it waits for the device after every step, and hides a loss that is no number
    "dataloader_pin_memory": False,
    "average_tokens_across_devices": False,  # else Trainer multiplies a mean loss by the number of processes
}


class ExplicitEnum(enum.StrEnum):
    """In the place of transformers' class of that name: words of which a field holds one."""


@functools.cache
def training_declarations() -> type:
    """A dataclass that has the fields of TrainingArguments and nothing else, made from the source of transformers.

    Importing transformers takes seconds, which nobody should wait for to be told of a misspelled name. A release whose
    source refers to a name that is not known here is imported.
    """
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.origin is not None, "reltune depends on it"
    names: dict[str, Any] = {"__name__": __name__, "field": dataclasses.field, "ExplicitEnum": ExplicitEnum}
    names |= {"Any": Any, "Literal": typing.Literal, "ParallelismConfig": Any, "trainer_log_levels": {}}
    try:
        for file in ("debug_utils.py", "trainer_utils.py", "training_args.py"):
            source = Path(package.origin).with_name(file).read_text(encoding="utf-8")
            classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
            needed: list[ast.stmt] = [node for node in classes if _names_words(node)]
            needed += [_fields_alone(node) for node in classes if node.name == "TrainingArguments"]
            exec(compile(ast.Module(needed, []), file, "exec", dont_inherit=True), names)
        return dataclasses.dataclass(names["TrainingArguments"])
    except (NameError, KeyError):
        from transformers import TrainingArguments

        return TrainingArguments


def _names_words(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "ExplicitEnum" for base in node.bases)


def _fields_alone(node: ast.ClassDef) -> ast.ClassDef:
    """The class without methods and decorators. A default that depends on torch's release is that of a new one."""
    statements = [one for one in node.body if isinstance(one, ast.AnnAssign | ast.Assign | ast.If)]
    parts = [part for statement in statements for part in ast.walk(statement)]
    body: list[ast.stmt] = [
        part
        for part in parts
        if isinstance(part, ast.AnnAssign) or (isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant))
    ]
    return ast.ClassDef(node.name, bases=[], keywords=[], body=body, decorator_list=[], lineno=1, col_offset=0)


@functools.cache
def training_field_names() -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(training_declarations()))


def training_field_kinds() -> dict[str, Any]:
    """The fields with their annotations."""
    return {field.name: field.type for field in dataclasses.fields(training_declarations())}


# -- command-line words ---------------------------------------------------------------------------------------------


def named_training_fields(words: Sequence[str], own_flags: Collection[str] = ()) -> dict[str, str | bool]:
    """The fields given in ``words``, with their values as they were written, or what a flag without one stands for.

    Does without transformers.

    Raises InputError for a flag that no field has, naming the nearest, also of the command's ``own_flags``; and for a value that is no
    number, or none of the words, of which its field holds one.
    """
    if words and not words[0].startswith("--"):
        raise InputError(f"unexpected argument {words[0]!r}; flags begin with --.")
    kinds, name = training_field_kinds(), ""
    found: dict[str, str | bool] = {}
    for word in _normal(words):
        if not word.startswith("--"):
            if isinstance(found[name], str) and "list" not in str(kinds[name]):
                raise InputError(
                    f"unexpected argument {word!r}: the flag before it takes one value, where several are joined by commas, and flags begin with --."
                )
            found[name] = word
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:] if flag[2:] in kinds else flag[2:].removeprefix("no_")
        if name not in kinds:
            raise _unknown(flag, own_flags)
        if name in RESERVED:
            raise InputError(f"{flag} is fixed in the run's config.yaml; make another run for another {name}.")
        found[name] = value if equals else name == flag[2:]
    for name, given in found.items():
        if isinstance(given, str):
            _check_word(name, kinds[name], given)
    return found


def _check_word(name: str, kind: Any, word: str) -> None:
    if kind is bool and word and word.lower() not in TRUTHS:
        raise InputError(f"{name} is {word!r}; it must be true or false.")
    kinds = typing.get_args(kind) or (kind,)
    for number, article in ((int, "a whole number"), (float, "a number")):
        if number in kinds:
            try:
                number(word)
            except ValueError as error:
                raise InputError(f"{name} is {word!r}; it must be {article}.") from error
    for known in kinds:
        if isinstance(known, type) and issubclass(known, enum.Enum):
            values = [member.value for member in known]
            if word not in values:
                raise InputError(f"--{name} {word!r} is unknown; {nearest(word, values)}")


def parse_training_fields(words: Sequence[str], own_flags: Collection[str] = ()) -> dict[str, Any]:
    """The fields given in ``words`` ("--learning_rate", "1e-3", …), with TrainingArguments' own types.

    Raises InputError for a flag that no field has, as ``named_training_fields`` does, or a value of the wrong type.
    """
    if not words:
        return {}
    named_training_fields(words, own_flags)
    parser = _parser()
    normal = _normal(words)
    fields = {flag: action.dest for flag, action in parser._option_string_actions.items()}
    for flag in _flags(normal):
        if flag not in fields:  # --no_ before a field that is not true by default
            raise _unknown(flag, own_flags)
    values, rest = parser.parse_known_args(normal)
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; put values that belong together in quotes.")
    # Enum members and the like go to YAML as what the user wrote.
    given = [fields[flag] for flag in _flags(normal)]
    return {name: getattr(getattr(values, name), "value", getattr(values, name)) for name in given}


@functools.cache
def _parser() -> Any:
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser([TrainingArguments], allow_abbrev=False, add_help=False)  # type: ignore[list-item]
    parser.error = _refuse  # type: ignore[method-assign]
    return parser


def _normal(words: Sequence[str]) -> list[str]:
    """The words with underscores in place of hyphens in the names of flags."""
    normal = []
    for word in words:
        flag, equals, value = word.partition("=")
        normal.append(f"--{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word)
    return normal


def _flags(normal: Sequence[str]) -> list[str]:
    return [word.partition("=")[0] for word in normal if word.startswith("--")]


def _unknown(flag: str, own_flags: Collection[str]) -> InputError:
    known = [*own_flags, *sorted(f"--{name}" for name in training_field_names())]
    return InputError(f"unknown flag {flag}; {nearest(flag, known)}")


def _refuse(message: str) -> NoReturn:
    """Raise InputError with what argparse says of a value."""
    match = re.fullmatch(r"argument (--\w+)\S*: (.*?)\.*", message, re.DOTALL)
    flag, reason = match.groups() if match else ("training fields", message)
    choice = re.fullmatch(r"invalid choice: '(.*)' \(choose from (.*)\)", reason, re.DOTALL)
    if choice:
        known = re.findall(r"[\w-]+", choice[2])
        raise InputError(f"{flag} {choice[1]!r} is unknown; {nearest(choice[1], known)}")
    raise InputError(f"{flag}: {reason}.")


# -- YAML -----------------------------------------------------------------------------------------------------------


def check_training_names(names: Iterable[Any]) -> None:
    """Raise InputError for a name under ``training`` that no field has, naming the nearest."""
    known = training_field_names()
    for name in names:
        if name not in known:
            raise InputError(f"{name!r} is no field of transformers.TrainingArguments; {nearest(str(name), known)}")
        if name in RESERVED:
            raise InputError(f"{name} is a field of the run, not of its training; write it outside training.")


def checked_training_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TrainingArguments as YAML has them, with the type checks that flags have; None means the default.

    Raises InputError for a name that no field has (naming the nearest), or a value of the wrong kind.
    """
    if not values:
        return {}
    check_training_names(values)
    kinds = {name: str(kind) for name, kind in training_field_kinds().items()}
    switches = {
        field.name for field in dataclasses.fields(training_declarations()) if field.metadata.get("const") is True
    }
    checked: dict[str, Any] = {}
    words = []
    for name, value in values.items():
        if isinstance(value, enum.Enum):
            value = value.value
        if isinstance(value, dict | list):
            if type(value).__name__ not in kinds[name]:
                raise InputError(f"{name} is {value!r}; it must be a single value.")
            checked[name] = value
        elif value is False and name in switches:
            checked[name] = value
        elif value is not None:
            word = str(value).lower() if isinstance(value, bool) else str(value)
            if value is False and "bool" not in kinds[name]:  # what YAML 1.1 makes of a plain no
                word = "no"
            # A flag without a value, such as a bare --fsdp, is held as true whatever its kind.
            words.append(f"--{name}" if value is True and "bool" not in kinds[name] else f"--{name}={word}")
    try:
        checked |= parse_training_fields(words)
    except InputError as error:
        raise InputError(str(error).removeprefix("--")) from error
    return {name: checked[name] for name in values if name in checked}
