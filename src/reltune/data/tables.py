"""Tables of text: CSV and TSV, in the dialects that spreadsheets and programs write."""

from __future__ import annotations

import csv
import io
import itertools
import re
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from reltune.data.rows import Record
from reltune.errors import InputError
from reltune.notes import note

SEPARATORS = {".csv": ",", ".tsv": "\t"}  # what a suffix implies
OTHERS = (";", "\t", ",", "|")  # what may be used in place of it
LOOKED_AT = 200  # lines by which the dialect is told
LONGEST = 200  # lines that a quoted field of a TSV file may span
TELLING_FIRST_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # Excel's

Line = tuple[int, list[str]]  # the number of a record's first line, and its fields


class Dialect(NamedTuple):
    """How a table is written: what separates fields, whether the first line says so, whether space precedes quotes, and whether
    lines begin with a number that the header has no name for, as R writes them."""

    separator: str
    told: bool = False
    spaced: bool = False
    numbered: bool = False


def dialect_of(path: Path, suffix: str, lines: Iterable[str]) -> Dialect:
    """The dialect of a table by its suffix and its first lines.

    Raises:
        InputError: a title stands above the names of the columns.
    """
    csv.field_size_limit(2**31 - 1)  # texts may be long
    head = [line for line in lines if line.strip("\r\n")]
    telling = TELLING_FIRST_LINE.fullmatch(head[0].strip()) if head else None
    if telling:
        separator = telling.group(1)
    else:
        separator = _used(head, SEPARATORS[suffix])
        if separator != SEPARATORS[suffix]:
            note(
                f"{path.name}: fields are separated by {separator!r}, although the suffix implies {SEPARATORS[suffix]!r}."
            )
    head = head[bool(telling) :]
    _check_header(path, head, separator)
    return Dialect(separator, bool(telling), _spaced(head, separator), _numbered(head, separator))


def read_table(path: Path, dialect: Dialect, file: Iterable[str]) -> tuple[int, list[str], Iterator[Record]]:
    """The header's line, the names in it, and the records after it, which are read as they are asked for.

    Args:
        file: the lines with their ends as they are.

    Raises:
        InputError: CSV in which nothing after the fault can be trusted.
    """
    lines = _tab_lines(path, file) if dialect.separator == "\t" else _csv_lines(path, file, dialect)
    filled = _filled(path, lines, dialect.separator)
    if dialect.told:
        next(filled)
    header_line, header = next(filled, (1, []))
    names = [name.strip().strip("\ufeff") for name in header]  # some programs write a byte order mark too many
    names = ["", *names] if dialect.numbered else names
    return header_line, names, (_record(line, fields, names) for line, fields in filled)


def _filled(path: Path, lines: Iterator[Line], separator: str) -> Iterator[Line]:
    """The records with any text. Those without it are said to be left out where others follow, whose numbers they would shift; empty lines
    are none."""
    since: list[int] = []
    left_out: list[int] = []
    begun = False
    for line, fields in lines:
        if any(field.strip() for field in fields):
            left_out += since
            since, begun = [], True
            yield line, fields
        elif begun and len(fields) > (separator == "\t"):
            since.append(line)
    if left_out:
        note(
            f"{path.name}: rows without any text are left out, {len(left_out)} of them, the first on line {left_out[0]}."
        )


def _used(head: list[str], usual: str) -> str:
    """The separator in use: another than the usual one only if that is not in the header and the lines agree on the other."""
    if not head or len(_fields(head[0], usual)) > 1:
        return usual
    for mark in sorted(OTHERS, key=head[0].count, reverse=True):
        width = len(_fields(head[0], mark))
        if width > 1 and 2 * sum(len(_fields(line, mark)) == width for line in head) > len(head):
            return mark
    return usual


