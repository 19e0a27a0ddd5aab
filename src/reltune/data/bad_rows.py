"""The check of rows by a task's own rule, and the words for bad ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from reltune.data.cells import Unreadable
from reltune.data.rows import Row, Rows
from reltune.errors import InputError, nearest
from reltune.names import ON_BAD_ROWS

SHOWN_LINES = 10  # line numbers per problem in a message,
SHOWN_PROBLEMS = 3  # and problems


def checked(rows: Rows, problem: Callable[[Row], str | None], on_bad_rows: str = "error") -> Rows:
    """The rows that are good.

    Args:
        problem: a task's rule: what is wrong with a row, as a phrase ("an empty 'text'"), or None.
        on_bad_rows: "error" refuses bad rows; "skip" leaves them out and records their lines in ``skipped``, by problem.

    Raises:
        InputError: a bad row under "error", no rows, or none left.
    """
    if on_bad_rows not in ON_BAD_ROWS:
        raise InputError(f"on_bad_rows {on_bad_rows!r} is unknown; {nearest(on_bad_rows, ON_BAD_ROWS)}")
    bad = lines_by_problem(rows.broken)
    good = []
    for index, row in enumerate(rows):
        phrase = row_problem(row, problem)
        if phrase is None:
            good.append(index)
        else:
            bad[phrase].append(row.line)
    if bad and on_bad_rows == "error":
        words = in_words(bad, rows.unit)
        raise InputError(f"{rows.source} has {words}. Mend or delete these {rows.unit}s, or pass --on_bad_rows skip.")
    if not good:
        raise InputError(no_good_rows(rows.source, bad, rows.unit))
    return rows.without(bad, good)


def row_problem(row: Row, problem: Callable[[Row], str | None]) -> str | None:
    """What is wrong with a row, by a task's rule or for any task."""
    for value in row.values.values():
        if isinstance(value, Unreadable):
            return value.reason
    # JSON escapes can write lone surrogates, which no tokenizer can read.
    return problem(row) or (None if _encodable(row.values) else "half of a surrogate pair")


def lines_by_problem(lines: Iterable[tuple[int, str]]) -> dict[str, list[int]]:
    """The numbers of bad lines by what is wrong with them."""
    bad: dict[str, list[int]] = defaultdict(list)
    for line, phrase in lines:
        bad[phrase].append(line)
    return bad


def no_good_rows(source: str, bad: Mapping[str, Sequence[int]], unit: str = "line") -> str:
    """The message of a source without a single good row."""
    if not bad:
        return f"{source} has no rows of data; add some."
    return f"{source} has no good rows: {in_words(bad, unit)}. Mend them."


def in_words(bad: Mapping[str, Sequence[int]], unit: str = "line") -> str:
    """Bad rows in words: each problem with the numbers of its first lines, the commonest first."""
    order = sorted(bad.items(), key=lambda item: -len(item[1]))
    words = [f"{phrase} {_where(lines, unit)}" for phrase, lines in order[:SHOWN_PROBLEMS]]
    rest = sum(len(lines) for _, lines in order[SHOWN_PROBLEMS:])
    return "; ".join([*words, f"{rest} more of {len(order) - SHOWN_PROBLEMS} other kinds"] if rest else words)


def _where(lines: Sequence[int], unit: str) -> str:
    if len(lines) == 1:
        return f"on {unit} {lines[0]}"
    shown = ", ".join(map(str, lines[:SHOWN_LINES])) + (", …" if len(lines) > SHOWN_LINES else "")
    return f"on {len(lines)} {unit}s ({shown})"


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
