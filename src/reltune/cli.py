"""The command line. No logic: read flags, call the stage, print what it made, turn errors into exit codes.

Exit codes: 0 done, 1 failed at run time, 2 bad input or configuration, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from reltune import __version__
from reltune.records import CRITERIA, GRANULARITIES, InputError, RunConfig

if TYPE_CHECKING:
    from reltune.records import RunRecord
    from reltune.run import Materials, RunDirectory

app = typer.Typer(
    help="Measure which parameters matter for a task, choose them under a budget, train only those, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
TRAINING = {"allow_extra_args": True, "ignore_unknown_options": True}
TRAINING_HELP = "Any field of transformers.TrainingArguments is a flag too: --num_train_epochs 5 --learning_rate 1e-3."

Run = Annotated[str, typer.Argument(help="Directory of a run.", show_default=False)]
Model = Annotated[
    str, typer.Option("--model_name_or_path", help="Model directory or hub id.", show_default=False)
]
OutputDir = Annotated[str, typer.Option("--output_dir", help="Directory of the run; new or empty.", show_default=False)]
TrainFile = Annotated[
    str | None, typer.Option("--train_file", help="CSV, TSV or JSONL with a text and a label column.", show_default=False)
]
DatasetName = Annotated[
    str | None, typer.Option("--dataset_name", help="A data set that comes with reltune[demo]: bbc_news.", show_default=False)
]
ValidationFile = Annotated[
    str | None,
    typer.Option("--validation_file", help="Split off the training data when not given.", show_default=False),
]
TestFile = Annotated[
    str | None, typer.Option("--test_file", help="Split off the training data when not given.", show_default=False)
]
TextColumn = Annotated[str, typer.Option("--text_column")]
LabelColumn = Annotated[str, typer.Option("--label_column")]
Encoding = Annotated[str, typer.Option("--encoding", help="Of CSV and JSONL files; a BOM is understood.")]
MaxLength = Annotated[int, typer.Option("--max_length", help="Tokens per text; longer texts are cut.")]
Criteria = Annotated[
    list[str] | None,
    typer.Option("--criteria", help=f"One or several of {', '.join(CRITERIA)}; the first selects.  [default: fisher]"),
]
Budget = Annotated[
    str, typer.Option("--budget", help="Trainable parameters: a share of the base model (0.5%) or a count (100k).")
]
Granularity = Annotated[
    list[str] | None,
    typer.Option("--granularity", help=f"One or several of {', '.join(GRANULARITIES)}.  [default: column]"),
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target_modules", help="Names, ends or beginnings of names, or a regex.", show_default=False),
]
Excludes = Annotated[list[str] | None, typer.Option("--exclude_modules", help="Likewise, to leave out.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed")]
Overwrite = Annotated[bool, typer.Option("--overwrite_output_dir", help="Replace what is there.")]
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # Typer may bring its own Click, so Click's class is found through Typer


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
def run(
    context: typer.Context,
    model_name_or_path: Model,
    output_dir: OutputDir,
    train_file: TrainFile = None,
    dataset_name: DatasetName = None,
    validation_file: ValidationFile = None,
    test_file: TestFile = None,
    text_column: TextColumn = RunConfig.text_column,
    label_column: LabelColumn = RunConfig.label_column,
    encoding: Encoding = RunConfig.encoding,
    max_length: MaxLength = RunConfig.max_length,
    criteria: Criteria = None,
    budget: Budget = RunConfig.budget,
    granularity: Granularity = None,
    target_modules: Targets = None,
    exclude_modules: Excludes = None,
    seed: Seed = RunConfig.seed,
    overwrite_output_dir: Overwrite = False,
) -> None:
    """All four steps: analyze, select, tune, evaluate; and a report."""
    config = _config(context)
    _all_stages(config, overwrite_output_dir)


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
def analyze(
    context: typer.Context,
    model_name_or_path: Model,
    output_dir: OutputDir,
    train_file: TrainFile = None,
    dataset_name: DatasetName = None,
    validation_file: ValidationFile = None,
    test_file: TestFile = None,
    text_column: TextColumn = RunConfig.text_column,
    label_column: LabelColumn = RunConfig.label_column,
    encoding: Encoding = RunConfig.encoding,
    max_length: MaxLength = RunConfig.max_length,
    criteria: Criteria = None,
    target_modules: Targets = None,
    exclude_modules: Excludes = None,
    seed: Seed = RunConfig.seed,
    overwrite_output_dir: Overwrite = False,
) -> None:
    """Measure how much every unit matters; writes OUTPUT_DIR/relevance."""
    from reltune import run as stages

    config = _config(context)
    materials, directory = _begin(config, overwrite_output_dir)
    stages.analyze(materials, directory)
    _show_relevance(config, directory)
    _say(f"Next: reltune select {config.output_dir} --budget 0.5%")


@app.command()
def select(
    context: typer.Context,
    run: Run,
    criteria: Criteria = None,
    budget: Budget = RunConfig.budget,
    granularity: Granularity = None,
    target_modules: Targets = None,
    exclude_modules: Excludes = None,
    overwrite_output_dir: Overwrite = False,
) -> None:
    """Choose the most relevant units that a budget allows; writes RUN/plan/plan.yaml."""
    from reltune import run as stages

    directory, config = stages.RunDirectory.open(run)
    directory.check_stage("select", overwrite_output_dir)
    config = _changed(config, context)
    plan = stages.select(config, directory)
    directory.clear("tune")
    config.save(directory.config_file)
    _say(*plan.describe(), f"Next: look at {directory.plan / 'plan.yaml'}, then: reltune tune {run}")


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
def tune(context: typer.Context, run: Run, overwrite_output_dir: Overwrite = False) -> None:
    """Train what the plan names; writes RUN/adapter."""
    from reltune import run as stages
    from reltune.plan.plan import Plan

    directory, config = stages.RunDirectory.open(run)
    config = _changed(config, context)
    resume = config.training.pop("resume_from_checkpoint", None)
    directory.check_stage("tune", overwrite_output_dir)
    Plan.load(directory.plan)
    materials = stages.prepare(config)
    if not resume:
        directory.clear("tune")
    config.save(directory.config_file)
    stages.tune(materials, directory, resume)
    _say(f"Adapter: {directory.adapter}", f"Next: reltune evaluate {run}")


@app.command()
def evaluate(run: Run) -> None:
    """Measure the saved adapter on validation and test data; writes RUN/all_results.json."""
    from reltune import run as stages

    directory, config = stages.RunDirectory.open(run)
    _adapter_exists(directory)
    results = stages.evaluate(stages.prepare(config), directory)
    _print(_metrics_table(results))


@app.command()
def report(run: Run) -> None:
    """Draw the relevance map, the table and the training curve; writes RUN/report.html."""
    from reltune import run as stages

    directory, config = stages.RunDirectory.open(run)
    _show_record(stages.report(config, directory), directory)


@app.command()
def export(
    run: Run,
    output_dir: OutputDir,
    to: Annotated[
        str, typer.Option("--to", help="lora: a standard PEFT adapter; merged: a plain model.", show_default=False)
    ],
) -> None:
    """Hand the tuned model to programs that do not know reltune."""
    from reltune import run as stages

    if to not in ("lora", "merged"):
        raise InputError(f"--to {to!r} is unknown; write lora or merged.")
    directory, config = stages.RunDirectory.open(run)
    _adapter_exists(directory)
    _say(f"Exported to {stages.export(stages.prepare(config), directory, to, output_dir)}")


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
def demo(
    context: typer.Context,
    output_dir: Annotated[str, typer.Option("--output_dir", help="Directory of the run.")] = "demo-run",
    budget: Budget = RunConfig.budget,
    criteria: Criteria = None,
    granularity: Granularity = None,
    seed: Seed = RunConfig.seed,
    overwrite_output_dir: Overwrite = False,
) -> None:
    """A real encoder on BBC news from installed packages: the four steps beside three baselines."""
    from reltune.demo import demo_config

    _all_stages(_changed(demo_config(output_dir, seed), context), overwrite_output_dir, baselines=True)


# -- helpers of the commands ----------------------------------------------------------------------------------------


def _config(context: typer.Context) -> RunConfig:
    """The run's config from the flags of a command, training fields among them."""
    known = {field.name for field in dataclasses.fields(RunConfig)}
    given = {name: value for name, value in context.params.items() if name in known and value not in (None, [], ())}
    config = RunConfig(**{name: _listed(value) for name, value in given.items()}, training=_training_fields(context))
    config.check()
    return config


