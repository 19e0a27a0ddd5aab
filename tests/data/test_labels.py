"""Labels: what they are for, and the values that tasks are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from reltune.data.cells import Unreadable
from reltune.data.labels import (
    ClassNames,
    LabelColumns,
    LabelSets,
    Numbers,
    is_empty,
    mark_of_none,
    note_odd_labels,
    note_one_class,
    note_rare_classes,
    switch_of,
    task_of_labels,
)
from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.notes import collecting


def task_of(labels: Sequence[Any]) -> tuple[str, list[str]]:
    """The task that the labels are for, and what is said of it."""
    with collecting() as notes:
        return task_of_labels([Row({"y": label}, line) for line, label in enumerate(labels, 1)], "y"), notes


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[1, 0, 0], [0, 1, 1]], ""),
        ([[1.0, 0.0], [0.0, 0.0]], ""),
        ([[True, False], [True, True]], ""),
        (["[1 0]", "[0 0]"], ""),
        (["['a', 'b']", "[]", None], ""),
        (["['a']", "[b]"], "exactly one label"),  # the second is a bad row
        ([{"a": 1, "b": 0}, {"a": 0, "b": 0}], ""),
        (["a|b", "a", ""], "'a|b' in 'y' are read as several"),
        (["1|2", "1"], "several"),
        ([["a"], ["b"]], "exactly one label"),
        (["1 0 0", "0 1 1"], ""),
        (["1|0", "1|1"], ""),
        ([[1, 0, 0], [0, 1, 1], [1, 0]], ""),  # the last is a bad row
    ],
)
def test_several_labels(labels: list[Any], words: str) -> None:
    task, notes = task_of(labels)
    assert task == "multilabel_classification" and words in " ".join(notes) and bool(words) == bool(notes)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["3,2", "1,5", "2"], "decimal comma or several labels; say which with --task regression or --task multi"),
        (["a,b", "a", "b", "b"], "several labels of one text or one class.*--task multilabel_classification"),
        (["a;b", "b;a"], "several labels of one text or one class"),
        ([[[0, 5, "PER"]], []], "lists of lists or of objects.*token_classification"),
        ([[{"start": 0, "end": 5}]], "lists of lists or of objects"),
        ([{"a": 3}], "are objects; multilabel_classification wants a list of classes"),
        ([[0.5, 1.0]], "lists with numbers"),
        (["10%", "20%", "5 %"], "'10%' in 'y' could be classes or quantities; .*--task regression"),
        (["$1.50", "$2.50", "$3"], "could be classes or quantities"),
        (["1,234.50", "2,100.00", "1,000,000"], "could be classes or quantities"),
        (["2020-01-01", "2020-01-02", "2020-01-03"], "are dates"),
        (["010", "110", "000"], r"a zero or one for each of several labels.*\[0, 1, 0\]"),
        (["B-X O", "O O"], "tags of words, such as 'B-X'; for token_classification"),
        ([["B-X", "O"], ["O"]], "tags of words"),
    ],
)
def test_labels_that_could_be_several_things(labels: list[Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        task_of(labels)


@pytest.mark.parametrize(
    "labels",
    [
        ["10%", "20%"],
        ["100", "110", "101"],
        ["1/5", "2/5"],
        ["Paris, France", "Rome, Italy"],
        ["a, b", "c"],
        [0.0, 1.0],
        ["0.0", "1.0", 1],
    ],
)
def test_one_class(labels: list[Any]) -> None:
    assert task_of(labels) == ("sequence_classification", [])


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1.0, 0, "1", "1.0", " 0 ", 2.0], ["1", "0", "1", "1", "0", "2"]),
        (["TRUE", "True", "false", True], ["True", "True", "False", "True"]),
        (["01", "1"], ["01", "1"]),
        (["1.0", "n/a", 2.0], ["1.0", "n/a", "2"]),  # names of versions, say
        ([["a"], "['b']", '["a"]'], ["a", "b", "a"]),
        (["a", float("nan"), None, ""], ["a", None, None, None]),
        ([-1, 1], ["-1", "1"]),
    ],
)
def test_class_names(labels: list[Any], names: list[Any]) -> None:
    assert list(map(ClassNames(labels, "y"), labels)) == names


def test_class_names_that_are_none() -> None:
    read = ClassNames(["a", "b"], "y")
    for value, words in ((["a", "b"], "a list of several"), ("['a', 'b']", "several"), ("[a, b]", "in brackets")):
        assert words in read(value).reason
    assert read(0.5) == 0.5 and read([]) is None and read({"a": 1}) == {"a": 1}  # for the task to refuse


def test_spellings_are_said_once() -> None:
    read = ClassNames(["1", 1.0], "y")
    for label in ("1", 1.0, 1.0, 2, "2 ", "-1"):
        read(label)
    with collecting() as notes:
        read.note_spellings()
    assert notes == ["The labels '1', '1.0' in 'y' are read as one class, '1'."]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["-1", "0", "1", "2"], "'-1' in 'y' is read as a class; if it marks rows without a label, delete them"),
        (["a", "nan"], "'nan' in 'y' is read as a class"),
        (["bad", "Good", "good"], "'Good' and 'good' in 'y' are different ones, although they look alike"),
        (['"bad"', "bad"], "look alike"),
        (["B-PER", "O", "o"], "'O' and 'o' in 'y' are different ones"),
        (["“bad”", "“good”"], "keep their quotes, which are no marks of CSV"),
        (["'bad'", "'good'"], "keep their quotes"),
        (["-", "entailment"], "'-' in 'y' is read as a class"),
        (["#N/A", "good"], "'#N/A' in 'y' is read as a class"),
        (["bad", "bad\u200b"], "'bad' and 'bad\\u200b' in 'y' are different ones"),
        (["n\u00e9g", "ne\u0301g"], "'ne\\u0301g' and 'n\\xe9g' in 'y' are different"),
        (["-1", "0", "1"], None),
        (["bad", "good"], None),
    ],
)
def test_odd_labels(labels: list[str], words: str | None) -> None:
    with collecting() as notes:
        note_odd_labels(labels, "y")
    assert len(notes) == bool(words) and (words or "") in " ".join(notes)


@pytest.mark.parametrize(
    ("labels", "sets", "names", "words"),
    [
        ([[1, 0, 1], [0, 0, 0], "[0 1 0]"], [["0", "2"], [], ["1"]], ["0", "1", "2"], "3 zeros and ones"),
        ([[1, 0], [0, 1]], [["0"], ["1"]], ["0", "1"], "each row has exactly one"),
        (["1,0,0", "0,1,1"], [["0"], ["1", "2"]], ["0", "1", "2"], "3 zeros and ones"),
        ([{"a": 1.0, "b": 0}, {"b": 1}], [["a"], ["b"]], ["a", "b"], ""),
        (["a|b", " c | a ", ""], [["a", "b"], ["c", "a"], []], [], ""),
        (["a, b", "c"], [["a", "b"], ["c"]], [], "'a, b' in 'y' are read as several, with ',' between"),
        (["3,2", "1"], [["3", "2"], ["1"]], [], "','"),
        (["a,b|c", "a"], [["a,b", "c"], ["a"]], [], ""),
        (["['a', 'b']", "[]"], [["a", "b"], []], [], ""),
        ([[1.0, 3.0], [2]], [[1, 3], [2]], [], ""),
        ([None, float("nan"), ["a"]], [None, None, ["a"]], [], ""),
    ],
)
def test_sets_of_labels(labels: list[Any], sets: list[Any], names: list[str], words: str) -> None:
    with collecting() as notes:
        read = LabelSets(labels, "y")
    assert list(map(read, labels)) == sets and list(read.labels) == names
    assert words in " ".join(notes) and bool(words) == bool(notes)


def test_sets_that_are_none() -> None:
    with collecting():
        places, words = LabelSets([[1, 0, 1], [0, 0, 0]], "y"), LabelSets(["a|b"], "y")
    for value in ([1, 0], [1, 0, 2], ["a", "b", "c"], "a|b", "[1 0"):
        assert "no list of 3 zeros and ones" in places(value).reason
    assert "in brackets" in words("[a, b]").reason and words({"a": 5}) == {"a": 5}


def test_numbers() -> None:
    with collecting() as notes:
        comma, point = Numbers(["3,2", "-1,55", "4", None], "y"), Numbers(["1,234", "0.5"], "y")
    assert notes == ["Labels such as '3,2' in 'y' are read as numbers with a decimal comma."]
    assert list(map(comma, ["3,2", " -1,5", "4", 2.5, "x", None, [3.5], "[2]"])) == [
        "3.2",
        " -1.5",
        "4",
        2.5,
        "x",
        None,
        3.5,
        2,
    ]
    assert point("1,234") == "1,234"  # a bad row
    with pytest.raises(InputError, match="'1,000' in 'y' could have a decimal comma or a comma between thousands"):
        Numbers(["1,000", "12"], "y")


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (["45%", "7 %", "3.5%"], ["45", "7", "3.5"]),
        (["$1,234.50", "$2"], ["1234.50", "2"]),
        (["12.50€", "3€"], ["12.50", "3"]),
        (["1,234.50", "1,000", "7"], ["1234.50", "1000", "7"]),
        (["1.234,50", "2.000,00"], ["1234.50", "2000.00"]),
        (["\N{MINUS SIGN}0.5", "1.5"], ["-0.5", "1.5"]),
        (["45%", "0.5"], ["45%", "0.5"]),  # of two kinds: bad rows
        (["$5", "5€"], ["$5", "5€"]),
    ],
)
def test_signs_and_thousands(labels: list[str], numbers: list[str]) -> None:
    with collecting() as notes:
        read = Numbers(labels, "y")
    assert list(map(read, labels)) == numbers
    assert notes == (
        [f"Labels such as {labels[0]!r} in 'y' are read as the number {numbers[0]}."] if labels != numbers else []
    )


def test_lists_of_another_length_are_bad_rows() -> None:
    with collecting():
        read = LabelSets([[1, 0, 0], [0, 1, 1], [1, 0]], "y")
    assert read([1, 0, 0]) == ["0"] and "no list of 3 zeros and ones" in read([1, 0]).reason


def test_held_out_rows_of_one_class() -> None:
    with collecting() as notes:
        note_one_class("test", ["0"] * 9)
        note_one_class("validation", ["0", "1"])
    assert len(notes) == 1 and "All 9 rows of the test split have the label '0'" in notes[0]


def test_columns_of_labels() -> None:
    join = LabelColumns(["toxic", "obscene"], "y")
    assert join({"t": "x", "toxic": "1", "obscene": 1.0}) == {
        "t": "x",
        "toxic": "1",
        "obscene": 1.0,
        "y": ["toxic", "obscene"],
    }
    assert join({"toxic": False, "obscene": "true"})["y"] == ["obscene"]
    found = join({"toxic": 0, "obscene": -1})["y"]
    assert isinstance(found, Unreadable) and found.reason == "a 'obscene' that is neither 0 nor 1"
    assert [switch_of(value) for value in (0, "1", 2, "", None, "no", "TRUE")] == [
        False,
        True,
        None,
        None,
        None,
        None,
        True,
    ]


def test_what_is_no_label() -> None:
    assert all(map(is_empty, (None, "", " ", float("nan")))) and not any(map(is_empty, (0, "0", [], False)))
    assert [*map(mark_of_none, (-1, "-1", -1.0, [-1, -1], "N/A", "?"))] == ["-1"] * 4 + ["n/a", "?"]
    assert not any(map(mark_of_none, (1, "", [], [-1, 0], None, float("nan"), "none at all")))


@pytest.mark.parametrize(
    ("counts", "guessed", "words"),
    [
        (
            {"1": 1, "2": 1, "3": 4},
            True,
            "s.csv: 3 classes, of which 2 have one example ('1', '2'); if the labels are quantities",
        ),
        ({"1": 1, "2": 3}, False, "s.csv: 2 classes, of which 1 has one example ('1')."),
        ({"a": 1, "b": 3}, True, "s.csv: 2 classes, of which 1 has one example ('a')."),
        (
            {str(n): 9 for n in range(11)},
            True,
            "s.csv: 11 classes; if the labels are quantities, pass --task regression.",
        ),
        ({str(n): 9 for n in range(10)}, True, None),
        (
            {f"{n}.5": 9 for n in range(11)},
            False,
            "s.csv: 11 classes; if the labels are quantities, pass --task regression.",
        ),
        (
            {str(n): 1 for n in range(9)},
            False,
            "s.csv: 9 classes, of which 9 have one example ('0', '1', '2', …); if the labels are q",
        ),
        (
            {f"2024-01-0{n}": 1 for n in range(2)},
            False,
            "s.csv: 2 classes, of which 2 have one example ('2024-01-00', '2024-01-01'); the labels are dates",
        ),
        (
            {f"id {n}": 1 for n in range(2)},
            False,
            "s.csv: 2 classes, of which 2 have one example ('id 0', 'id 1'); most rows have",
        ),
        (
            {"sport": 9, "sprt": 1, "Tech ": 1, "tech": 9, "news": 1, "run 1": 9, "run 2": 1},
            False,
            "s.csv: 7 classes, of which 4 have one example ('Tech ', meant to be 'tech'?, 'news', 'run 2', …).",
        ),
        (
            {"sport": 9, "sprt": 1},
            False,
            "s.csv: 2 classes, of which 1 has one example ('sprt', meant to be 'sport'?).",
        ),
        ({chr(n): 9 for n in range(99, 120)}, True, None),
    ],
)
def test_rare_classes(counts: dict[str, int], guessed: bool, words: str | None) -> None:
    with collecting() as notes:
        note_rare_classes(counts, "folder/s.csv", guessed)
    assert notes == [] if words is None else notes[0].startswith(words)
