"""The benchmark of a training step over a base in few bits runs from end to end on a small model."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest

import tuner_step


@pytest.mark.parametrize("bits", [4, 8])
def test_a_step(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--tiny", "--cases", f"{bits}bit", "--repeats", "1", "--steps", "1", "--threads", "1", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["tuner_step", *words, "--output_dir", str(tmp_path)])
    monkeypatch.setattr(gc, "collect", lambda: 0)  # before every repeat: most of the time of a tiny run
    assert tuner_step.main() == 0
    found = json.loads((tmp_path / "tuner_step.json").read_text())
    assert not found["problems"]
    (case,) = found["cases"]
    assert case["case"] == f"{bits}bit" and len(case["methods"]) == 4
    assert [check["passed"] for check in found["checks"] if check["required"]] == [True, True]
