"""The same command goes on from the stage that it had come to, and says what differs where it is not the same."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import Answer, assert_refused, contents, held, reltune, review_rows, write_csv
from interruption import changes
from reltune.config.run_config import RunConfig
from reltune.runs import flow, stages, training
from reltune.runs.directory import RunDirectory
from tiny_models import save_tiny_bert

SHORT = ["--per_device_train_batch_size", 8, "--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no"]
WORDS = ["--granularity", "column", "--budget", "5%", "--max_steps", 6, *SHORT, "--export", "lora"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model", labels=["neg", "pos"])
    write_csv(place / "train.csv", review_rows(60))
    return place


def run(place: Path, name: str, *words: object, command: str = "run") -> Answer:
    files = ["--model_name_or_path", place / "model", "--train_file", place / "train.csv"]
    return reltune(command, *files, "--output_dir", place / name, *(words or WORDS))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    answer = run(place, "whole")
    assert answer.code == 0, answer
    return place / "whole"


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(of / "adapter" / "adapter_model.safetensors") for of in (one, other))
    metrics = [
        {k: v for k, v in json.loads((of / "all_results.json").read_text()).items() if not k.startswith("train_")}
        for of in (one, other)
    ]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and metrics[0] == metrics[1]


@contextmanager
def signalled(step: int, number: int) -> Iterator[None]:
    """Have a signal come in a step of training, which is to be finished and kept."""
    on_step_end = training._StepClock.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._StepClock, "on_step_end", stop)
        yield


@contextmanager
def broken(place: Any, name: str) -> Iterator[None]:
    """Have Ctrl-C come where a function is called."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, stop)
        yield


@pytest.fixture(scope="module")
def cut(place: Path, whole: Path) -> Path:
    """A run that was terminated in its third step, from which tests take copies."""
    with signalled(3, signal.SIGTERM):
        answer = run(place, "cut")
    assert answer.code == 143 and "terminated; what was done is kept" in answer.err, answer
    assert (place / "cut" / "checkpoint-3").is_dir() and not (place / "cut" / "adapter").exists()
    return place / "cut"


def copied(cut: Path, name: str) -> str:
    shutil.copytree(cut, cut.parent / name)
    return name


# -- stage by stage -------------------------------------------------------------------------------------------------


def test_interrupted_in_every_stage(place: Path, whole: Path) -> None:
    stages_left = [
        (broken(stages, "_drawn_examples"), ""),
        (broken(stages, "select"), "analysis"),
        (signalled(3, signal.SIGTERM), "selection"),
        (signalled(5, signal.SIGINT), "training"),
        (broken(stages, "describe_adapter"), "training"),  # the last checkpoint is there, and the adapter in part
        (broken(stages, "measure_metrics"), "training"),
        (broken(flow, "report"), "evaluation"),
        (broken(stages.exporting, "to_lora"), "report"),
    ]
    for interruption, going_on in stages_left:
        with interruption:
            answer = run(place, "stepwise")
        assert answer.code in (130, 143), answer
        assert (f"Going on with the interrupted {going_on}." in answer.out) == bool(going_on), answer
    assert (place / "stepwise" / "report.html").is_file()
    answer = run(place, "stepwise")
    assert answer.code == 0 and "Going on with the interrupted export." in answer.out
    assert same(place / "stepwise", whole)
    assert {path.name for path in place.glob("stepwise/checkpoint-*")} == {"checkpoint-6"}
    names = [{str(path.relative_to(of)) for path in of.rglob("*")} for of in (place / "stepwise", whole)]
    assert names[0] == names[1]


def test_tune_alone_goes_on(place: Path, cut: Path, whole: Path) -> None:
    name = copied(cut, "tuned")
    answer = reltune("tune", place / name, "--learning_rate", 0.5)
    assert_refused(answer, "was interrupted", "learning_rate was not given and is 0.5", "--overwrite_output_dir")
    answer = run(place, name, *WORDS, "--resume_from_checkpoint", "checkpoint-2")
    assert_refused(answer, "by itself", "reltune tune RUN")
    answer = reltune("tune", place / name, "--logging_steps", 3)
    assert answer.code == 0, answer
    assert json.loads((place / name / "training_cost.json").read_text())["timed_steps"] == 3
    assert reltune("evaluate", place / name).code == 0 and same(place / name, whole)


