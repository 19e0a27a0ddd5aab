"""What a run writes down of the data that it is made with, so that later stages need not read all of them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reltune.config.run_config import RunConfig
from reltune.data.rows import Rows
from reltune.errors import InputError
from reltune.files import read_json, write_json
from reltune.runs.bad_rows import bad_rows
from reltune.runs.directory import RunDirectory
from reltune.runs.kept_rows import keep
from reltune.runs.splits import Splits
from reltune.tasks.registry import task_of_record
from reltune.tasks.task import Task


def record_data(run: RunDirectory, config: RunConfig, task: Task, splits: Splits, notes: Sequence[str]) -> None:
    """Write the task with its classes, the held-out rows that come from no file of their own, and what was skipped, assumed or
    left out."""
    write_json(run.task, task.record())
    write_json(run.data, dict(_fingerprints(task, splits)))
    for split in ("validation", "test"):
        rows, file = getattr(splits, split), getattr(config, f"{split}_file")
        if file is None or Path(rows.source) != Path(file):  # also where the file's rows have no labels
            keep(run.kept_rows / f"{split}.jsonl", rows, task.columns.values())
    record_bad_rows(run, splits)
    file_of_notes = run.path / "notes.json"
    earlier = (
        read_json(file_of_notes)["notes"] if file_of_notes.is_file() else []
    )  # an analysis and a later training each have some
    if every := list(dict.fromkeys([*earlier, *notes])):
        write_json(file_of_notes, {"notes": every})


def _fingerprints(task: Task, splits: Splits) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each split its source, and unless it is streamed how many rows it has and a digest of them."""
    for name in ("train", "validation", "test"):
        rows = getattr(splits, name)
        record = {"source": str(rows.source)}
        yield (
            name,
            record | ({"rows": len(rows), "fingerprint": fingerprint(rows, task)} if isinstance(rows, Rows) else {}),
        )


def fingerprint(rows: Rows, task: Task) -> str:
    """A digest of what the task has of the rows, in their order, whatever file or table it is from."""
    columns = [column for _, column in sorted(task.columns.items())]
    picture = task.columns.get("image")
    total = hashlib.sha256()
    for row in rows:
        values = [row.values.get(column) for column in columns]
        if picture is not None:
            values[columns.index(picture)] = _of_picture(row.values[picture])
        total.update(json.dumps(values, sort_keys=True, default=repr).encode() + b"\n")
    return total.hexdigest()[:32]


def _of_picture(value: Any) -> str:
    held = value.get("bytes") if isinstance(value, Mapping) else None
    if held is None:
        held = Path(value["path"] if isinstance(value, Mapping) else value).read_bytes()
    return hashlib.sha256(held).hexdigest()


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
