"""The pieces that a comparison is made of. Each writes what it found, its record last, and can be done in any process.

What a piece needs of others is on disk: a training reads the new heads and the plan of its seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.trainer_utils import set_seed

from reltune.config.comparison import ComparisonConfig
from reltune.config.run_config import RunConfig
from reltune.errors import AnalysisError, InputError, StorageError, first_line
from reltune.files import disk_bytes, read_json, whole_file, write_json
from reltune.methods.registry import METHODS
from reltune.notes import collecting
from reltune.plan.plan import Plan
from reltune.relevance.scores import RelevanceScores
from reltune.runs import stages, training
from reltune.runs.comparison.cells import Cell
from reltune.runs.comparison.directory import RESULT, TESTED, ComparisonDirectory, Place
from reltune.runs.comparison.rates import rate_at
from reltune.runs.directory import ADAPTER_FILES, RunDirectory
from reltune.runs.evaluation import evaluate as measure_metrics
from reltune.runs.materials import Materials, placement

# Fields of training that hold for every run of a comparison.
FIXED = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
# What makes a run a failed one. Whatever concerns the machine (a full disk, an interruption) ends the comparison instead.
FAILURES = (ArithmeticError, AnalysisError, InputError, RuntimeError, ValueError, TypeError, IndexError, KeyError)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Something to do: new ``heads`` for a seed, an ``analysis`` for a cell's, ``settle`` a cell, ``train`` it, ``test`` it, or
    measure the model ``before`` training."""

    kind: str
    seed: int
    cell: str = ""
    rate_steps: int = 0
    max_steps: int = 0  # of a training that is to be longer than the others

    @property
    def place(self) -> Place:
        return Place(self.cell, self.rate_steps, self.seed, self.max_steps)


