"""Rows of data with their columns and line numbers, and the check of each by a task's own rule."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from reltune.data.cells import Unreadable
from reltune.errors import InputError, nearest
from reltune.names import ON_BAD_ROWS

if TYPE_CHECKING:
    from reltune.data.streams import StreamedRows

# A line number with the values of the row that starts there, or with a phrase that says why there is none.
Record = tuple[int, dict[str, Any] | str]
SPLITS = {  # names in use for the parts of a data set -> what they are here
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SHOWN = 10  # line numbers per kind of bad row in a message,
KINDS = 3  # and kinds


@dataclasses.dataclass(frozen=True)
class Row:
    """One example: the values of all its columns, and where its record starts in the file, counted from 1."""

    values: dict[str, Any]
    line: int


class Rows(Sequence[Row]):
    """The rows of one source, in order.

    Args:
        records: the rows' values: a list of mappings, or a ``datasets.Dataset``, which stays on the disk.
        source: what the user named, for messages.
        columns: the columns' names; those of ``records`` when not given.
        lines: where each record starts; 1, 2, … when not given.
        header_line: the line that names the columns, where there is one.
        repeated: columns that the header names more than once.
        broken: lines that hold no row at all, with a phrase that says why: (line, phrase).
        skipped: lines left out by ``checked``, by kind; by several checks, one after the other.
        unit: what ``lines`` count, in messages: "line" of a file or "row" of a table.
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
            found = getattr(records, "column_names", None)  # of a Dataset
            columns = found if found is not None else list(dict.fromkeys(name for record in records for name in record))
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
        """The rows at ``indices``, with the lines that were left out by kind on record."""
        rest = self.select(indices) if len(indices) < len(self) else self._with(self.records, self.lines)
        rest.broken = []
        rest.skip(skipped)
        return rest

    def skip(self, lines: Mapping[str, Sequence[int]]) -> None:
        """Put lines that are left out on record, by kind."""
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


# -- checking -------------------------------------------------------------------------------------------------------


def require_columns(rows: Rows | StreamedRows, wanted: Mapping[str, str]) -> None:
    """Raise InputError unless the rows have these columns, each once.

    Args:
        wanted: column name -> the flag that would name another one ("--text_column"), or "" where there is none.
    """
    place = rows.source if rows.header_line is None else f"{rows.source} line {rows.header_line}"
    for name, option in wanted.items():
        if name not in rows.columns:
            found = ", ".join(map(repr, rows.columns[:12])) + (", …" if len(rows.columns) > 12 else "")
            mend = other_separator(rows.columns)
            if not mend:
                close = nearest(name, rows.columns)
                mend = f"Name the right one with {option}" if option else "Rename the right one"
                mend += f"; {close}" if close.startswith("did") else "."
            raise InputError(f"{place} has no column {name!r}, only {found or 'none'}. {mend}")
        if name in rows.repeated:
            raise InputError(f"{place} names the column {name!r} twice; rename one of the two.")


def other_separator(columns: Sequence[str]) -> str:
    """How to mend a file whose header was read as one column because it uses another separator than its suffix implies; else
    an empty text."""
    only = columns[0] if len(columns) == 1 else ""
    other = next((mark for mark in ";\t," if mark in only), None)
    return f"Its separator seems to be {other!r}: save it with commas (.csv) or tabs (.tsv)." if other else ""


def checked(rows: Rows, problem: Callable[[Row], str | None], on_bad_rows: str = "error") -> Rows:
    """The rows that are good.

    Args:
        problem: a task's rule: a phrase for what is wrong with a row ("an empty 'text'"), or None.
        on_bad_rows: "error" refuses bad rows, "skip" leaves them out; what was left out is in ``skipped``, by kind.

    Raises:
        InputError: a bad row under "error", no rows, or none left.
    """
    if on_bad_rows not in ON_BAD_ROWS:
        raise InputError(f"on_bad_rows {on_bad_rows!r} is unknown; {nearest(on_bad_rows, ON_BAD_ROWS)}")
    bad = by_kind(rows.broken)
    good = []
    for index, row in enumerate(rows):
        phrase = row_problem(row, problem)
        if phrase is None:
            good.append(index)
        else:
            bad[phrase].append(row.line)
    if bad and on_bad_rows == "error":
        words = found(bad, rows.unit)
        raise InputError(f"{rows.source} has {words}. Mend or delete these {rows.unit}s, or pass --on_bad_rows skip.")
    if not good:
        raise InputError(no_good_rows(rows.source, bad, rows.unit))
    return rows.without(bad, good)


def row_problem(row: Row, problem: Callable[[Row], str | None]) -> str | None:
    """What is wrong with a row by a task's rule, or for every task."""
    for value in row.values.values():
        if isinstance(value, Unreadable):
            return value.reason
    # JSON escapes can write lone surrogates, which no tokenizer can read.
    return problem(row) or (None if _encodable(row.values) else "half of a surrogate pair")


def by_kind(lines: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    """Bad lines, each with its phrase, by phrase."""
    bad: dict[str, list[int]] = defaultdict(list)
    for line, phrase in lines:
        bad[phrase].append(line)
    return bad


def no_good_rows(source: str, bad: Mapping[str, Sequence[int]], unit: str = "line") -> str:
    """The message of a source without a single good row."""
    if not bad:
        return f"{source} has no rows of data; add some."
    return f"{source} has no good rows but {found(bad, unit)}; mend them."


def found(bad: Mapping[str, Sequence[int]], unit: str = "line") -> str:
    """Bad rows in words: each kind with the numbers of its first lines, the commonest kinds first."""
    order = sorted(bad.items(), key=lambda item: -len(item[1]))
    words = [f"{phrase} {_where(lines, unit)}" for phrase, lines in order[:KINDS]]
    rest = sum(len(lines) for _, lines in order[KINDS:])
    return "; ".join([*words, f"{rest} more of {len(order) - KINDS} other kinds"] if rest else words)


def _where(lines: Sequence[int], unit: str) -> str:
    if len(lines) == 1:
        return f"on {unit} {lines[0]}"
    shown = ", ".join(map(str, lines[:SHOWN])) + (", …" if len(lines) > SHOWN else "")
    return f"on {len(lines)} {unit}s ({shown})"


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


def _encodable(value: object) -> bool:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return False
    elif isinstance(value, Mapping):
        return all(map(_encodable, value.values()))
    elif isinstance(value, list):
        return all(map(_encodable, value))
    return True
