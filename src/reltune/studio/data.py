"""What a file of rows holds, as a run would read it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reltune.config.run_config import RunConfig
from reltune.data.layout import layout_of
from reltune.data.sources import read_rows
from reltune.errors import InputError
from reltune.notes import collecting
from reltune.runs.bad_rows import bad_rows, in_words
from reltune.runs.splits import read_data

ROWS, CHARACTERS, CLASSES = 8, 300, 40  # that are shown


@dataclasses.dataclass
class Preview:
    """What is shown of a file.

    Attributes:
        roles: column -> what it is to the task.
        classes: label -> how many rows have it, the most frequent first; empty where rows have no classes.
        first: the values of the first rows, as text, with their line numbers.
        splits: how many rows train, and are held out.
        notes: what was assumed, left out or refused.
    """

    rows: int
    columns: list[str]
    task: str
    roles: dict[str, str]
    classes: dict[str, int]
    first: list[tuple[int, list[str]]]
    splits: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


def preview(file: Path, task: str | None = None, text_column: str = "text", label_column: str = "label") -> Preview:
    """Raises InputError, with the line, for a file that cannot be read, and for columns that fit no task."""
    with collecting() as notes:
        rows = read_rows(file)
        layout = layout_of(rows, task, text_column, label_column)
        classes: Counter[str] = Counter()
        if "label" in layout.columns or "tags" in layout.columns:
            column = layout.columns.get("label") or layout.columns["tags"]
            for row in layout.read(rows):
                value = row.values.get(column)
                classes.update(map(str, value if isinstance(value, list) else [] if value is None else [value]))
        if layout.task == "regression":  # numbers, not classes
            classes.clear()
        first = [(row.line, [_cell(row.values.get(name)) for name in rows.columns]) for row in rows[:ROWS]]
        roles = {column: role for role, column in layout.columns.items()}
        found = Preview(len(rows), rows.columns, layout.task, roles, dict(classes.most_common(CLASSES)), first)
        try:
            config = RunConfig(
                "model",
                "run",
                train_file=str(file),
                task=task,
                text_column=text_column,
                label_column=label_column,
                on_bad_rows="skip",
            )
            _, splits = read_data(config)
            found.splits = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
            found.notes = [*notes, *in_words(bad_rows(splits) or {})]
        except InputError as error:
            found.notes = [*notes, str(error)]
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _cell(value: Any) -> str:
    if isinstance(value, Mapping) and "bytes" in value:
        value = value.get("path") or "image"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"
