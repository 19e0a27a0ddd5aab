"""Values of rows as the task wants them, whatever form the source has them in: one function per role of a column.

A cell that cannot be read becomes ``Unreadable``, which makes its row a bad one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from reltune.data.cells import Unreadable, looks_structured, structure_in
from reltune.data.conversations import as_messages, with_system, without_none
from reltune.data.labels import MISSING, READERS, ClassNames, switch_of
from reltune.data.rows import Row
from reltune.notes import note

SYSTEM = "system"  # the column whose text opens a conversation beside it
VERDICTS = ("label", "labels", "kto_tag")  # columns that say of a single answer whether it is good
JUDGED = ("completion", "messages", "output")  # roles of single answers
BYTES = re.compile(r"b(['\"]).*\1", re.DOTALL)
START = "answer_start"  # the column that says where the answer of a column beside it begins
ANNOTATED = "answer"  # the column in which Prodigy has accept, reject or ignore


class Conversion:
    """Makes of a row's values those that the task wants.

    Args:
        task: its name.
        columns: role -> column.
        rows: the first rows, which decide where one row alone does not.
        every: the names of all columns.
        known_labels: the task's labels, where training has defined them: they decide then.

    Attributes:
        labels: the names of all labels, where the form of the data says them.
        used: columns that are used beside those of ``columns``.
    """

    def __init__(
        self,
        task: str,
        columns: Mapping[str, str],
        rows: Iterable[Row],
        every: Sequence[str],
        known_labels: Sequence[str] = (),
    ) -> None:
        rows = list(rows)
        self.cells: dict[str, Callable[[Any], Any]] = {}
        self.labels: Sequence[str] = ()
        self.class_names: ClassNames | None = None
        for role, column in columns.items():
            if role == "label" and task in READERS:
                values = [row.values.get(column) for row in rows]
                reader: Any = READERS[task](
                    [one for one in values if not isinstance(one, Unreadable)], column, known_labels
                )
                self.labels = reader.labels
                self.cells[column] = reader
                self.class_names = reader if isinstance(reader, ClassNames) else None
            elif role in ("text", "text_pair"):
                _note_code([row.values.get(column) for row in rows], column)
                _note_no_text(rows, column)
            elif role in ("tokens", "tags"):
                self.cells[column] = partial(_as_list, column=column, always=_mostly_lists(rows, column))
            elif role in CELLS:
                self.cells[column] = partial(CELLS[role], column=column)
        free = [name for name in every if name not in columns.values()]
        self.messages = columns.get("messages", "") if SYSTEM in free else ""
        self.verdict = self.judged = ""
        if task == "causal_lm":
            self.judged = next((columns[role] for role in JUDGED if role in columns), "")
            self.verdict = next((name for name in VERDICTS if name in free and _all(rows, name, switch_of)), "")
        self.annotated = ANNOTATED if ANNOTATED in free and _all(rows, ANNOTATED, _annotation) else ""
        start = START if START in free and task == "question_answering" else ""
        self.start, self.answers = start, columns.get("answers", "") if start else ""
        asked = columns.get("prompt", "")
        self.asked = asked if asked == "instruction" and "input" in free and task == "preference" else ""
        verdict = self.verdict if self.judged else ""
        extra = (SYSTEM if self.messages else "", "input" if self.asked else "", verdict, self.annotated, self.start)
        self.used = [name for name in extra if name]

    def __bool__(self) -> bool:
        """Whether anything can change."""
        return bool(self.cells or self.used)

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        made = {**values, **{column: read(values.get(column)) for column, read in self.cells.items()}}
        if self.start and isinstance(answer := made[self.answers], str) and values.get(self.start) not in (None, ""):
            made[self.answers] = {"text": [answer], "answer_start": [_whole(values[self.start])]}
        if self.messages:
            made[self.messages] = with_system(made[self.messages], values.get(SYSTEM), SYSTEM)
        if self.asked and values.get(self.asked) and values.get("input"):
            made[self.asked] = f"{values[self.asked]}\n{values['input']}"
        if self.judged and self.verdict and switch_of(values.get(self.verdict)) is False:
            made[self.judged] = Unreadable(
                f"a {self.judged!r} that {self.verdict!r} marks as bad (single answers are learned, not avoided)"
            )
        if self.annotated and values.get(self.annotated) != "accept":
            made[self.annotated] = Unreadable(f"an {self.annotated!r} other than 'accept'")
        return made

    def note_labels(self) -> None:
        """Say which labels are spelled in several ways in the rows that were converted so far."""
        if self.class_names is not None:
            self.class_names.note_spellings()


def _all(rows: Sequence[Row], column: str, read: Callable[[Any], Any]) -> bool:
    """Whether something can be read of the column in every row that has it, and in one at least."""
    values = [value for row in rows if (value := row.values.get(column)) is not None and value != ""]
    return bool(values) and all(read(value) is not None for value in values)


def _note_code(values: Sequence[Any], column: str) -> None:
    """Say that all texts look like values of a program."""
    texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    if texts and all(structure_in(text) is not None for text in texts):
        note(f"The texts in {column!r} are lists or objects written as text, and are read with their brackets.")
    elif texts and all(BYTES.fullmatch(text) for text in texts):
        note(f"The texts in {column!r} are bytes as Python writes them (b'…'), and are read with all their marks.")


def _note_no_text(rows: Sequence[Row], column: str) -> None:
    """Say that texts are words which programs write where there is no value."""
    found = [row for row in rows if isinstance(text := row.values.get(column), str) and text.strip().lower() in MISSING]
    if found:
        shown = found[0].values[column].strip()
        note(
            f"Texts such as {shown!r} in {column!r} (line {found[0].line}) are read as they are; if they mark rows without a text, "
            "delete them."
        )


def _whole(value: Any) -> Any:
    """The whole number that a text or a fraction of .0 stands for; other values as they are."""
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _annotation(value: Any) -> Any:
    return value if value in ("accept", "reject", "ignore") else None


def _mostly_lists(rows: Sequence[Row], column: str) -> bool:
    """Whether most of the column's texts spell lists."""
    texts = [value for row in rows if isinstance(value := row.values.get(column), str) and value.strip()]
    return sum(isinstance(structure_in(text), list) for text in texts) > len(texts) / 2


