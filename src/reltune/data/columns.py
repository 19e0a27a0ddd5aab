"""Which task rows are meant for, read off the names of their columns and the kind of their labels."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reltune.data.rows import Row, Rows
from reltune.data.streams import StreamedRows
from reltune.errors import InputError
from reltune.notes import note

LOOKED_AT = 1000  # rows whose labels decide between classes, numbers and lists
CLASSES = 20  # integers of more values than this are classes only where they repeat
REPEATS = 5  # rows per value, on average


@dataclasses.dataclass(frozen=True)
class Convention:
    """A layout of columns that people know, and the tasks it can be for.

    Attributes:
        tasks: where there are several, the labels decide.
        roles: what each column is to the task -> the names it goes by, the usual one first.
        optional: roles that may be missing.
    """

    tasks: tuple[str, ...]
    roles: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def columns(self, found: Sequence[str]) -> dict[str, str] | None:
        """role -> column, or None if one is missing."""
        chosen: dict[str, str] = {}
        for role, names in (self.roles | self.optional).items():
            name = next((name for name in names if name in found), None)
            if name is not None:
                chosen[role] = name
            elif role in self.roles:
                return None
        return chosen

    def __str__(self) -> str:
        names = [names[0] for names in self.roles.values()] + [f"({names[0]})" for names in self.optional.values()]
        return ", ".join(names)


LABELLED = ("sequence_classification", "multilabel_classification", "regression")
LABEL = ("label", "labels")
CONVENTIONS = (
    Convention(("preference",), {"chosen": ("chosen",), "rejected": ("rejected",)}, {"prompt": ("prompt",)}),
    Convention(
        ("question_answering",), {"question": ("question",), "context": ("context",), "answers": ("answers", "answer")}
    ),
    Convention(
        ("token_classification",),
        {"tokens": ("tokens", "words"), "tags": ("ner_tags", "tags", "pos_tags", "chunk_tags", "labels")},
    ),
    Convention(("causal_lm",), {"messages": ("messages",)}),
    Convention(("causal_lm",), {"prompt": ("prompt",), "completion": ("completion",)}),
    Convention(("causal_lm",), {"instruction": ("instruction",), "output": ("output",)}, {"input": ("input",)}),
    Convention(("seq2seq",), {"source": ("source",), "target": ("target",)}),
    Convention(("seq2seq",), {"source": ("document",), "target": ("summary",)}),
    Convention(("seq2seq",), {"source": ("article",), "target": ("highlights", "summary")}),
    Convention(("image_classification",), {"image": ("image",), "label": LABEL}),
    Convention(LABELLED, {"text": ("text", "sentence"), "label": LABEL}),
)
BESIDE = ("", "id", "idx", "index", "url", "title", "date", "timestamp", "meta", "metadata")  # of text alone
TEXT_ALONE = Convention(("causal_lm", "masked_lm"), {"text": ("text",)})


def guess_task(
    columns: Sequence[str], rows: Iterable[Row], text_column: str = "text", label_column: str = "label"
) -> tuple[str, dict[str, str]]:
    """The task that rows are laid out for.

    Args:
        columns: the columns' names.
        rows: the rows, of which the first are looked at where labels decide: lists of labels are several classes, numbers
            with a fraction are to be predicted as numbers, words and few integers are classes.
        text_column: what the user calls the column ``text``.
        label_column: what the user calls the column ``label``.

    Returns:
        The task's name and its columns by role, for example ``("causal_lm", {"prompt": "prompt", "completion": "completion"})``.
        A text column alone is taken for causal language modelling.

    Raises:
        InputError: no layout fits, or several do, or labels that could be classes as well as numbers.
    """
    fitting = [
        (convention, chosen)
        for convention in _named(text_column, label_column)
        if (chosen := convention.columns(columns)) is not None
    ]
    wider = [
        (convention, chosen)
        for convention, chosen in fitting
        if not any(set(chosen.values()) < set(other.values()) for _, other in fitting)
    ]
    if len(wider) > 1:
        tasks = " or ".join(dict.fromkeys(convention.tasks[0] for convention, _ in wider))
        raise InputError(f"The columns {_shown(columns)} could be for {tasks}; say which with --task.")
    if wider:
        convention, chosen = wider[0]
        if convention.tasks == LABELLED:
            return _by_labels(itertools.islice(rows, LOOKED_AT), chosen["label"]), chosen
        return convention.tasks[0], chosen
    if text_column in columns and set(columns) <= {text_column, *BESIDE} and label_column in LABEL:
        return TEXT_ALONE.tasks[0], {"text": text_column}
    layouts = "; ".join(str(convention) for convention in (*CONVENTIONS, TEXT_ALONE))
    raise InputError(
        f"The columns {_shown(columns)} are of no layout that is known ({layouts}). Name yours with --text_column and "
        "--label_column, or rename them."
    )


def columns_of(
    task: str, columns: Sequence[str], text_column: str = "text", label_column: str = "label"
) -> dict[str, str]:
    """The columns of a known task by role, for example {"text": "text", "label": "label"}.

    Raises:
        InputError: a layout that the task does not know; the message has the columns found and those that it knows.
    """
    text_alone = dataclasses.replace(TEXT_ALONE, roles={"text": (text_column,)})
    mine = [c for c in (*_named(text_column, label_column), text_alone) if task in c.tasks]
    fitting = [chosen for convention in mine if (chosen := convention.columns(columns)) is not None]
    if fitting:
        return max(fitting, key=len)
    raise InputError(
        f"The columns {_shown(columns)} are none that {task} can use; it wants {' or '.join(map(str, mine))}. "
        "Rename them, or name them with --text_column and --label_column."
    )


def note_left_out(rows: Rows | StreamedRows, used: Iterable[str]) -> None:
    """Name the columns that the task does not use."""
    unused = [name or "an unnamed one" for name in rows.columns if name not in set(used)]
    if unused:
        note(f"{Path(rows.source).name}: not used: {'columns' if len(unused) > 1 else 'column'} {_shown(unused)}.")


def _shown(columns: Sequence[str]) -> str:
    return (", ".join(map(repr, columns[:12])) or "none") + (", …" if len(columns) > 12 else "")


def _named(text_column: str, label_column: str) -> tuple[Convention, ...]:
    """The conventions with the user's names for text and label in place of the usual ones."""
    own = {"text": text_column, "label": label_column}

    def names(role: str, usual: tuple[str, ...]) -> tuple[str, ...]:
        given = own.get(role, role)
        return usual if given == role else (given,)

    return tuple(
        dataclasses.replace(c, roles={role: names(role, usual) for role, usual in c.roles.items()})
        if {"text", "label"} & set(c.roles)
        else c
        for c in CONVENTIONS
    )


