"""The command line. No logic: read flags, call the stage, print what it made, turn errors into exit codes.

Exit codes: 0 done, 1 failed at run time, 2 bad input or configuration, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import signal
import sys
import textwrap
import traceback
import warnings
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from reltune import __version__
from reltune.config.parsing import assignments, parts
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.notes import Note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from reltune.relevance.scores import RelevanceScores
    from reltune.report.record import LMEvalRecord, RunRecord
    from reltune.runs.directory import RunDirectory
    from reltune.runs.materials import Materials

app = typer.Typer(
    help="Measure which parameters matter for a task, choose them under a budget, train only those, evaluate.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},  # --text-column is --text_column
)
TRAINING = {"allow_extra_args": True, "ignore_unknown_options": True}
TRAINING_HELP = "Any field of transformers.TrainingArguments is a flag too: --num_train_epochs 5 --learning_rate 1e-3."

Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run.", show_default=False)]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="YAML with fields of the run; flags win over it.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite_output_dir", help="Replace what is there.")]
SHARED = ("run", "analyze", "tune", "evaluate")  # commands that several processes work on together
# Click's class, found through Typer, which may bring its own Click.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
    elif _several() and context.invoked_subcommand not in SHARED:
        raise InputError(
            f"`reltune {context.invoked_subcommand}` is for one process, and a launcher started several; of reltune's "
            f"commands {', '.join(SHARED)} run on several."
        )


def flags(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each of these fields of RunConfig; it finds them in its context."""

    def with_flags(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def called(**values: Any) -> None:
            command(**{name: values[name] for name in own.parameters})

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [parameter.replace(kind=keyword) for parameter in own.parameters.values()]
        for field in dataclasses.fields(RunConfig):
            if field.name in names:
                default, annotation = _flag(field)
                parameters.insert(-1, inspect.Parameter(field.name, keyword, default=default, annotation=annotation))
        called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return with_flags


def _flag(field: dataclasses.Field) -> tuple[Any, Any]:
    """The default and the annotation that make Typer's flag of a field."""
    about, kind = field.metadata, str(field.type).removesuffix(" | None")
    default = None if field.default is dataclasses.MISSING else field.default
    words = [] if field.default_factory is dataclasses.MISSING else field.default_factory()
    types = {"str": str, "int": int, "float": float, "bool": bool, "list[str]": list[str]}
    types["dict[str, list[str]]"] = list[str]
    option = typer.Option(
        f"--{field.name}/--no_{field.name}" if kind == "bool" else f"--{field.name}",
        metavar=about["metavar"] or None,
        help=about["help"] + (f"  [default: {','.join(words)}]" if words else ""),
        min=about.get("least") if "most" in about else None,
        max=about.get("most"),
    )
    return default, Annotated[types[kind] | None, option]


EVERY = tuple(field.name for field in dataclasses.fields(RunConfig) if field.name != "training")
HELD_OUT = ("validation_file", "test_file", "on_bad_rows")
CHOICE = ("criteria", "budget", "granularity", "spread", "target_modules", "exclude_modules")


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
@flags(*EVERY)
def run(context: typer.Context, config: ConfigFile = None, overwrite_output_dir: Overwrite = False) -> None:
    """All four steps: analyze, select, tune, evaluate; and a report."""
    _all_stages(_config(context, config), overwrite_output_dir)


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
@flags(*(name for name in EVERY if name not in ("budget", "granularity", "spread", "frozen_dtype")))
def analyze(context: typer.Context, config: ConfigFile = None, overwrite_output_dir: Overwrite = False) -> None:
    """Measure how much each unit matters: DIR/relevance."""
    from reltune.runs import stages
    from reltune.runs.directory import RunDirectory

    made = _config(context, config)
    if made.has_data:
        materials, directory = _begin(made, overwrite_output_dir, select=False)
        stages.analyze(materials, directory)
        if not _first():
            return
    elif _several():
        raise InputError("an analysis of the weights alone is for one process; start it without a launcher.")
    else:
        directory = RunDirectory(made.output_dir)
        stages.analyze_weights(made, directory, overwrite_output_dir)
    _show_relevance(made, directory)
    _say(f"Next: reltune select {made.output_dir} --budget 0.5%")


@app.command(epilog="What is not given stays as config.yaml in RUN has it.")
@flags(*CHOICE)
def select(context: typer.Context, run: Run, overwrite_output_dir: Overwrite = False) -> None:
    """Choose units under a budget: RUN/plan/plan.yaml."""
    from reltune.runs import stages
    from reltune.runs.directory import RunDirectory

    directory, config = RunDirectory.open(run)
    directory.check_stage("select", overwrite_output_dir)
    config = _changed(config, context)
    plan = stages.select(config, directory)
    config.save(directory.config_file)
    after = f"then: reltune tune {run}" if config.has_data else "then train by it: reltune.ReltuneConfig(plan=...)"
    _say(*plan.describe(), f"Next: look at {directory.plan / 'plan.yaml'}, {after}")


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
@flags("frozen_dtype", "early_stopping_patience", "sweep", "sweep_trials")
def tune(context: typer.Context, run: Run, overwrite_output_dir: Overwrite = False) -> None:
    """Train what the plan names: RUN/adapter."""
    from reltune.plan.plan import Plan
    from reltune.relevance.scores import RelevanceScores
    from reltune.runs import stages
    from reltune.runs.directory import RunDirectory
    from reltune.runs.materials import prepare

    if run.startswith("--"):  # the training flags came first, so that Click took one of them for RUN
        *context.args, run = run, *context.args
    with _together():
        directory, config = RunDirectory.open(run)
        config = _changed(config, context)
        resume = config.training.pop("resume_from_checkpoint", None)
        _check_data(config, run)
        _check_space(config)
        selects = "budget" in config.sweep
        if overwrite_output_dir or not directory.sweeping(config):
            directory.check_stage("select" if selects else "tune", overwrite_output_dir)
            directory.check_stage("tune", overwrite_output_dir)
        relevance = RelevanceScores.load(directory.relevance) if selects else None
        if not selects:
            Plan.load(directory.plan)
        materials = prepare(config, directory)
        if config.sweep:
            if resume:
                raise InputError(
                    "resume_from_checkpoint is for one training; a sweep goes on by itself where it stopped."
                )
            _check_sweep(materials, relevance)
    if config.sweep:
        _sweep(materials, directory, overwrite_output_dir)
    else:
        stages.tune(materials, directory, resume)
    _say(f"Adapter: {directory.adapter}", f"Next: reltune evaluate {run}")


@app.command(epilog="What is not given stays as config.yaml in RUN has it.")
@flags(*HELD_OUT, *(name for name in EVERY if name.startswith("lm_eval_")))
def evaluate(context: typer.Context, run: Run) -> None:
    """Measure the adapter on held-out data: RUN/all_results.json."""
    from reltune.runs import stages
    from reltune.runs.directory import RunDirectory
    from reltune.runs.materials import prepare_evaluation
    from reltune.runs.summary import read_lm_eval

    with _together():
        directory, config = RunDirectory.open(run)
        _adapter_exists(directory)
        materials = prepare_evaluation(_changed(config, context), directory)
    results = stages.evaluate(materials, directory)
    _print(_metrics_table(results))
    if materials.lm_eval_tasks and _first():
        _show_lm_eval(read_lm_eval(directory))


@app.command()
def report(run: Run) -> None:
    """Draw relevance, results and training: RUN/report.html."""
    from reltune.runs import stages
    from reltune.runs.directory import RunDirectory

    directory, config = RunDirectory.open(run)
    _show_record(stages.report(config, directory), directory)


@app.command()
def export(
    run: Run,
    output_dir: Annotated[str, typer.Option("--output_dir", metavar="DIR", help="Directory to write; new or empty.")],
    to: Annotated[
        str, typer.Option("--to", metavar="FORM", help="lora: a standard PEFT adapter; merged: a plain model.")
    ],
) -> None:
    """Hand the tuned model to programs without reltune."""
    from reltune.runs import stages
    from reltune.runs.directory import RunDirectory
    from reltune.runs.export import lora_summary
    from reltune.runs.materials import prepare_export

    if to not in ("lora", "merged"):
        raise InputError(f"--to {to!r} is unknown; write lora or merged.")
    directory, config = RunDirectory.open(run)
    _adapter_exists(directory)
    path = stages.export(prepare_export(config, directory), directory, to, output_dir)
    _say(f"Exported to {path}" + (f": {lora_summary(path)}" if to == "lora" else ""))


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
@flags("output_dir", "budget", "criteria", "granularity", "seed")
def demo(context: typer.Context, overwrite_output_dir: Overwrite = False) -> None:
    """The four steps and three baselines on BBC news."""
    from reltune.runs.demo import demo_config

    config = _changed(demo_config("demo-run", RunConfig.seed), context)
    _all_stages(config, overwrite_output_dir, baselines=True)


@app.command()
def config(
    defaults: Annotated[bool, typer.Option("--defaults", help="Every field with its default, as YAML.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="A JSON Schema of it, for editors.")] = False,
) -> None:
    """Print what a config file can say."""
    if defaults == schema:
        raise InputError("say what to print: --defaults or --schema.")
    from reltune.config.file import defaults_yaml, json_schema

    print(defaults_yaml() if defaults else json_schema(), end="")


# -- helpers of the commands ----------------------------------------------------------------------------------------


def _config(context: typer.Context, file: str | None = None) -> RunConfig:
    """The run's config from a file and the flags of a command, training fields among them; flags win."""
    fields: dict[str, Any] = {}
    if file is not None:
        from reltune.config.file import read_config

        fields = read_config(file)
    fields = _combined(fields, _given(context), _training_fields(context))
    for name in ("model_name_or_path", "output_dir"):
        if name not in fields:
            raise InputError(f"--{name} is missing; give it as a flag or in a file named with --config.")
    if "resume_from_checkpoint" in fields["training"]:
        raise InputError("a new run has no checkpoint to resume from; resume with `reltune tune RUN` instead.")
    config = RunConfig(**fields)
    config.check()
    return config


def _changed(config: RunConfig, context: typer.Context) -> RunConfig:
    """The config with what was given on this command line."""
    config = RunConfig(**_combined(vars(config), _given(context), _training_fields(context)))
    config.check()
    return config


def _combined(stored: dict[str, Any], given: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """A config's fields with what was given on the command line: what has a value there is not swept any more, and what is
    swept there has no value any more."""
    swept = given.get("sweep", {})
    if twice := [name for name in swept if name in training or name in given]:
        raise InputError(f"{twice[0]} has a value and is swept too; leave out --{twice[0]} or that --sweep.")
    left = {name: values for name, values in stored.get("sweep", {}).items() if name not in {**given, **training}}
    kept = {name: value for name, value in stored.get("training", {}).items() if name not in swept}
    sweep = swept or left
    trials = given.get("sweep_trials", stored.get("sweep_trials") if sweep else None)
    return {**stored, **given, "sweep": sweep, "sweep_trials": trials, "training": {**kept, **training}}


def _given(context: typer.Context) -> dict[str, Any]:
    """The fields of RunConfig that were given on this command line."""
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    given = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name in fields and source is not None and source.name == "COMMANDLINE":
            given[name] = parts(value) if isinstance(value, list | tuple) else value
            if name == "sweep":
                given[name] = assignments(value)
            if given[name] in ("", []):
                raise InputError(f"--{name} is empty; give it a value or leave it out.")
    return given


def _training_fields(context: typer.Context) -> dict[str, Any]:
    """Flags that are no flags of the command must be fields of TrainingArguments."""
    words = list(context.args)
    if not words:
        return {}
    own = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
    if not words[0].startswith("--"):
        raise InputError(f"unexpected argument {words[0]!r}; flags begin with --.")
    from reltune.config.training_fields import parse_training_fields

    return parse_training_fields(words, own)


def _begin(config: RunConfig, overwrite: bool, select: bool = True) -> tuple[Materials, RunDirectory]:
    """Check everything that can be checked, and only then make the run's directory."""
    from reltune.processes import Processes
    from reltune.relevance.resumption import interrupted_in
    from reltune.runs import stages
    from reltune.runs.directory import RunDirectory
    from reltune.runs.materials import prepare

    directory = RunDirectory(config.output_dir)
    processes = Processes.joined()
    with processes.together():
        _check_space(config)
        resumed = not overwrite and directory.continues(config)
        if not resumed:
            directory.check_new(overwrite)
        elif processes.count > 1 and interrupted_in(directory.relevance):
            raise InputError(
                f"output_dir {directory.path} holds an interrupted analysis, which goes on in one process only; start it "
                "without a launcher, or pass --overwrite_output_dir."
            )
        materials = prepare(config, directory if resumed and directory.relevance.exists() else None)
        stages.check_choice(materials, select)
        materials.check_training()
        if config.sweep:
            _check_sweep(materials)
        if select:
            _ = materials.lm_eval_tasks  # checked here, and measured on at the end
    with processes.together():
        if not resumed and processes.first:
            directory.create(config)
    unit = materials.task.unit
    _say(
        f"{'streamed' if config.streaming else f'{len(materials.train):,}'} training, {len(materials.validation):,} validation and {len(materials.test):,} test {unit}s, "
        + (f"{materials.task.describe()}; " if materials.task.describe() else "")
        + (
            f"{materials.sample.n_truncated:,} training {unit}s cut to {materials.longest} tokens."
            if unit != "image"
            else ""
        )
        + (
            f" Going on with the interrupted {'sweep' if directory.sweeping(config) else 'analysis'}."
            if resumed
            else ""
        )
    )
    return materials, directory


def _all_stages(config: RunConfig, overwrite: bool, baselines: bool = False) -> None:
    from reltune.runs import stages

    materials, directory = _begin(config, overwrite)
    if not directory.sweeping(config):
        stages.analyze(materials, directory)
        if "budget" not in config.sweep:
            _say(*stages.select(config, directory).describe())
    if config.sweep:
        materials = _sweep(materials, directory)
        config = materials.config
    else:
        stages.tune(materials, directory)
    results = stages.evaluate(materials, directory)
    if baselines:
        from reltune.runs.comparison import compare

        compare(materials, directory, results)
    with _together():
        if _first():
            _show_record(stages.report(config, directory), directory)


def _check_space(config: RunConfig) -> None:
    if config.sweep:
        from reltune.runs.sweep import space

        space(config)


def _check_sweep(materials: Materials, relevance: RelevanceScores | None = None) -> None:
    from reltune.runs.sweep import check

    check(materials, relevance)


def _sweep(materials: Materials, directory: RunDirectory, anew: bool = False) -> Materials:
    from reltune.files import read_json
    from reltune.report.terminal import sweep_table
    from reltune.runs.sweep import in_words, sweep

    materials = sweep(materials, directory, anew)
    record = read_json(directory.trials)
    _print(sweep_table(record))
    _say(f"Best on validation data: {in_words(record['best']['values'])}.")
    return materials


def _check_data(config: RunConfig, run: str) -> None:
    if not config.has_data:
        raise InputError(
            f"{run} was analyzed without data, so there is nothing to train on; analyze again with --train_file or --dataset_name."
        )


def _adapter_exists(directory: RunDirectory) -> None:
    if not (directory.adapter / "adapter_config.json").is_file():
        raise InputError(f"{directory.path} holds no adapter; run `reltune tune {directory.path}` first.")


def _show_relevance(config: RunConfig, directory: RunDirectory) -> None:
    from reltune.relevance.scores import RelevanceScores
    from reltune.report.terminal import heatmap

    relevance = RelevanceScores.load(directory.relevance)
    _print(heatmap(relevance.heatmap()))
    _say(relevance.depth_sentence())


def _show_record(record: RunRecord, directory: RunDirectory) -> None:
    from reltune.report.terminal import comparison_table, heatmap, outputs

    _print(heatmap(record.heatmaps[0]))
    if record.comparison:
        _print(comparison_table(record.comparison), width=100)  # its lines would break in the wrong places
    else:
        _print(_metrics_table(record.metrics))
    if record.outputs:
        _print(outputs(record.outputs))
    _show_lm_eval(record.lm_eval)
    _say(record.depth_sentence, *record.notes, f"Report: {directory.report}")


def _show_lm_eval(record: LMEvalRecord | None) -> None:
    if record is not None:
        from reltune.report.terminal import lm_eval_table

        _print(lm_eval_table(record), width=100)


def _metrics_table(metrics: dict[str, float]) -> Any:
    from reltune.report.terminal import metrics_table

    return metrics_table(metrics)


def _print(renderable: Any, width: int = 0) -> None:
    """Print as wide as the terminal is, and at least ``width``."""
    if not _first():
        return
    from rich.console import Console

    console = Console()
    console.width = max(console.width, width)
    console.print(renderable)


def _say(*lines: str) -> None:
    for line in lines if _first() else ():
        print(line, flush=True)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What runs inside fails in all processes of a launcher when it fails in one."""
    from reltune.processes import Processes

    with Processes.joined().together():
        yield


def _several() -> bool:
    """Whether torchrun or accelerate launch started several of this process."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _first() -> bool:
    """Whether this process is the only one or the one that speaks."""
    return not _several() or os.environ.get("RANK", "0") == "0"


# -- errors and exit codes ------------------------------------------------------------------------------------------


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """reltune's own warnings are sentences for the user; of a library's it matters where they come from."""
    if issubclass(category, Note):
        if _first():
            print(f"reltune: note: {message}", file=sys.stderr)
    elif f"{os.sep}reltune{os.sep}" in filename:
        print(f"reltune: warning: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(143)


def main() -> None:
    """Entry point of the ``reltune`` command."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    debug = "--debug" in sys.argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows another one
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    warnings.showwarning = _warn
    # PEFT asks transformers for it; nothing that a user could mend.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(args=words, prog_name="reltune", standalone_mode=False)
        if code == 130:  # what newer Typers make of KeyboardInterrupt
            raise KeyboardInterrupt
        raise SystemExit(code if isinstance(code, int) else 0)
    except (InputError, USAGE_ERROR) as error:
        if debug:
            traceback.print_exc()
        _fail(error.format_message() if isinstance(error, USAGE_ERROR) else str(error), 2, common=True)
    except (KeyboardInterrupt, typer.Abort):
        _fail(
            "interrupted; what was finished is kept, and the same command goes on with an analysis or a sweep that was cut short.",
            130,
            common=True,
        )
    except Exception as error:
        if debug:
            traceback.print_exc()
        message = f"{type(error).__name__}: {textwrap.shorten(str(error), 500)} (--debug shows where)"
        _fail(message, 1, common=getattr(error, "agreed", False))


def _fail(message: str, code: int, common: bool = False) -> NoReturn:
    """End with a message; one that all processes end with is the first one's to say."""
    if common and not _first():
        raise SystemExit(code)
    if "tqdm" in sys.modules:  # end the lines of progress bars that the error has left open
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(f"reltune: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
