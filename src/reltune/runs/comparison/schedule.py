"""What is to be done next, read off what is on disk: so that a comparison that was interrupted goes on by the same command.

Heads and analyses come first, then every cell is settled and tried at its rates with the first seed; its best rate on validation data
goes on with the other seeds. Test data are looked at once for each cell and seed, when everything is trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from reltune.runs.comparison import rates
from reltune.runs.comparison.cells import Cell
from reltune.runs.comparison.directory import RESULT, TESTED, ComparisonDirectory, Place, read
from reltune.runs.comparison.work import Piece


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is compared: the cells, the seeds, and whether there is a table at equal total cost."""

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    trials: int
    equal_cost: bool
    new_heads: bool
    chosen_by: str  # the validation metric by which rates are chosen
    largest: bool  # whether its largest value is the best
    batch_size: int  # examples of an optimizer step

    def at_equal_cost(self) -> list[Cell]:
        """The cells of the table at equal total cost: those of equal sizes, where there are any."""
        size = "equal" if any("equal" in cell.sizes for cell in self.cells) else "usual"
        return [cell for cell in self.cells if size in cell.sizes] if self.equal_cost else []


class State:
    """What a comparison has found so far."""

    def __init__(self, directory: ComparisonDirectory, grid: Grid) -> None:
        self.directory, self.grid = directory, grid

    def settled(self, cell: Cell) -> dict[str, Any] | None:
        found: dict[str, Any] | None = read(self.directory.settled(cell.name))
        return found

    def rate(self, cell: Cell, steps: int) -> float:
        settled = self.settled(cell)
        assert settled is not None, "rates are asked for after the cell is settled"
        return rates.rate_at(settled["default_rate"], steps)

    def result(self, cell: Cell, steps: int, seed: int, max_steps: int = 0) -> dict[str, Any] | None:
        """What a training gave; ``max_steps`` of one that has more steps than the others."""
        run = self.directory.run(Place(cell.name, steps, seed, max_steps), self.rate(cell, steps))
        found: dict[str, Any] | None = read(run.path / RESULT)
        return found

    def tested(self, cell: Cell, steps: int, seed: int, max_steps: int = 0) -> dict[str, Any] | None:
        run = self.directory.run(Place(cell.name, steps, seed, max_steps), self.rate(cell, steps))
        found: dict[str, Any] | None = read(run.path / TESTED)
        return found

    def tried(self, cell: Cell) -> dict[int, float | None]:
        """The metric at each rate that was tried with the first seed, in the order of trying; None where that failed."""
        order = rates.first_steps(self.grid.trials)
        order += [sign * i for i in range(1, self.grid.trials + rates.WIDENINGS) for sign in (-1, 1)]
        found = {}
        for steps in dict.fromkeys(order):
            result = self.result(cell, steps, self.grid.seeds[0])
            if result is not None:
                found[steps] = None if result["failed"] else result["metric"]
        return found

    def best(self, cell: Cell) -> int | None:
        return rates.best(self.tried(cell), self.grid.largest)

    def failed(self, cell: Cell) -> str | None:
        """Why the cell as a whole failed: it could not be made ready, or at every rate."""
        settled = self.settled(cell)
        if settled is None:
            return None
        if settled["failed"]:
            return str(settled["failed"])
        if self._next_rates(cell) or self.best(cell) is not None:
            return None
        result = self.result(cell, 0, self.grid.seeds[0])
        return str(result["failed"]) if result else None

    def longest_analysis(self) -> int:
        """The optimizer steps that took as many examples as the longest analysis did."""
        return max((self.analysis_steps(cell) for cell in self.grid.at_equal_cost()), default=0)

    def analysis_steps(self, cell: Cell) -> int:
        found = [self._analysis(cell, seed) for seed in self.grid.seeds] if cell.analysis else []
        most = max((one.get("examples", 0) for one in found if one), default=0)
        return math.ceil(most / self.grid.batch_size)

    def analysis_seconds(self, cell: Cell) -> float | None:
        found = [self._analysis(cell, seed) for seed in self.grid.seeds] if cell.analysis else []
        seconds = [one["seconds"] for one in found if one and one["seconds"] is not None]
        return sum(seconds) / len(seconds) if seconds else None

    def _analysis(self, cell: Cell, seed: int) -> Any:
        return read(self.directory.analysis(seed, cell.analysis))

    def _analysed(self, cell: Cell, seed: int) -> bool:
        """Whether the cell was there when its analysis was made, if it needs one."""
        if not cell.analysis:
            return True
        found = self._analysis(cell, seed)
        return found is not None and cell.name in found["cells"]

    def longer(self, cell: Cell, seed: int) -> int:
        """How many steps the cell takes at equal total cost; 0 where that is what it has anyway."""
        best = self.best(cell)
        result = None if best is None else self.result(cell, best, seed)
        more = self.longest_analysis() - self.analysis_steps(cell)
        return result["steps"] + more if result and not result["failed"] and more > 0 else 0

    # -- what is left to do -------------------------------------------------------------------------------------------

    def pending(self) -> list[Piece]:
        """The pieces of work that can be done now; none when all is done."""
        grid, first = self.grid, self.grid.seeds[0]
        pieces = [
            Piece("heads", seed) for seed in grid.seeds if grid.new_heads and not self.directory.head(seed).is_file()
        ]
        if pieces:
            return pieces
        for seed in grid.seeds:
            lacking = {cell.analysis: cell for cell in reversed(grid.cells) if not self._analysed(cell, seed)}
            pieces += [Piece("analysis", seed, cell.name) for cell in lacking.values()]
        if pieces:
            return pieces
        for cell in grid.cells:
            pieces += self._of_cell(cell, first)
        if pieces:
            return pieces
        for cell in grid.at_equal_cost():
            pieces += self._longer_ones(cell)
        return pieces or self._tests()

    def _of_cell(self, cell: Cell, first: int) -> list[Piece]:
        settled = self.settled(cell)
        if settled is None:
            return [Piece("settle", first, cell.name)]
        if settled["failed"]:
            return []
        if wanted := self._next_rates(cell):
            return [Piece("train", first, cell.name, steps) for steps in wanted]
        best = self.best(cell)
        if best is None:
            return []
        return [
            Piece("train", seed, cell.name, best)
            for seed in self.grid.seeds[1:]
            if self.result(cell, best, seed) is None
        ]

    def _next_rates(self, cell: Cell) -> list[int]:
        """The rates to try now."""
        tried = self.tried(cell)
        missing = [steps for steps in rates.first_steps(self.grid.trials) if steps not in tried]
        if missing:
            return missing
        wider = rates.wider(tried, self.grid.trials, self.grid.largest)
        return [] if wider is None else [wider]

    def _longer_ones(self, cell: Cell) -> list[Piece]:
        best = None if self.failed(cell) else self.best(cell)
        if best is None:
            return []
        return [
            Piece("train", seed, cell.name, best, max_steps)
            for seed in self.grid.seeds
            if (max_steps := self.longer(cell, seed)) and self.result(cell, best, seed, max_steps) is None
        ]

    def _tests(self) -> list[Piece]:
        pieces = [Piece("before", seed) for seed in self.grid.seeds if not self.directory.before(seed).is_file()]
        for cell, steps, seed, max_steps in self.trained():
            if self.tested(cell, steps, seed, max_steps) is None:
                pieces.append(Piece("test", seed, cell.name, steps, max_steps))
        return pieces

    def trained(self) -> list[tuple[Cell, int, int, int]]:
        """Every training that a table rests on, and that did not fail: its cell, rate and seed, and its steps if it is a longer one."""
        found = []
        for cell in self.grid.cells:
            best = None if self.settled(cell) is None or self.failed(cell) else self.best(cell)
            for seed in self.grid.seeds if best is not None else ():
                for max_steps in dict.fromkeys((0, self.longer(cell, seed))):
                    result = self.result(cell, best, seed, max_steps)  # type: ignore[arg-type]
                    if result is not None and not result["failed"]:
                        found.append((cell, best, seed, max_steps))
        return found  # type: ignore[return-value]

    def superseded(self) -> list[Any]:
        """The directories of trainings whose adapter no table rests on any more."""
        found = []
        for cell in self.grid.cells:
            settled = self.settled(cell)
            if settled is None or settled["failed"]:
                continue
            best = self.best(cell)
            for steps in self.tried(cell):
                if steps != best:
                    found.append(
                        self.directory.run(Place(cell.name, steps, self.grid.seeds[0]), self.rate(cell, steps))
                    )
        return found

    def expected(self) -> int:
        """About how many pieces there are in all."""
        grid = self.grid
        analyses = len({cell.analysis for cell in grid.cells if cell.analysis})
        longer = sum(1 for cell in grid.at_equal_cost() if not cell.analysis) if analyses else 0
        per_cell = 1 + grid.trials + (len(grid.seeds) - 1)
        tests = len(grid.seeds) * (1 + len(grid.cells) + longer)
        heads = len(grid.seeds) * (grid.new_heads + analyses)
        return heads + len(grid.cells) * per_cell + longer * len(grid.seeds) + tests


def words_of(piece: Piece, cells: Mapping[str, Cell] | Sequence[Cell], rate: float | None) -> str:
    """A piece of work for a progress bar."""
    labels = {cell.name: cell.label for cell in (cells.values() if isinstance(cells, Mapping) else cells)}
    if piece.kind in ("heads", "before"):
        return f"{piece.kind}, seed {piece.seed}"
    if piece.kind == "analysis":
        return f"analysis, seed {piece.seed}"
    at = "" if rate is None or piece.kind == "settle" else f", rate {rate:g}, seed {piece.seed}"
    return f"{labels[piece.cell]}{at}{', longer' if piece.max_steps else ''}"
