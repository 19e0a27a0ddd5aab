"""Killed at random moments, a run goes on to the result of an uninterrupted one: the benchmark of that name, in short."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import interruption
from reltune.files import PARTIAL
from reltune.relevance import resumption


def test_a_killed_run_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumption, "EVERY", 0.2)
    interruption.prepare(tmp_path)
    harness = interruption.Harness(tmp_path, ["run"])
    draw = random.Random(3)
    moments = 0
    while moments < 3:  # a kill comes too late where the process is quicker than before
        trial = harness.trial("run", draw, kills=3)
        assert not trial["problems"], trial
        moments += len(trial["moments"])
    found = harness.whole["run"]
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors", "relevance/scores.safetensors"} <= set(
        found
    )
    for part in ("adapter/adapter_model.safetensors", "all_results.json: test_loss", "plan/plan.yaml"):
        (difference,) = interruption.differing(found, {**found, part: "another"})
        assert difference.startswith(part)
    run = tmp_path / "trial" / "run"
    (run / "adapter" / f".values{PARTIAL}").touch()
    assert interruption.left_over(run) == [f".values{PARTIAL}"]
