"""The cost model against what an H200 was measured to hold; and the sweep at tiny sizes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import cost_sweep
from cost_sweep import CPU, GPU, Case, drawn

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


def test_predictions_stand_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = [[1.0, 1e9], [1e12, 1e10]]
    both = {f"float32 {way}": rates for way in ("forward", "backward")}
    sweep = {
        "hardware": {"cpu": "a CPU"},
        "drawn": [1, 2],
        "calibration": {
            "device": "cpu", "name": "a CPU", "products": {"float32": rates}, "attention": both, "bandwidth": rates,
            "per_operation": 1e-5,
        },
        "cases": [
            {
                "case": {"model": "llama-tiny", "method": method, "batch": 2, "length": 16, "dtype": "float32"},
                "error": None, "before_bytes": 10, "peak_bytes": 10 + 16 * 2**20, "seconds": [0.01, 0.02],
            }
            for method in ("lora", "columns")
        ] + [{"case": {}, "error": "OutOfMemoryError: no"}],
    }  # fmt: skip
    (tmp_path / "cost_sweep_cpu.json").write_text(json.dumps(sweep), encoding="utf-8")
    options = argparse.Namespace(files=[str(tmp_path / "cost_sweep_cpu.json")], output_dir=str(tmp_path))
    assert cost_sweep.predict(options) == 0
    written = json.loads((tmp_path / "cost_sweep.json").read_text(encoding="utf-8"))["sweeps"][0]["cases"]
    assert all(record["predicted"]["peak_bytes"] > 15 * 2**20 for record in written[:2])
    assert "predicted" not in written[2]
    shown = capsys.readouterr().out
    assert "2 cases, held out; 1 failed" in shown and "memory within 5%" in shown and "time within 15%" in shown
