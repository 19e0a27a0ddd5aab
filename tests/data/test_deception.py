"""Data that deceive: what is said of them, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from reltune.data.deception import check_leaks, note_columns, note_conflicts
from reltune.data.rows import Row, Rows
from reltune.errors import InputError
from reltune.notes import collecting


def rows_of(*values: tuple[str, str], source: str = "folder/made.csv", start: int = 2) -> Rows:
    records = [{"text": text, "label": label} for text, label in values]
    return Rows(records, source, ["text", "label"], list(range(start, start + len(records))))


def content(row: Row) -> str:
    return str(row.values["text"])


def label(row: Row) -> str:
    return str(row.values["label"])


TRAIN = rows_of(*((f"text {n}", "a") for n in range(5)))
SAYS_LITTLE = "What is measured on them says little of other texts; --on_leak error refuses such data."


def test_rows_of_training_among_held_out_ones_are_counted() -> None:
    test = rows_of(("other", "a"), ("text  1", "a"), ("text 9", "a"), ("text 2", "b"), source="test.csv")
    validation = rows_of(("text 9", "a"), ("none", "a"), source="val.csv")
    with collecting() as notes:
        check_leaks(TRAIN, {"test": test, "validation": validation}, content, label)
    assert notes == [
        "test.csv: 2 of 4 test rows are in the training data too, the first on line 3; 1 of them with another label. "
        + SAYS_LITTLE,
        "test.csv: 1 of 4 test rows are in the validation data too, the first on line 4. " + SAYS_LITTLE,
    ]
    with collecting() as notes:
        check_leaks(TRAIN, {}, content, label)
        check_leaks(TRAIN, {"test": rows_of(), "validation": rows_of(("new", "a"))}, content, label, "error")
    assert notes == []


@pytest.mark.parametrize("split", ["test", "validation", "forgetting"])
def test_they_are_refused_where_this_is_asked_for(split: str) -> None:
    held = {split: rows_of(("text 4", "a"), source="held.csv")}
    with pytest.raises(
        InputError, match=rf"held.csv: 1 of 1 {split} rows are in the training data too, the first on line 2\. Remove"
    ):
        check_leaks(TRAIN, held, content, label, "error")
    both = {"validation": rows_of(("x", "a")), "test": rows_of(("x ", "a"))}
    with pytest.raises(InputError, match="1 of 1 test rows are in the validation data too"):
        check_leaks(TRAIN, both, content, label, "error")


def test_texts_with_several_labels_are_counted() -> None:
    def said(*values: tuple[str, str], several: bool = False) -> list[str]:
        with collecting() as notes:
            note_conflicts(rows_of(*values), content, label, several)
        return notes

    assert said(("a", "x"), ("b", "x"), ("a", "x")) == []
    assert said(("a", "x"), ("b", "x"), ("a ", "y"), ("a", "z")) == [
        "made.csv: 1 text stands in several rows with different labels (lines 2 and 4); at most one can be learned."
    ]
    (words,) = said(("a", "x"), ("b", "x"), ("b", "y"), ("a", "y"), several=True)
    assert words.startswith(
        "made.csv: 2 texts stand in several rows with different labels (lines 3 and 4); if a text may"
    )


def columns_said(
    records: Sequence[dict[str, object]], columns: dict[str, str], told: Sequence[str] = ("label",)
) -> list[str]:
    with collecting() as notes:
        note_columns(Rows(list(records), "made.csv"), columns, told)
    return notes


def test_columns_that_say_nothing_or_too_much() -> None:
    pair = {"text": "a", "text_pair": "b", "label": "c"}
    good = [{"a": f"a{n}", "b": f"b{n}", "c": n % 2} for n in range(12)]
    assert columns_said(good, pair) == []
    assert columns_said([{**row, "b": "x"} for row in good], pair) == [
        "made.csv: 'b' is the same in all 12 training rows, so that nothing can be learned from it."
    ]
    assert columns_said([{**row, "b": f" {row['c']}"} for row in good], pair) == [
        "made.csv: 'b' equals 'c' in all 12 training rows: what is to be learned stands in what the model reads; is 'b' the right column?"
    ]
    assert columns_said([{**row, "b": row["a"]} for row in good], pair) == [
        "made.csv: 'a' equals 'b' in all 12 training rows."
    ]
    one_other = [*good[1:], {"a": "a0", "b": "else", "c": 0}]
    assert columns_said([{**row, "b": "x"} for row in good[1:]] + one_other[-1:], pair) == []
    assert columns_said([{**row, "b": "x"} for row in good[:9]], pair) == []  # too few to say


def test_columns_that_may_be_the_same_in_all_rows() -> None:
    rows = [{"instruction": "translate", "input": f"a{n}", "output": f"b{n}", "system": "be brief"} for n in range(12)]
    assert columns_said(rows, {name: name for name in rows[0]}, ("completion", "output")) == []
    rows = [{"prompt": "go on", "completion": f"b{n}"} for n in range(12)]
    assert len(columns_said(rows, {name: name for name in rows[0]}, ("completion", "output"))) == 1
