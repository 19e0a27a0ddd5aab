"""Runs methods side by side and writes down what they took. Every other file here measures through this one.

Methods of one case take turns (A B C A B C …) after a warm-up each, so that what else the machine does falls on all of
them alike. All repeats are kept. A method that raises is recorded with its error; where it was required, the run's
exit code is 1, as it is for a check that fails and for a required method that never ran.

Memory is what torch's CUDA allocator held at most during a repeat, and what it held before. On a CPU no figure is
given: a process has one peak, and methods that take turns in it cannot be told apart.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "triton", "numpy")


class Timed(float):
    """What a method's ``run`` may give: the seconds that count, where only a part of it is to be timed."""


@dataclasses.dataclass(frozen=True)
class Method:
    """``run`` is what is timed. ``around`` is entered before each repeat and left after it, untimed: hooks, modes."""

    name: str
    run: Callable[[], Any]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    required: bool = True
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Machine:
    """The clock and the memory that repeats are measured by."""

    device: torch.device
    clock: Callable[[], float] = time.perf_counter

    def ready(self) -> None:
        """Wait for the device, and forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def held(self) -> int | None:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else None

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class TimedLoader:
    """A data loader that notes when each batch is asked for: what a loop over data does with one takes until the next."""

    def __init__(self, machine: Machine, batches: Sequence[Any]) -> None:
        self.machine, self.batches = machine, batches
        self.asked: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.asked.append(self.machine.now())
            yield batch
        self.asked.append(self.machine.now())

    def seconds(self, skip: int = 1) -> Timed:
        """Mean time of a batch, without the first ones, in which a loop may set things up."""
        after = self.asked[skip:]
        return Timed((after[-1] - after[0]) / (len(after) - 1))


class Benchmark:
    """One result file: cases, each with methods side by side, and checks of their results."""

    def __init__(
        self,
        name: str,
        arguments: Mapping[str, Any],
        commit: Mapping[str, Any],
        machine: Machine,
        packages: Iterable[str] = (),
    ) -> None:
        self.machine = machine
        self.result: dict[str, Any] = {
            "benchmark": name,
            "arguments": dict(arguments),
            **commit,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "hardware": hardware(machine.device),
            "versions": versions(packages),
            "memory": "peak of torch's CUDA allocator per repeat"
            if machine.device.type == "cuda"
            else "not measured: methods that take turns share one process and its peak",
            "cases": [],
            "checks": [],
        }

    def measure(
        self, case: str, config: Mapping[str, Any], methods: Sequence[Method], repeats: int, warmups: int = 1
    ) -> dict[str, dict[str, Any]]:
        """Run the methods in turns. Gives each method's record, which is in the result too."""
        records: dict[str, dict[str, Any]] = {}
        for method in methods:
            if method.name in records:
                raise ValueError(f"two methods of {case} are called {method.name!r}")
            records[method.name] = {
                "method": method.name,
                "required": method.required,
                "config": dict(method.config),
                "seconds": [],
                "peak_bytes": [],
                "held_bytes": [],
                "error": None,
            }
        self.result["cases"].append({"case": case, "config": dict(config), "methods": list(records.values())})
        for turn in range(warmups + repeats):
            for method in methods:
                record = records[method.name]
                if record["error"] is None:
                    self._repeat(method, record, counted=turn >= warmups)
        return records

    def _repeat(self, method: Method, record: dict[str, Any], counted: bool) -> None:
        machine = self.machine
        gc.collect()
        try:
            with method.around():
                machine.ready()
                held, started = machine.held(), machine.now()
                given = method.run()
                seconds, peak = machine.now() - started, machine.peak()
                if isinstance(given, Timed):
                    seconds = float(given)
                given = None
        except Exception as error:  # whatever it is: it belongs into the record, and the others go on
            record["error"] = described(error)
        else:
            print(f"  {record['method']}: {seconds:.4g} s", file=sys.stderr, flush=True)  # long work shows progress
            if counted:
                record["seconds"].append(seconds)
                if peak is not None:
                    record["peak_bytes"].append(peak)
                    record["held_bytes"].append(held)
            return
        machine.free()  # outside the handler, which keeps the failed method's tensors alive

    def failed(
        self, case: str, config: Mapping[str, Any], method: str, error: BaseException, required: bool = True
    ) -> None:
        """Record a method that could not even be set up."""
        record = {"method": method, "required": required, "config": {}, "seconds": [], "error": described(error)}
        self.result["cases"].append({"case": case, "config": dict(config), "methods": [record]})

    def check(self, name: str, value: float, limit: float, at_least: bool = False, required: bool = True) -> bool:
        """Hold a figure against its limit. One that is not finite never passes."""
        value = float(value)
        passed = math.isfinite(value) and (value >= limit if at_least else value <= limit)
        self.result["checks"].append(
            {
                "check": name,
                "value": value if math.isfinite(value) else repr(value),
                "limit": limit,
                "sense": "at least" if at_least else "at most",
                "required": required,
                "passed": passed,
            }
        )
        return passed

    def value(self, name: str, value: Any) -> None:
        """Write down a figure that follows from others."""
        if isinstance(value, float) and not math.isfinite(value):
            value = repr(value)  # JSON has no such numbers
        self.result.setdefault("values", {})[name] = value

    def ratio(self, case: str, method: str, to: str, key: str = "seconds") -> float:
        """Median of one method over that of another, nan where one is missing."""
        return self.median(case, method, key) / self.median(case, to, key)

    def median(self, case: str, method: str, key: str = "seconds") -> float:
        for found in self.result["cases"]:
            for record in found["methods"]:
                if found["case"] == case and record["method"] == method and record["error"] is None and record.get(key):
                    return statistics.median(record[key])
        return math.nan

    def problems(self) -> list[str]:
        """Why this run is no success."""
        found = []
        for case in self.result["cases"]:
            for record in case["methods"]:
                if record["required"] and (record["error"] is not None or not record["seconds"]):
                    found.append(f"{case['case']}: {record['method']}: {record['error'] or 'no repeat was measured'}")
        for check in self.result["checks"]:
            if check["required"] and not check["passed"]:
                found.append(f"check {check['check']}: {check['value']}, wanted {check['sense']} {check['limit']}")
        if not self.result["cases"] and not self.result["checks"]:
            found.append("nothing was measured")
        return found

    def save(self, directory: str | os.PathLike, name: str | None = None) -> Path:
        """Write the result so far. Call it after each case: a run that is cut short then keeps what it has."""
        path = Path(directory) / f"{name or self.result['benchmark']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.result["problems"] = self.problems()
        partial = path.with_suffix(".json.partial")
        partial.write_text(json.dumps(self.result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    def finish(self, directory: str | os.PathLike, name: str | None = None) -> int:
        """Save, print the table, and give the exit code."""
        path = self.save(directory, name)
        print(self.table())
        print(f"\n{path}")
        for problem in self.result["problems"]:
            print(f"FAILED {problem}", file=sys.stderr)
        return 1 if self.result["problems"] else 0

    def table(self) -> str:
        """Per case the median, the spread, the peak, and last the ratio to the case's first method; then the checks."""
        lines = []
        for case in self.result["cases"]:
            lines.append(f"\n{case['case']}")
            base = math.nan
            for record in case["methods"]:
                if record["error"] is not None:
                    lines.append(f"  {record['method']:34} {record['error'][:150]}")
                    continue
                if not record["seconds"]:
                    lines.append(f"  {record['method']:34} not measured")
                    continue
                median = statistics.median(record["seconds"])
                base = median if math.isnan(base) else base
                spread = f"{min(record['seconds']):.3f}–{max(record['seconds']):.3f}"
                peak = f"{max(record['peak_bytes']) / 2**30:8.2f} GiB" if record.get("peak_bytes") else ""
                lines.append(f"  {record['method']:34} {median:8.3f} s ({spread}) {peak}  ×{median / base:.3f}")
        for name, value in self.result.get("values", {}).items():
            lines.append(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")
        for check in self.result["checks"]:
            sign = "≥" if check["sense"] == "at least" else "≤"
            verdict = "ok  " if check["passed"] else "FAIL" if check["required"] else "miss"
            value = f"{check['value']:.4g}" if isinstance(check["value"], float) else check["value"]
            lines.append(f"  {verdict} {check['check']}: {value} {sign} {check['limit']:g}")
        return "\n".join(lines)


def described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:1000]}"


def arguments(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """Parse the command line, with the options that every benchmark has."""
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument("--commit", default="", help="of the code that is measured, where there is no git to ask")
    parser.add_argument("--output_dir", default=str(Path(__file__).parent / "results"))
    parser.add_argument("--name", default=name, help="of the result file")
    options = parser.parse_args()
    try:
        options.commit = commit(options.commit)
    except OSError as error:
        parser.error(f"{error}; pass --commit")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device; leave --device out")
    torch.set_num_threads(options.threads)
    return options


# Where things lie on this machine, and what is written down elsewhere.
NOT_RECORDED = ("commit", "output_dir", "name", "inputs", "prepare", "encoder", "decoder", "data")


def benchmark(options: argparse.Namespace, packages: Iterable[str] = ()) -> Benchmark:
    """The benchmark that the command line describes."""
    about = {k: v for k, v in vars(options).items() if k not in NOT_RECORDED}
    return Benchmark(options.name, about, options.commit, Machine(torch.device(options.device)), packages)


def commit(given: str = "") -> dict[str, Any]:
    """The commit measured, and whether files differ from it (None: unknown)."""
    if given:
        return {"commit": given, "dirty": None}
    here = Path(__file__).parent

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True, cwd=here).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", "..", ":!results")),
        }
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError("git does not say which commit this is") from error


def hardware(device: torch.device) -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": pages,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
        for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            if variable in os.environ:
                found[variable] = os.environ[variable]
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Iterable[str] = ()) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*PACKAGES, *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