def test_a_finished_run_and_another_configuration_are_told(place: Path, whole: Path, cut: Path) -> None:
    before = contents(whole)
    assert_refused(run(place, "whole"), "this run is finished", "report.html", "another --output_dir")
    answer = run(place, "whole", *WORDS, "--budget", "4%", "--weight_decay", 0.1)
    assert_refused(answer, "budget was 5% and is 4%", "weight_decay was not given and is 0.1")
    analysis = [*WORDS[:2], "--criteria", "fisher", "--max_steps", 6, *SHORT]
    assert_refused(run(place, "whole", *analysis[2:], command="analyze"), "budget was")
    assert contents(whole) == before
    assert_refused(run(place, "cut", *WORDS, "--seed", 1), "seed was 42 and is 1")
    # what changes no result may differ: here a stage that was not asked for before
    name = copied(whole, "exported_too")
    words = [*WORDS[:-1], "merged", "--report_examples", 3]
    answer = run(place, name, *words)
    assert answer.code == 0 and "interrupted export" in answer.out and (place / name / "merged").is_dir()


def test_a_changed_plan_or_changed_data_is_not_gone_on_with(place: Path, cut: Path) -> None:
    name = copied(cut, "changed")
    plan = place / name / "plan" / "plan.yaml"
    text = plan.read_text()
    plan.write_text(text + "# edited\n")
    assert_refused(run(place, name), "the plan in", "has changed")
    plan.write_text(text)
    data = (place / "train.csv").read_text()
    (place / "train.csv").write_text(data.replace("good", "great"))
    try:
        assert_refused(run(place, name), "training data", "changed")
        words = "tune", place / name, "--resume_from_checkpoint", "checkpoint-3"
        assert_refused(reltune(*words), "training data", "changed")
    finally:
        (place / "train.csv").write_text(data)


def test_another_base_is_not_gone_on_with(place: Path) -> None:
    """Of a method without a plan, which would tell it: other weights in the place of the base's."""
    words = ["--method", "lora", "--max_steps", 6, *SHORT]
    with signalled(3, signal.SIGTERM):
        assert run(place, "lora", *words).code == 143
    weights = place / "model" / "model.safetensors"
    own = weights.read_bytes()
    try:
        moved = {
            name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in load_file(weights).items()
        }
        save_file(moved, weights, metadata={"format": "pt"})
        answer = run(place, "lora", *words)
        assert answer.code == 2 and "the base model has changed" in answer.err
        assert not (place / "lora" / "adapter").exists() and (place / "lora" / "checkpoint-3").is_dir()
    finally:
        weights.write_bytes(own)
    assert run(place, "lora", *words).code == 0


# -- what else can happen -------------------------------------------------------------------------------------------


def test_a_lost_data_file(place: Path, cut: Path, whole: Path) -> None:
    name = copied(cut, "lost")
    (place / "train.csv").rename(place / "elsewhere.csv")
    try:
        assert_refused(run(place, name), "train.csv does not exist")
    finally:
        (place / "elsewhere.csv").rename(place / "train.csv")
    assert run(place, name).code == 0 and same(place / name, whole)


