"""Flags, made from the fields of RunConfig, and the config that a command line gives."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from reltune.cli.launcher import together
from reltune.config.comparison import COMPARISON_FIELDS, ComparisonConfig, comparison_config
from reltune.config.fields import assignments, checked, kind_of
from reltune.config.file import read_config, read_fields
from reltune.config.precedence import combined
from reltune.config.recipes import CHOICE, chosen_again, with_parameters
from reltune.config.run_config import FIELDS, RunConfig
from reltune.config.training_fields import named_training_fields, parse_training_fields
from reltune.errors import InputError
from reltune.files import model_directory
from reltune.names import LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PART = re.compile(rf"({'|'.join(LIMITS)})=|[\d.,_]+%$")  # a word that goes on with a budget


class Words(typer.core.TyperGroup):
    """Commands whose budget may be several words, or several flags: ``--budget 0.5% memory=12GiB``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_whole_budgets(args))


def _with_whole_budgets(args: Sequence[str]) -> list[str]:
    """The words of a command line with all that is said of the budget in one flag. Of what two flags say the last counts."""
    rest: list[str] = []
    budget: dict[str, str] = {}
    words = list(args)
    while words and words[0] != "--":
        flag, equals, value = (word := words.pop(0)).partition("=")
        if flag != "--budget" or not (equals or words):
            rest.append(word)
            continue
        if not budget:
            rest.append("--budget")
        said = [value if equals else words.pop(0)]
        while words and PART.match(words[0]):
            said.append(words.pop(0))
        own: dict[str, str] = {}
        for part in said:
            for each in part.split() if "=" in part else [part]:
                name = each.partition("=")[0] if "=" in each else "parameters"
                own[name] = f"{own[name]} {each}" if name in own else each  # said twice, which is refused later
        budget |= own
    if budget:
        rest.insert(rest.index("--budget") + 1, " ".join(budget.values()))
    return rest + words


EVERY = tuple(field.name for field in FIELDS if field.name != "training")


