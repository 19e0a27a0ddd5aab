"""The cost model against what an H200 was measured to hold; and the sweep at tiny sizes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import cost_sweep
from cost_sweep import TINY
from sweep_cases import CPU, GPU, Case, drawn, make, without_liger

RESULTS = Path(cost_sweep.__file__).parent / "results"


@pytest.mark.parametrize("case", ["single", "single, liger"])
def test_lora_on_an_8b_model_holds_what_an_h200_held(case: str) -> None:
    record = json.loads((RESULTS / "tuner_step_single.json").read_text(encoding="utf-8"))
    (methods,) = (each["methods"] for each in record["cases"] if each["case"] == case)
    (measured,) = (each["peak_bytes"][0] for each in methods if each["method"] == "LoRA, r = 16, bf16")
    row = Case("llama-8b", "lora_bf16", 4, 2048, liger="liger" in case)
    from reltune.cost.memory import allocated

    assert allocated(cost_sweep.count(row, cuda=True)) == pytest.approx(measured, rel=0.002)


def test_drawn_cases_are_none_of_the_listed_ones_and_the_same_for_a_seed() -> None:
    for gpu in (True, False):
        found = drawn(7, 20, gpu, liger=gpu)
        assert found == drawn(7, 20, gpu, liger=gpu) != drawn(8, 20, gpu, liger=gpu)
        assert len(set(found)) == 20 and not set(found) & {*GPU, *CPU}
    assert len({*GPU, *CPU, *found}) >= 60


def test_what_liger_changes_in_a_file_does_not_last_for_the_next_case() -> None:
    from transformers.models.llama import modeling_llama

    without_liger()
    own = modeling_llama.LlamaMLP
    modeling_llama.LlamaMLP = type("LigerMLP", (own,), {})
    model, _ = make(TINY[0], "meta")
    assert modeling_llama.LlamaMLP is own
    assert not any(type(module).__name__ == "LigerMLP" for module in model.modules())


def test_a_case_is_measured_once_and_the_record_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Case] = []

    def measured(_threads: int, work: Any, *args: Any) -> Any:
        if work is cost_sweep.best_pulse:
            return 0.01
        case, what, best, patience = args
        assert patience == 5
        assert best == (0.01 if what == "time" else 0)
        calls.append(case)
        if len(calls) == 1:
            raise RuntimeError("the process ended with status 9")
        values = {"peak_bytes": 10, "seconds": [0.1]}
        return {what: values}

    monkeypatch.setattr(cost_sweep, "with_malloc", lambda what: None)
    monkeypatch.setattr(cost_sweep, "imported", lambda: None)
    monkeypatch.setattr(cost_sweep, "forked", lambda work, *args: measured(*args))
    record = tmp_path / "record.json"
    options = argparse.Namespace(
        device="cpu", what="memory", threads=1, commit="c", drawn=None, seconds=60, keep_calibration=True, tiny=True,
        again=False, record=str(record), patience=5,
    )  # fmt: skip
    cost_sweep.measure(options)
    cost_sweep.measure(options)  # the one that failed again, and no other
    assert calls == [TINY[0], TINY[1], TINY[0]]
    options.what = "time"
    cost_sweep.measure(options)
    (sweep,) = json.loads(record.read_text(encoding="utf-8"))["sweeps"]
    assert [set(entry) for entry in sweep["cases"]] == [{"case", "held_out", "memory", "time"}] * 2
    assert set(sweep["measured"]) == {"memory", "time"}
    calls.clear()
    options.again = True
    cost_sweep.measure(options)
    assert calls == list(TINY)


def test_cases_of_an_earlier_draw_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_sweep, "with_malloc", lambda what: None)
    monkeypatch.setattr(cost_sweep, "imported", lambda: None)
    monkeypatch.setattr(cost_sweep, "forked", lambda *args: {"memory": {"peak_bytes": 10}})
    path = tmp_path / "record.json"
    options = argparse.Namespace(
        device="cpu", what="memory", threads=1, commit="c", drawn=[1, 3], seconds=60, keep_calibration=True, tiny=False,
        again=False, record=str(path), patience=5,
    )  # fmt: skip
    first, second = (drawn(seed, 3, gpu=False, liger=False) for seed in (1, 2))
    for seed in (1, 1, 2):
        options.drawn = [seed, 3]
        cost_sweep.measure(options)
    (sweep,) = json.loads(path.read_text(encoding="utf-8"))["sweeps"]
    held_out = {str(Case(**entry["case"])): entry["held_out"] for entry in sweep["cases"]}
    assert held_out == {str(case): False for case in first} | {str(case): True for case in second}


def test_steps_count_while_the_machine_is_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(cost_sweep.time, "sleep", slept.append)

    def steps(pulses: list[float]) -> dict[str, list[float]]:
        after, takes = iter(pulses), iter(range(1, 100))
        monkeypatch.setattr(cost_sweep, "pulse", lambda: next(after))
        return cost_sweep.calm_steps(lambda: float(next(takes)), 1.0, 2, 30.0)

    assert steps([1.0, 1.1, 1.0, 1.0]) == {"seconds": [1, 2], "pace": [1.1, 1.0]}
    # Disturbed while it runs; then the next one waits for two pulses, and counts, as does the one after it.
    assert steps([1.0, 1.5, 2.0, 2.0, 1.1, 1.0, 1.0, 1.0]) == {"seconds": [2, 3], "pace": [1.1, 1.0]}
    assert len(slept) == 2
    never = steps([2.0] * 400)
    assert never["seconds"] == [1, 2, 3, 4] and never["pace"] == [2.0] * 4


def test_predictions_stand_beside_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = {
        "device": "cpu", "name": "a CPU", "products": {}, "attention": {}, "bandwidth": [[1.0, 1e9], [1e12, 1e10]],
        "per_operation": 1e-5, "laws": {f"float32 {what}": [0, 0, 1e-9] for what in ("product", "forward", "backward")},
    }  # fmt: skip
    measured = {"memory": {"peak_bytes": 2**20}, "time": {"seconds": [0.01, 0.02]}}
    cases = [
        {
            "case": dataclasses.asdict(Case("llama-tiny", method, 2, 16, "float32")),
            "held_out": method == "lora",
            **measured,
        }
        for method in ("lora", "columns")
    ]
    failed = {"case": dataclasses.asdict(TINY[0]), "held_out": False, "memory": {"error": "OutOfMemoryError: no"}}
    sweep = {"device": "a CPU", "cuda": False, "calibration": calibration, "cases": [*cases, failed]}
    record, drawing = tmp_path / "record.json", tmp_path / "picture.svg"
    record.write_text(json.dumps({"sweeps": [sweep]}), encoding="utf-8")
    assert (
        cost_sweep.predict(argparse.Namespace(record=str(record), held_out=None, cuda=None, picture=str(drawing))) == 0
    )
    written = json.loads(record.read_text(encoding="utf-8"))["sweeps"][0]["cases"]
    for entry in written[:2]:
        counted = cost_sweep.count(Case(**entry["case"]), cuda=False)
        assert entry["predicted"]["peak_bytes"] >= counted.bytes and entry["predicted"]["trained"] == counted.trained
    assert "predicted" not in written[2]
    assert written[0]["unseen"] == {key: written[0]["predicted"][key] for key in ("peak_bytes", "seconds")}
    assert "unseen" not in written[1]
    shown = capsys.readouterr().out
    assert "a CPU, 1 cases, held out; 0 failed" in shown and "a CPU, 2 cases, fitted; 1 failed" in shown
    assert "memory of 1 within 5%" in shown and "time of 1 within 15%" in shown
    root = ElementTree.fromstring(drawing.read_text(encoding="utf-8"))
    points = [each for each in root.iter() if each.tag.endswith("circle") and len(each)]
    assert len(points) == 4  # two cases, memory and time
    # A case that has been seen keeps what was told of it before, and is told anew.
    earlier = {"peak_bytes": 2**21, "seconds": {"forward": 0.02}}
    written[0] |= {"held_out": False, "unseen": earlier, "predicted": {}}
    record.write_text(json.dumps({"sweeps": [{**sweep, "cases": [written[0]]}]}), encoding="utf-8")
    cost_sweep.predict(argparse.Namespace(record=str(record), held_out=None, cuda=None, picture=""))
    (again,) = json.loads(record.read_text(encoding="utf-8"))["sweeps"][0]["cases"]
    kept = {"peak_bytes": 7, "seconds": {"forward": 0.5}, "by_fitcheck": None}
    replaced = {**again, "replaced": True, "predicted": kept}
    record.write_text(json.dumps({"sweeps": [{**sweep, "cases": [replaced]}]}), encoding="utf-8")
    cost_sweep.predict(argparse.Namespace(record=str(record), held_out=None, cuda=None, picture=""))
    assert json.loads(record.read_text(encoding="utf-8"))["sweeps"][0]["cases"][0]["predicted"] == kept
    assert again["unseen"] == earlier and again["predicted"]["seconds"]["backward"] > 0
    assert (
        "memory of 1, as told before they were seen, within 5%: 0%; lowest +100.0%, highest +100.0%"
        in capsys.readouterr().out
    )
