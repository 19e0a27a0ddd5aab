"""The commands: each reads its flags, calls its stage and prints what comes back.

What takes torch is imported after everything that can be checked without it.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from reltune import __version__
from reltune.cli.errors import run_program
from reltune.cli.flags import (
    EVERY,
    Words,
    changed_config,
    estimated_config,
    flags,
    new_comparison,
    new_config,
    previewed_config,
)
from reltune.cli.launcher import alone, note_command, several, together
from reltune.cli.output import (
    say,
    show_comparison,
    show_estimate,
    show_forecast,
    show_lm_eval,
    show_metrics,
    show_preview,
    show_record,
    show_relevance,
    show_runs,
    show_sweep,
)
from reltune.config.comparison import COMPARISON_FIELDS, ComparisonConfig
from reltune.config.data import DataConfig
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.names import EXPORT_FORMS, GGUF_TYPE, GGUF_TYPES, REPORT_FORMS, SERVERS

app = typer.Typer(
    cls=Words,
    help="Measure which parameters matter for a task, choose them under a budget, train only those, evaluate.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},  # --text-column is --text_column
)
TRAINING = {"allow_extra_args": True, "ignore_unknown_options": True}
TRAINING_HELP = "Any field of transformers.TrainingArguments is a flag too: --num_train_epochs 5 --learning_rate 1e-3."
STORED_HELP = "Whatever is not given stays as it is in RUN/config.yaml."
SELECT_HELP = (
    "Whatever is not given stays as it is in RUN/config.yaml; but where the run has the default choice, another --granularity "
    "brings its own budget and spread."
)
HELD_OUT = ("validation_file", "test_file", "on_bad_rows")
ESTIMATED = (
    *("model_name_or_path", "task", "max_length", "packing", "load_in_4bit", "load_in_8bit"),
    *("method", "lora_r", "lora_alpha", "lora_dropout", "budget", "fixed", "granularity"),
    *("target_modules", "exclude_modules", "cuda_graphs"),
)
PREVIEWED = ("model_name_or_path", *(field.name for field in dataclasses.fields(DataConfig)), "seed")
SHARED = ("run", "analyze", "tune", "evaluate")  # commands that several processes work on together

Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory of a run.", show_default=False)]
TunedModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="Directory of a run, or of its LoRA adapter or merged model.", show_default=False
    ),
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="A YAML file with fields of the run. Flags win over it.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry_run",
        help="Say what would be trained, and what memory and time that takes, beside LoRA and full; write nothing.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="CARD",
        help="With --dry_run: for which card (h100-80gb, …), size of memory (24GiB), or cpu, and not for this machine.",
    ),
]
Form = Annotated[
    str, typer.Option("--format", metavar="FORM", help="With --dry_run: table or json.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite_output_dir", help="Replace what an earlier run wrote there.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Go on with another base model than the plan or adapter was made for, as far as the shapes allow. Risk: trained values "
        "take the place of weights that they were not trained with; the result may be worse than either model, and no error says so.",
    ),
]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from, and the remarks of libraries.")
    ] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
    elif several() and context.invoked_subcommand not in SHARED:
        raise InputError(
            f"`reltune {context.invoked_subcommand}` runs in one process, but a launcher started several; only "
            f"{', '.join(SHARED)} can share their work."
        )


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
@flags(*EVERY)
def run(
    context: typer.Context,
    config: ConfigFile = None,
    overwrite_output_dir: Overwrite = False,
    dry_run: DryRun = False,
    device: Device = None,
    form: Form = "table",
) -> None:
    """Analyze, select, tune and evaluate, and write a report."""
    from reltune.runs.preflight import check_dry_run, check_new_run

    check_dry_run(dry_run, device, form)
    if dry_run:
        made = new_config(context, config, lambda draft: check_new_run(draft, True))
        from reltune.runs import flow

        show_forecast(flow.forecast_run(made, device), form)
        return
    _run_all(
        new_config(context, config, lambda draft: check_new_run(draft, overwrite_output_dir)), overwrite_output_dir
    )


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
@flags(*(field.name for field in COMPARISON_FIELDS if field.name != "training"), fields=COMPARISON_FIELDS)
def compare(context: typer.Context, config: ConfigFile = None, overwrite_output_dir: Overwrite = False) -> None:
    """Train in several ways and measure them side by side."""
    from reltune.runs.preflight import check_new_comparison

    def check(draft: ComparisonConfig) -> None:
        check_new_comparison(draft, overwrite_output_dir)

    made = new_comparison(context, config, check)
    from reltune.runs.comparison import flow

    with alone(str(made.output_dir)):
        started = flow.start(made, overwrite_output_dir)
        say(*started.describe())
        show_comparison(flow.run(started))
    say(f"Report: {started.directory.report}")


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
@flags("output_dir", "budget", "fixed", "criteria", "granularity", "seed")
def demo(context: typer.Context, overwrite_output_dir: Overwrite = False) -> None:
    """Do all of this on BBC news, beside LoRA and full.

    The run is written to the directory demo-run, unless --output_dir names another one.
    """
    from reltune.runs.demo import demo_config
    from reltune.runs.preflight import check_new_run

    stored = demo_config("demo-run", RunConfig.seed)
    config = changed_config(
        context, stored, lambda draft: check_new_run(draft, overwrite_output_dir, "comparison"), chosen=False
    )
    _run_all(config, overwrite_output_dir, baselines=True)


def _run_all(config: RunConfig, overwrite: bool, baselines: bool = False) -> None:
    from reltune.runs import flow

    with alone(config.output_dir):
        started = flow.start(config, overwrite, "comparison" if baselines else "run")
        note_command(started.directory, "demo" if baselines else "run")
        say(*started.describe())
        if plan := flow.measure_and_choose(started):
            say(*plan.describe(), *flow.settings_of(started.directory))
        if trials := flow.train(started):
            show_sweep(trials)
        if record := flow.evaluate_and_report(started, baselines):
            show_record(record, started.directory.report)
        if exported := flow.export_as_configured(started):
            say(f"Exported to {exported}")


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
@flags(*(name for name in EVERY if name not in ("budget", "fixed", "granularity", "spread", "frozen_dtype", "export")))
def analyze(context: typer.Context, config: ConfigFile = None, overwrite_output_dir: Overwrite = False) -> None:
    """Measure how much each unit matters; write DIR/relevance."""
    from reltune.runs.directory import RunDirectory
    from reltune.runs.preflight import check_chooses, check_new_run

    def check(draft: RunConfig) -> None:
        check_chooses(draft)
        check_new_run(draft, overwrite_output_dir, "analysis")

    made = new_config(context, config, check)
    from reltune.runs import flow, stages

    with alone(made.output_dir):
        if made.has_data:
            started = flow.start(made, overwrite_output_dir, "analysis")
            note_command(started.directory, "analyze")
            say(*started.describe())
            show_relevance(stages.analyze(started.materials, started.directory))
        else:
            show_relevance(flow.analyze_weights(made, overwrite_output_dir))
            note_command(RunDirectory(made.output_dir), "analyze")
    say(f"Next: reltune select {made.output_dir} --budget {made.budget}")


@app.command(epilog=SELECT_HELP)
@flags("criteria", "budget", "fixed", "granularity", "spread", "target_modules", "exclude_modules", stored=True)
def select(
    context: typer.Context,
    run: Run,
    every_module: Annotated[
        bool,
        typer.Option(
            "--every_module",
            help="Choose from all modules that were measured: forget what earlier selections have named or excluded.",
        ),
    ] = False,
    overwrite_output_dir: Overwrite = False,
    dry_run: DryRun = False,
    device: Device = None,
    form: Form = "table",
) -> None:
    """Choose units under a budget; write RUN/plan/plan.yaml."""
    from reltune.runs.directory import RunDirectory
    from reltune.runs.preflight import check_chooses, check_dry_run, check_selection

    check_dry_run(dry_run, device, form)
    directory, stored = RunDirectory.open(run)
    check_chooses(stored)
    if not dry_run:
        directory.check_stage("select", overwrite_output_dir)
    if every_module:
        stored.target_modules, stored.exclude_modules = directory.measured_modules()
    config = changed_config(context, stored, check_selection)
    from reltune.runs import flow

    if dry_run:
        show_forecast(flow.forecast_selection(config, directory, device), form)
        return
    with alone(run):
        plan = flow.choose_again(config, directory)
        note_command(directory, "select")
    after = f"then: reltune tune {run}" if config.has_data else "then train by it: reltune.ReltuneConfig(plan=...)"
    say(*plan.describe(), *flow.settings_of(directory), f"Next: look at {directory.plan / 'plan.yaml'}, {after}")


@app.command(context_settings=TRAINING, epilog=f"{STORED_HELP} {TRAINING_HELP}")
@flags(
    *("frozen_dtype", "activation_offloading", "cuda_graphs", "cache_frozen_prefix", "cache_size"),
    *("early_stopping_patience", "sweep", "sweep_trials", "sample_prompts"),
    stored=True,
)
def tune(context: typer.Context, run: Run, overwrite_output_dir: Overwrite = False, force: Force = False) -> None:
    """Train what the plan names; write RUN/adapter."""
    from reltune.runs.directory import RunDirectory
    from reltune.runs.preflight import check_tuning

    if run.startswith("--"):  # the training flags came first, so that Click took one of them for RUN
        *context.args, run = run, *context.args
    with together():
        directory, stored = RunDirectory.open(run)
    config = changed_config(context, stored, lambda draft: check_tuning(draft, directory, overwrite_output_dir))
    from reltune.layers.fingerprint import any_base
    from reltune.runs import flow

    with alone(run), any_base(force):
        if trials := flow.tune_again(config, directory, overwrite_output_dir):
            show_sweep(trials)
        note_command(directory, "tune")
    say(f"Adapter: {directory.adapter}", f"Next: reltune evaluate {run}")


@app.command(epilog=STORED_HELP)
@flags(*HELD_OUT, *(name for name in EVERY if name.startswith("lm_eval_")), stored=True)
def evaluate(context: typer.Context, run: Run, force: Force = False) -> None:
    """Measure the adapter on held-out data; write all_results.json."""
    from reltune.runs.directory import RunDirectory
    from reltune.runs.preflight import check_evaluation

    with together():
        directory, stored = RunDirectory.open(run)
    config = changed_config(context, stored, lambda draft: check_evaluation(draft, directory))
    from reltune.layers.fingerprint import any_base
    from reltune.runs import flow

    with alone(run), any_base(force):
        results, lm_eval = flow.evaluate_again(config, directory)
        note_command(directory, "evaluate")
    show_metrics(results)
    show_lm_eval(lm_eval)


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN", help="Directory of a run; of several, side by side.", show_default=False),
    ],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORM",
            help=f"What to write. {'; '.join(f'{name}: {meaning}' for name, meaning in REPORT_FORMS.items())}. "
            "If not given, as the ending of --output_file says, or html.",
        ),
    ] = None,
    output_file: Annotated[
        str | None,
        typer.Option(
            "--output_file",
            metavar="FILE",
            help="The file to write. If not given, RUN/report.FORM, or of several runs runs.FORM in this directory.",
        ),
    ] = None,
) -> None:
    """Draw what was measured and trained, of one run or several."""
    from reltune.runs.preflight import check_report

    form, path = check_report(runs, form, output_file)
    from reltune.runs import summary
    from reltune.runs.comparison.directory import ComparisonDirectory
    from reltune.runs.directory import RunDirectory

    if path is not None and len(runs) > 1:
        show_runs(summary.report_side_by_side(runs, path, form))
        say(f"Report: {path}")
        return
    if (comparison := ComparisonDirectory(runs[0])).config_file.is_file():
        from reltune.runs.comparison.summary import report as report_comparison

        path = path or comparison.report.with_suffix(f".{form}")
        show_comparison(report_comparison(comparison, path, form))
        say(f"Report: {path}")
        return
    directory, config = RunDirectory.open(runs[0])
    path = path or directory.report.with_suffix(f".{form}")
    show_record(summary.report(config, directory, path, form), path)


@app.command()
def export(
    run: Run,
    output_dir: Annotated[str, typer.Option("--output_dir", metavar="DIR", help="Directory to write; new or empty.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORM",
            help=f"What to write. {'; '.join(f'{name}: {meaning}' for name, meaning in EXPORT_FORMS.items())}.",
        ),
    ],
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SERVER",
            help=f"Write the LoRA adapter as a server wants it. {'; '.join(f'{name}: {form}' for name, form in SERVERS.items())}.",
        ),
    ] = None,
    gguf_type: Annotated[
        str | None,
        typer.Option(
            "--gguf_type",
            metavar="TYPE",
            help=f"What a file for llama.cpp holds matrices in: {', '.join(GGUF_TYPES)}. If not given, {GGUF_TYPE}.",
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write the tuned model for programs that do not know reltune."""
    from reltune.runs.directory import RunDirectory
    from reltune.runs.preflight import check_export

    directory, config = RunDirectory.open(run)
    check_export(directory, to, output_dir, server, gguf_type)
    from reltune.layers.fingerprint import any_base
    from reltune.runs import flow

    with any_base(force):
        say(f"Exported to {flow.export(directory, config, to, output_dir, server, gguf_type)}")


