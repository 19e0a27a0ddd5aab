"""The way through the stages, as the commands go it: what can be checked is checked before anything is written.

Every function returns what there is to show, and prints nothing.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import set_seed

from reltune.config.run_config import RunConfig
from reltune.data.bad_rows import in_words
from reltune.errors import InputError
from reltune.files import read_json
from reltune.names import GGUF_TYPE
from reltune.plan.budget import read_budget
from reltune.plan.plan import Plan
from reltune.pretrained import load_config
from reltune.processes import Processes
from reltune.relevance.artefact import interrupted_in
from reltune.relevance.scores import RelevanceScores
from reltune.report.preview import short_lines
from reltune.report.record import LMEvalRecord, RunRecord
from reltune.runs import prediction as predictions
from reltune.runs import preflight, stages
from reltune.runs import sweep as sweeps
from reltune.runs.chat import Conversation, conversations
from reltune.runs.comparison.beside import compare_run
from reltune.runs.data_record import read_task
from reltune.runs.directory import STAGES, RunDirectory
from reltune.runs.estimate import Estimate, estimate_run
from reltune.runs.export import lora_summary
from reltune.runs.forecast import Forecast, Settings
from reltune.runs.materials import Materials, noting, prepare, prepare_evaluation, prepare_export, task_of_run
from reltune.runs.prediction import Predicted
from reltune.runs.preview import Preview, preview_data, preview_of_run
from reltune.runs.sizes import NOT_KNOWN, Sizes
from reltune.runs.splits import encode, read_data, sizes_of
from reltune.runs.summary import read_lm_eval, report
from reltune.runs.tuned import Tuned
from reltune.tasks.chat_templates import text_of


@dataclasses.dataclass
class Started:
    """A run that was checked and may write into its directory.

    Attributes:
        going_on: the stage at which the same command was interrupted, and goes on (``RunDirectory.next_stage``); else nothing.
        analysis_seconds: how long measuring and choosing took, where it was not interrupted.
    """

    materials: Materials
    directory: RunDirectory
    going_on: str = ""
    analysis_seconds: float | None = None

    @property
    def config(self) -> RunConfig:
        return self.materials.config

    def was_done(self, stage: str) -> bool:
        """Whether a stage was finished before the interruption: found out once, since processes that work together have to take
        the same steps."""
        return bool(self.going_on) and STAGES.index(stage) < STAGES.index(self.going_on)

    def describe(self) -> list[str]:
        """What the run works with: how many examples, and then what they are to the model."""
        materials, task = self.materials, self.materials.task
        train = "streamed" if self.config.streaming else f"{len(materials.train):,}"
        line = (
            f"{train} training, {len(materials.validation):,} validation and {len(materials.test):,} test {task.unit}s"
        )
        if task.describe():
            line += f", {task.describe()}"
        going_on = f" Going on with the interrupted {self.going_on}." if self.going_on else ""
        return [f"{line}.{going_on}", *short_lines(preview_of_run(materials).to_dict())]


def start(config: RunConfig, overwrite: bool = False, goal: str = "run") -> Started:
    """Check everything that can be checked, and only then make the run's directory.

    A run that was interrupted there with the same config goes on at the stage that it had come to, unless told to
    ``overwrite`` it. Where the ``goal`` is "analysis", nothing that belongs to the selection and later stages is checked; where it is
    "comparison", the baselines belong to the run.
    """
    directory, processes = RunDirectory(config.output_dir), Processes.joined()
    with processes.together():
        config.chat_template = text_of(config.chat_template)  # whatever becomes of the file
        if config.sweep:
            sweeps.space(config)
        stages.keep_to_budget(config)
        stage = directory.check_start(config, overwrite, goal)
        if stage == "analysis" and processes.count > 1 and interrupted_in(directory.relevance):
            raise InputError(
                f"output_dir {directory.path} holds an interrupted analysis, which goes on in one process only; start it "
                "without a launcher, or pass --overwrite_output_dir."
            )
        if stage is not None and directory.has_adapter:
            config = sweeps.adopted(config, directory)
        recorded = stage is not None and (directory.relevance.exists() or directory.task.is_file())
        materials = prepare(config, directory if recorded else None)
        if stage is None or not directory.has_adapter:
            stages.check_choice(materials, goal != "analysis")
            if goal != "analysis":
                stages.check_affordable(config, directory, materials.sizes)
                if stage is None:
                    stages.advise(materials)  # what goes on has its budget
            if config.export is not None:
                stages.check_export(config, materials.task, config.export)
            materials.check_training()
            if config.sweep:
                sweeps.check(materials)
        if stage == "training":
            stages.checkpoint_to_go_on_from(materials, directory)  # and raises where plan or data have changed
        if goal != "analysis":
            _ = materials.lm_eval_tasks  # checked here, and measured on at the end
    with processes.together():
        if processes.first:
            if stage is None:
                directory.create(config)
            elif not directory.is_in_sweep():
                config.save(directory.config_file)  # what changes no result may have changed
    return Started(materials, directory, stage or "")


def measure_and_choose(started: Started) -> Plan | None:
    """Analyze and select, as far as that was not done before an interruption. None where there is no one plan to show: a sweep
    of budgets selects in each trial, and some methods choose nothing."""
    config, directory = started.config, started.directory
    if not config.needs_plan:
        return None
    began = time.perf_counter()
    if not started.was_done("analysis"):
        stages.analyze(started.materials, directory)
    if "budget" in config.sweep:
        return None
    if started.was_done("selection"):
        return Plan.load(directory.plan)
    plan = stages.select(config, directory, started.materials.sizes)
    started.analysis_seconds = None if started.going_on else time.perf_counter() - began
    return plan


def train(started: Started, anew: bool = False, resume_from_checkpoint: str | None = None) -> dict[str, Any] | None:
    """Tune, or sweep: then the record of its trials is returned, and the best values enter the run's config. What was
    interrupted goes on, unless it is to begin ``anew``."""
    directory = started.directory
    if not started.config.sweep:
        if not started.was_done("training"):
            stages.tune(started.materials, directory, resume_from_checkpoint, goes_on=not anew, predict=True)
        return None
    started.materials = sweeps.sweep(started.materials, directory, anew)
    record: dict[str, Any] = read_json(directory.trials)
    return record


def evaluate_and_report(started: Started, baselines: bool = False) -> RunRecord | None:
    """Evaluate, compare with the baselines if wanted, and write the report; its record, in the first process. What was
    measured before an interruption is not measured again."""
    config, directory, processes = started.config, started.directory, Processes.joined()
    measured = started.was_done("evaluation")
    results = read_json(directory.results) if measured else stages.evaluate(started.materials, directory)
    if baselines and not started.was_done("comparison"):
        compare_run(started.materials, directory, results, started.analysis_seconds)
    record = None
    with processes.together():
        if processes.first:
            record = report(config, directory)
    return record


# -- single stages --------------------------------------------------------------------------------------------------


def analyze_weights(config: RunConfig, overwrite: bool = False) -> RelevanceScores:
    """Measure relevance by criteria that look at no data."""
    if Processes.joined().count > 1:
        raise InputError("an analysis of the weights alone runs in one process; start it without a launcher.")
    return stages.analyze_weights(config, RunDirectory(config.output_dir), overwrite)


def choose_again(config: RunConfig, directory: RunDirectory) -> Plan:
    """Select from the relevance of an existing run, and store this config as the run's."""
    limited = read_budget(config.budget).is_limited
    return stages.select(config, directory, sizes_of_run(config, directory) if limited else NOT_KNOWN)