def _changed(config: RunConfig, context: typer.Context) -> RunConfig:
    """The config with what was given on this command line."""
    given = {
        name: _listed(context.params[name])
        for name in context.params
        if hasattr(config, name) and _was_given(context, name)
    }
    config = dataclasses.replace(config, **given, training={**config.training, **_training_fields(context)})
    config.check()
    return config


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _listed(value: Any) -> Any:
    """Several values may come as repeated flags or with commas between."""
    if isinstance(value, list | tuple):
        return [part for item in value for part in str(item).split(",") if part]
    return value


def _training_fields(context: typer.Context) -> dict[str, Any]:
    """Flags that are no flags of the command must be fields of TrainingArguments."""
    words = list(context.args)
    if not words:
        return {}
    own = [option for parameter in context.command.params for option in parameter.opts if option.startswith("--")]
    if not words[0].startswith("--"):
        raise InputError(f"unexpected argument {words[0]!r}; flags begin with --.")
    from reltune.training_fields import parse_training_fields

    return parse_training_fields(words, own)


def _begin(config: RunConfig, overwrite: bool) -> tuple[Materials, RunDirectory]:
    """Check everything that can be checked, and only then make the run's directory."""
    from reltune import run as stages

    directory = stages.RunDirectory(config.output_dir)
    directory.check_new(overwrite)
    materials = stages.prepare(config)
    stages.check_choice(materials)
    directory.create(config)
    _say(
        f"{len(materials.train):,} training, {len(materials.validation):,} validation and {len(materials.test):,} test texts, "
        f"{len(materials.task.labels)} classes; {materials.train.n_truncated:,} training texts cut to {config.max_length} tokens."
    )
    return materials, directory