def flags(
    *names: str, stored: bool = False, fields: Sequence[dataclasses.Field] = FIELDS
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each of these fields, of RunConfig unless others are given; it finds them in its context.

    Args:
        stored: whether the command goes by a run's ``config.yaml`` where a flag is not given. Its help then has no
            defaults, which are those of a new run.
    """

    def with_flags(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def called(**values: Any) -> None:
            command(**{name: values[name] for name in own.parameters})

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in own.parameters.values()]
        for field in fields:
            if field.name in names:
                default, annotation = _flag(field, stored)
                parameters.insert(-1, inspect.Parameter(field.name, keyword, default=default, annotation=annotation))
        called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return with_flags


def _flag(field: dataclasses.Field, stored: bool) -> tuple[Any, Any]:
    """The default and the annotation that make Typer's flag of a field. Values stay words, which ``checked`` reads."""
    kind, default = kind_of(field), None if field.default is dataclasses.MISSING else field.default
    words = [] if field.default_factory is dataclasses.MISSING else field.default_factory()
    types: dict[str, Any] = {
        "bool": bool,
        "list[str]": list[str],
        "Texts": list[str],
        "dict[str, list[str]]": list[str],
    }
    help = field.metadata["help"].partition(" If not given")[0] if stored else field.metadata["help"]
    option = typer.Option(
        f"--{field.name}/--no_{field.name}" if kind == "bool" else f"--{field.name}",
        metavar=field.metadata["metavar"] or None,
        help=help + (f"  [default: {','.join(words)}]" if words and not stored else ""),
        show_default=not stored,
    )
    return default, Annotated[types.get(kind, str) | None, option]


def new_config(context: typer.Context, file: str | None, check: Callable[[RunConfig], None]) -> RunConfig:
    """The config of a new run, from a file and the flags of a command; flags win.

    ``check`` is asked first, about a config whose training fields are words still: to give them their types takes
    transformers, and seconds.
    """
    draft = combined(read_fields(file) if file else {}, _given(context), _named_training_fields(context))
    _check_named(draft)
    if "resume_from_checkpoint" in draft["training"]:
        _check_resumes(draft["output_dir"], str(draft["training"].pop("resume_from_checkpoint")))
    _check_draft(draft, check)
    stored = read_config(file) if file else {}
    values = combined(stored, _given(context), parse_training_fields(context.args))
    values["training"].pop("resume_from_checkpoint", None)
    return _config(values)


def _check_resumes(output_dir: str, wanted: str) -> None:
    """Raise InputError unless a run is to go on as it does by itself."""
    if not (Path(output_dir) / "config.yaml").is_file():
        raise InputError(
            "a new run has no checkpoint to resume from; leave it out, or resume an existing one with `reltune tune RUN`."
        )
    if wanted.lower() not in ("", "true"):
        raise InputError(
            "the same command goes on from the newest checkpoint by itself; to go on from another, use `reltune tune RUN "
            "--resume_from_checkpoint checkpoint-N`."
        )


def new_comparison(
    context: typer.Context, file: str | None, check: Callable[[ComparisonConfig], None]
) -> ComparisonConfig:
    """The config of a comparison, from a file and the flags of a command, as ``new_config`` makes that of a run."""
    given = _given(context, COMPARISON_FIELDS)
    stored = read_fields(file, COMPARISON_FIELDS) if file else {}
    draft = combined(stored, given, _named_training_fields(context))
    _check_named(draft)
    check(comparison_config(draft))
    stored = read_config(file, COMPARISON_FIELDS) if file else {}
    return comparison_config(combined(stored, given, parse_training_fields(context.args)))


def _check_named(draft: dict[str, Any]) -> None:
    for name in ("model_name_or_path", "output_dir"):
        if name not in draft:
            raise InputError(f"--{name} is missing; give it as a flag or in a file named with --config.")


def estimated_config(context: typer.Context, file: str | None, check: Callable[[RunConfig], None]) -> RunConfig:
    """The config of a training that is only estimated: it needs neither data nor a directory. ``check`` as by ``new_config``."""
    stored = read_fields(file) if file else {}
    place = {"output_dir": "."}
    draft = place | combined(stored, _given(context), _named_training_fields(context))
    if "model_name_or_path" not in draft:
        raise InputError("--model_name_or_path is missing; give it as a flag or in a file named with --config.")
    place["model_name_or_path"] = draft["model_name_or_path"] = model_directory(draft["model_name_or_path"])
    check(RunConfig(**draft))
    stored = read_config(file) if file else {}
    return RunConfig(**(combined(stored, _given(context), parse_training_fields(context.args)) | place))


def previewed_config(
    context: typer.Context, file: str | None, check: Callable[[RunConfig, bool], None]
) -> tuple[RunConfig, bool]:
    """The config of data that are only looked at, and whether it names a model; it needs none. ``check`` is told both."""
    values = combined(read_fields(file) if file else {}, _given(context), {})
    values.pop("training", None)  # says nothing of the data
    named = "model_name_or_path" in values
    config = RunConfig(**({"model_name_or_path": "."} | values | {"output_dir": "."}))
    config.model_name_or_path = model_directory(config.model_name_or_path)
    check(config, named)
    return config, named


def changed_config(
    context: typer.Context, stored: RunConfig, check: Callable[[RunConfig], None], chosen: bool = True
) -> RunConfig:
    """The config of an existing run with the flags of a command. ``check`` is asked first, as by ``new_config``.

    If not ``chosen``, criteria, granularity, budget and spread follow from the flags as in a new run.
    """
    given = _given(context)
    if "budget" in given and chosen:
        given["budget"] = with_parameters(given["budget"], stored.budget)
    values = stored.values() | (chosen_again(stored.values(), given) if chosen else dict.fromkeys(CHOICE))
    _check_draft(combined(values, given, _named_training_fields(context)), check)
    return _config(combined(values, given, parse_training_fields(context.args)))


def _check_draft(fields: dict[str, Any], check: Callable[[RunConfig], None]) -> None:
    with together():
        check(_config(fields))


def _config(fields: dict[str, Any]) -> RunConfig:
    config = RunConfig(**fields)
    config.check()
    return config


def _given(context: typer.Context, fields: Sequence[dataclasses.Field] = FIELDS) -> dict[str, Any]:
    """The fields that were given on this command line."""
    given = {}
    for field in fields:
        source = context.get_parameter_source(field.name)
        if source is not None and source.name == "COMMANDLINE":
            value = context.params[field.name]
            given[field.name] = checked(field, assignments(value) if field.name == "sweep" else value)
    return given


def _named_training_fields(context: typer.Context) -> dict[str, str | bool]:
    """Flags that the command does not have must be fields of TrainingArguments."""
    own = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
    return named_training_fields(context.args, own)
