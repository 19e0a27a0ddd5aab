"""Runs the demo as `make demo` does, times it, and writes down its comparison: benchmarks/results/demo.json.

python benchmarks/demo_record.py     about ten minutes on an idle machine with two cores
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import harness
from reltune.runs.summary import predicted_and_measured

RESULTS = Path(__file__).parent / "results"
KEPT = (
    "label",
    "trainable_parameters",
    "head_parameters",
    "metrics",
    "learning_rate",
    "steps",
    "seconds_per_step",
    "peak_memory_bytes",
    "adapter_bytes",
    "analysis_seconds",
    "seconds",
)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "demo-run"
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "reltune", "demo", "--output_dir", run], check=True)
        seconds = time.perf_counter() - started

        def read(name: str) -> dict:
            return json.loads((run / name).read_text(encoding="utf-8"))

        comparison = read("comparison/comparison.json")
        rows = next(table["rows"] for table in comparison["tables"] if table["name"] == "usual")
        predicted = predicted_and_measured(read("prediction.json"), read("training_cost.json"))
    record = {
        "benchmark": "demo",
        "command": "make demo",
        **harness.commit(),
        "hardware": harness.hardware(torch.device("cpu")),
        "versions": harness.versions(),
        "seconds_in_all": round(seconds),
        "seeds": comparison["seeds"],
        "rows": [{name: row[name] for name in KEPT if row.get(name) is not None} for row in rows],
        "predicted": [dataclasses.asdict(each) for each in predicted],
        "notes": comparison["notes"],
    }
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{seconds:.0f} s; {RESULTS / 'demo.json'}")


if __name__ == "__main__":
    main()
