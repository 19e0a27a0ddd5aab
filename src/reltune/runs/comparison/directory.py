"""Where a comparison keeps what it found: everything that is finished is on disk, and nothing else decides what is left to do."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

from reltune.config.comparison import ComparisonConfig
from reltune.errors import InputError
from reltune.files import check_writable, make_directory, read_json
from reltune.runs.directory import RunDirectory
from reltune.runs.lock import LOCK


@dataclasses.dataclass(frozen=True)
class Place:
    """One training of a cell: the rate in half-decades from the default, the seed, and its steps where it has more than others."""

    cell: str
    rate_steps: int
    seed: int
    max_steps: int = 0


class ComparisonDirectory:
    """The files of a comparison.

    ``runs/CELL/`` holds a run for each of the cell's trainings, ``seeds/SEED/`` what all methods start from with that seed: the
    trained new heads, and the plans that each analysis chose.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.config_file = self.path / "comparison.yaml"
        self.inputs = self.path / "inputs.json"
        self.grid = self.path / "grid.json"
        self.record = self.path / "comparison.json"
        self.report = self.path / "report.html"

    # -- whether it can be used ---------------------------------------------------------------------------------------

    def check(self, config: ComparisonConfig, overwrite: bool, training: bool = True) -> None:
        """Raise InputError unless a comparison with this config may begin or go on here; without ``training``, whatever its fields
        of training are. Creates nothing."""
        check_writable(self.path)
        if not self.path.is_dir() or all(path.name == LOCK for path in self.path.iterdir()):
            return
        if not self.config_file.is_file():
            raise InputError(f"output_dir {self.path} is not empty and holds no comparison; name a new directory.")
        if overwrite:
            return
        if difference := config.difference(ComparisonConfig.load(self.config_file), training):
            raise InputError(
                f"output_dir {self.path} holds another comparison: {difference}. Name another directory, or pass "
                "--overwrite_output_dir to replace it."
            )

    def create(self, config: ComparisonConfig, overwrite: bool) -> None:
        make_directory(self.path)
        if overwrite:
            for name in ("runs", "seeds"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for file in (self.inputs, self.grid, self.record, self.report):
                file.unlink(missing_ok=True)
        config.save(self.config_file)

    # -- of a seed ----------------------------------------------------------------------------------------------------

    def seed(self, seed: int) -> Path:
        return self.path / "seeds" / str(seed)

    def head(self, seed: int) -> Path:
        return self.seed(seed) / "head.safetensors"

    def before(self, seed: int) -> Path:
        """The metrics of the base model with the trained new heads."""
        return self.seed(seed) / "before.json"

    def analysis(self, seed: int, name: str) -> Path:
        """What an analysis cost, and which cells it found no plan for."""
        return self.seed(seed) / name / "analysis.json"

    def plan(self, seed: int, name: str, cell: str) -> Path:
        return self.seed(seed) / name / cell

    # -- of a cell ----------------------------------------------------------------------------------------------------

    def settled(self, cell: str) -> Path:
        """The cell's default rate and its size."""
        return self.path / "runs" / cell / "cell.json"

    def run(self, place: Place, rate: float) -> RunDirectory:
        longer = f"-steps-{place.max_steps}" if place.max_steps else ""
        return RunDirectory(self.path / "runs" / place.cell / f"seed-{place.seed}-rate-{rate:g}{longer}")


RESULT, TESTED = "result.json", "test.json"  # in the directory of a run that a comparison made


def read(path: Path) -> Any:
    """A record, or None where it was not written yet."""
    return read_json(path) if path.is_file() else None
