"""How much sooner a comparison ends when several of its runs share one GPU, and that its tables stay the same.

    PYTHONPATH=src:tests:benchmarks python3 benchmarks/comparison_jobs.py --jobs 1 2 4 --output_dir benchmarks/results --commit COMMIT

compares four ways to train an encoder of MiniLM's shape (random weights) on reviews drawn by code; in a minute, to see that the script
runs: the same with --tiny --jobs 1 2. The page of the report is left out where Plotly is not installed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from command_line import review_rows, write_csv
from harness import commit, hardware, versions
from reltune.errors import InputError
from reltune.runs.comparison.flow import compare
from tiny_models import tiny_tokenizer

METHODS = ["weights", "lora", "bitfit", "full"]
TIMES = ("seconds", "seconds_per_step", "peak_memory_bytes", "analysis_seconds")


def made(place: Path, tiny: bool) -> None:
    """A model and its data."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if not tiny:
        sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    write_csv(place / "train.csv", review_rows(100 if tiny else 2000))


def one(place: Path, jobs: int, tiny: bool) -> tuple[float, dict[str, Any]]:
    """The seconds that a comparison takes with so many runs at a time, and its record."""
    output = place / f"jobs-{jobs}"
    training = {"max_steps": 3, "per_device_train_batch_size": 8} if tiny else {"num_train_epochs": 2.0}
    started = time.perf_counter()
    try:
        compare(
            str(place / "model"), output, methods=METHODS, train_file=str(place / "train.csv"), sizes="usual", seeds=2,
            equal_cost=False, probe_steps=2 if tiny else 50, jobs=jobs, training=training,
        )  # fmt: skip
    except InputError as error:
        if "the report needs" not in str(error):
            raise
    seconds = time.perf_counter() - started
    return seconds, json.loads((output / "comparison.json").read_text(encoding="utf-8"))


def metrics(record: dict[str, Any]) -> dict[str, float]:
    """Mean test loss by method."""
    return {row["label"]: row["metrics"].get("loss") for row in record["tables"][0]["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        made(Path(scratch), options.tiny)
        for jobs in options.jobs:
            seconds, record = one(Path(scratch), jobs, options.tiny)
            rows = record["tables"][0]["rows"]
            runs.append(
                {
                    "jobs": jobs,
                    "seconds": seconds,
                    "loss": metrics(record),
                    "seconds_per_step": {row["label"]: row["seconds_per_step"] for row in rows},
                    "peak_memory_bytes": {row["label"]: row["peak_memory_bytes"] for row in rows},
                    "failed": {row["label"]: row["failed"] for row in rows if row["failed"]},
                }
            )
            print(json.dumps(runs[-1]), flush=True)
    found = {
        "benchmark": "comparison_jobs",
        **commit(options.commit),
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": versions(),
        "tiny": options.tiny,
        "runs": runs,
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "comparison_jobs.json"
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
