"""Rows of data with their columns and line numbers, and what tasks ask of a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

# A line number with the values of the row that starts there, or with a phrase that says why there is none.
Record = tuple[int, dict[str, Any] | str]
SPLITS = {  # names in use for the parts of a data set -> what they are here
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One example: the values of all its columns, and where its record starts in the file, counted from 1."""

    values: dict[str, Any]
    line: int


class Rows(Sequence[Row]):
    """The rows of one source, in order.

    Args:
        records: the values of each row: a list of mappings, or rows that ``datasets`` holds on the disk.
        source: the file or data set as the user named it, for messages.
        columns: the names of the columns; those of ``records`` if not given.
        lines: the number of the line on which each record starts; 1, 2, … if not given.
        header_line: the number of the line that names the columns, if there is one.
        repeated: columns that the header names more than once.
        broken: the lines that hold no row at all, each with a phrase that says why.
        skipped: the lines that were left out so far, by problem.
        unit: what ``lines`` count: "line" (of a file) or "row" (of a table). For messages.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        source: str,
        columns: Sequence[str] | None = None,
        lines: Sequence[int] | None = None,
        *,
        header_line: int | None = None,
        repeated: Iterable[str] = (),
        broken: Sequence[tuple[int, str]] = (),
        skipped: Mapping[str, list[int]] | None = None,
        unit: str = "line",
    ) -> None:
        if columns is None:
            names = getattr(records, "column_names", None)  # of a Dataset
            columns = names if names is not None else list(dict.fromkeys(name for record in records for name in record))
        self.records, self.source, self.columns = records, source, list(columns)
        self.lines: Sequence[int] = range(1, len(records) + 1) if lines is None else lines
        self.header_line, self.repeated, self.broken = header_line, frozenset(repeated), list(broken)
        self.skipped, self.unit = dict(skipped or {}), unit

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return Row(self.records[index], self.lines[index])

    def __iter__(self) -> Iterator[Row]:
        return map(Row, self.records, self.lines)

    def select(self, indices: Sequence[int]) -> Rows:
        """The rows at these places, in this order."""
        choose = getattr(self.records, "select", None)  # of a Dataset: a view, nothing is read
        return self._with(
            choose(indices) if choose else [self.records[i] for i in indices], [self.lines[i] for i in indices]
        )

    def without(self, skipped: Mapping[str, Sequence[int]], indices: Sequence[int]) -> Rows:
        """The rows at ``indices``, with a record of the lines that were left out, by problem."""
        rest = self.select(indices) if len(indices) < len(self) else self._with(self.records, self.lines)
        rest.broken = []
        rest.skip(skipped)
        return rest

    def skip(self, lines: Mapping[str, Sequence[int]]) -> None:
        """Record lines that are left out, by problem."""
        for phrase, more in lines.items():
            self.skipped[phrase] = [*self.skipped.get(phrase, ()), *more]

    def mapped(self, convert: Callable[[dict[str, Any]], dict[str, Any]], more_columns: Sequence[str] = ()) -> Rows:
        """The same rows with other values; what ``datasets`` holds is converted when it is asked for."""
        change = getattr(self.records, "mapped", None)
        records = change(convert) if change else [convert(record) for record in self.records]
        rows = self._with(records, self.lines)
        rows.columns += [name for name in more_columns if name not in rows.columns]
        return rows

    def _with(self, records: Sequence[dict[str, Any]], lines: Sequence[int]) -> Rows:
        return Rows(
            records,
            self.source,
            self.columns,
            lines,
            header_line=self.header_line,
            repeated=self.repeated,
            broken=self.broken,
            skipped=self.skipped,
            unit=self.unit,
        )


# -- values ---------------------------------------------------------------------------------------------------------


def text_problem(values: Mapping[str, Any], column: str) -> str | None:
    """A phrase if the column holds no text to be read: for a task's own rule."""
    value = values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return f"an empty {column!r}"
    return None if isinstance(value, str) else f"a {column!r} that is no string"


def label_problem(values: Mapping[str, Any], column: str) -> str | None:
    """A phrase if the column holds no class: a class is a string, an integer or a boolean."""
    value = values.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        return f"an empty {column!r}"
    return None if isinstance(value, str | int) else f"a {column!r} that is neither a string nor an integer"


def label_of(value: str | int) -> str:
    """The class that a value names, without the space around it: "1", 1 and " 1 " are one."""
    return str(value).strip()