@app.command()
def predict(
    tuned: TunedModel,
    input_file: Annotated[
        str,
        typer.Option(
            "--input_file",
            metavar="PATH",
            help="The rows: whatever training reads (CSV, TSV, JSONL, JSON, Parquet, a folder). Labels are not needed.",
        ),
    ],
    output_file: Annotated[
        str,
        typer.Option(
            "--output_file",
            metavar="FILE",
            help="A .jsonl, .csv or .tsv file to write; - for JSON Lines on standard output.",
        ),
    ],
    per_device_eval_batch_size: Annotated[
        int | None,
        typer.Option(
            "--per_device_eval_batch_size", metavar="N", min=1, help="Rows in a batch. If not given, as in evaluation."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max_new_tokens",
            metavar="N",
            min=1,
            help="Tokens that a model may write for a row. If not given, as in evaluation.",
        ),
    ] = None,
    on_bad_rows: Annotated[
        str,
        typer.Option(
            "--on_bad_rows",
            metavar="HOW",
            help="error: refuse a file with bad rows; skip: leave them out and list them.",
        ),
    ] = "error",
    encoding: Annotated[
        str, typer.Option("--encoding", metavar="NAME", help="Character encoding of a text file.")
    ] = "utf-8",
    force: Force = False,
) -> None:
    """Write what the tuned model says of each row of a file."""
    from reltune.runs.preflight import check_prediction

    check_prediction(tuned, input_file, output_file, on_bad_rows, encoding)
    from reltune.layers.fingerprint import any_base
    from reltune.runs import flow

    with any_base(force):
        done = flow.predict(
            tuned, input_file, output_file, per_device_eval_batch_size, max_new_tokens, on_bad_rows, encoding
        )
    if output_file != "-":
        say(f"Predicted {done.rows:,} rows: {output_file}")


