"""The memory that streaming takes, measured as the benchmark does it, on a checkpoint that is small for that."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "streaming_memory.py"


@pytest.mark.slow
def test_peak_is_near_the_largest_tensor(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("streaming_memory", FILE)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    sizes = benchmark.write_checkpoint(tmp_path, layers=10, hidden=1024, intermediate=4096, vocab=96000)
    largest, whole = sizes["largest_tensor_bytes"], sizes["checkpoint_bytes"]
    assert largest > 190e6 and whole > 3.5 * largest
    run = benchmark.measured(tmp_path, "streaming", ["magnitude"], "cpu")
    assert "error" not in run, run
    # what is not weights is some 40 MB: modules that are imported late, blocks of rows
    assert 0.9 * largest < run["peak_bytes"] < largest + 120e6, run
    loaded = benchmark.measured(tmp_path, "loaded", ["magnitude"], "cpu")
    assert loaded["peak_bytes"] > 0.9 * whole, loaded  # what the measurement makes of a model in memory
    assert run["fingerprint"] == loaded["fingerprint"]
    assert "error" in benchmark.measured(tmp_path / "absent", "streaming", ["magnitude"], "cpu")
