"""Flags, made from the fields of RunConfig, and the config that a command line gives."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reltune.config.fields import assignments, checked, kind_of
from reltune.config.precedence import combined
from reltune.config.run_config import FIELDS, RunConfig
from reltune.config.training_fields import parse_training_fields
from reltune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY = tuple(field.name for field in FIELDS if field.name != "training")


def flags(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each of these fields of RunConfig; it finds them in its context."""

    def with_flags(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def called(**values: Any) -> None:
            command(**{name: values[name] for name in own.parameters})

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in own.parameters.values()]
        for field in FIELDS:
            if field.name in names:
                default, annotation = _flag(field)
                parameters.insert(-1, inspect.Parameter(field.name, keyword, default=default, annotation=annotation))
        called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return with_flags


def _flag(field: dataclasses.Field) -> tuple[Any, Any]:
    """The default and the annotation that make Typer's flag of a field. Values stay words, which ``checked`` reads."""
    kind, default = kind_of(field), None if field.default is dataclasses.MISSING else field.default
    words = [] if field.default_factory is dataclasses.MISSING else field.default_factory()
    types: dict[str, Any] = {"bool": bool, "list[str]": list[str], "dict[str, list[str]]": list[str]}
    option = typer.Option(
        f"--{field.name}/--no_{field.name}" if kind == "bool" else f"--{field.name}",
        metavar=field.metadata["metavar"] or None,
        help=field.metadata["help"] + (f"  [default: {','.join(words)}]" if words else ""),
    )
    return default, Annotated[types.get(kind, str) | None, option]


def new_config(context: typer.Context, file: str | None = None) -> RunConfig:
    """The config of a new run, from a file and the flags of a command; flags win."""
    fields: dict[str, Any] = {}
    if file is not None:
        from reltune.config.file import read_config

        fields = read_config(file)
    fields = combined(fields, _given(context), _training_fields(context))
    for name in ("model_name_or_path", "output_dir"):
        if name not in fields:
            raise InputError(f"--{name} is missing; give it as a flag or in a file named with --config.")
    if "resume_from_checkpoint" in fields["training"]:
        raise InputError("a new run has no checkpoint to resume from; resume with `reltune tune RUN` instead.")
    config = RunConfig(**fields)
    config.check()
    return config


def changed_config(config: RunConfig, context: typer.Context) -> RunConfig:
    """The config of an existing run with the flags of a command."""
    config = RunConfig(**combined(config.values(), _given(context), _training_fields(context)))
    config.check()
    return config


def _given(context: typer.Context) -> dict[str, Any]:
    """The fields of RunConfig that were given on this command line."""
    given = {}
    for field in FIELDS:
        source = context.get_parameter_source(field.name)
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[field.name]
            given[field.name] = checked(field, assignments(value) if field.name == "sweep" else value)
    return given


def _training_fields(context: typer.Context) -> dict[str, Any]:
    """Flags that the command does not have must be fields of TrainingArguments."""
    own = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
    return parse_training_fields(list(context.args), own)
