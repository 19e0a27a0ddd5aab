"""Where a run keeps its artefacts, and which of them follow from which."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.files import check_writable, make_directory, write_text
from reltune.names import EXPORT_FORMS
from reltune.relevance.artefact import SCORES, interrupted_in
from reltune.report.record import Output

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
    "analyze": ("relevance", "task.json", "held_out", "bad_rows.json", "notes.json"),
    "select": ("plan",),
    "tune": ("adapter", "method.json", "trainer_state.json", "training_cost.json", "sweep.json", "sweep"),
    "evaluate": ("all_results.json", "outputs.jsonl", "comparison.json", "lm_eval.json"),
    "report": ("report.html", *EXPORT_FORMS),
}


class RunDirectory:
    """Where a run keeps its artefacts."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.config_file = self.path / CONFIG
        self.task = self.path / TASK
        self.kept_rows = self.path / "held_out"
        self.relevance = self.path / "relevance"
        self.head = self.relevance / "head.safetensors"
        self.plan = self.path / "plan"
        self.adapter = self.path / "adapter"
        self.method = self.path / "method.json"  # where no plan says what was trained
        self.results = self.path / "all_results.json"
        self.outputs = self.path / "outputs.jsonl"
        self.lm_eval = self.path / "lm_eval.json"
        self.report = self.path / "report.html"
        self.log = self.path / "train_log.jsonl"
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
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        try:  # others call their files config.yaml too, and have checkpoints beside it
            RunConfig.load(self.config_file)
        except InputError as error:
            raise InputError(
                f"output_dir {self.path} is not empty and holds no run of reltune; name a new directory."
            ) from error
        if not overwrite:
            raise InputError(
                f"output_dir {self.path} already holds a run; name another directory or pass --overwrite_output_dir."
            )

    def is_unfinished(self) -> bool:
        """Whether a run was interrupted here: in its analysis, before that, or in a sweep."""
        try:
            config = RunConfig.load(self.config_file)
            analyzed = (self.relevance / SCORES).exists() and not interrupted_in(self.relevance)
            return (config.needs_plan and not analyzed) or self.is_in_sweep()
        except (InputError, OSError):  # a name that is too long, say: check_new has the words for it
            return False

    def continues(self, config: RunConfig) -> bool:
        """Whether an analysis or a sweep with this config was interrupted here."""
        return self.is_unfinished() and self._is_of(config)

    def sweeping(self, config: RunConfig) -> bool:
        """Whether a sweep with this config was interrupted here."""
        return self.is_in_sweep() and self._is_of(config)

    def is_in_sweep(self) -> bool:
        """Whether a sweep was interrupted here."""
        return self.study.is_file() and not self.adapter.exists()

    def _is_of(self, config: RunConfig) -> bool:
        saved = dataclasses.replace(RunConfig.load(self.config_file), output_dir=config.output_dir)
        if config.task is None:
            saved.task = None  # it was read off the columns
        return saved == config

    def trial(self, number: int, selects: bool) -> RunDirectory:
        """The directory of a sweep's trial, with this run's relevance and, unless it ``selects`` its own, plan."""
        trial = RunDirectory(self.sweep / f"trial-{number}")
        trial.relevance, trial.head, trial.kept_rows = self.relevance, self.head, self.kept_rows
        if not selects:
            trial.plan = self.plan
        return trial

    def check_stage(self, stage: str, overwrite: bool) -> None:
        """Raise InputError if the stage was done already and may not be done again."""
        done = [name for name in ARTEFACTS[stage] if (self.path / name).exists()]
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

    def write_outputs(self, base: Sequence[Written], tuned: Sequence[Written]) -> None:
        """Write what two models wrote for the same examples, a line for each; if they wrote nothing, no file."""
        self.outputs.unlink(missing_ok=True)
        outputs = [Output(*one[:2], base=one.text, tuned=other.text) for one, other in zip(base, tuned, strict=True)]
        if outputs:
            lines = [json.dumps(dataclasses.asdict(output), ensure_ascii=False) + "\n" for output in outputs]
            write_text(self.outputs, "".join(lines))

    def read_outputs(self, count: int) -> list[Output]:
        """The first of what was written, if anything was."""
        if not self.outputs.is_file():
            return []
        try:
            with self.outputs.open(encoding="utf-8") as lines:
                return [Output(**json.loads(line)) for line in itertools.islice(lines, count)]
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{self.outputs} cannot be read ({error}); run `reltune evaluate` again.") from error

    def clear(self, stage: str, checkpoints: bool = True) -> None:
        """Remove the artefacts of the stage and of those after it; of training's checkpoints too, unless told otherwise."""
        stages = list(ARTEFACTS)
        for later in stages[stages.index(stage) :]:
            for name in ARTEFACTS[later]:
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if checkpoints and stages.index(stage) <= stages.index("tune"):
            self.log.unlink(missing_ok=True)
            for checkpoint in self.path.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

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
        return path

    def newest_checkpoint(self) -> str | None:
        """The newest checkpoint that was written whole, if there is one: trainer_state.json is the last file of a checkpoint."""
        whole = [path.parent for path in self.path.glob("checkpoint-*/trainer_state.json")]
        return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None
