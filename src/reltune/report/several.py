"""Runs side by side: what each trains, reaches and takes, and the settings in which they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reltune.metrics import METRICS
from reltune.report import numbers
from reltune.report.record import RunRecord

# Settings that are each run's own, whatever was tried: where it was written.
OF_EVERY_RUN = ("output_dir", "overwrite_output_dir")
TELLING = {
    "task": "tasks",
    "model_name_or_path": "models",
    "train_file": "training data",
    "dataset_name": "training data",
}
# The same of what the run found there, by the names of facts: a file may have had other rows in between.
FOUND = {"train data": "training data", "test data": "held-out rows"}
Cells = tuple[list[str], list[list[str]]]  # head and rows of a table


@dataclasses.dataclass
class NamedRun:
    """A run and the name that tells it from the others."""

    name: str
    record: RunRecord


def method(record: RunRecord) -> str:
    """What was trained, by what it was chosen, within which budget."""
    config = record.config
    name = str(config.get("method") or "weights")
    if name != "weights" and not config.get("granularity"):
        return name
    chosen = ", ".join(config.get("granularity") or []) or name
    criteria = config.get("criteria") or []
    by = f" by {criteria[0]}" if criteria else ""
    return f"{chosen}{by}, {config['budget']}" if config.get("budget") else f"{chosen}{by}"


def prefix(runs: Sequence[NamedRun]) -> str:
    """Which held-out data the metrics of a table are of: "test", or "eval" where no run has any of these."""
    found = [part for part in ("test", "eval") for run in runs if numbers.measured([run.record.metrics], f"{part}_")]
    return "eval" if found and "test" not in found else "test"


def reached(runs: Sequence[NamedRun], most: int | None = None) -> Cells:
    """What each run trains, and its metrics on held-out data, of the base model and of the tuned one."""
    split = prefix(runs)
    names = numbers.measured([run.record.metrics for run in runs], f"{split}_")[:most]
    heads = ["run", "method", "trained"]
    for name in names:
        unit = " %" if METRICS[name].share else ""
        heads += [f"{METRICS[name].label}{unit}\nbase", f"{METRICS[name].label}{unit}\ntuned"]
    rows = []
    for run in runs:
        metrics = run.record.metrics
        trained = metrics.get("trainable_parameters")
        if trained is None and run.record.selected_by_layer:
            trained = sum(run.record.selected_by_layer.values())
        cells = [
            run.name,
            method(run.record),
            numbers.MISSING if trained is None else numbers.short_count(int(trained)),
        ]
        for name in names:
            cells += [numbers.score(name, metrics.get(f"{split}_{part}{name}")) for part in ("before_", "")]
        rows.append(cells)
    return heads, rows


def took(runs: Sequence[NamedRun]) -> Cells:
    """What each training took."""
    rows = []
    for run in runs:
        found = run.record.metrics
        rate = found.get("learning_rate")
        rows.append(
            [
                run.name,
                numbers.MISSING if rate is None else f"{rate:.2g}",
                numbers.count(found.get("train_steps")),
                numbers.fixed(found.get("train_seconds_per_step"), 3),
                numbers.size(found.get("train_peak_memory_bytes")),
                numbers.size(found.get("adapter_bytes")),
            ]
        )
    return ["run", "rate", "steps", "s /\nstep", "peak", "saved"], rows


def differences(runs: Sequence[NamedRun]) -> Cells:
    """The settings in which the runs differ, one in a row."""
    settings = [dict(numbers.flatten(run.record.config)) for run in runs]
    names = dict.fromkeys(name for found in settings for name in found if name not in OF_EVERY_RUN)
    rows = [[name, *(found.get(name, numbers.MISSING) for found in settings)] for name in names]
    return ["setting", *(run.name for run in runs)], [row for row in rows if len(set(row[1:])) > 1]


def notes(runs: Sequence[NamedRun]) -> list[str]:
    """What keeps the numbers from being compared."""

    def differ(values: Sequence[Any]) -> bool:
        return len(set(values)) > 1

    apart = [what for name, what in TELLING.items() if differ([str(run.record.config.get(name)) for run in runs])]
    for name, what in FOUND.items():
        told = [dict(run.record.facts).get(name, "").rpartition("fingerprint ")[2] for run in runs]
        if differ([one for one in told if one]):
            apart.append(what)
    split = prefix(runs)
    if differ([run.record.metrics.get(f"{split}_samples") for run in runs]):
        apart.append("numbers of held-out rows")
    if not apart:
        return []
    return [
        f"These runs have different {', '.join(dict.fromkeys(apart))}: their metrics do not tell which method is better."
    ]


def terminal_tables(runs: Sequence[NamedRun]) -> RenderableType:
    """What was reached by the first metric, and what it took. At most 80 columns wide."""
    drawn = []
    for heads, rows in (reached(runs, most=1), took(runs)):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for head in heads:
            if head in ("run", "method"):
                table.add_column(head, overflow="fold", max_width=20)
            else:
                table.add_column(head, justify="right", no_wrap=True)
        for cells in rows:
            table.add_row(*map(Text, cells))
        drawn.append(table)
    return Group(*drawn)
