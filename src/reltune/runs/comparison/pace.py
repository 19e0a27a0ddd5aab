"""How long a comparison takes, from a few measured steps of each method; and what is left out of it so that it ends in time."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reltune.config.comparison import ComparisonConfig
from reltune.errors import InputError
from reltune.methods.registry import METHODS
from reltune.runs import stages, training
from reltune.runs.comparison.cells import Cell
from reltune.runs.comparison.schedule import Grid
from reltune.runs.comparison.work import FAILURES, FIXED
from reltune.runs.evaluation import evaluate as measure_metrics
from reltune.runs.materials import Materials, placement

STEPS = 5  # of each method that are measured; the median of the last ones counts
SLACK = 1.15  # what else there is: loading, saving, starting


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds.

    Attributes:
        step: of an optimizer step, by cell.
        evaluation: of the validation data, which the test data are taken to take too.
        steps: of a training.
        analysis_steps: optimizer steps that take as many examples as an analysis.
    """

    step: Mapping[str, float]
    evaluation: float
    steps: int
    analysis_steps: int

    def hours(self, grid: Grid) -> float:
        """How long the whole grid takes, one run at a time."""
        slowest = max(self.step.values(), default=0.0)
        analyses = len({cell.analysis for cell in grid.cells if cell.analysis})
        seconds = len(grid.seeds) * (analyses * self.analysis_steps * slowest + self.evaluation)
        for cell in grid.cells:
            runs = grid.trials + (grid.trials > 1) + len(grid.seeds) - 1  # one of the widenings
            step = self.step[cell.name]
            seconds += runs * (self.steps * step + self.evaluation) + len(grid.seeds) * self.evaluation
            if not cell.analysis and analyses and cell in grid.at_equal_cost():
                seconds += len(grid.seeds) * ((self.steps + self.analysis_steps) * step + 2 * self.evaluation)
        return SLACK * seconds / 3600


def measured_pace(config: ComparisonConfig, grid: Grid, materials: Materials, graphs: bool = False) -> Pace:
    """Train a few steps of each method. What needs a plan, which is not chosen yet, is taken to be as slow as full fine-tuning, or as
    LoRA where the base is quantised."""
    step: dict[str, float] = {}
    stand_in = "lora" if getattr(materials.base.look(), "is_quantized", False) else "full"
    for cell in grid.cells:
        method, fields = (stand_in, {}) if cell.analysis else (cell.method, dict(cell.fields))
        same = next(
            (other.name for other in grid.cells if cell.analysis and other.analysis and other.name in step), None
        )
        try:
            step[cell.name] = step[same] if same else _seconds_per_step(config, method, fields, materials, graphs)
        except FAILURES:
            step[cell.name] = 0.0  # it fails in its training too, and is recorded there
    own = dataclasses.replace(materials, config=config.of("full", task=materials.task.name, training=_training(config)))
    started = time.perf_counter()
    measure_metrics(
        own.base.look(), {"eval": own.validation}, own.task, own.tokenizer, generate=False, **placement(own.config)
    )
    evaluation = time.perf_counter() - started
    return Pace(step, evaluation, _steps(own), math.ceil(_analysis_examples(config) / grid.batch_size))


def _training(config: ComparisonConfig, **more: Any) -> dict[str, Any]:
    return {**config.shared.get("training", {}), **FIXED, **more}


def _seconds_per_step(
    config: ComparisonConfig, method: str, fields: Mapping[str, Any], materials: Materials, graphs: bool
) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        own_config = config.of(
            method, **{**fields, "task": materials.task.name, "output_dir": str(Path(scratch) / "run")},
            training=_training(config, max_steps=STEPS),
        )  # fmt: skip
        own = dataclasses.replace(materials, config=own_config, base=materials.base.like(own_config))
        trainable = METHODS[method].prepare(stages.base_of(own, own.base.take(), None))
        args = own.arguments(trainable.rate, trainable.divisor)
        words = f"measure {method}"
        _, cost = training.train(
            *(trainable.model, args, own.task, own.tokenizer, own.train),
            description=words,
            offload=own.config.activation_offloading,
            graphs=None if graphs else bool(own.config.cuda_graphs),
        )
    return cost.seconds_per_step or 0.0


def _steps(own: Materials) -> int:
    """Optimizer steps of a training."""
    args = own.arguments("full")
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(
        args.num_train_epochs * math.ceil(len(own.train) / (args.train_batch_size * args.gradient_accumulation_steps))
    )


def _analysis_examples(config: ComparisonConfig) -> int:
    """About as many as the default analysis takes."""
    own = config.of("weights")
    steps = own.probe_steps if isinstance(own.probe_steps, int) else 120
    return steps * own.analysis_batch_size if own.criteria == ["movement"] else own.analysis_examples


def fitted(grid: Grid, pace: Pace, hours: float, named: bool) -> tuple[Grid, list[str]]:
    """The grid without what does not fit into so many hours, and sentences on what was left out.

    First the table at equal total cost goes, then seeds beyond three, then usual sizes where there are equal ones, then methods that
    are no reference, the last first, unless they were ``named``; then seeds down to one.

    Raises InputError where the least of it does not fit.
    """
    left_out: list[str] = []
    for smaller, sentence in _smaller(grid, named):
        if pace.hours(grid) <= hours:
            break
        before, grid = pace.hours(grid), smaller(grid)
        if pace.hours(grid) < before:
            left_out.append(sentence)
    if pace.hours(grid) > hours:
        raise InputError(
            f"max_hours is {hours:g}, and the least comparison of these methods, with one seed, takes about {pace.hours(grid):.2g}; "
            "give more, or name fewer methods."
        )
    return grid, left_out


def _smaller(grid: Grid, named: bool) -> list[tuple[Any, str]]:
    def without(cell: Cell) -> Any:
        return lambda grid: dataclasses.replace(grid, cells=tuple(one for one in grid.cells if one != cell))

    def seeds(count: int) -> Any:
        return lambda grid: dataclasses.replace(grid, seeds=grid.seeds[:count])

    steps: list[tuple[Any, str]] = [
        (
            lambda grid: dataclasses.replace(grid, equal_cost=False),
            "To end in time, the table at equal total cost is left out.",
        )
    ]
    if len(grid.seeds) > 3:
        steps.append((seeds(3), "To end in time, there are three seeds."))
    if any("equal" in cell.sizes for cell in grid.cells):
        for cell in reversed(grid.cells):
            if "equal" not in cell.sizes:
                steps.append((without(cell), f"To end in time, {cell.label} (its usual size) is left out."))
    if not named:
        first = next(cell.method for cell in grid.cells)
        for cell in reversed(grid.cells):
            if "equal" in cell.sizes and cell.method not in (first, "lora", "full"):
                steps.append((without(cell), f"To end in time, {cell.label} is left out."))
    for count in range(min(3, len(grid.seeds)) - 1, 0, -1):
        words = "one seed" if count == 1 else "two seeds"
        steps.append((seeds(count), f"To end in time, there {'is' if count == 1 else 'are'} {words}."))
    return steps