def test_a_clock_that_was_set_back(place: Path, cut: Path, whole: Path) -> None:
    name = copied(cut, "clock")
    for path in (place / name).rglob("*"):
        os.utime(path, (4e9, 4e9))
    ticks = itertools.count(4_000_000_000, -60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(ticks)))  # it goes on going back
        answer = run(
            place, name, *WORDS, "--resume_from_checkpoint", "true"
        )  # which says no more than the same command
    assert answer.code == 0 and same(place / name, whole)
    assert {path.name for path in place.glob("clock/checkpoint-*")} == {"checkpoint-6"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow larger: what a full disk is to a program, but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(place: Path, cut: Path, whole: Path) -> None:
    for name, size in (("full", 6000), (copied(cut, "full_later"), 9000)):
        with largest_file(size):
            answer = run(place, name)
        assert answer.code == 1 and "could not be written" in answer.err and "free some space" in answer.err, answer
        assert answer.err.splitlines()[-1].startswith("reltune: error: ") and "Traceback" not in answer.err
        assert not [path for path in (place / name).rglob("*") if path.name.endswith((".partial", ".lock"))]
        answer = run(place, name)
        assert answer.code == 0 and "Going on" in answer.out and same(place / name, whole), answer


@contextmanager
def read_only(directory: Path, after: int = 0) -> Iterator[None]:
    """After so many changes of files in the directory, let every other one fail. (Permissions stop no administrator.)"""
    left = after

    def refuse() -> None:
        nonlocal left
        left -= 1
        if on and left < 0:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    on = True
    sys.addaudithook(changes(str(directory), refuse))  # it cannot be taken away again
    try:
        yield
    finally:
        on = False


def test_a_directory_that_is_or_becomes_read_only(place: Path, cut: Path, whole: Path) -> None:
    name = copied(cut, "locked")
    before = contents(place / name)
    with read_only(place / name):
        assert_refused(run(place, name), "cannot be written (Read-only file system)", "name another one")
    assert contents(place / name) == before
    with read_only(place / name, 20):
        answer = run(place, name)
    assert answer.code == 1 and "could not be written (read-only file system)" in answer.err, answer
    assert "make it writable" in answer.err and "Traceback" not in answer.err
    answer = run(place, name)
    assert answer.code == 0 and "Going on" in answer.out and same(place / name, whole), answer


def test_two_runs_in_one_directory(place: Path, cut: Path) -> None:
    name = copied(cut, "twice")
    before = contents(place / name)
    with held(place / name) as other:
        sweep = ["tune", place / name, "--overwrite_output_dir", "--sweep", "learning_rate=1e-3,1e-2"]
        for answer in (run(place, name), reltune(*sweep), run(place, name, *WORDS, "--overwrite_output_dir")):
            assert_refused(answer, f"in use by process {other.pid}", "wait for its end")
    assert {k: v for k, v in contents(place / name).items() if k != "run.lock"} == before


def test_a_sweep_that_is_finished(place: Path) -> None:
    words = [*WORDS[:4], "--max_steps", 2, *SHORT, "--sweep", "learning_rate=1e-3,1e-2"]
    with broken(stages, "measure_lm_eval"), broken(flow, "report"):
        assert run(place, "swept", *words).code == 130
    saved = RunConfig.load(place / "swept" / "config.yaml")
    assert not saved.sweep and saved.training["learning_rate"] in (1e-3, 1e-2)
    assert_refused(run(place, "swept", *words[:-1], "learning_rate=1e-3,1e-4"), "sweep was")
    answer = run(place, "swept", *words)
    assert answer.code == 0 and "Going on with the interrupted report." in answer.out
    assert RunConfig.load(place / "swept" / "config.yaml") == saved
    assert_refused(run(place, "swept", *words), "this run is finished")


def test_streamed_rows_go_on_in_a_later_pass(place: Path) -> None:
    held_out = write_csv(place / "held.csv", review_rows(10, seed=2))
    words = ["--streaming", "--validation_file", held_out, "--test_file", held_out, *WORDS[:6], *SHORT[2:]]
    words += ["--per_device_train_batch_size", 16]  # four steps a pass
    assert run(place, "streamed", *words).code == 0
    with signalled(5, signal.SIGTERM):
        assert run(place, "streamed_cut", *words).code == 143
    answer = run(place, "streamed_cut", *words)
    assert answer.code == 0 and same(place / "streamed_cut", place / "streamed"), answer
    gone = RunDirectory(place / "gone")
    text = (place / "train.csv").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.LogFile, "on_train_begin", lambda *_, **__: (place / "train.csv").unlink())
        answer = run(place, "gone", *words)
    (place / "train.csv").write_text(text)
    assert answer.code == 2 and "train.csv" in answer.err, answer
    assert run(place, "gone", *words).code == 0 and same(gone.path, place / "streamed")


@pytest.mark.slow
def test_early_stopping_goes_on_counting(place: Path) -> None:
    """Nothing gets better at a rate of nearly nothing, so that training ends after the second evaluation."""
    words = [*WORDS[:4], "--num_train_epochs", 6, "--early_stopping_patience", 2, "--learning_rate", "1e-12"]
    assert run(place, "patient", *words).code == 0
    steps = json.loads((place / "patient" / "trainer_state.json").read_text())["global_step"]
    for name, interruption in (
        ("impatient", signalled(steps - 1, signal.SIGTERM)),
        ("ended", broken(stages, "describe_adapter")),
    ):
        with interruption:
            assert run(place, name, *words).code in (130, 143)
        assert run(place, name, *words).code == 0
        assert json.loads((place / name / "trainer_state.json").read_text())["global_step"] == steps
        assert same(place / name, place / "patient")
