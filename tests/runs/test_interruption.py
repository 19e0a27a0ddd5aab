"""Killed at random moments, a run goes on to the result of an uninterrupted one: the benchmark of that name, in short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import interruption
from reltune.files import PARTIAL

ROOT = Path(__file__).parents[2]


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    # a process of its own: the benchmark forks, which hangs where another test has left torch with several threads
    command = [sys.executable, interruption.__file__, "--moments", "3", "--most", "3", "--seed", "3", "--cases", "run"]
    answer = subprocess.run(
        [*command, "--threads", "1", "--output_dir", str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 0, answer.stderr
    record = json.loads((tmp_path / "interruption.json").read_text())
    assert sum(len(trial["moments"]) for trial in record["trials"]) >= 3
    assert not any(trial["problems"] for trial in record["trials"])


def test_the_records_have_every_case_and_no_difference() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("interruption*.json"))
    trials = [trial for file in files for trial in json.loads(file.read_text())["trials"]]
    moments = [moment for trial in trials for moment in trial["moments"]]
    assert not any(trial["problems"] for trial in trials)
    cases = interruption.cases(Path())
    assert {trial["case"] for trial in trials if trial["moments"]} == cases.keys()
    assert {moment["command"] for moment in moments} == {words[0] for case in cases.values() for words in case}
    page = (ROOT / "docs" / "interruptions.md").read_text(encoding="utf-8")
    assert len(moments) >= 60 and f"in {len(trials)} trials with {len(moments)} kills" in page


def test_what_differs_and_what_is_left_over_is_found(tmp_path: Path) -> None:
    found = {"adapter/adapter_model.safetensors": "tensors", "all_results.json: test_loss": 0.5}
    assert not interruption.differing(found, dict(found))
    for part in found:
        (difference,) = interruption.differing(found, {**found, part: "another"})
        assert difference.startswith(part)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    assert not interruption.left_over(run)
    (run / "adapter" / f".values{PARTIAL}").touch()
    assert interruption.left_over(run) == [f".values{PARTIAL}"]
