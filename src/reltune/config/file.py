"""A run's config as a file that people write: read, printed with its defaults, and described for editors."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
import textwrap
import typing
from collections.abc import Sequence
from typing import Any

import yaml

from reltune.config.fields import AUTO, KINDS, checked_fields, kind_of, limits_of
from reltune.config.run_config import FIELDS
from reltune.config.training_fields import (
    DEFAULTS,
    NOT_FOR_RUNS,
    check_training_names,
    checked_training_fields,
    training_declarations,
    training_field_names,
)
from reltune.errors import InputError, nearest
from reltune.reading import Damaged, read_yaml

WIDTH = 118


def read_fields(path: str | os.PathLike, fields: Sequence[dataclasses.Field] = FIELDS) -> dict[str, Any]:
    """The fields that a YAML file gives, checked: of RunConfig, unless others are given, and of TrainingArguments, under
    ``training``, by name only.

    Does without transformers, which takes seconds to import.

    Raises:
        InputError: no YAML mapping, an unknown key (naming the nearest), or a wrong value.
    """
    values = _read(path)
    own = {field.name for field in fields}
    outside = {name: value for name, value in values.items() if name not in own}
    try:
        known_values = checked_fields({name: value for name, value in values.items() if name in own}, fields)
        inside = known_values.get("training", {})
        known = training_field_names()
        for name in outside:
            if name not in known:
                raise InputError(f"{name!r} is no field; {nearest(str(name), [*own, *known])}")
            if name in inside:
                raise InputError(f"{name} stands both in training and outside it; keep one.")
        check_training_names(inside)
    except InputError as error:
        raise InputError(f"config {path}: {error}") from error
    return {**known_values, "training": {**inside, **outside}} if inside or outside else known_values


def read_config(path: str | os.PathLike, fields: Sequence[dataclasses.Field] = FIELDS) -> dict[str, Any]:
    """What ``read_fields`` reads, with the types of TrainingArguments' fields.

    Raises InputError as it does, and for a field of TrainingArguments with a value of the wrong kind.
    """
    values = read_fields(path, fields)
    try:
        return {**values, "training": checked_training_fields(values["training"])} if "training" in values else values
    except InputError as error:
        raise InputError(f"config {path}: {error}") from error


def _read(path: str | os.PathLike) -> dict[Any, Any]:
    try:
        values = read_yaml(path)
    except FileNotFoundError as error:
        raise InputError(f"config {path} does not exist; check the path.") from error
    except OSError as error:
        raise InputError(f"config {path} cannot be read ({error}); save it as UTF-8 text.") from error
    except Damaged as error:
        raise InputError(f"config {path}{error.place} {error.reason}; mend it there.") from error
    if not isinstance(values, dict):
        raise InputError(f"config {path} must be a mapping; write one field on each line, like max_length: 128.")
    return values


# -- the commented file ---------------------------------------------------------------------------------------------


def defaults_yaml() -> str:
    """Every field with its default and its help, as a file that ``read_config`` reads.

    TrainingArguments' fields are commented out, except those for which reltune has its own defaults.
    """
    blocks = [
        _comment(
            "A config for `reltune run --config FILE`. Flags of the same names win over it. A field without a value is not set. "
            "Relative paths start from the directory in which the command is run."
        )
    ]
    *own, training_field = FIELDS
    blocks += [_comment(field.metadata["help"]) + _line(field.name, _default(field)) for field in own]
    training = _comment(training_field.metadata["help"]) + "training:\n"
    for field in _training_fields():
        default = DEFAULTS.get(field.name, _default(field))
        line = _line(field.name, default)
        training += textwrap.indent(_comment(_help(field)), "  ")
        training += textwrap.indent(line, "  " if field.name in DEFAULTS else "  # ")
    return "\n".join([*blocks, training])


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, WIDTH - 2, break_long_words=False))


def _line(name: str, value: Any) -> str:
    if value is None:
        return f"{name}:\n"
    return (
        f"{name}: {yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10_000).strip()[1:-1]}\n"
    )


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    value = None if field.default in (dataclasses.MISSING, "") else field.default
    return value.value if isinstance(value, enum.Enum) else value


def _training_fields() -> list[dataclasses.Field]:
    """Those of TrainingArguments that a run can be given."""
    return [field for field in dataclasses.fields(training_declarations()) if field.name not in NOT_FOR_RUNS]


def _help(field: dataclasses.Field) -> str:
    """The first sentence of transformers' help."""
    words = " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%")
    return re.split(r"(?<=[.?!])\s+(?=[A-Z`])", words)[0]


