"""A comparison's results as its record: the tables, and every training that they rest on."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reltune import __version__
from reltune.config.comparison import ComparisonConfig
from reltune.report.numbers import measured
from reltune.report.record import ComparisonRecord, Difference, WayResult, WayTable
from reltune.runs import training
from reltune.runs.comparison.cells import Cell
from reltune.runs.comparison.directory import read
from reltune.runs.comparison.rates import on_edge
from reltune.runs.comparison.schedule import Grid, State
from reltune.runs.comparison.statistics import DRAW_SEED, DRAWS, LEVEL, deviation, difference

REFERENCES = ("lora", "full")
TITLES = {
    "equal": "Equal size: {count:,} trainable parameters, or as near as a method comes",
    "usual": "Usual size",
    "equal_cost": "Equal total cost: what an analysis takes, the others train longer",
}


def record_of(
    state: State, config: ComparisonConfig, notes: Sequence[str], count: int, graphs: bool = False
) -> dict[str, Any]:
    """``comparison.json`` as a mapping: what ``ComparisonRecord`` reads, and beside it every training and where it ran."""
    grid = state.grid
    before = {seed: read(state.directory.before(seed)) or {} for seed in grid.seeds}
    trainings = _trainings(state)
    metric = next(iter(measured([one["test"] for one in trainings if one.get("test")], "test_")), "loss")
    tables = []
    for size in ("equal", "usual"):
        if cells := [cell for cell in grid.cells if cell.in_table(size)]:
            rows = [_row(state, cell, trainings, before, metric, False) for cell in cells]
            tables.append(WayTable(size, TITLES[size].format(count=count), rows))
    if state.longest_analysis():
        rows = [_row(state, cell, trainings, before, metric, True) for cell in grid.at_equal_cost()]
        tables.append(WayTable("equal_cost", TITLES["equal_cost"], rows))
    for table in tables:
        table.rows.insert(0, _untrained(before, metric))
        _add_differences(table, trainings, metric, table.name == "equal_cost", grid)
    record = ComparisonRecord(metric, grid.chosen_by, list(grid.seeds), tables, [*notes, *_notes(state, config)])
    return {
        "format": "reltune comparison 1",
        "reltune": __version__,
        "commit": commit(),
        "machine": training.machine(),
        "jobs": config.jobs,
        "cuda_graphs": graphs or bool(config.shared.get("cuda_graphs")),
        "bootstrap": {"draws": DRAWS, "seed": DRAW_SEED, "level": LEVEL, "pairs": "trainings with the same seed"},
        **dataclasses.asdict(record),
        "config": {
            **config.shared,
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "shared"},
        },
        "before": {str(seed): values for seed, values in before.items()},
        "trainings": trainings,
    }


def _trainings(state: State) -> list[dict[str, Any]]:
    """Every training that was made, also those that failed and those at other rates."""
    found = []
    for cell in state.grid.cells:
        settled = state.settled(cell)
        if settled is None or settled["failed"]:
            continue
        best = state.best(cell)
        places = [(steps, state.grid.seeds[0], 0) for steps in state.tried(cell)]
        if best is not None:
            places += [(best, seed, 0) for seed in state.grid.seeds[1:]]
            places += [(best, seed, more) for seed in state.grid.seeds if (more := state.longer(cell, seed))]
        for steps, seed, max_steps in places:
            result = state.result(cell, steps, seed, max_steps)
            if result is not None:
                chosen = steps == best
                tested = state.tested(cell, steps, seed, max_steps) if chosen else None
                found.append({**result, "longer": bool(max_steps), "chosen": chosen, "test": tested})
    return found


def _row(
    state: State,
    cell: Cell,
    trainings: Sequence[Mapping[str, Any]],
    before: Mapping[int, Mapping[str, float]],
    metric: str,
    cost: bool,
) -> WayResult:
    """A cell's row, of its longer trainings where it has them at equal ``cost``."""
    row = WayResult(cell.label, cell.method)
    if reason := state.failed(cell):
        row.failed = reason
        return row
    own = [one for one in trainings if one["cell"] == cell.name and one["chosen"]]
    longer = cost and any(one["longer"] for one in own)
    own = [one for one in own if one["longer"] == longer or (longer and one["failed"])]  # what failed has no longer one
    failures = [one["failed"] or (one["test"] or {}).get("failed") for one in own]
    row.failed = next((f"seed {one['seed']}: {why}" for one, why in zip(own, failures, strict=True) if why), "")
    good = [one for one, why in zip(own, failures, strict=True) if not why and one["test"]]
    row.seeds = len(good)
    if not good:
        return row
    if row.failed:
        row.failed += f" The row is of {len(good)} seed{'' if len(good) == 1 else 's'}."
    names = ["loss", *measured([one["test"] for one in good], "test_")]
    for name in dict.fromkeys([metric, *names]):
        values = [one["test"][f"test_{name}"] for one in good if f"test_{name}" in one["test"]]
        if values:
            row.metrics[name], row.deviations[name] = statistics.fmean(values), deviation(values)
        changes = [
            one["test"][f"forgetting_{name}"] - before[one["seed"]][f"forgetting_{name}"]
            for one in good
            if f"forgetting_{name}" in one["test"] and f"forgetting_{name}" in before[one["seed"]]
        ]
        if changes:
            row.forgetting[name] = statistics.fmean(changes)
    row.trainable_parameters = round(statistics.fmean(one["trainable_parameters"] for one in good))
    row.head_parameters = good[0]["head_parameters"]
    row.learning_rate = good[0]["learning_rate"]
    row.edge = on_edge(state.tried(cell), state.grid.largest)
    row.steps = good[0]["steps"]
    paces = [one["seconds_per_step"] for one in good if one["seconds_per_step"] is not None]
    row.seconds_per_step = statistics.median(paces) if paces else None
    peaks = [one["peak_memory_bytes"] for one in good if one["peak_memory_bytes"] is not None]
    row.peak_memory_bytes = max(peaks, default=None)
    row.adapter_bytes = good[0]["adapter_bytes"]
    row.analysis_seconds = state.analysis_seconds(cell)
    if row.seconds_per_step is not None:
        row.seconds = row.steps * row.seconds_per_step + (row.analysis_seconds or 0.0)
    return row


