from collections import Counter

import pytest

from reltune.data.rows import Row, Rows
from reltune.data.splitting import check_splits, split_off
from reltune.errors import InputError


def row(text, label, line):
    return Row({"text": text, "label": label}, line)


def content(row):
    return row.values["text"]


def label(row):
    return row.values["label"]


def rows_of(counts):
    labels = [name for name, count in counts.items() for _ in range(count)]
    return rows_like([row(f"text {index}", label, index + 2) for index, label in enumerate(labels)])


def rows_like(rows):
    return Rows([row.values for row in rows], "made", lines=[row.line for row in rows])


def split(rows, fraction, seed):
    return split_off(rows, fraction, seed, content, label)


def test_split_keeps_proportions_order_and_seed():
    rows = rows_of({"a": 60, "b": 30, "c": 10})
    rest, part = split(rows, 0.2, seed=7)
    assert Counter(map(label, part)) == {"a": 12, "b": 6, "c": 2}
    assert sorted([*rest, *part], key=list(rows).index) == list(rows)
    for side in (rest, part):
        assert [row.line for row in side] == sorted(row.line for row in side)
    again, other = split(rows, 0.2, seed=7), split(rows, 0.2, seed=8)
    assert list(map(list, again)) == [list(rest), list(part)] != list(map(list, other))


def test_copies_of_a_text_stay_together():
    rows = rows_like([row(f"text  {n % 20}" + " " * (n // 20), "ab"[n % 2], n) for n in range(100)])
    rest, part = split(rows, 0.25, seed=0)
    assert len(rest) + len(part) == 100 and len(part) == 25
    assert not {" ".join(content(row).split()) for row in rest} & {" ".join(content(row).split()) for row in part}


def test_rare_classes_do_not_stop_a_split():
    for seed in range(5):
        rest, part = split(rows_of({"a": 40, "b": 20, "once": 1}), 0.2, seed)
        assert len(part) == 12 and "once" in set(map(label, rest))
        assert Counter(map(label, part)) == {"a": 8, "b": 4}
        # three classes, but a part of two texts: drawn without regard to classes
        rest, part = split(rows_of({"a": 6, "b": 6, "c": 6}), 0.1, seed)
        assert (len(rest), len(part)) == (16, 2)


def test_every_class_keeps_a_text_in_the_rest():
    classes = {f"c{index}": 2 for index in range(50)}
    for seed in range(3):  # chance alone would move all texts of some class
        rest, part = split(rows_of(classes), 0.3, seed)
        assert set(map(label, rest)) == set(classes) and 20 < len(part) < 30


@pytest.mark.parametrize(
    ("rows", "fraction"),
    [
        ([], 0.5),
        ([row("a", "x", 1)], 0.5),
        ([row("a", "x", 1), row(" a", "x", 2)], 0.5),
        (rows_of({"a": 10}), 0.99),
        (rows_of({"a": 10}), 0.0),
        (rows_of({"a": 10}), 1.0),
        (rows_of({"a": 10}), float("nan")),
    ],
)
def test_too_little_to_split(rows, fraction):
    with pytest.raises(InputError):
        split(rows_like(list(rows)), fraction, seed=0)


def test_check_splits():
    a, b, c = row("t", "a", 4), row("u", "b", 5), row("v", "c", 6)
    check_splits([a, b], [a], [b], label)
    check_splits([a, a], [b], [c])  # a task without classes
    for splits, words in [
        (([], [a], [b]), "training split has no rows"),
        (([a, b], [], [b]), "validation split has no rows"),
        (([a, b], [a], []), "test split has no rows"),
        (([a, a], [a], [a]), "'a'.*two classes"),
        (([a, b], [a, c], [b]), r"'c' in the validation split \(line 6\)"),
        (([a, b], [a], [b, c]), r"'c' in the test split \(line 6\)"),
    ]:
        with pytest.raises(InputError, match=words):
            check_splits(*splits, label)