# -- the schema -----------------------------------------------------------------------------------------------------


def json_schema() -> str:
    """A JSON Schema (draft 2020-12) of the file that ``read_config`` reads."""
    training = {field.name: _training_schema(field.type, _help(field)) for field in _training_fields()}
    own = {field.name: _own_schema(field) for field in FIELDS}
    own["training"] |= {"properties": training, "additionalProperties": False}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Config of a reltune run",
        "type": "object",
        "properties": {**training, **own},
        "additionalProperties": False,
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


LIMITS = (("minimum", "least"), ("maximum", "most"), ("exclusiveMinimum", "above"))
NUMBER_WORD = {"type": "string", "pattern": r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"}  # "1e-3" is a word in YAML 1.1
WORD = {"type": ["string", "number"], "pattern": r"\S"}
VALUE = {"type": ["string", "number", "boolean"], "pattern": r"\S"}
VALUES = {"anyOf": [VALUE, {"type": "array", "items": VALUE, "minItems": 1}]}


def _own_schema(field: dataclasses.Field) -> dict[str, Any]:
    """What a field of RunConfig may be."""
    choices, limits = field.metadata["choices"], limits_of(field)
    bounds = {key: limits[name] for key, name in LIMITS if name in limits}
    word: dict[str, Any] = {"enum": list(choices)} if choices else WORD
    words = {"type": "array", "items": word} | ({"minItems": limits["least"]} if "least" in limits else {})
    wanted = {
        "str": word,
        "bool": {"type": "boolean"},
        "int": {"type": "integer", **bounds},
        "int | str": {"anyOf": [{"type": "integer", **bounds}, {"const": AUTO}]},
        "float": {"anyOf": [{"type": "number", **bounds}, NUMBER_WORD]},
        **{key: {"anyOf": [words, {"type": "string", "pattern": r"\S"}]} for key in ("list[str]", "Texts")},
        "dict[str, Any]": {"type": "object"},
        "dict[str, list[str]]": {"type": "object", "additionalProperties": VALUES},
    }
    assert set(wanted) == set(KINDS), "every kind of field has its schema"
    kind = kind_of(field)
    schema: dict[str, Any] = {"description": field.metadata["help"], **wanted[kind]}
    if kind.startswith("dict"):
        schema["type"] = ["object", "null"]
        return schema
    rest = {key: schema.pop(key) for key in list(schema) if key != "description"}
    schema["anyOf"] = [rest, {"type": "null"}] if "anyOf" not in rest else [*rest["anyOf"], {"type": "null"}]
    default = _default(field)
    return schema if default is None else {**schema, "default": default}


def _training_schema(annotation: Any, help: str) -> dict[str, Any]:
    """What a field of TrainingArguments may be."""
    kinds: list[dict[str, Any]] = [{"type": "null"}]
    members = (annotation,) if typing.get_origin(annotation) in (None, list, dict) else typing.get_args(annotation)
    for kind in members:
        origin = typing.get_origin(kind) or kind
        if isinstance(origin, type) and issubclass(origin, enum.Enum):
            kinds = [known for known in kinds if known != {"type": "string"}]
            kinds.append({"enum": [member.value for member in origin]})
        elif origin is bool:
            kinds.append({"type": "boolean"})
        elif origin is int:
            kinds.append({"type": "integer"})
        elif origin is float:
            kinds += [{"type": "number"}, NUMBER_WORD]
        elif origin is list:
            kinds.append({"type": "array"})
        elif origin is dict:
            kinds.append({"type": "object"})
        elif origin is str and not any("enum" in known for known in kinds):
            kinds.append({"type": "string"})
    return {"description": help, "anyOf": kinds}
