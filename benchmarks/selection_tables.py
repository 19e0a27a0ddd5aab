"""The selection study's tables and its rule for learning rates, from the records of selection_study.py.

    python benchmarks/selection_tables.py benchmarks/results/selection_*.jsonl

prints for each file the mean test figure of every method at the rate that validation chose per task, and paired differences to
chosen others with 95% intervals (bootstrap over the pairs of task and seed).
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
from pathlib import Path
from typing import Any

import numpy as np

GOALS = (
    ("single weights 0.25%", "LoRA 4"),
    ("single weights 0.25%", "LoRA 4, equal cost"),
    ("single weights 0.25%", "full"),
    ("single weights 0.25%", "full, equal cost"),
    ("single weights 0.25%", "random 0.25%"),
    ("single weights 0.25%", "random 0.25%, equal cost"),
    ("single weights 0.25%", "LoRA 1"),
    ("single weights 0.25%", "LoRA 1, equal cost"),
    ("single weights 1%", "full"),
    ("single weights 1%", "full, equal cost"),
    ("single weights 1%", "LoRA 8"),
    ("single weights 1%", "LoRA 8, equal cost"),
    ("single weights 1%", "random 1%"),
    ("columns 1%", "LoRA 3"),
)

Records = list[dict[str, Any]]


def read(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def chosen(records: Records) -> dict[str, dict[tuple[str, int], float]]:
    """By method and (task, seed): the test figure at the rate that was chosen."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for record in records:
        if "test_metric" in record:
            found.setdefault(record["method"], {})[record["task"], record["seed"]] = record["test_metric"]
    return found


def difference(
    one: dict[tuple[str, int], float], other: dict[tuple[str, int], float]
) -> tuple[float, float, float, int]:
    """Mean paired difference, its 95% interval and the number of pairs."""
    pairs = np.array([one[key] - other[key] for key in one if key in other])
    if not len(pairs):
        return float("nan"), float("nan"), float("nan"), 0
    draws = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    low, high = np.quantile(pairs[draws].mean(1), (0.025, 0.975))
    return float(pairs.mean()), float(low), float(high), len(pairs)


def table(path: Path) -> str:
    records = read(path)
    if not records:
        return "no records"
    figures = chosen(records)
    tasks = list(dict.fromkeys(r["task"] for r in records))
    reference = figures[next(iter(figures))]
    lines = [
        "| method | trained | " + " | ".join(tasks) + " | mean | best rates | validation | against the first [95%] |",
        "|" + "---|" * (len(tasks) + 6),
    ]
    for method, figure in figures.items():
        mine = [r for r in records if r["method"] == method]
        best = [r for r in mine if "test_metric" in r]
        by_task = {t: [v for (task, _), v in figure.items() if task == t] for t in tasks}
        means = {t: stats.mean(v) for t, v in by_task.items() if v}
        rates = [f"{next(r['rate'] for r in best if r['task'] == t):.0e}" for t in means]
        off, low, high, n = difference(figure, reference)
        lines.append(
            f"| {method} | {mine[0]['trained']:,} | "
            + " | ".join(f"{means[t]:.1f}" if t in means else "" for t in tasks)
            + f" | {stats.mean(means.values()):.2f} | {' '.join(rates)} "
            + f"| {stats.mean(r['validation_metric'] for r in best):.2f} | {off:+.2f} [{low:+.2f}, {high:+.2f}] {n} |"
        )
    for one, other in GOALS:
        if one in figures and other in figures:
            off, low, high, n = difference(figures[one], figures[other])
            lines.append(f"{one} − {other}: {off:+.2f} [{low:+.2f}, {high:+.2f}] ({n} pairs)")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    for path in parser.parse_args().records:
        print(f"## {path.stem}\n\n{table(path)}\n")


if __name__ == "__main__":
    main()