def settings_of(directory: RunDirectory) -> list[str]:
    """What was chosen beside the units so that a budget is kept, one sentence for each."""
    if not directory.prediction.is_file():
        return []
    made = read_json(directory.prediction)
    return Settings(made["fields"], made["training"]).describe()


def forecast_selection(
    config: RunConfig,
    directory: RunDirectory,
    device: str | None = None,
    relevance: RelevanceScores | None = None,
    sizes: Sizes | None = None,
    shown: bool = True,
) -> Forecast:
    """What ``choose_again`` would choose, and what its training would take. Writes nothing. ``relevance``, ``sizes``: where they are
    loaded already; ``shown``: beside what else could be trained."""
    relevance = relevance or RelevanceScores.load(directory.relevance)
    sizes = sizes or sizes_of_run(config, directory)
    return stages.forecast_of(config, directory, relevance, device, sizes, shown=shown)


def estimate_new(config: RunConfig, device: str | None = None) -> Estimate:
    """What a training would take, from the model's config and the data that are named, if any are."""
    preflight.check_estimate(config, device)
    return estimate_run(config, device, sizes_of_run(config))


def forecast_run(config: RunConfig, device: str | None = None) -> Forecast:
    """What a run would train, and what that would take; by the relevance in its directory, if it was analyzed. Writes nothing."""
    directory = RunDirectory(config.output_dir)
    sizes = sizes_of_run(config)
    known = directory.config_file.is_file() and config.needs_plan and directory.is_analyzed
    relevance = RelevanceScores.load(directory.relevance) if known else None
    if relevance is not None and config.criteria[0] not in relevance.criteria:
        relevance = None
    return stages.forecast_of(config, directory, relevance, device, sizes)