class Workshop:
    """Does pieces of work with one set of data and one base model."""

    def __init__(
        self,
        config: ComparisonConfig,
        cells: Sequence[Cell],
        materials: Materials,
        directory: ComparisonDirectory,
        graphs: bool = False,
    ) -> None:
        self.config, self.materials, self.directory, self.graphs = config, materials, directory, graphs
        self.cells = {cell.name: cell for cell in cells}

    def without_model(self) -> Workshop:
        """The same for another process, which loads the model itself."""
        base = self.materials.base.like(self.materials.base.config)
        materials = dataclasses.replace(self.materials, base=base)
        return Workshop(self.config, list(self.cells.values()), materials, self.directory, self.graphs)

    def do(self, piece: Piece, words: str = "") -> None:
        """Do a piece of work; ``words`` name its progress bar."""
        try:
            with collecting():  # what there is to note of the data was noted at the start
                getattr(self, piece.kind)(piece, words or piece.kind)
        finally:
            gc.collect()  # a Trainer and its model hold each other

    # -- what all methods share ---------------------------------------------------------------------------------------

    def heads(self, piece: Piece, words: str) -> None:
        """Train the new heads alone, from which every method starts with this seed."""
        own = self._materials("full", piece.seed, self.directory.seed(piece.seed))
        model = own.base.take()
        stages.train_new_heads(own, model, float(self.config.shared.get("head_epochs", 1.0)))
        with whole_file(self.directory.head(piece.seed)) as partial:
            save_file(stages.new_head_tensors(model, own.new_heads), partial)

    def before(self, piece: Piece, words: str) -> None:
        """Measure the base model with the trained new heads."""
        own = self._materials("full", piece.seed, self.directory.seed(piece.seed))
        model = stages.model_with_new_heads(own, self._started(piece.seed))
        write_json(self.directory.before(piece.seed), self._metrics(own, model))

    def analysis(self, piece: Piece, words: str) -> None:
        """Measure relevance and choose, for all cells that choose by this analysis."""
        cell = self.cells[piece.cell]
        sharing = [other for other in self.cells.values() if other.analysis == cell.analysis]
        file = self.directory.analysis(piece.seed, cell.analysis)
        shutil.rmtree(file.parent, ignore_errors=True)
        own = self._materials(cell.method, piece.seed, file.parent, cell.fields)
        started = time.perf_counter()
        facts: dict[str, Any] = {"cells": [other.name for other in sharing], "failed": {}}
        try:
            relevance = stages.measure(own, stages.model_with_new_heads(own, self._started(piece.seed)))
        except FAILURES as error:
            facts["failed"] = {other.name: sentence(error) for other in sharing}
        else:
            facts["examples"] = _examples_seen(relevance, own.config)
            for other in sharing:
                config = self._config(other.method, piece.seed, file.parent, other.fields)
                try:
                    stages.choose(config, relevance, config.criteria[0]).save(
                        self.directory.plan(piece.seed, cell.analysis, other.name)
                    )
                except InputError as error:
                    facts["failed"][other.name] = sentence(error)
        facts["seconds"] = time.perf_counter() - started
        write_json(file, facts)

    # -- a cell -------------------------------------------------------------------------------------------------------

    def settle(self, piece: Piece, words: str) -> None:
        """Find the method's default rate and how much it trains."""
        cell = self.cells[piece.cell]
        file = self.directory.settled(cell.name)
        own = self._materials(cell.method, piece.seed, file.parent, cell.fields)
        try:
            plan = self._plan(cell, piece.seed)
            base = stages.model_with_new_heads(own, self._started(piece.seed))
            trainable = METHODS[cell.method].prepare(stages.base_of(own, base, plan))
        except FAILURES as error:
            write_json(file, {"failed": sentence(error)})
            return
        rate = training.default_rate(trainable.rate, own.task, trainable.divisor)
        write_json(file, {"failed": None, "default_rate": rate, "lines": list(trainable.lines)})

    def train(self, piece: Piece, words: str) -> None:
        """Train a cell at a rate with a seed, and measure it on validation data."""
        cell = self.cells[piece.cell]
        rate = self._rate(piece)
        run = self.directory.run(piece.place, rate)
        shutil.rmtree(run.path, ignore_errors=True)
        fields: dict[str, Any] = {"learning_rate": rate}
        if piece.max_steps:
            fields["max_steps"] = piece.max_steps
        result: dict[str, Any] = {"cell": cell.name, "seed": piece.seed, "learning_rate": rate}
        try:
            own = self._materials(cell.method, piece.seed, run.path, cell.fields, fields)
            if self.materials.new_heads:
                run.head.parent.mkdir(parents=True)
                shutil.copy(self.directory.head(piece.seed), run.head)
            if (plan := self._plan(cell, piece.seed)) is not None:
                plan.save(run.plan)
            set_seed(piece.seed)
            started = time.perf_counter()
            model = stages.tune(own, run, description=words, try_graphs=self.graphs)
            result["seconds"] = time.perf_counter() - started
            result |= self._measured(own, run, model)
        except FAILURES as error:
            result["failed"] = sentence(error)
            shutil.rmtree(run.adapter, ignore_errors=True)
        write_json(run.path / RESULT, result)

    def _measured(self, own: Materials, run: RunDirectory, model: Any) -> dict[str, Any]:
        cost = read_json(run.path / "training_cost.json")
        trained, heads = stages.trained_parameters(run)
        task, processor = own.task, own.tokenizer
        metrics = measure_metrics(
            model, {"eval": own.validation}, task, processor, generate=False, **placement(own.config)
        ).metrics
        name, _ = training.compared_by(own.config.training, task)
        name = name.removeprefix("eval_")
        metric = metrics[f"eval_{name}"]
        return {
            "failed": None if math.isfinite(metric) else f"its {name} on validation data is {metric}.",
            "metric": metric if math.isfinite(metric) else None,
            "validation": metrics,
            "trainable_parameters": trained,
            "head_parameters": heads,
            "adapter_bytes": disk_bytes(run.adapter, [n for n in ADAPTER_FILES if (run.adapter / n).is_file()]),
            "steps": cost["steps"],
            "seconds_per_step": cost["seconds_per_step"],
            "peak_memory_bytes": cost["peak_memory_bytes"],
            "replayed_batches": cost["replayed_batches"],
        }

    def test(self, piece: Piece, words: str) -> None:
        """Measure what was trained on test data, and on the second set where there is one."""
        cell = self.cells[piece.cell]
        run = self.directory.run(piece.place, self._rate(piece))
        own = self._materials(cell.method, piece.seed, run.path, cell.fields)
        try:
            model = stages.load_tuned(own, run, stages.model_with_new_heads(own, run))
            tested: dict[str, Any] = {"failed": None, **self._metrics(own, model)}
        except FAILURES as error:
            tested = {"failed": sentence(error)}
        write_json(run.path / TESTED, tested)

    def fail(self, piece: Piece, reason: str) -> None:
        """Record that a piece could not be done. What all methods need ends the comparison."""
        if piece.kind == "analysis":
            name = self.cells[piece.cell].analysis
            sharing = [cell.name for cell in self.cells.values() if cell.analysis == name]
            facts = {"cells": sharing, "failed": dict.fromkeys(sharing, reason), "seconds": None}
            write_json(self.directory.analysis(piece.seed, name), facts)
        elif piece.kind == "settle":
            write_json(self.directory.settled(piece.cell), {"failed": reason})
        elif piece.kind in ("train", "test"):
            run, rate = self.directory.run(piece.place, self._rate(piece)), self._rate(piece)
            result = {"cell": piece.cell, "seed": piece.seed, "learning_rate": rate, "failed": reason}
            write_json(run.path / (RESULT if piece.kind == "train" else TESTED), result)
        else:
            raise RuntimeError(f"{piece.kind}, seed {piece.seed}: {reason}")

    # -- what the pieces are made with --------------------------------------------------------------------------------

    def _metrics(self, own: Materials, model: Any) -> dict[str, float]:
        held_out = {"test": own.test} | ({} if own.forgetting is None else {"forgetting": own.forgetting})
        return measure_metrics(model, held_out, own.task, own.tokenizer, **placement(own.config)).metrics

    def _config(
        self,
        method: str,
        seed: int,
        path: Path,
        fields: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
    ) -> RunConfig:
        given = {**self.config.shared.get("training", {}), **FIXED, **(train or {})}
        return self.config.of(
            method,
            **{
                **(fields or {}),
                "seed": seed,
                "output_dir": str(path),
                "task": self.materials.task.name,
                "training": given,
            },
        )

    def _materials(
        self,
        method: str,
        seed: int,
        path: Path,
        fields: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
    ) -> Materials:
        """The same data for a run of a method with a seed, whose base model starts from that seed."""
        config = self._config(method, seed, path, fields, train)
        return dataclasses.replace(self.materials, config=config, base=self.materials.base.like(config))

    def _started(self, seed: int) -> RunDirectory:
        """A directory for reading the seed's new heads."""
        run = RunDirectory(self.directory.seed(seed))
        run.head = self.directory.head(seed)
        return run

    def _plan(self, cell: Cell, seed: int) -> Plan | None:
        """What the cell trains with this seed. Raises InputError where the analysis found nothing."""
        if not cell.analysis:
            return None
        if reason := read_json(self.directory.analysis(seed, cell.analysis))["failed"].get(cell.name):
            raise InputError(reason)
        return Plan.load(self.directory.plan(seed, cell.analysis, cell.name))

    def _rate(self, piece: Piece) -> float:
        return rate_at(read_json(self.directory.settled(piece.cell))["default_rate"], piece.rate_steps)


