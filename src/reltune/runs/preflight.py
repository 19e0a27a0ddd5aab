"""What can be refused at once: words, files and directories, looked at before torch, transformers or any data are loaded.

The stages rely on none of this: what is read later is checked as it is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reltune.config.comparison import ComparisonConfig
from reltune.config.run_config import RunConfig
from reltune.cost.devices import card
from reltune.data.columns import require_columns
from reltune.data.folders import kind_of_folder
from reltune.data.layout import layout_of
from reltune.data.prompts import read_prompts
from reltune.data.streams import StreamedRows
from reltune.data.text_files import TEXT_SUFFIXES, check_text_file, format_of, read_text_file, stream_text_file
from reltune.errors import InputError, nearest
from reltune.files import check_destination, model_directory_problem, read_json
from reltune.hub import dataset_problem, model_problem
from reltune.methods.registry import METHODS
from reltune.names import (
    CRITERIA,
    DATASETS,
    EXPORT_FORMS,
    GGUF_TYPES,
    IN_GGUF,
    ON_BAD_ROWS,
    PREDICTION_SUFFIXES,
    REPORT_FORMS,
    SERVERS,
    WITH_DIRECTIONS,
    WRITING,
)
from reltune.notes import collecting
from reltune.plan.budget import check_budget, read_budget
from reltune.plan.granularities import ALONE, check_together
from reltune.runs.comparison.directory import ComparisonDirectory
from reltune.runs.directory import ADAPTER_CONFIG, CONFIG, TASK, RunDirectory
from reltune.tasks.chat_templates import text_of

FILES = ("train_file", "validation_file", "test_file", "forgetting_file")
QUICKLY_READ = 16 * 2**20  # bytes of a text file that are read in half a second


def check_new_run(config: RunConfig, overwrite: bool, goal: str = "run") -> None:
    """Raise InputError for a run whose model, data or directory cannot be what is wanted. Creates nothing. ``goal`` is as for
    ``RunDirectory.check_start``."""
    config.check()
    METHODS[config.method].check_config(config)
    if config.export is not None:
        check_form(config.method, config.export, "--export")
    check_selection(config)
    check_inputs(config)
    read_prompts(config.sample_prompts)
    config.chat_template = text_of(config.chat_template)
    if RunDirectory(config.output_dir).check_start(config, overwrite, goal) is None:
        check_rows(config)


def check_new_comparison(config: ComparisonConfig, overwrite: bool) -> None:
    """Raise InputError for a comparison whose methods, model, data or directory cannot be what is wanted. Creates nothing."""
    config.check()
    if read_budget(config.budget).is_limited:
        raise InputError("budget: sizes that are equal are numbers of parameters; leave memory, time and hours out.")
    for name in config.names:
        try:
            made = config.of(name)
            made.check()
            METHODS[name].check_config(made)
        except InputError:
            if config.methods:
                raise
    check_inputs(config.of("full"))
    ComparisonDirectory(config.output_dir).check(config, overwrite, training=False)
    check_rows(config.of("full"))


def check_estimate(config: RunConfig, device: str | None, form: str = "table") -> None:
    """Raise InputError for a training that could not be estimated. Reads nothing but whether the model is there."""
    super(RunConfig, config).check()
    config.check_method()
    METHODS[config.method].check_config(config)
    check_selection(config)
    if form not in ("table", "json"):
        raise InputError(f"--format {form!r} is unknown; write table or json.")
    if device is not None and device != "cpu":
        card(device)
    check_model(config.model_name_or_path)


def check_preview(config: RunConfig, model: bool, form: str = "table") -> None:
    """Raise InputError for data that are not named, or not there; and with a ``model`` for one that is not."""
    super(RunConfig, config).check()
    config.check_data()
    if form not in ("table", "json"):
        raise InputError(f"--format {form!r} is unknown; write table or json.")
    if model:
        check_model(config.model_name_or_path)
    _check_files(config, FILES)
    check_dataset(config.dataset_name)
    check_rows(config)
    config.chat_template = text_of(config.chat_template)


def check_dry_run(dry_run: bool, device: str | None, form: str) -> None:
    """Raise InputError for a device or a form of a dry run that is none, and for one without a dry run."""
    if form not in ("table", "json"):
        raise InputError(f"--format {form!r} is unknown; write table or json.")
    if not dry_run and (device is not None or form != "table"):
        raise InputError("--device and --format are for a dry run; add --dry_run, or leave them out.")
    if device is not None and device != "cpu":
        card(device)


def check_tuning(config: RunConfig, directory: RunDirectory, overwrite: bool) -> None:
    """Raise InputError for an existing run that cannot be trained, or was trained already."""
    if not config.has_data:
        raise InputError(
            f"{directory.path} was analyzed without data, so there is nothing to train on; analyze again with --train_file "
            "or --dataset_name."
        )
    METHODS[config.method].check_config(config)
    check_selection(config)
    check_inputs(config)
    read_prompts(config.sample_prompts)
    if not directory.is_in_sweep():
        check_untrained(config, directory, overwrite)


def check_untrained(config: RunConfig, directory: RunDirectory, overwrite: bool) -> None:
    """Raise InputError for what was done already: a training, or the selection if a sweep of budgets is to make it anew."""
    for stage in ("select", "tune") if "budget" in config.sweep else ("tune",):
        directory.check_stage(stage, overwrite)


def check_evaluation(config: RunConfig, directory: RunDirectory) -> None:
    """Raise InputError for an existing run that cannot be evaluated."""
    directory.check_adapter()
    check_inputs(config, training=False)


def check_export(
    directory: RunDirectory, to: str, output_dir: str, server: str | None = None, gguf_type: str | None = None
) -> None:
    """Raise InputError for an export in an unknown form, of a run without an adapter, or to a directory with files."""
    if to not in EXPORT_FORMS:
        raise InputError(f"--to {to!r} is unknown; write {' or '.join(EXPORT_FORMS)}.")
    if server is not None and server not in SERVERS:
        raise InputError(f"--for {server!r} is unknown; write {' or '.join(SERVERS)}, or leave it out.")
    if server is not None and to != "lora":
        raise InputError(f"--for {server} is about LoRA adapters; write --to lora, or leave it out.")
    if gguf_type is not None and gguf_type not in GGUF_TYPES:
        raise InputError(f"--gguf_type {gguf_type!r} is unknown; write {' or '.join(GGUF_TYPES)}.")
    if gguf_type is not None and to not in IN_GGUF:
        raise InputError(
            f"--gguf_type is about files for llama.cpp; write --to {' or '.join(IN_GGUF)}, or leave it out."
        )
    directory.check_adapter()
    check_form(RunConfig.load(directory.config_file).method, to)
    check_destination(output_dir)


def check_report(places: Sequence[str], form: str | None, output_file: str | None) -> tuple[str, Path | None]:
    """The form of a report, and the file to write where it is not one run's own.

    Raises InputError for a form that is unknown or cannot be made, and for runs that cannot stand side by side.
    """
    ending = Path(output_file).suffix.lower().removeprefix(".") if output_file else ""
    form = form or (ending if ending in REPORT_FORMS else "html")
    if form not in REPORT_FORMS:
        raise InputError(f"--format {form!r} is unknown; write {' or '.join(REPORT_FORMS)}.")
    if ending in REPORT_FORMS and ending != form:
        raise InputError(f"--output_file {output_file} has the ending of another format than --format {form}.")
    comparisons = [place for place in places if ComparisonDirectory(place).config_file.is_file()]
    if comparisons and len(places) > 1:
        raise InputError(f"{comparisons[0]} is a comparison of ways to train, not a run; report it by itself.")
    if comparisons and form in ("svg", "png"):
        raise InputError(f"{comparisons[0]} is a comparison, which has no relevance map; take --format html or md.")
    if len({Path(place).resolve() for place in places}) < len(places):
        raise InputError("a run is named twice; name each run once.")
    if form == "png":
        from reltune.report.picture import check_png

        check_png()
    path = Path(output_file or f"runs.{form}") if output_file or len(places) > 1 else None
    if path is not None and path.is_dir():
        raise InputError(f"--output_file {path} is a directory; name a file.")
    return form, path


def kept_as(path: str | os.PathLike) -> tuple[str, Path]:
    """How a directory keeps a tuned model, and the directory: "run"; of exports "adapter", on its base, or "model".

    Raises InputError for one that keeps none.
    """
    folder = Path(path)
    if folder.name == "adapter" and (folder.parent / CONFIG).is_file():
        folder = folder.parent
    if (folder / CONFIG).is_file():
        RunDirectory.open(folder)[0].check_adapter()
        return "run", folder
    exported = {"adapter": ADAPTER_CONFIG, "model": "config.json"}
    for form, file in exported.items():
        if (folder / file).is_file():
            if (folder / TASK).is_file():
                return form, folder
            raise InputError(
                f"{path} does not say what its model is for (no {TASK}); write it again with `reltune export`."
            )
    raise InputError(
        f"{path} holds neither a run (config.yaml) nor what `reltune export` wrote of one, a LoRA adapter or a merged model."
    )


def check_prediction(
    path: str, input_file: str, output_file: str, on_bad_rows: str = "error", encoding: str = "utf-8"
) -> None:
    """Raise InputError for a prediction without a tuned model, without a file to read, or to a file that cannot be written."""
    form, folder = kept_as(path)
    if on_bad_rows not in ON_BAD_ROWS:
        raise InputError(f"--on_bad_rows {on_bad_rows!r} is unknown; write {' or '.join(ON_BAD_ROWS)}.")
    check_source(input_file)
    if (folder / TASK).is_file():
        _check_asked(read_json(folder / TASK), input_file, encoding)
    if output_file == "-":
        return
    target = Path(output_file)
    if target.suffix.lower() not in PREDICTION_SUFFIXES:
        raise InputError(
            f"--output_file {output_file} has the unknown suffix {target.suffix!r}; use one of {', '.join(PREDICTION_SUFFIXES)}, or - for "
            "JSON Lines on standard output."
        )
    if os.path.exists(input_file) and os.path.exists(output_file) and os.path.samefile(input_file, output_file):
        raise InputError(f"--output_file {output_file} is the input file too; name another one.")
    config = RunDirectory.open(folder)[1] if form == "run" else None
    for field in ("train_file", "validation_file", "test_file"):
        own = getattr(config, field, None)
        if (
            own is not None
            and os.path.exists(own)
            and os.path.exists(output_file)
            and os.path.samefile(own, output_file)
        ):
            raise InputError(f"--output_file {output_file} is the run's {field}; name another one.")
    if target.is_dir():
        raise InputError(f"--output_file {output_file} is a directory; name a file in it.")
    if not target.absolute().parent.is_dir():
        raise InputError(
            f"--output_file {output_file} cannot be written, because its directory does not exist; make it first."
        )
    if not os.access(target.absolute().parent, os.W_OK | os.X_OK):
        raise InputError(
            f"--output_file {output_file} cannot be written, because its directory does not allow it; name another one."
        )


def _check_asked(task: Any, input_file: str, encoding: str) -> None:
    """Raise InputError for a table without a column that a model with classes, or one number, reads. Else its stage looks."""
    columns = task.get("columns") if isinstance(task, Mapping) else None
    if not isinstance(columns, Mapping) or "label" not in columns or "image" in columns:
        return
    path = Path(input_file)
    if not path.is_dir() and format_of(path) in (".csv", ".tsv"):
        rows = StreamedRows(stream_text_file(path, encoding), input_file)
        require_columns(rows, {str(column): "" for role, column in columns.items() if role != "label"})


def check_chat(path: str, compare: bool) -> None:
    """Raise InputError for a directory without a tuned model that writes texts; and to ``compare``, for one without its base."""
    form, folder = kept_as(path)
    name = read_json(folder / TASK).get("name") if (folder / TASK).is_file() else RunDirectory.open(folder)[1].task
    if name not in WRITING:
        raise InputError(
            f"{path} is tuned for {name}, which writes no texts; ask it with `reltune predict` (chat is for {', '.join(WRITING)})."
        )
    if compare and form == "model":
        raise InputError(
            f"--compare: {path} is a merged model, which has no base beside it; name the run or its LoRA adapter."
        )


def check_form(method: str, to: str, flag: str = "--to") -> None:
    """Raise InputError for a method whose result cannot be written in a form."""
    if to == "lora" and not METHODS[method].lora_file:
        raise InputError(f"what the method {method} trains cannot be a LoRA adapter; use {flag} merged.")


def check_chooses(config: RunConfig) -> None:
    """Raise InputError for a method that nothing is measured or chosen for."""
    if not config.needs_plan:
        more = ", or name --rank_by relevance" if "rank_by" in config.way.defaults else ""
        raise InputError(
            f"the method {config.method} needs no analysis and no selection; start it with `reltune run`{more}."
        )


def check_selection(config: RunConfig) -> None:
    """Raise InputError for budgets that no model could have, and for units that cannot be chosen together or are not measured."""
    if not config.needs_plan:
        if config.budget is not None:
            check_budget(config.budget)
        return
    for budget in config.sweep.get("budget", [config.budget]):
        if ".." not in budget:  # a range, which the sweep itself refuses
            check_budget(budget)
    check_together(config.granularity, config.spread)
    if ALONE not in config.granularity:
        return
    criterion = config.criteria[0]
    if criterion in CRITERIA and criterion not in WITH_DIRECTIONS:
        raise InputError(
            f"{criterion} scores no {ALONE}; leave --criteria out, which takes {WITH_DIRECTIONS[0]}, or choose another granularity."
        )
    if not config.probe_directions:
        raise InputError(
            f"granularity {ALONE}: probe_directions is 0, so that none would be kept to choose from; raise it, or leave it out."
        )


def check_model(name: str) -> None:
    """Raise InputError for a model that is neither there nor, as far as can be told at once, on the Hugging Face Hub."""
    if problem := model_directory_problem(name) or model_problem(name):
        raise InputError(problem)


def check_inputs(config: RunConfig, training: bool = True) -> None:
    """Raise InputError for a model or data files that are not there; without ``training``, only for those that an evaluation
    reads."""
    check_model(config.model_name_or_path)
    _check_files(config, FILES if training else FILES[1:])
    if training:
        check_dataset(config.dataset_name)


def check_dataset(name: str | None) -> None:
    """Raise InputError for a data set that neither a package nor, as far as can be told at once, the Hugging Face Hub has."""
    if name is None or name in DATASETS:
        return
    close = nearest(name, DATASETS)
    if problem := dataset_problem(name, close if close.startswith("did") else ""):
        raise InputError(problem)


def _check_files(config: RunConfig, names: Sequence[str]) -> None:
    for name in names:
        if (file := getattr(config, name)) is not None:
            check_source(file)


def check_rows(config: RunConfig) -> None:
    """Raise InputError for text files that hold no rows, and for training rows whose columns fit no task.

    Large files are left to the stage that reads them, and so is every row by itself, whose rules need the task.
    """
    if config.streaming:
        return
    with collecting():  # what there is to note is noted by that stage
        for name in FILES:
            file = getattr(config, name)
            if file is None or os.path.isdir(file) or format_of(Path(file)) not in TEXT_SUFFIXES:
                continue
            if os.path.getsize(file) > QUICKLY_READ:
                continue
            rows = read_text_file(file, config.encoding)
            if name == "train_file" and "train" in rows:
                layout_of(rows["train"], config.task, config.text_column, config.label_column, config.text_pair_column)


def check_source(file: str) -> None:
    """Raise InputError for data that are neither a directory of data nor a file of a known format."""
    if os.path.isdir(file):
        kind_of_folder(Path(file))
    elif not (os.path.isfile(file) and Path(file).suffix.lower() == ".parquet"):
        check_text_file(Path(file))