def sizes_of_run(config: RunConfig, directory: RunDirectory | None = None) -> Sizes:
    """How much data a run has, new or in its directory, as far as that is known. A task that the config does not name enters it."""
    if not config.has_data:
        return NOT_KNOWN
    with noting():
        recorded = read_task(directory, config) if directory is not None else None
        task, splits = read_data(config, recorded)
        config.task = task.name
        if recorded is None:
            task = task.suited_to(load_config(config.model_name_or_path))
        data = encode(task, splits, task.load_tokenizer(config.model_name_or_path), config)
    return sizes_of(task, data.train, data.validation, data.test)


def tune_again(config: RunConfig, directory: RunDirectory, overwrite: bool = False) -> dict[str, Any] | None:
    """Train by the plan of an existing run; the record of the trials if it is a sweep. A training that was interrupted goes on."""
    resume = config.training.pop("resume_from_checkpoint", None)
    with Processes.joined().together():
        preflight.check_tuning(config, directory, overwrite)
        if not directory.sweeping(config):
            preflight.check_untrained(config, directory, overwrite)
        if not overwrite and not resume:
            directory.check_goes_on(config)
        if config.sweep:
            sweeps.space(config)
        selects = "budget" in config.sweep
        relevance = RelevanceScores.load(directory.relevance) if selects else None
        if not selects and config.needs_plan:
            Plan.load(directory.plan)
        materials = prepare(config, directory)
        if config.sweep:
            if resume:
                raise InputError(
                    "resume_from_checkpoint is for one training; a sweep goes on by itself where it stopped."
                )
            sweeps.check(materials, relevance)
    return train(Started(materials, directory), overwrite, resume)


def evaluate_again(config: RunConfig, directory: RunDirectory) -> tuple[dict[str, float], LMEvalRecord | None]:
    """The metrics of an existing run's adapter, and what lm-evaluation-harness says of it, in the first process."""
    processes = Processes.joined()
    with processes.together():
        preflight.check_evaluation(config, directory)
        materials = prepare_evaluation(config, directory)
    results = stages.evaluate(materials, directory)
    return results, read_lm_eval(directory) if materials.lm_eval_tasks and processes.first else None


def export_as_configured(started: Started) -> str | None:
    """Export the run in the form that its config asks for; what ``export`` says, in the first process."""
    form, directory, processes = started.config.export, started.directory, Processes.joined()
    if form is None:
        return None
    with processes.together():
        if not processes.first or (directory.path / form).is_dir():
            return None
        return export(directory, started.config, form, str(directory.path / form))


def export(
    directory: RunDirectory,
    config: RunConfig,
    to: str,
    output_dir: str,
    server: str | None = None,
    gguf_type: str | None = None,
) -> str:
    """Write the tuned model for programs without reltune. Gives a phrase: where it is, and the largest rank of a LoRA adapter."""
    preflight.check_export(directory, to, output_dir, server, gguf_type)
    stages.check_export(config, task_of_run(config, directory), to)
    materials = prepare_export(config, directory)
    path: Path = stages.export(materials, directory, to, output_dir, server, gguf_type or GGUF_TYPE)
    return f"{path}: {lora_summary(path)}" if to == "lora" else str(path)


def predict(
    path: str,
    input_file: str,
    output_file: str = "-",
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    on_bad_rows: str = "error",
    encoding: str = "utf-8",
) -> Predicted:
    """Write a tuned model's predictions for the rows of a file; the lines that were left out are a warning."""
    preflight.check_prediction(path, input_file, output_file, on_bad_rows, encoding)
    with noting():
        tuned = Tuned.open(path)
        done = predictions.predict(tuned, input_file, output_file, batch_size, max_new_tokens, on_bad_rows, encoding)
    if done.skipped:
        count = sum(map(len, done.skipped.values()))
        warnings.warn(f"{input_file}: {count} bad rows are left out, with {in_words(done.skipped)}.", stacklevel=2)
    return done


def preview(config: RunConfig, example: int = 1, tokens: bool = True) -> Preview:
    """Data as a run would work with them, with ``tokens`` by the model's tokenizer; what was assumed is said."""
    with noting():
        return preview_data(config, example, tokens)


def chat(
    path: str,
    compare: bool = False,
    system: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> dict[str, Conversation]:
    """Conversations with a tuned model, and to ``compare`` with its base, by name."""
    preflight.check_chat(path, compare)
    with noting():
        made = conversations(path, compare, system, sampling)
    if seed is not None:
        set_seed(seed)
    return made