@app.command()
def chat(
    tuned: TunedModel,
    compare: Annotated[
        bool, typer.Option("--compare", help="Let the base model answer too, before the tuned one.")
    ] = False,
    system_prompt: Annotated[
        str | None,
        typer.Option("--system_prompt", metavar="TEXT", help="What the model is told before the chat begins."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max_new_tokens", metavar="N", min=1, help="Tokens of an answer, at most.")
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--do_sample/--no_do_sample",
            help="Draw each token by its probability, or take the likeliest.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", metavar="X", min=0.01, help="Below 1, likely tokens are drawn more often."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top_p", metavar="X", min=0.01, max=1, help="Draw from the likeliest tokens that have this probability."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top_k", metavar="N", min=1, help="Draw from this many likeliest tokens.")
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition_penalty", metavar="X", min=0.01, help="Above 1, tokens that are there already are rarer."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="Draw the same tokens every time.")
    ] = None,
    force: Force = False,
) -> None:
    """Talk to the tuned model, in the terminal or through a pipe.

    A pipe has a question on each line. /reset forgets what was said, /quit ends. What is not given is as the model's generation_config.json has it.
    """
    from reltune.runs.preflight import check_chat

    check_chat(tuned, compare)
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    if do_sample is None and any(value is not None for value in drawn.values()):
        do_sample = True
    wanted = {
        **drawn,
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "repetition_penalty": repetition_penalty,
    }
    from reltune.cli.chat import converse
    from reltune.layers.fingerprint import any_base
    from reltune.runs import flow

    sampling = {name: value for name, value in wanted.items() if value is not None}
    with any_base(force):
        converse(flow.chat(tuned, compare, system_prompt, sampling, seed))


