"""A finished run beside other methods: it is taken over as it is, and the others are trained at their default rates."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from reltune.config.comparison import DECIDED, SHARED_FIELDS, ComparisonConfig
from reltune.files import write_json
from reltune.report.record import ComparisonRecord
from reltune.runs import stages, training
from reltune.runs.comparison import flow
from reltune.runs.comparison.cells import Cell, analysis_name
from reltune.runs.comparison.directory import RESULT, TESTED, ComparisonDirectory, Place
from reltune.runs.comparison.rates import rate_at
from reltune.runs.comparison.schedule import Grid
from reltune.runs.directory import RunDirectory
from reltune.runs.materials import Materials

OTHERS = {"lora": "lora r=8", "full": "full"}  # with their labels


def compare_run(
    materials: Materials, run: RunDirectory, results: Mapping[str, Any], analysis_seconds: float | None
) -> ComparisonRecord:
    """Train other methods from the head that the run began with, on its seed, and write ``comparison/`` in its directory.

    ``results`` are the run's, from the evaluate stage. Its training is not repeated: an evaluation while it trains draws no random
    numbers, so that a comparison would train the same.
    """
    config, directory = materials.config, ComparisonDirectory(run.comparison.parent)
    mine = Cell(config.method, f"{config.method} {config.budget}", config.method, {}, ("usual",), analysis_name(config))
    others = [Cell(name, label, name, {}, ("usual",)) for name, label in OTHERS.items()]
    shared = {each.name: getattr(config, each.name) for each in SHARED_FIELDS}
    shared |= {
        "output_dir": str(directory.path),
        "training": {name: value for name, value in config.training.items() if name not in DECIDED},
    }
    own = ComparisonConfig(
        methods=[config.method, *OTHERS],
        sizes="usual",
        seeds=1,
        rate_trials=1,
        equal_cost=False,
        jobs=1,
        shared={name: value for name, value in shared.items() if value is not None},
    )
    begun = directory.config_file.is_file() and not own.difference(ComparisonConfig.load(directory.config_file))
    directory.create(own, overwrite=not begun)  # one that was interrupted goes on
    args = materials.arguments("full")
    metric, largest = training.compared_by(config.training, materials.task)
    grid = Grid(
        cells=(mine, *others),
        seeds=(config.seed,),
        trials=1,
        equal_cost=False,
        new_heads=bool(materials.new_heads),
        chosen_by=metric.removeprefix("eval_"),
        largest=largest,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps,
    )
    _take_over(mine, config.seed, run, directory, results, analysis_seconds, metric.removeprefix("eval_"))
    note = f"{mine.label} was trained with an evaluation and a checkpoint every epoch, which the others were spared."
    return flow.run(flow.Comparison(own, directory, materials, grid, [note], 0))


def _take_over(
    cell: Cell,
    seed: int,
    run: RunDirectory,
    directory: ComparisonDirectory,
    results: Mapping[str, Any],
    analysis_seconds: float | None,
    metric: str,
) -> None:
    """Write what the run found as the comparison's own."""
    if run.head.is_file():
        directory.seed(seed).mkdir(parents=True, exist_ok=True)
        shutil.copy(run.head, directory.head(seed))
    write_json(
        directory.before(seed), _renamed(results, {"test_before_": "test_", "forgetting_before_": "forgetting_"})
    )
    write_json(
        directory.analysis(seed, cell.analysis), {"cells": [cell.name], "failed": {}, "seconds": analysis_seconds}
    )
    rate = results["learning_rate"]
    write_json(directory.settled(cell.name), {"failed": None, "default_rate": rate, "lines": []})
    own = directory.run(Place(cell.name, 0, seed), rate_at(rate, 0)).path
    trained, heads = stages.trained_parameters(run)
    result = {
        "cell": cell.name,
        "seed": seed,
        "learning_rate": rate,
        "failed": None,
        "metric": results[f"eval_{metric}"],
        "trainable_parameters": trained,
        "head_parameters": heads,
        "adapter_bytes": results["adapter_bytes"],
        "steps": results["train_steps"],
        "seconds_per_step": results["train_seconds_per_step"],
        "peak_memory_bytes": results["train_peak_memory_bytes"],
    }
    write_json(own / RESULT, result)
    tested = _renamed(results, {"test_before_": None, "test_": "test_", "forgetting_after_": "forgetting_"})
    write_json(own / TESTED, {"failed": None, **tested})


def _renamed(results: Mapping[str, Any], prefixes: Mapping[str, str | None]) -> dict[str, Any]:
    """The results whose names begin with one of the prefixes, the first that fits, with another in its place; None drops them."""
    found = {}
    for name, value in results.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None and (new := prefixes[prefix]) is not None:
            found[new + name.removeprefix(prefix)] = value
    return found
