"""The float8 benchmarks run from end to end on small models."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import float8_products
import float8_quality
import tuner_step
from command_line import review_rows, write_csv
from tiny_models import save_tiny_bert


def result(script: Any, monkeypatch: Any, place: Path, *words: object) -> dict[str, Any]:
    command = [script.__name__, "--threads", "1", "--commit", "abc", "--output_dir", str(place), *map(str, words)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # before every repeat: most of the time of a tiny run
    assert script.main() == 0
    found: dict[str, Any] = json.loads((place / f"{script.__name__}.json").read_text())
    assert not found["problems"]
    return found


def test_the_parts_of_a_map(tmp_path: Path, monkeypatch: Any) -> None:
    found = result(float8_products, monkeypatch, tmp_path, "--tiny", "--repeats", 1)
    assert all(method["seconds"] for method in found["cases"][0]["methods"])
    errors = [value for name, value in found["values"].items() if "float8" in name]
    assert len(errors) == 2 and all(0.01 < error < 0.06 for error in errors)


def test_a_step(tmp_path: Path, monkeypatch: Any) -> None:
    found = result(tuner_step, monkeypatch, tmp_path, "--tiny", "--cases", "fp8", "--repeats", 1)
    methods = {m["method"]: m for case in found["cases"] for m in case["methods"]}
    assert len(methods["columns, r = 4, fp8"]["seconds"]) == 1
    assert [check["passed"] for check in found["checks"] if check["required"]] == [True, True]
    assert len([check for check in found["checks"] if check["check"].endswith("time")]) == 4
    losses = [methods[f"columns, r = 4, fp8{how}"]["config"]["losses"][0] for how in ("", ", no waits")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_quality(tmp_path: Path, monkeypatch: Any) -> None:
    save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "texts.csv", review_rows(120))
    tasks = [dataclasses.replace(float8_quality.TASKS[0], tokens=16, rate=1e-2)]
    monkeypatch.setattr(float8_quality, "TASKS", tasks)
    words = ["--prepare", tmp_path / "in", "--encoder", tmp_path / "model", "--data", tmp_path / "texts.csv"]
    monkeypatch.setattr(sys, "argv", ["float8_quality", "--commit", "abc", *map(str, words)])
    assert float8_quality.main() == 0
    words = ["--inputs", tmp_path / "in", "--seeds", 1, "--epochs", 4, "--texts", 80, "--test", 40]
    found = result(float8_quality, monkeypatch, tmp_path, *words)
    assert [run["trained over"] for run in found["runs"]] == ["high precision"] * 2 + ["float8"] * 3
    by_place = {(r["trained over"], r["evaluated on"]): r for r in found["runs"] if r["when"] == "after"}
    assert len(by_place) == 3 and all(run["accuracy"] > 0.8 for run in by_place.values())
    assert 0.01 < found["values"]["encoder: relative error of one product"]["median"] < 0.06
