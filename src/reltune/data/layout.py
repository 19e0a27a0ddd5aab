"""How the rows of a source are understood: which task they are for, what each column is to it, and what makes their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import overload

from reltune.data.columns import LOOKED_AT, columns_of, guess_task, label_columns, other_separator, require_columns
from reltune.data.conversion import Conversion
from reltune.data.images import located
from reltune.data.labels import MARKS_OF_NONE, MULTILABEL, LabelColumns, is_empty, mark_of_none
from reltune.data.rows import Rows
from reltune.data.streams import StreamedRows
from reltune.data.tagged_words import ONE_SENTENCE, one_word_each, sentence_column, sentences
from reltune.errors import InputError
from reltune.notes import note

USUAL = ("text", "label")  # names that the user need not have given


@dataclasses.dataclass
class Layout:
    """What rows are for, and how their values are made.

    Attributes:
        task: its name.
        columns: role -> column.
        conversion: makes the values that the task wants.
        joined: where each label has a column of its own, what makes one column of them.
        flags: column -> the flag that names it.
        marks: marks such as -1 that mean the lack of a label, because training has no such label.
        sentence: where each row has one word, the column that says which sentence it belongs to; else "".
    """

    task: str
    columns: Mapping[str, str]
    conversion: Conversion
    joined: LabelColumns | None
    flags: Mapping[str, str]
    marks: Set[str]
    sentence: str = ""

    @property
    def labels(self) -> list[str]:
        """The names of all labels where the form of the data says them, as columns of 0 and 1 do."""
        return list(self.joined.names if self.joined else self.conversion.labels)

    @property
    def label_columns(self) -> list[str]:
        """The columns of the source that hold labels."""
        return (
            list(self.joined.names)
            if self.joined
            else [self.columns[role] for role in ("label", "tags") if role in self.columns]
        )

    @property
    def used(self) -> list[str]:
        """The columns of the source that anything is made of."""
        more = [self.sentence] if self.sentence else []
        return [*self.columns.values(), *self.conversion.used, *(self.joined.names if self.joined else ()), *more]

    @overload
    def read(self, rows: Rows) -> Rows: ...

    @overload
    def read(self, rows: Rows | StreamedRows) -> Rows | StreamedRows: ...

    def read(self, rows: Rows | StreamedRows) -> Rows | StreamedRows:
        """The rows with the task's values.

        Raises:
            InputError: a column is missing.
        """
        made = self.joined.column if self.joined else None
        wanted = {column: self.flags.get(column, "") for column in self.columns.values() if column != made}
        require_columns(rows, wanted | dict.fromkeys(self.joined.names if self.joined else (), "--label_column"))
        if self.sentence:
            if not isinstance(rows, Rows):
                raise InputError(f"{rows.source} has one word in each row, which cannot be streamed; {ONE_SENTENCE}.")
            rows = sentences(rows, self.sentence, self.columns["tokens"], self.columns["tags"])
        if self.joined:
            rows = rows.mapped(self.joined, [self.joined.column])
        if image := self.columns.get("image"):
            folder = Path(rows.source).parent
            rows = rows.mapped(lambda values: {**values, image: located(values.get(image), folder)})
        return rows.mapped(self.conversion) if self.conversion else rows

    def lacks_labels(self, rows: Rows) -> bool:
        """Whether no row has a label: nothing, or -1 or "N/A" and the like where training has no such class."""
        if not self.label_columns or not set(self.label_columns) <= set(rows.columns):
            return bool(self.label_columns)
        values = (row.values.get(name) for row in rows for name in self.label_columns)
        if "tags" in self.columns:  # a list of several labels may be empty
            values = (None if value == [] else value for value in values)
        return all(is_empty(value) or (mark_of_none(value) or " ") in self.marks for value in values)


def layout_of(
    rows: Rows | StreamedRows,
    task: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
    text_pair_column: str | None = None,
) -> Layout:
    """The layout of training rows, which the names of their columns and the first values decide.

    Args:
        task: what the rows are for, where the user says it.
        text_column, label_column, text_pair_column: the user's names for these columns; ``label_column`` may be several with
            commas between.

    Raises:
        InputError: columns that are missing, or that fit no task or several.
    """
    first = _first(rows)
    joined = None
    if task in (None, MULTILABEL) and (spread := label_columns(rows.columns, first, text_column, label_column)):
        text_column, names = spread
        require_columns(rows, {text_column: "--text_column", **dict.fromkeys(names, "--label_column")})
        if "," not in label_column:
            shown = ", ".join(map(repr, names))
            note(f"The columns {shown} hold 0 and 1 alone: read as {len(names)} labels of {text_column!r}.")
        task, joined = MULTILABEL, LabelColumns(names, label_column)
    flags = {text_column: "--text_column", label_column: "--label_column"}
    if text_pair_column:
        flags[text_pair_column] = "--text_pair_column"
    columns = [*rows.columns, label_column] if joined else rows.columns
    looked_at = first.mapped(joined, [label_column]) if joined else first
    require_columns(looked_at, {name: flag for name, flag in flags.items() if name not in USUAL})
    if columns[:1] != [text_column] and (mend := other_separator(columns)):
        raise InputError(f"{rows.source} has one column only, {columns[0]!r}. {mend}")
    named = (text_column, label_column, text_pair_column)
    try:
        task = task or guess_task(columns, looked_at, *named)[0]
        roles = columns_of(task, columns, *named)
        conversion = Conversion(task, roles, looked_at, rows.columns)
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from error
    layout = Layout(task, roles, conversion, joined, flags, set(), _sentence(first, roles))
    found = {mark_of_none(row.values.get(name)) for row in first for name in layout.label_columns}
    layout.marks = MARKS_OF_NONE - found
    return layout


def known_layout(
    rows: Rows | StreamedRows, task: str, columns: Mapping[str, str], labels: Sequence[str] = ()
) -> Layout:
    """The layout of more rows for a task that training has defined.

    Args:
        columns: role -> column, of the task.
        labels: the task's labels, if it has some: they say in which form the rows' own are.
    """
    first, label = _first(rows), columns.get("label", "")
    spread = task == MULTILABEL and label not in rows.columns and set(labels) <= set(rows.columns)
    joined = LabelColumns(labels, label) if spread else None
    looked_at = first.mapped(joined, [label]) if joined else first
    try:
        conversion = Conversion(task, columns, looked_at, rows.columns, labels)
    except InputError as error:
        raise InputError(f"{rows.source}: {error}") from error
    marks = MARKS_OF_NONE - {label.lower() for label in labels}
    return Layout(task, columns, conversion, joined, {}, marks, _sentence(first, columns))


def _sentence(rows: Rows, roles: Mapping[str, str]) -> str:
    """The column that says to which sentence the word of each row belongs; "" where rows are sentences.

    Raises:
        InputError: each row has one word, and there is no such column.
    """
    if "tags" not in roles or not one_word_each(rows, roles["tokens"], roles["tags"]):
        return ""
    column = sentence_column(rows.columns)
    if column is None:
        raise InputError(
            f"{rows.source} has one word in each row, and no column that tells the sentences; {ONE_SENTENCE}."
        )
    note(
        f"Each row has one word: read as sentences by the column {column!r}, which goes on where it is empty or the same as before."
    )
    return column


def _first(rows: Rows | StreamedRows) -> Rows:
    """The first rows in memory, without the bytes of images."""
    head = rows[:LOOKED_AT] if isinstance(rows, Rows) else rows.take(LOOKED_AT)
    values = [
        {name: None if isinstance(value, Mapping) and "bytes" in value else value for name, value in row.values.items()}
        for row in head
    ]
    return Rows(
        values,
        head.source,
        head.columns,
        head.lines,
        header_line=head.header_line,
        repeated=head.repeated,
        unit=head.unit,
    )
