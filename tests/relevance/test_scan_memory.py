"""The memory that streaming takes, measured as the benchmark does it, on a checkpoint that is small for that."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "streaming_memory.py"


@pytest.fixture
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("streaming_memory", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_peak_is_near_the_largest_tensor(benchmark, tmp_path: Path) -> None:
    sizes = benchmark.write_checkpoint(tmp_path, layers=10, hidden=1024, intermediate=4096, vocab=96000)
    largest, whole = sizes["largest_tensor_bytes"], sizes["checkpoint_bytes"]
    assert largest > 190e6 and whole > 3.5 * largest
    run = benchmark.measured(tmp_path, "streaming", ["magnitude"], "cpu")
    assert "error" not in run, run
    # what is not weights is some 40 MB: modules that are imported late, blocks of rows
    assert 0.9 * largest < run["peak_bytes"] < largest + 120e6, run
    # the tensor itself is pages of its file
    assert run["peak_anonymous_bytes"] < 120e6, run
    loaded = benchmark.measured(tmp_path, "loaded", ["magnitude"], "cpu")
    assert loaded["peak_bytes"] > 0.9 * whole, loaded  # what the measurement makes of a model in memory
    assert run["fingerprint"] == loaded["fingerprint"]
    assert "error" in benchmark.measured(tmp_path / "absent", "streaming", ["magnitude"], "cpu")


@pytest.mark.slow
def test_decompositions_take_three_short_squares_and_no_more(benchmark, tmp_path: Path) -> None:
    sizes = benchmark.write_checkpoint(tmp_path, layers=1, hidden=2048, intermediate=2048, vocab=4096)
    assert sizes["tensors"] > 8
    run = benchmark.measured(tmp_path, "streaming", ["spectral_snr", "principal"], "cpu", ["down_proj", "o_proj"])
    assert "error" not in run, run
    square = 8 * 2048**2
    # beside them two blocks of 34 MB and the buffers of the products; eigh out of place would take a square more
    assert 2.5 * square < run["peak_anonymous_bytes"] < 3 * square + 150e6, run
