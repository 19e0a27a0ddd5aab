"""Held-out rows that have no file of their own, kept in the run's directory, one JSON object per line.

They were split off the training data, or came with them. An evaluation that split today's training file again would give other
rows if the file has changed, some of which the adapter was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reltune.data.rows import Rows
from reltune.errors import InputError
from reltune.files import whole_file
from reltune.reading import parse_json, typed


def keep(path: Path, rows: Rows, columns: Iterable[str]) -> None:
    """Write these columns of the rows. Rows that JSON cannot hold, such as the bytes of images, are not kept."""
    names = list(dict.fromkeys(columns))
    try:
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
            for row in rows:
                values = {name: row.values[name] for name in names if name in row.values}
                file.write(json.dumps({rows.unit: row.line, "values": values}, ensure_ascii=False) + "\n")
    except TypeError:
        path.unlink(missing_ok=True)


def kept(path: Path, source: str) -> Rows | None:
    """The rows that were kept, with the numbers that they have in their ``source``; None if none were.

    Raises InputError for a file that is damaged.
    """
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8") as file:
            records = [typed(dict[str, Any], parse_json(line)) for line in file]
        unit = "line" if all("line" in record for record in records) else "row"
        return Rows(
            [typed(dict[str, Any], record["values"]) for record in records],
            source,
            lines=[typed(int, record[unit]) for record in records],
            unit=unit,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); run `reltune tune` again, or pass a file.") from error