@app.command(context_settings=TRAINING, epilog=TRAINING_HELP)
@flags(*ESTIMATED)
def estimate(
    context: typer.Context,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="CARD",
            help="A card (h100-80gb, rtx4090-24gb, …), a size of memory (24GiB), or cpu. If not given: what this machine has.",
        ),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option("--examples", metavar="N", min=1, help="Rows of training data, for the hours of the run."),
    ] = None,
    eval_examples: Annotated[
        int | None,
        typer.Option(
            "--eval_examples",
            metavar="N",
            min=0,
            help="Rows of validation and test data together. If not given: as many as a run splits off.",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan", metavar="FILE", help="A plan.yaml. If not given: units are spread evenly over the model."
        ),
    ] = None,
    form: Annotated[str, typer.Option("--format", metavar="FORM", help="table or json.")] = "table",
    config: ConfigFile = None,
) -> None:
    """Predict parameters, memory and time of a training from a config.

    No weights are read, and no GPU is needed.
    """
    from reltune.cli.imports import for_a_count

    with for_a_count():
        from reltune.runs.preflight import check_estimate

        made = estimated_config(context, config, lambda draft: check_estimate(draft, device, form))
        from reltune.plan.plan import Plan
        from reltune.runs.estimate import estimate_run
        from reltune.runs.sizes import Sizes

    found = estimate_run(made, device, Sizes.of(examples, eval_examples), Plan.load(plan) if plan else None)
    show_estimate(found, form)


