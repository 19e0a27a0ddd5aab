"""Data that deceive: rows of training among those that measure, texts with several labels, columns that say nothing or too much.

Each is said before anything is trained. Rows that stand in two splits may be refused instead (``on_leak``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from reltune.data.rows import Row, Rows
from reltune.data.splitting import same
from reltune.errors import InputError
from reltune.notes import note

FEW = 10  # rows, of which it may be chance that all have the same value
TELLING = ("text", "text_pair", "source", "prompt", "tokens")  # roles whose columns differ from row to row


def check_leaks(
    train: Rows,
    held_out: Mapping[str, Rows],
    content: Callable[[Row], str],
    answer: Callable[[Row], str],
    on_leak: str = "warn",
) -> None:
    """Say how many rows of each held-out split are training rows too (whitespace aside), and how many of those that test are
    in the validation split.

    Args:
        held_out: the splits by name.
        content: what makes two rows copies of each other.
        answer: what training has beside it: a label, say. Copies whose answer is another one are counted.
        on_leak: "error" refuses them.

    Raises:
        InputError: such rows, where they are refused.
    """
    own = {name: [same(content(row)) for row in rows] for name, rows in held_out.items()}
    wanted = set().union(*own.values())
    answers: dict[str, set[str]] = defaultdict(set)
    for row in train if wanted else ():
        if (key := same(content(row))) in wanted:
            answers[key].add(answer(row))
    for name, rows in held_out.items():
        found = [(row, key) for row, key in zip(rows, own[name], strict=True) if key in answers]
        others = sum(answer(row) not in answers[key] for row, key in found)
        _say(rows, name, [row for row, _ in found], "training", others, on_leak)
    if {"validation", "test"} <= set(held_out):
        before = set(own["validation"])
        found_rows = [row for row, key in zip(held_out["test"], own["test"], strict=True) if key in before]
        _say(held_out["test"], "test", found_rows, "validation", 0, on_leak)


def _say(rows: Rows, name: str, found: list[Row], other: str, others: int, on_leak: str) -> None:
    if not found:
        return
    sentence = f"{Path(rows.source).name}: {len(found)} of {len(rows)} {name} rows are in the {other} data too"
    sentence += f", the first on {rows.unit} {found[0].line}"
    sentence += f"; {others} of them with another label" if others else ""
    if on_leak == "error":
        raise InputError(f"{sentence}. Remove them from one of the two, or pass --on_leak warn.")
    note(f"{sentence}. What is measured on them says little of other texts; --on_leak error refuses such data.")


def note_conflicts(
    rows: Rows, content: Callable[[Row], str], answer: Callable[[Row], str], several: bool = False
) -> None:
    """Say how many texts stand in several rows with different labels. ``several``: whether one row may have more than one label,
    which may have been meant."""
    labels: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Row] = {}
    pair: tuple[Row, Row] | None = None
    for row in rows:
        key = same(content(row))
        labels[key].add(answer(row))
        if pair is None and len(labels[key]) > 1:
            pair = first[key], row
        first.setdefault(key, row)
    if pair is None:
        return
    count = sum(len(own) > 1 for own in labels.values())
    stand = "text stands" if count == 1 else "texts stand"
    note(
        f"{Path(rows.source).name}: {count} {stand} in several rows with different labels ({rows.unit}s {pair[0].line} and "
        f"{pair[1].line})"
        + ("; if a text may have several, write them in one row (a|b)." if several else "; at most one can be learned.")
    )


def note_columns(rows: Rows, columns: Mapping[str, str], told: Iterable[str]) -> None:
    """Say which columns hold the same in all rows, the same as another, or what is to be learned from them.

    Args:
        columns: role -> column, of the task.
        told: roles of what is to be learned.
    """
    if len(rows) < FEW:
        return
    read = [column for role, column in columns.items() if role not in told]
    learned = [column for role, column in columns.items() if role in told]
    first = {column: repr(rows[0].values.get(column)) for column in (*read, *learned)}
    constant = {columns[role] for role in TELLING if role in columns and role not in told}
    pairs = {(column, other) for i, column in enumerate(read) for other in (*read[i + 1 :], *learned)}
    for row in rows:
        constant = {column for column in constant if repr(row.values.get(column)) == first[column]}
        pairs = {(a, b) for a, b in pairs if str(row.values.get(a)).strip() == str(row.values.get(b)).strip()}
        if not constant and not pairs:
            return
    name = Path(rows.source).name
    for column in (column for column in read if column in constant and rows[0].values.get(column) is not None):
        note(
            f"{name}: {column!r} is the same in all {len(rows):,} training rows, so that nothing can be learned from it."
        )
    for a, b in sorted(pairs):
        if rows[0].values.get(a) is None:
            continue
        says = f"what is to be learned stands in what the model reads; is {a!r} the right column?"
        note(f"{name}: {a!r} equals {b!r} in all {len(rows):,} training rows" + (f": {says}" if b in learned else "."))
