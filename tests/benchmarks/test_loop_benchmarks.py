"""The benchmarks of the training loop, of long texts and of later passes run from end to end on a small model."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import frozen_prefix
import long_context
import streamed_weights
import training_loop


def result(script: Any, monkeypatch: Any, place: Path, *words: str) -> dict[str, Any]:
    command = [
        script.__name__,
        "--tiny",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--commit",
        "abc",
        "--output_dir",
        str(place),
    ]
    monkeypatch.setattr(sys, "argv", [*command, *words])
    monkeypatch.setattr(gc, "collect", lambda: 0)  # before every repeat: most of the time of a tiny run
    assert script.main() == 0
    found: dict[str, Any] = json.loads((place / f"{script.__name__}.json").read_text())
    assert not found["problems"]
    return found


def test_the_loop_beside_the_bare_step(tmp_path: Path, monkeypatch: Any) -> None:
    found = result(training_loop, monkeypatch, tmp_path)
    (case,) = found["cases"]
    assert [method["method"] for method in case["methods"]] == ["bare step", "loop", "loop, TRL's step"]
    assert all(method["seconds"] for method in case["methods"]) and len(found["checks"]) == 1


def test_a_long_text(tmp_path: Path, monkeypatch: Any) -> None:
    found = result(long_context, monkeypatch, tmp_path)
    losses = [method["config"]["losses"][-1] for method in found["cases"][0]["methods"]]
    assert losses[0] == losses[1] and losses[2] == losses[3] and len(losses) == 5
    assert [check["passed"] for check in found["checks"] if check["required"]] == [True, True]


def test_steps_above_the_frozen_layers(tmp_path: Path, monkeypatch: Any) -> None:
    found = result(frozen_prefix, monkeypatch, tmp_path)
    with_liger = importlib.util.find_spec("liger_kernel") is not None
    assert [case["case"] for case in found["cases"]][:3] == ["minilm", "8b", "8b, float8"]
    assert len(found["checks"]) == 8 + 2 * with_liger
    names = [method["method"] for case in found["cases"] for method in case["methods"] if method["seconds"]]
    assert len(names) == 12 + 2 * with_liger
    assert sum(name.endswith(frozen_prefix.LATER) for name in names) == 4 + with_liger


def test_weights_in_host_memory(tmp_path: Path, monkeypatch: Any) -> None:
    found = result(streamed_weights, monkeypatch, tmp_path)
    assert [case["case"] for case in found["cases"]] == ["on the card", "streamed"]
    assert [check["passed"] for check in found["checks"] if check["required"]] == [True, True, True]