@app.command()
@flags(*PREVIEWED)
def data(
    context: typer.Context,
    example: Annotated[
        int, typer.Option("--example", metavar="N", min=1, help="Which training example to show token by token.")
    ] = 1,
    form: Annotated[str, typer.Option("--format", metavar="FORM", help="table or json.")] = "table",
    config: ConfigFile = None,
) -> None:
    """Show data as the model will see them.

    Columns, classes, lengths, and an example token by token. Of the model its config and tokenizer are read, and no weights;
    without a model, the rows alone are looked at.
    """
    from reltune.runs.preflight import check_preview

    made, named = previewed_config(context, config, lambda draft, model: check_preview(draft, model, form))
    from reltune.runs import flow

    show_preview(flow.preview(made, example, named), form)


@app.command()
def studio(
    runs_dir: Annotated[
        str, typer.Argument(metavar="RUNS_DIR", help="Directory that the runs lie in.", show_default=False)
    ],
    host: Annotated[
        str,
        typer.Option(
            "--host", metavar="ADDRESS", help="Address to listen on. Others than this computer's own need --password."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port to listen on; 0: any.")
    ] = 7860,
    password: Annotated[
        str | None,
        typer.Option(
            "--password", metavar="WORD", envvar="RELTUNE_STUDIO_PASSWORD", help="What the browser has to give."
        ),
    ] = None,
    language: Annotated[
        str, typer.Option("--language", metavar="NAME", help="en or zh; the page has a switch.")
    ] = "en",
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", metavar="DIR", help="A model outside of RUNS_DIR that may be used; can be given several times."
        ),
    ] = None,
) -> None:
    """See, choose, start and try runs in the browser."""
    from reltune.studio import server

    place = server.check(runs_dir, host, password, language, model or ())
    server.serve(place, host, port, password, language, model or (), say)


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


def main() -> None:
    """Entry point of the ``reltune`` command."""
    run_program(app)