def _by_labels(rows: Iterable[Row], column: str) -> str:
    """Which of LABELLED the labels are made for; empty ones say nothing."""
    filled = [(row.line, row.values.get(column)) for row in rows]
    filled = [(line, label) for line, label in filled if label is not None and label != ""]
    labels = [label for _, label in filled]
    if any(isinstance(label, list) for label in labels):
        if all(isinstance(label, list) and not any(isinstance(one, float) for one in label) for label in labels):
            return "multilabel_classification"
        raise InputError(
            f"The labels in {column!r} are lists with numbers, or lists and other things; multilabel_classification wants "
            "a list of classes in every row."
        )
    numbers = [_number(label) for label in labels]
    fractional = any(number != int(number) for number in numbers if number is not None)
    words = [(line, label) for (line, label), number in zip(filled, numbers, strict=True) if number is None]
    if words and fractional:  # scores with a slip of the pen, or version numbers among other names
        raise InputError(
            f"The labels in {column!r} are fractions and other things, such as {words[0][1]!r} on line {words[0][0]}; say with "
            "--task regression that they are numbers (rows with others are then bad rows), or with --task sequence_classification "
            "that they are classes."
        )
    if not labels or words:
        return "sequence_classification"
    if fractional:
        return "regression"
    values = set(numbers)
    fractions = any(isinstance(label, float) or (isinstance(label, str) and "." in label) for label in labels)
    if fractions or (len(values) > CLASSES and len(numbers) < REPEATS * len(values)):
        raise InputError(
            f"The labels in {column!r} are whole numbers, {len(values)} different ones in {len(numbers)} rows, and could be "
            "classes or quantities; say which with --task sequence_classification or --task regression."
        )
    return "sequence_classification"


def _number(label: Any) -> float | None:
    """The number that a label is or spells; None for words and booleans."""
    if isinstance(label, bool):
        return None
    if isinstance(label, int | float):
        return float(label) if label == label and abs(label) != float("inf") else None
    if isinstance(label, str) and re.fullmatch(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", label):
        return float(label)
    return None