@contextlib.contextmanager
def cheap_collections() -> Iterator[None]:
    """Garbage is collected after every piece of work, and again before memory is measured: what is there already, the libraries above
    all, is not looked through each time, which took longer than a small training."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def sentence(error: BaseException) -> str:
    """What failed, as a sentence for a table. A full disk is no failure of the run, and is raised again."""
    if isinstance(error, StorageError):
        raise error
    if isinstance(error, torch.OutOfMemoryError):
        return "it does not fit in the accelerator's memory."
    if isinstance(error, ArithmeticError | AnalysisError | InputError):
        return str(error).partition(";")[0].rstrip(".") + "."  # the mend is for those who tune once
    return f"{type(error).__name__}: {first_line(error)}."  # type: ignore[arg-type]


def _examples_seen(relevance: RelevanceScores, config: RunConfig) -> int:
    """How many examples the analysis took forward and backward; a forward pass alone counts a third."""
    facts, total = relevance.provenance.get(config.criteria[0], {}), int(relevance.provenance["examples"])
    if "steps_taken" in facts:
        return int(facts["steps_taken"]) * min(config.analysis_batch_size, total)
    trials = [own for own in facts.values() if isinstance(own, dict) and "trials" in own]
    return sum(own["trials"] * own.get("examples", total) for own in trials) // 3 if trials else total
