"""The way through a comparison: everything is checked, then pieces of work are done until none is left, then the tables are made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from reltune.config.comparison import COMPARISON_FIELDS, ComparisonConfig, comparison_config
from reltune.config.fields import checked_fields
from reltune.data.rows import Rows
from reltune.errors import InputError, nearest
from reltune.files import write_json
from reltune.layers.fingerprint import fingerprint
from reltune.layers.inventory import take_inventory
from reltune.plan.budget import parse_budget
from reltune.report.preview import short_lines
from reltune.report.record import ComparisonRecord
from reltune.runs import training
from reltune.runs.comparison.cells import cells_of
from reltune.runs.comparison.directory import ComparisonDirectory, read
from reltune.runs.comparison.pace import fitted, measured_pace
from reltune.runs.comparison.schedule import Grid, State, words_of
from reltune.runs.comparison.summary import report
from reltune.runs.comparison.tables import record_of
from reltune.runs.comparison.work import FIXED, Piece, Workshop, cheap_collections
from reltune.runs.comparison.workers import Alone, Shared, default_jobs
from reltune.runs.graphed_step import why_not_unasked
from reltune.runs.lock import locked
from reltune.runs.materials import Materials, prepare
from reltune.runs.preview import preview_of_run
from reltune.tasks.task import Task, Written


@dataclasses.dataclass
class Comparison:
    """A comparison that was checked and may write into its directory.

    Attributes:
        notes: what was left out, and what was assumed of the data.
        count: the trainable parameters that "equal" means.
        graphs: whether steps are replayed as CUDA graphs where they can be, as nothing is said of them.
    """

    config: ComparisonConfig
    directory: ComparisonDirectory
    materials: Materials
    grid: Grid
    notes: list[str]
    count: int
    graphs: bool = False

    def describe(self) -> list[str]:
        """What is compared, in sentences."""
        materials, grid = self.materials, self.grid
        unit = materials.task.unit
        train = "streamed" if materials.config.streaming else f"{len(materials.train):,}"
        begun = any(self.directory.path.glob("seeds/*/*"))
        going_on = " Going on where it stopped." if begun else ""
        return [
            f"{train} training, {len(materials.validation):,} validation and {len(materials.test):,} test {unit}s.",
            *short_lines(preview_of_run(materials).to_dict()),
            f"{len(grid.cells)} ways to train: {', '.join(cell.label for cell in grid.cells)}; "
            f"{_counted(grid.trials, 'rate')}, {_counted(len(grid.seeds), 'seed')}.{going_on}",
            *(sentence for sentence in self.notes if sentence not in materials.notes),  # those were said
        ]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def start(config: ComparisonConfig, overwrite: bool = False) -> Comparison:
    """Check everything that can be checked, measure a few steps where the time is limited, and make the directory.

    Raises InputError for whatever is wrong: with the data or the model, with a method for them, or with a directory that holds
    another comparison.
    """
    directory = ComparisonDirectory(config.output_dir)
    directory.check(config, overwrite)
    training_fields = {**config.shared.get("training", {}), **FIXED}
    materials = prepare(config.of("full", training=training_fields))
    materials.check_training()
    metric, largest = training.compared_by(config.shared.get("training", {}), materials.task)
    _check_measured(metric.removeprefix("eval_"), materials.task)
    cells, left_out = cells_of(config, materials)
    count = parse_budget(config.budget, take_inventory(materials.base.look(), materials.new_heads).base_parameters)
    args = materials.arguments("full")
    grid = Grid(
        cells=tuple(cells),
        seeds=tuple(config.all_seeds),
        trials=config.rate_trials,
        equal_cost=config.equal_cost,
        new_heads=bool(materials.new_heads),
        chosen_by=metric.removeprefix("eval_"),
        largest=largest,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps,
    )
    inputs = {
        "data": _digest(materials),
        "model": fingerprint(materials.base.look(), materials.new_heads, as_held=True),
    }
    known = {} if overwrite else read(directory.inputs) or {}
    for name in inputs:
        if known.get(name, inputs[name]) != inputs[name]:
            raise InputError(
                f"the {name} {'have' if name == 'data' else 'has'} changed since the comparison in {directory.path} began; name "
                "another directory, or pass --overwrite_output_dir to begin anew."
            )
    graphs, remembered = False, None
    if config.shared.get("cuda_graphs") is None:
        unsuited = why_not_unasked(config.shared, args, materials.task.name, materials.base.look())
        # One that an older version began is without.
        remembered = bool(known.get("cuda_graphs")) if known else not unsuited
        graphs = remembered and not unsuited
        if graphs:
            left_out.append(
                "Steps are replayed as CUDA graphs where a shape of batch comes again; --no_cuda_graphs trains without."
            )
        elif remembered:
            left_out.append(
                f"What was trained so far had its steps replayed as CUDA graphs; what is left has not: {unsuited}."
            )
    decided = None if config.max_hours is None else _in_time(config, grid, materials, directory, overwrite, graphs)
    directory.create(config, overwrite)
    write_json(directory.inputs, {**inputs, "cuda_graphs": remembered})
    if decided is not None:
        write_json(directory.grid, decided)
        grid = dataclasses.replace(
            grid,
            cells=tuple(cell for cell in grid.cells if cell.name in decided["cells"]),
            seeds=grid.seeds[: decided["seeds"]],
            equal_cost=decided["equal_cost"],
        )
        left_out += [*decided["left_out"], f"It should take about {decided['hours']:.2g} hours."]
    return Comparison(config, directory, materials, grid, [*left_out, *materials.notes], count, graphs)


def _check_measured(metric: str, task: Task) -> None:
    """Raise InputError for a metric that is not measured on validation data, where the model writes nothing."""
    known = [name for name in ("loss", *task.metrics) if name not in task.written_metrics([Written("", "", "")])]
    if metric not in known:
        raise InputError(
            f"metric_for_best_model {metric!r} is not what rates can be compared by; {nearest(metric, known)}"
        )


def _in_time(
    config: ComparisonConfig,
    grid: Grid,
    materials: Materials,
    directory: ComparisonDirectory,
    overwrite: bool,
    graphs: bool,
) -> dict[str, Any]:
    """The part of the grid that fits into ``max_hours``: as it was decided when the comparison began, or by measuring now."""
    hours = config.max_hours
    assert hours is not None
    wanted = {
        "cells": [cell.name for cell in grid.cells],
        "seeds": list(grid.seeds),
        "equal_cost": grid.equal_cost,
        "hours": hours,
    }
    decided: dict[str, Any] | None = None if overwrite else read(directory.grid)
    if decided is not None and decided["wanted"] == wanted:
        return decided
    pace = measured_pace(config, grid, materials, graphs)
    smaller, sentences = fitted(grid, pace, hours, bool(config.methods))
    return {
        "wanted": wanted,
        "cells": [cell.name for cell in smaller.cells],
        "seeds": len(smaller.seeds),
        "equal_cost": smaller.equal_cost,
        "left_out": sentences,
        "hours": pace.hours(smaller),
        "pace": dataclasses.asdict(pace),
    }


def run(comparison: Comparison) -> ComparisonRecord:
    """Do what is left to do, and write the record and the report."""
    directory, state = comparison.directory, State(comparison.directory, comparison.grid)
    jobs = comparison.config.jobs or default_jobs(comparison.materials)
    graphs = comparison.graphs
    workshop = Workshop(comparison.config, comparison.grid.cells, comparison.materials, directory, graphs)
    comparison.materials.base.forget()  # every piece of work loads its own
    crew: Alone | Shared = Alone(workshop)
    if jobs > 1:
        try:
            crew = Shared(workshop, jobs)
        except ValueError as error:
            comparison.notes.append(f"All runs shared one process: {error}.")
            jobs = 1
    config = dataclasses.replace(comparison.config, jobs=jobs)
    with tqdm(total=state.expected(), desc="compare", unit="piece", disable=jobs == 1) as bar, cheap_collections():

        def done(piece: Piece) -> None:
            bar.update(1)

        try:
            while pieces := state.pending():
                crew.do(pieces, _words(state), done)
                for light in state.superseded():
                    shutil.rmtree(light.adapter, ignore_errors=True)
        except BaseException:
            crew.leave(at_once=True)
            raise
        crew.leave(at_once=False)
    write_json(directory.record, record_of(state, config, comparison.notes, comparison.count, graphs))
    return report(directory)


def _words(state: State) -> Callable[[Piece], str]:
    def words(piece: Piece) -> str:
        settled = read(state.directory.settled(piece.cell)) if piece.cell else None
        rate = None
        if settled and not settled["failed"]:
            cell = next(cell for cell in state.grid.cells if cell.name == piece.cell)
            rate = state.rate(cell, piece.rate_steps)
        return words_of(piece, state.grid.cells, rate)

    return words


def compare(
    model_name_or_path: str,
    output_dir: str | Path,
    *,
    methods: str | Sequence[str] = (),
    overwrite: bool = False,
    **fields: Any,
) -> ComparisonRecord:
    """Train a model in several ways, each at its own best learning rate, and measure them side by side.

    Args:
        model_name_or_path: the pretrained model: a directory, or an id on the Hugging Face Hub.
        output_dir: where everything is kept. Called again, an interrupted comparison goes on from there.
        methods: the ways to train, of ``reltune.config.method.METHODS``; all that fit if none is named.
        overwrite: whether to begin anew where there is a comparison already.
        fields: what ``reltune compare`` has flags for: ``train_file``, ``budget``, ``sizes`` ("equal", "usual", "both"), ``seeds``,
            ``rate_trials``, ``jobs``, ``max_hours`` and so on; ``training`` is a mapping of fields of TrainingArguments.

    Returns:
        The tables; ``output_dir`` has them with every training as ``comparison.json``, and as ``report.html``.

    Raises:
        InputError: bad input, before anything is trained.
    """
    values = {
        "model_name_or_path": model_name_or_path,
        "output_dir": str(output_dir),
        "methods": methods if isinstance(methods, str) else list(methods),
        **fields,
    }
    config = comparison_config(checked_fields(values, COMPARISON_FIELDS))
    config.check()
    with locked(config.output_dir):
        return run(start(config, overwrite))


def _digest(materials: Materials) -> str:
    """A digest of the rows of every split, as far as the task reads them."""
    digest = hashlib.sha256()
    splits, task = materials.splits, materials.task
    for rows in (splits.train, splits.validation, splits.test, splits.forgetting):
        digest.update(b"|")
        if not isinstance(rows, Rows):  # streamed: nobody knows them all
            continue
        for row in rows:
            values = [row.values.get(column) for column in task.columns.values()]
            words = json.dumps(values, default=lambda value: type(value).__name__, ensure_ascii=False)
            digest.update(f"{task.content(row)}\n{words}\n{task.label(row)}\n".encode())
    return digest.hexdigest()[:32]