def _untrained(before: Mapping[int, Mapping[str, float]], metric: str) -> WayResult:
    """The base model with the head that every method starts from."""
    row = WayResult("before training", "", seeds=len(before))
    known = [values for values in before.values() if values]
    for name in dict.fromkeys([metric, "loss", *measured(known, "test_")]):
        values = [one[f"test_{name}"] for one in known if f"test_{name}" in one]
        if values:
            row.metrics[name], row.deviations[name] = statistics.fmean(values), deviation(values)
    return row


def _add_differences(
    table: WayTable, trainings: Sequence[Mapping[str, Any]], metric: str, cost: bool, grid: Grid
) -> None:
    """To LoRA and to full fine-tuning, in pairs of the same seed."""
    labels = {cell.label: cell.name for cell in grid.cells}

    def by_seed(row: WayResult) -> dict[int, float]:
        own = [one for one in trainings if one["cell"] == labels.get(row.label) and one["chosen"] and one["test"]]
        longer = cost and any(one["longer"] for one in own)
        return {
            one["seed"]: one["test"][f"test_{metric}"]
            for one in own
            if one["longer"] == longer and f"test_{metric}" in one["test"]
        }

    for name in REFERENCES:
        reference = next((row for row in table.rows if row.method == name and row.metrics), None)
        if reference is None:
            continue
        for row in table.rows:
            if row is not reference and row.method:
                found: Difference | None = difference(by_seed(row), by_seed(reference))
                if found is not None:
                    row.differences[name] = found


def _notes(state: State, config: ComparisonConfig) -> list[str]:
    grid = state.grid
    notes = ["Every method has the same data, head start, steps, schedule and order of batches."]
    if grid.trials > 1:
        notes.append(
            f"Each method's learning rate is the best of {grid.trials} half-decades around its default on validation data with seed "
            f"{grid.seeds[0]}, or of up to {grid.trials + 2} where the best lay on an edge; * marks a best rate that still lies on one."
        )
    else:
        notes.append("Rates were not tuned: each method has its default rate (docs/learning_rates.md).")
    if len(grid.seeds) == 1:
        notes.append("One seed: there is no interval, and a small difference may be chance. Give --seeds 3 or more.")
    else:
        notes.append(
            f"± is the standard deviation between {len(grid.seeds)} seeds; intervals are 95% percentile bootstrap intervals of the "
            f"mean difference, pairs of the same seed drawn {DRAWS:,} times (seed {DRAW_SEED}). Of few seeds they are rough."
        )
    if longest := state.longest_analysis():
        notes.append(
            f"The longest analysis took as many examples as {longest:,} steps; at equal total cost the others train for so many more."
        )
    if second := config.shared.get("forgetting_file"):
        notes.append(f"forgets: how a metric of {Path(second).name} changed from before training to after it.")
    if config.jobs is not None and config.jobs > 1:
        notes.append(
            f"{config.jobs} runs shared the machine, so that step times are longer than those of a run by itself."
        )
    notes.append(f"Run on {training.machine()}.")
    if "CPU" in training.machine():
        notes.append("Peak memory is the resident memory of the whole process, libraries and data included.")
    return notes


def commit() -> str | None:
    """The commit of reltune's own source, where that is a checkout."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
