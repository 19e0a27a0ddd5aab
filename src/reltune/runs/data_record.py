"""What a run writes down of the data that it is made with, so that later stages need not read all of them again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.files import read_json, write_json
from reltune.runs.bad_rows import bad_rows
from reltune.runs.directory import RunDirectory
from reltune.runs.kept_rows import keep
from reltune.tasks.registry import task_of_record
from reltune.tasks.task import Task

if TYPE_CHECKING:
    from reltune.runs.materials import Materials
    from reltune.runs.splits import Splits


def record_data(run: RunDirectory, materials: Materials) -> None:
    """Write the task with its classes, the held-out rows that come from no file of their own, and what was skipped, assumed or
    left out."""
    write_json(run.task, materials.task.record())
    for split in ("validation", "test"):
        rows, file = getattr(materials.splits, split), getattr(materials.config, f"{split}_file")
        if file is None or Path(rows.source) != Path(file):  # also where the file's rows have no labels
            keep(run.kept_rows / f"{split}.jsonl", rows, materials.task.columns.values())
    record_bad_rows(run, materials.splits)
    notes = run.path / "notes.json"
    earlier = read_json(notes)["notes"] if notes.is_file() else []  # an analysis and a later training each have some
    if every := list(dict.fromkeys([*earlier, *materials.notes])):
        write_json(notes, {"notes": every})


def record_bad_rows(run: RunDirectory, splits: Splits) -> None:
    """Write which rows were skipped, if any were."""
    if record := bad_rows(splits):
        write_json(run.path / "bad_rows.json", record)


def read_task(run: RunDirectory, config: RunConfig) -> Task | None:
    """The task that the run was made with; None if an older version made it, which did not write the task down.

    Raises InputError for a file that is damaged.
    """
    if not run.task.is_file():
        return None
    try:
        return task_of_record(read_json(run.task), **vars(config))
    except (InputError, AttributeError, TypeError) as error:
        raise InputError(f"{run.task} cannot be used ({error}); run `reltune analyze` again.") from error