def _as_list(value: Any, column: str, always: bool) -> Any:
    """A list in place of the text that spells it; unless texts ``always`` spell one, others are words with spaces between."""
    if not isinstance(value, str) or not value.strip() or not (always or looks_structured(value)):
        return value
    parsed = structure_in(value)
    return parsed if isinstance(parsed, list) else Unreadable(f"a {column!r} that is no list")


def _as_answers(value: Any, column: str) -> Any:
    """SQuAD's ``{"text": [...], "answer_start": [...]}`` of a text that spells it, of a list of answers, and of one answer; texts
    without a place as they are."""
    if isinstance(value, str):
        parsed = structure_in(value)
        value = parsed if isinstance(parsed, list | Mapping) else value
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return value  # texts that the context holds somewhere
    if isinstance(value, list) and all(isinstance(one, Mapping) and "text" in one for one in value):
        value = {"text": [one["text"] for one in value], "answer_start": [one.get("answer_start") for one in value]}
    if isinstance(value, Mapping) and isinstance(value.get("text"), str):
        value = {"text": [value["text"]], "answer_start": [value.get("answer_start")]}
    if isinstance(value, Mapping) and isinstance(starts := value.get("answer_start"), list):
        value = {**value, "answer_start": [_whole(start) for start in starts]}
    return value


def _as_tools(value: Any, column: str) -> Any:
    """A list of descriptions of tools, or None where there are none."""
    if value is None or value == "":
        return None
    parsed = structure_in(value) if isinstance(value, str) else value
    parsed = [parsed] if isinstance(parsed, Mapping) else parsed
    good = isinstance(parsed, list) and all(isinstance(tool, Mapping) for tool in parsed)
    return (without_none(parsed) or None) if good else Unreadable(f"a {column!r} that is no list of tools")


def _as_history(value: Any, column: str) -> Any:
    """A list of earlier turns, each a question and its answer."""
    parsed: Any = structure_in(value) if isinstance(value, str) and value.strip() else value or []
    good = isinstance(parsed, list) and all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in parsed
    )
    return (
        [list(turn) for turn in parsed]
        if good
        else Unreadable(f"a {column!r} that is no list of questions and answers")
    )


CELLS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("messages", "prompt", "completion", "chosen", "rejected"), as_messages),
    "answers": _as_answers,
    "tools": _as_tools,
    "history": _as_history,
}