def _fields(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def _check_header(path: Path, head: list[str], separator: str) -> None:
    """Raise InputError where lines of a single field, or comments, stand above lines that all have the same number of several."""
    widths = [1 if line.startswith("#") else _width(_fields(line, separator)) for line in head]
    above = len(list(itertools.takewhile(lambda width: width <= 1, widths)))
    table = [width for width in widths[above:] if width]
    if 0 < above < len(table) and len({*table}) == 1 and not _numbered(head, separator):
        shown = textwrap.shorten(head[0].strip(f"\ufeff{separator} \r\n"), 40, placeholder=" …")
        raise InputError(
            f"{path} begins with {shown!r}, one field, and goes on with {table[0]}; the first line must name the columns, so delete "
            "titles and comments above it (or, if there is one column, put texts that hold the separator in quotes)."
        )


def _width(fields: list[str]) -> int:
    """The number of fields without empty ones at the end."""
    return max((number for number, field in enumerate(fields, start=1) if field.strip()), default=0)


def _numbered(head: list[str], separator: str) -> bool:
    """Whether every line but the header begins with one more field, which counts the lines."""
    header, *rest = [_fields(line, separator) for line in head] or [[]]
    if len(rest) < 2 or any(len(fields) != len(header) + 1 for fields in rest):
        return False
    first = [fields[0] for fields in rest]
    return any(first == [str(number) for number in range(start, start + len(rest))] for start in (0, 1))


def _spaced(head: list[str], separator: str) -> bool:
    """Whether space stands between separators and the quotes of fields, which would become part of the values."""
    if separator == "\t":
        return False
    after = [field for line in head for field in _fields(line, separator)[1:] if re.match(r' +"', field)]
    # a quote that is not closed at the end of its field is part of a text, or the field has a separator inside
    closed = sum(field.rstrip().endswith('"') and len(field.strip()) > 1 for field in after)
    return bool(after) and (closed == len(after) or _widths(head, separator, True) < _widths(head, separator, False))


def _widths(head: list[str], separator: str, spaced: bool) -> int:
    """How many different numbers of fields the lines have."""
    return len({len(fields) for fields in csv.reader(head, delimiter=separator, skipinitialspace=spaced) if fields})


def _record(line: int, fields: list[str], names: list[str]) -> Record:
    """A record, or a phrase that says why there is none. Empty fields without a name are what spreadsheets add."""
    while len(fields) > len(names) and not fields[-1].strip():
        fields = fields[:-1]
    missing = names[len(fields) :]
    if len(fields) > len(names) or any(missing):
        return line, f"another number of fields than the header's {len(names)}"
    if len(names) > 1 and [field.strip() for field in fields] == names:
        return line, "the header once more"  # of files that were put one behind another
    return line, dict(zip(names, [*fields, *("" for _ in missing)], strict=True))


# -- separators other than tabs: CSV --------------------------------------------------------------------------------


def _csv_lines(path: Path, file: Iterable[str], dialect: Dialect) -> Iterator[Line]:
    record: list[str] = []  # the lines of the current one
    separator = dialect.separator
    # strict, because otherwise a quote that is never closed swallows the rest of the file silently
    reader = csv.reader(_kept(file, record), delimiter=separator, strict=True, skipinitialspace=dialect.spaced)
    while True:
        line = reader.line_num + 1  # a record with quoted newlines spans several lines
        record.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{path} line {line} is not valid CSV: {error}. "
                'Put fields with quotes in quotes and double the quotes inside: "say ""so""".'
            ) from error
        if len(record) > 3 and len(fields) > 1 and all(text.count(separator) == len(fields) - 1 for text in record):
            note(
                f"{path.name}: lines {line} to {line + len(record) - 1} are read as one row, because a quote is open all along; "
                f"if they are {len(record)} rows, close or double the quote on line {line}."
            )
        yield line, fields


def _kept(file: Iterable[str], lines: list[str]) -> Iterator[str]:
    for line in file:
        lines.append(line)
        yield line


# -- tabs: TSV ------------------------------------------------------------------------------------------------------


def _tab_lines(path: Path, file: Iterable[str]) -> Iterator[Line]:
    """Records of fields between tabs. A quote at the start of a field is an ordinary character, unless it is closed at the
    end of the field: on the same line, or on a later one if only both together have the header's number of fields."""
    ahead: deque[str] = deque()
    rest = iter(file)
    number, width = 0, 0
    spanning: list[int] = []

    def following(count: int) -> list[str]:
        while len(ahead) < count and (line := next(rest, None)) is not None:
            ahead.append(line)
        return list(ahead)[:count]

    while following(1):
        text = ahead.popleft()
        number, line = number + 1, number + 1
        fields = _split(text)
        if any(field.startswith('"') for field in fields):
            closed = _unquoted(text)
            more = _continuation(text, following, width) if closed is None and width > 1 else []
            if more:
                closed = _unquoted("".join([text, *more]))
                spanning.append(line)
                number += len(more)
                for _ in more:
                    ahead.popleft()
            # a quote that closes in another field is none: "He said<tab>so"
            if closed is not None and (len(closed) == width or len(fields) != width):
                fields = closed
        if not width and any(field.strip() for field in fields):
            width = len(fields)
        yield line, fields
    if spanning:
        note(f"{path.name}: {len(spanning)} quoted fields span several lines, the first from line {spanning[0]} on.")


def _split(text: str) -> list[str]:
    return text.rstrip("\r\n").split("\t")


def _unquoted(text: str) -> list[str] | None:
    """The fields of one record without their quotes, or None where a quote is not closed at the end of its field."""
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error:
        return None
    return records[0] if len(records) == 1 else None


def _continuation(text: str, following: Callable[[int], list[str]], width: int) -> list[str]:
    """The lines that an open quote goes on over: the last closes it, and none may be a record by itself. None if there are none.

    Args:
        following: gives a number of lines after this one.
    """
    whole = len(_split(text)) == width
    for count in range(1, LONGEST):
        more = following(count)
        if len(more) < count:
            break
        also_whole = len(_split(more[-1])) == width
        if '"' in more[-1] and not (whole and also_whole):
            fields = _unquoted("".join([text, *more]))
            if fields is not None and len(fields) == width:
                return more
        if also_whole:
            break
    return []
