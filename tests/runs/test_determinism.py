"""The same seed gives the same bits in another process; with another number of threads, the same but for rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import review_rows, write_csv
from tiny_models import save_tiny_bert


def run(place: Path, name: str, threads: int, seed: int = 7) -> dict[str, torch.Tensor]:
    """The scores, the head and the adapter of a run in a process of its own."""
    words = [
        "run",
        "--model_name_or_path",
        "model",
        "--train_file",
        "rows.csv",
        "--output_dir",
        name,
        "--seed",
        str(seed),
    ]
    words += [
        "--budget",
        "2%",
        "--granularity",
        "column",
        "--probe_steps",
        "8",
        "--max_steps",
        "12",
        "--learning_rate",
        "0.01",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "reltune", *words], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = [place / name / part for part in ("relevance/scores.safetensors", "relevance/head.safetensors")]
    files.append(place / name / "adapter" / "adapter_model.safetensors")
    return {f"{file.name}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "rows.csv", review_rows(80))
    first, again = run(tmp_path, "first", 1), run(tmp_path, "again", 1)
    assert first.keys() == again.keys() and len(first) > 5
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    threads = run(tmp_path, "threads", 2)
    for name, value in first.items():
        torch.testing.assert_close(
            threads[name], value, rtol=1e-3, atol=1e-4, msg=lambda words, name=name: f"{name}: {words}"
        )
    other = run(tmp_path, "other", 1, seed=8)
    assert any(not torch.equal(value, other[name]) for name, value in first.items() if name in other)
