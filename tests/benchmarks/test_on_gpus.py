"""Which results the record of benchmarks/on_gpus.py keeps, and what counts as passed."""

import subprocess

import pytest
import torch

import on_gpus
from reliability_page import record

COLUMNS, DIRECTIONS = (
    ("method columns", ["--method", "columns"]),
    (
        "method directions",
        ["--method", "directions", "--budget", "10%"],
    ),
)


def run(started, *rows):
    return {"commit": started, "started": started, "cases": list(rows)}


def row(case, loss=0.0, tensors=0.0, **facts):
    return {"case": case[0], "flags": case[1], "loss": loss, "tensors": tensors, **facts}


def test_the_latest_result_of_each_case_is_kept_and_judged_by_todays_limit():
    first = run("1", row(COLUMNS), row(DIRECTIONS, tensors=7e-3, limit=1e-3, passed=False))
    later = run("2", row(COLUMNS, loss=1.0), {"case": DIRECTIONS[0], "error": "not begun: no time left"})
    other = run("3", row(("method columns", ["--method", "rows"])), row(("gone", [])))
    kept = on_gpus.merged([later, other, first])
    assert [(part["commit"], [one["case"] for one in part["cases"]]) for part in kept] == [
        ("1", ["method directions"]),
        ("2", ["method columns"]),
    ]
    assert [(part["cases"][0]["passed"], part["cases"][0]["limit"]) for part in kept] == [
        (True, on_gpus.ROUNDED),
        (False, on_gpus.EXACT),
    ]
    assert on_gpus.merged(kept) == kept


def test_the_record_in_the_repository_is_what_the_script_would_write():
    runs = record("on_gpus")["runs"]
    assert on_gpus.merged(runs) == runs


def test_other_units_have_another_limit_and_must_be_few():
    case = next(case for case in on_gpus.every() if case.name == "run, 2 GPUs")
    facts = {"loss": 2e-3, "tensors": None}
    assert on_gpus.judged(case, {**facts, "alike": 0.9})["passed"]
    assert not on_gpus.judged(case, {**facts, "alike": 0.29})["passed"]
    assert not on_gpus.judged(case, {**facts, "tensors": 0.0, "alike": 1.0})["passed"]


def test_how_far_adapters_are_apart():
    a = {"x.indices": torch.tensor([1, 2, 3]), "x.values": torch.tensor([3.0, 4.0])}
    same = {**a, "x.values": torch.tensor([3.0, 4.5])}
    assert on_gpus._apart({"loss": 2.0, "tensors": same}, {"loss": 1.0, "tensors": a}) == {
        "loss": 1.0,
        "tensors": pytest.approx(0.1),
        "alike": 1.0,
    }
    other = {**a, "x.indices": torch.tensor([2, 3, 4])}
    found = on_gpus._apart({"loss": 1.0, "tensors": other}, {"loss": 1.0, "tensors": a})
    assert found == {"loss": 0.0, "tensors": None, "alike": 0.5}


@pytest.mark.parametrize(("words", "written", "passed"), [("", False, True), ("", True, False), ("else", False, False)])
def test_a_refusal_is_the_words_and_nothing_written(words, written, passed, tmp_path, monkeypatch):
    case = next(case for case in on_gpus.every() if case.refused)

    def command(line, place, devices, launched):
        assert "--fsdp" in line and len(devices) == 2
        if written:
            (tmp_path / "run-0").mkdir()
        raise subprocess.CalledProcessError(1, line, stderr=f"reltune: error: {words or case.refused}, and more")

    monkeypatch.setattr(on_gpus, "_command", command)
    assert on_gpus.run_case(case, tmp_path, 0, [0, 1])["passed"] == passed
