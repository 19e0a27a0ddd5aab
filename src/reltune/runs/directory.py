"""Where a run keeps its artefacts, and which of them follow from which."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reltune import __version__
from reltune.config.differences import differences, in_words
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.files import PARTIAL, REMOVED, check_writable, discard, make_directory, read_json, stored, write_text
from reltune.names import EXPORT_FORMS, REPORT_FORMS
from reltune.reading import parse_json, typed
from reltune.relevance.artefact import SCORES, interrupted_in, read_scores
from reltune.report.record import Output, Sample
from reltune.runs.lock import LOCK

if TYPE_CHECKING:
    from reltune.tasks.task import Written

ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "trained.safetensors",
)  # of PEFT, of methods/freed.py
CONFIG = "config.yaml"
ADAPTER_CONFIG = ADAPTER_FILES[1]
TASK = "task.json"  # in a run's directory, beside its adapter and in exports

ARTEFACTS = {  # in the order of the stages; writing one makes those after it out of date
    "analyze": ("relevance", "task.json", "data.json", "commands.json", "held_out", "bad_rows.json", "notes.json"),
    "select": ("plan",),
    "tune": (
        "prediction.json",
        "adapter",
        "method.json",
        "trainer_state.json",
        "training_cost.json",
        "training.json",
        "sweep.json",
        "sweep",
    ),
    "evaluate": ("all_results.json", "outputs.jsonl", "comparison.json", "comparison", "lm_eval.json"),
    "report": (*(f"report.{form}" for form in REPORT_FORMS), *EXPORT_FORMS),
}

GOES_ON = {"select": 1, "tune": 2, "evaluate": 3}  # commands that go on with a run, in their order; others begin one
STAGES = ("analysis", "selection", "sweep", "training", "evaluation", "comparison", "report", "export")  # of a run
BEFORE_THE_ADAPTER = (
    "prediction.json",
    "method.json",
    "trainer_state.json",
    "training_cost.json",
    "training.json",
)  # training is not done yet


class RunDirectory:
    """Where a run keeps its artefacts."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.config_file = self.path / CONFIG
        self.task = self.path / TASK
        self.data = self.path / "data.json"  # what the rows are from, and fingerprints of them
        self.commands = self.path / "commands.json"  # by which the run was made
        self.kept_rows = self.path / "held_out"
        self.relevance = self.path / "relevance"
        self.head = self.relevance / "head.safetensors"
        self.plan = self.path / "plan"
        self.adapter = self.path / "adapter"
        self.method = self.path / "method.json"  # where no plan says what was trained
        self.prediction = self.path / "prediction.json"  # what training will take, and what was chosen so that it fits
        self.begun = self.path / "training.json"  # what a training was begun with, for one that goes on
        self.results = self.path / "all_results.json"
        self.outputs = self.path / "outputs.jsonl"
        self.samples = self.path / "samples.jsonl"  # what was answered while it trained
        self.lm_eval = self.path / "lm_eval.json"
        self.comparison = self.path / "comparison" / "comparison.json"  # with other methods
        self.report = self.path / "report.html"
        self.log = self.path / "train_log.jsonl"
        self.prefix = self.path / "frozen_prefix"  # what a training keeps of its frozen layers until it is done
        self.sweep = self.path / "sweep"  # a directory per trial
        self.study = self.sweep / "study.jsonl"
        self.trials = self.path / "sweep.json"

    @classmethod
    def open(cls, path: str | os.PathLike) -> tuple[RunDirectory, RunConfig]:
        """An existing run and its config."""
        run = cls(path)
        if not run.config_file.is_file():
            raise InputError(f"{path} holds no run (no config.yaml); make one with `reltune run` or `reltune analyze`.")
        config = RunConfig.load(run.config_file)
        config.output_dir = str(path)  # the directory may have been moved
        return run, config

    def check_new(self, overwrite: bool) -> None:
        """Raise InputError unless a new run may be written here. Creates nothing."""
        check_writable(self.path)
        if self.is_empty:
            return
        self._check_ours()
        if not overwrite:
            raise InputError(
                f"output_dir {self.path} already holds a run; name another directory or pass --overwrite_output_dir."
            )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is here, or nothing but the mark of the process that is about to write."""
        passing = (LOCK, PARTIAL, REMOVED)
        return not self.path.is_dir() or all(child.name.endswith(passing) for child in self.path.iterdir())

    def _check_ours(self) -> RunConfig:
        """The config of the run that is here. Raises InputError where files of others are: these call theirs config.yaml too,
        and have checkpoints beside it."""
        try:
            return RunConfig.load(self.config_file)
        except InputError as error:
            raise InputError(
                f"output_dir {self.path} is not empty and holds no run of reltune; name a new directory."
            ) from error

    def check_start(self, config: RunConfig, overwrite: bool = False, goal: str = "run") -> str | None:
        """What a command that makes a run has to do next here: None where the run is a new one, else the stage at which the
        same command was interrupted (``next_stage``). Creates nothing.

        Raises InputError for files of others, for a run of another configuration and for one that is finished.
        """
        check_writable(self.path)
        if overwrite or self.is_empty:
            self.check_new(overwrite)
            return None
        if found := self.differences(config):
            raise InputError(
                f"output_dir {self.path} already holds a run with another configuration ({in_words(found)}); give the same as then, "
                "name another directory or pass --overwrite_output_dir."
            )
        stage = self.next_stage(config, goal)
        if stage is None:
            what, look = ("analysis", self.relevance) if goal == "analysis" else ("run", self.report)
            raise InputError(
                f"output_dir {self.path} already holds a run: this {what} is finished, see {look}. Choose another --output_dir, or pass "
                "--overwrite_output_dir to do it again."
            )
        return stage

    def differences(self, config: RunConfig) -> dict[str, tuple[Any, Any]]:
        """What a config has otherwise than the one that the run here was started with, as far as it changes results."""
        saved = self._check_ours()
        if config.sweep and not saved.sweep and self.trials.is_file():  # the best values have become the run's
            record = read_json(self.trials)
            saved.sweep, saved.sweep_trials = record["sweep"], record.get("sweep_trials", config.sweep_trials)
            saved.training = {name: value for name, value in saved.training.items() if name not in saved.sweep}
            if "budget" in saved.sweep:
                saved.budget = config.budget
        return differences(saved, config)

    def next_stage(self, config: RunConfig, goal: str = "run") -> str | None:
        """The first of the ``STAGES`` of which the result is not here; None where there is nothing to do for the ``goal``, which
        is "analysis", "run" or "comparison" (a run beside baselines)."""
        done = {"analysis": not config.needs_plan or self.is_analyzed}
        if goal != "analysis":
            done |= {
                "selection": not config.needs_plan or self.is_selected or "budget" in config.sweep,
                "sweep": not config.sweep or self.has_adapter,
                "training": self.has_adapter,
                "evaluation": self.results.is_file() and (not config.lm_eval_tasks or self.lm_eval.is_file()),
                "comparison": goal != "comparison" or self.comparison.is_file(),
                "report": self.report.is_file(),
                "export": config.export is None or (self.path / config.export).is_dir(),
            }
        return next((stage for stage, is_done in done.items() if not is_done), None)

    @property
    def is_analyzed(self) -> bool:
        return (self.relevance / SCORES).is_file() and not interrupted_in(self.relevance)

    @property
    def is_selected(self) -> bool:
        return (self.plan / "plan.yaml").is_file()

    def check_goes_on(self, config: RunConfig) -> None:
        """Raise InputError where a training of the run was interrupted that had other values than this config."""
        if not self.has_adapter and self.newest_checkpoint() and (found := self.differences(config)):
            raise InputError(
                f"{self.path} holds a training that was interrupted and had other values ({in_words(found)}); give the same, or pass "
                "--overwrite_output_dir to begin anew."
            )

    def sweeping(self, config: RunConfig) -> bool:
        """Whether a sweep with this config was interrupted here."""
        return self.is_in_sweep() and not self.differences(config)

    def is_in_sweep(self) -> bool:
        """Whether a sweep was interrupted here."""
        return self.study.is_file() and not self.has_adapter

    def trial(self, number: int, selects: bool) -> RunDirectory:
        """The directory of a sweep's trial, with this run's relevance and, unless it ``selects`` its own, plan."""
        trial = RunDirectory(self.sweep / f"trial-{number}")
        trial.relevance, trial.head, trial.kept_rows = self.relevance, self.head, self.kept_rows
        if not selects:
            trial.plan = self.plan
        return trial

    def check_stage(self, stage: str, overwrite: bool) -> None:
        """Raise InputError if the stage was done already and may not be done again."""
        done = [name for name in ARTEFACTS[stage] if name not in BEFORE_THE_ADAPTER and (self.path / name).exists()]
        if done and not overwrite:
            raise InputError(
                f"{self.path} already holds {done[0]}; pass --overwrite_output_dir to replace it and what was made from it."
            )

    @property
    def has_adapter(self) -> bool:
        """Whether the run was tuned."""
        return any((self.adapter / name).is_file() for name in ADAPTER_FILES[1:])

    def check_adapter(self) -> None:
        """Raise InputError unless the run was tuned."""
        if not self.has_adapter:
            raise InputError(f"{self.path} holds no adapter; run `reltune tune {self.path}` first.")

    def create(self, config: RunConfig) -> None:
        """Make the directory and save the config, over an earlier run's if there is one."""
        make_directory(self.path)
        self.clear("analyze")
        config.save(self.config_file)

    def record_command(self, name: str, words: Sequence[str]) -> None:
        """Write down the command line that a command was given, and forget those of later commands, whose results are gone."""
        earlier = read_json(self.commands) if self.commands.is_file() else {}
        kept = {key: value for key, value in earlier.items() if GOES_ON.get(key, 0) < GOES_ON.get(name, 0)}
        made = {"command": shlex.join(_without_secrets(words)), "reltune": __version__}
        write_text(self.commands, json.dumps({**kept, name: made}, indent=2, ensure_ascii=False) + "\n")

    def write_outputs(self, base: Sequence[Written], tuned: Sequence[Written]) -> None:
        """Write what two models wrote for the same examples, a line for each; if they wrote nothing, no file."""
        outputs = [Output(*one[:2], base=one.text, tuned=other.text) for one, other in zip(base, tuned, strict=True)]
        if outputs:
            lines = [json.dumps(dataclasses.asdict(output), ensure_ascii=False) + "\n" for output in outputs]
            write_text(self.outputs, "".join(lines))
        else:
            discard(self.outputs)

    def read_outputs(self, count: int) -> list[Output]:
        """The first of what was written, if anything was."""
        if not self.outputs.is_file():
            return []
        try:
            with self.outputs.open(encoding="utf-8") as lines:
                return [typed(Output, parse_json(line)) for line in itertools.islice(lines, count)]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.outputs} cannot be read ({error}); run `reltune evaluate` again.") from error

    def read_samples(self) -> list[Sample]:
        """What the model answered while it trained, if it was asked anything."""
        if not self.samples.is_file():
            return []
        try:
            with self.samples.open(encoding="utf-8") as lines:
                return [typed(Sample, parse_json(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.samples} cannot be read ({error}); remove it, and the rest is there.") from error

    def clear(self, stage: str, checkpoints: bool = True) -> None:
        """Remove the artefacts of the stage and of those after it; of training's checkpoints too, unless told otherwise."""
        stages = list(ARTEFACTS)
        with stored(self.path):
            for later in reversed(stages[stages.index(stage) :]):  # what is left is whole, whenever this is interrupted
                for name in ARTEFACTS[later]:
                    discard(self.path / name)
                if later == "tune" and checkpoints:
                    self.log.unlink(missing_ok=True)
                    self.samples.unlink(missing_ok=True)
                    discard(self.prefix)
                    for checkpoint in self.path.glob("checkpoint-*"):
                        discard(checkpoint)

    def checkpoint(self, wanted: str) -> str:
        """A checkpoint of this run by its path, by its name (checkpoint-30), or the newest (true)."""
        if wanted.lower() == "true":
            path = self.newest_checkpoint() or ""
        else:
            path = next((str(place) for place in (Path(wanted), self.path / wanted) if place.is_dir()), "")
        if not (Path(path) / "trainer_state.json").is_file():
            raise InputError(
                f"resume_from_checkpoint {wanted!r} names no checkpoint of {self.path}; look there for checkpoint-N."
            )
        if Path(path).resolve().parent != self.path.resolve():
            raise InputError(
                f"resume_from_checkpoint {wanted!r} is a checkpoint of another run, which may have trained something else; name one in "
                f"{self.path}."
            )
        return path

    def measured_modules(self) -> tuple[list[str], list[str]]:
        """The target_modules and exclude_modules that the analysis followed."""
        provenance = read_scores(self.relevance).get("provenance", {})
        return provenance.get("target_modules", []), provenance.get("exclude_modules", [])

    def plan_digest(self) -> str:
        """Of the plan's files, by which a changed plan is told; of a run without a plan that of nothing."""
        files = sorted(path for path in self.plan.glob("*") if path.is_file())
        return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()

    def newest_checkpoint(self) -> str | None:
        """The newest checkpoint, if there is one."""
        there = [path for path in checkpoints(self.path) if (path / "trainer_state.json").is_file()]
        return str(there[-1]) if there else None


def _without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line with a token's value left out."""
    shown, hide = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        secret = flag.replace("-", "_").endswith("hub_token")
        shown.append("TOKEN" if hide else f"{flag}=TOKEN" if secret and equals else word)
        hide = secret and not equals
    return shown


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a directory, by the number of their step."""
    there = [path for path in directory.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(there, key=lambda path: int(path.name.rpartition("-")[2]))
