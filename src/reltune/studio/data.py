"""What a file of rows holds, as a run would read it: what ``reltune data`` shows, and the first rows as they stand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reltune.config.run_config import RunConfig
from reltune.data.sources import read_rows
from reltune.errors import InputError
from reltune.notes import collecting
from reltune.runs.preview import preview_data

ROWS, CHARACTERS = 8, 300  # that are shown


@dataclasses.dataclass
class Looked:
    """What is shown of a file.

    Attributes:
        first: the line and the values of the first rows.
        preview: what a run would work with (``Preview.to_dict``); None where it could not.
        problem: why a run could not, or could not with this model.
    """

    columns: list[str]
    first: list[tuple[int, list[str]]]
    preview: dict[str, Any] | None
    problem: str


def look_at(
    file: Path,
    model: str | None,
    task: str | None,
    max_length: int,
    on_bad_rows: str = "error",
    chat_template: str | None = None,
) -> Looked:
    """A file, and of the ``model`` its tokenizer if there is one."""
    columns: list[str] = []
    first: list[tuple[int, list[str]]] = []
    problem = ""
    with collecting():
        try:
            rows = read_rows(file)
            columns = rows.columns
            first = [(row.line, [_cell(row.values.get(name)) for name in columns]) for row in rows[:ROWS]]
        except InputError as error:
            return Looked(columns, first, None, str(error))
        config: dict[str, Any] = {
            "train_file": str(file),
            "task": task,
            "max_length": max_length,
            "chat_template": chat_template,
        }
        # As it is asked for; else without bad rows; where the model is the problem, the rows alone.
        for name, how in dict.fromkeys(((model, on_bad_rows), (model, "skip"), (None, "skip"))):
            try:
                found = preview_data(RunConfig(name or ".", ".", on_bad_rows=how, **config), tokens=name is not None)
                return Looked(columns, first, found.to_dict(), problem)
            except InputError as error:
                problem = problem or str(error)
    return Looked(columns, first, None, problem)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping) and "bytes" in value:
        value = value.get("path") or "image"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…"