def _all_stages(config: RunConfig, overwrite: bool, baselines: bool = False) -> None:
    from reltune import run as stages

    materials, directory = _begin(config, overwrite)
    stages.analyze(materials, directory)
    plan = stages.select(config, directory)
    _say(*plan.describe())
    stages.tune(materials, directory)
    results = stages.evaluate(materials, directory)
    if baselines:
        from reltune.comparison import compare

        compare(materials, directory, results)
    _show_record(stages.report(config, directory), directory)


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
    from reltune.report.terminal import comparison_table, heatmap

    _print(heatmap(record.heatmaps[0]))
    _print(comparison_table(record.comparison) if record.comparison else _metrics_table(record.metrics))
    _say(record.depth_sentence, *record.notes, f"Report: {directory.report}")


def _metrics_table(metrics: dict[str, float]) -> Any:
    from reltune.report.terminal import metrics_table

    return metrics_table(metrics)


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)


def _say(*lines: str) -> None:
    for line in lines:
        print(line, flush=True)


# -- errors and exit codes ------------------------------------------------------------------------------------------


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(143)


def main() -> None:
    """Entry point of the ``reltune`` command."""
    words = sys.argv[1:]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(args=words, prog_name="reltune", standalone_mode=False)
        raise SystemExit(code if isinstance(code, int) else 0)
    except (InputError, USAGE_ERROR) as error:
        if debug:
            traceback.print_exc()
        _fail(error.format_message() if isinstance(error, USAGE_ERROR) else str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; stages that were finished are kept.", 130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    print(f"reltune: error: {message}", file=sys.stderr)
    raise SystemExit(code)
