"""Jobs: commands in processes of their own, found again by their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reltune.errors import InputError
from reltune.studio import command_lines, jobs
from reltune.studio.jobs import Job, Jobs
from reltune.studio.places import Place

STEPS = """
import sys, time
print("first \\r 10%\\r 100%", flush=True)
print("last", flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
sys.exit({"fail": 2}.get(sys.argv[1], 0))
"""


@pytest.fixture
def some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Jobs that run a short script in the place of reltune."""
    monkeypatch.setattr(jobs, "started", lambda words: [sys.executable, "-c", STEPS, *words])
    return Jobs(Place(tmp_path))


def ended(some: Jobs, name: str, *states: str) -> Job:
    for _ in range(300):
        if (job := some.get(name)).state in states:
            return job
        time.sleep(0.05)
    raise AssertionError(some.get(name))


def test_a_job_is_started_watched_and_found_by_another_studio(some: Jobs) -> None:
    assert some.all() == []
    good, bad = some.start(["good"], "run"), some.start(["fail"], "run")
    assert ended(some, good, "done").code == 0
    assert ended(some, bad, "failed").code == 2
    assert some.output(good) == " 100%\nlast"  # of a progress bar what it shows at the end
    again = Jobs(Place(some.place.path))
    assert {(job.name, job.state, job.target, tuple(job.words)) for job in again.all()} == {
        (good, "done", "run", ("good",)),
        (bad, "failed", "run", ("fail",)),
    }


def test_a_job_is_stopped_by_another_studio(some: Jobs) -> None:
    name = some.start(["wait"], "run")
    for _ in range(300):
        if "last" in some.output(name):
            break
        time.sleep(0.05)
    again = Jobs(Place(some.place.path))
    assert again.get(name).state == "running"
    again.stop(name)
    assert ended(some, name, "stopped").code == -15
    with pytest.raises(InputError, match="not running"):
        again.stop(name)


def test_a_job_whose_process_is_gone_or_another_one_has_ended(some: Jobs) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    for name, pid, created in (("gone", done.pid, 1.0), ("other", os.getpid(), 1.0)):
        (some.path / name).mkdir(parents=True)
        record = {"words": ["tune"], "target": "run", "pid": pid, "began": 1.0, "created": created}
        (some.path / name / "job.json").write_text(json.dumps(record))
        assert some.get(name).state == "ended"
        with pytest.raises(InputError, match="not running"):
            some.stop(name)


def test_damaged_and_foreign_jobs_are_left_out(some: Jobs, tmp_path: Path) -> None:
    (some.path / "torn").mkdir(parents=True)
    (some.path / "torn" / "job.json").write_text('{"words"')
    (some.path / "empty").mkdir()
    assert some.all() == []
    for name in ("torn", "empty", "../x", "..", "", "/etc"):
        with pytest.raises(InputError):
            some.get(name)


def test_words_of_commands_have_no_room_for_other_flags() -> None:
    run = Path("runs/a b")
    words = command_lines.further(
        "tune", run, {"learning_rate": "--output_dir=x", "num_train_epochs": 2.0, "seed": None}, True
    )
    assert words == [
        "tune",
        "runs/a b",
        "--learning_rate=--output_dir=x",
        "--num_train_epochs=2",
        "--overwrite_output_dir",
    ]
    assert command_lines.shown(words).startswith("reltune tune 'runs/a b' --learning_rate=")
    assert command_lines.started(words)[1:4] == ["-m", "reltune", "tune"]
    new = command_lines.new("run", run, {"exclude_modules": ["a", "b"], "budget": "", "learning_rate": 1e-5})
    assert new == [
        "run",
        "--output_dir=runs/a b",
        "--exclude_modules=a",
        "--exclude_modules=b",
        "--learning_rate=1e-05",
    ]
    with pytest.raises(AssertionError):
        command_lines.new("run", run, {"deepsped": "x"})
