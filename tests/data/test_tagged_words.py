"""Files of words with tags, as the CoNLL tasks have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from reltune.data.bad_rows import checked
from reltune.data.layout import layout_of
from reltune.data.rows import Rows
from reltune.data.sources import read_rows, read_splits
from reltune.data.tagged_words import entity_tags
from reltune.errors import InputError
from reltune.notes import collecting


def read(tmp_path: Path, content: str, name: str = "d.conll") -> Rows:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return read_rows(tmp_path / name)


@pytest.mark.parametrize("gap", ["\n", "\n\n", " \n"])
@pytest.mark.parametrize("between", [" ", "\t", "  "])
def test_words_and_tags(tmp_path: Path, gap: str, between: str) -> None:
    content = f"{gap}Ann{between}B-PER\nsings{between}O\n{gap}#好{between}O\n"
    rows = read(tmp_path, content)
    assert [row.values for row in rows] == [
        {"tokens": ["Ann", "sings"], "ner_tags": ["B-PER", "O"]},
        {"tokens": ["#好"], "ner_tags": ["O"]},
    ]
    assert rows[0].line == content.split("\n").index(f"Ann{between}B-PER") + 1
    assert [row.values for row in read_splits(tmp_path / "d.conll", streaming=True)["train"]] == [
        row.values for row in rows
    ]


def test_more_columns(tmp_path: Path) -> None:
    with collecting() as notes:
        rows = read(tmp_path, "-DOCSTART- -X- -X- O\n\nAnn NNP B-NP B-PER\nsings VB B-VP O\n\n-DOCSTART- -X- -X- O\n")
    assert [row.values for row in rows] == [{"tokens": ["Ann", "sings"], "ner_tags": ["B-PER", "O"]}]
    assert notes == ["d.conll: of 4 columns the first is read as words and the last as tags."]


def test_a_treebank(tmp_path: Path) -> None:
    lines = [
        "# text = vámonos",
        "1-2\tvámonos" + "\t_" * 8,
        "1\tvamos\tir\tVERB" + "\t_" * 6,
        "2\tnos\tnos\tPRON" + "\t_" * 6,
    ]
    with collecting() as notes:
        rows = read(tmp_path, "\n".join([*lines, "3.1\tx" + "\t_" * 8]) + "\n\n", "d.conllu")
    assert [row.values for row in rows] == [{"tokens": ["vamos", "nos"], "ner_tags": ["VERB", "PRON"]}] and notes == []


def test_lines_that_lack_a_tag(tmp_path: Path) -> None:
    rows = read(tmp_path, "Ann O\n\nsings\n\nBob O\nx y z\n\nCid O\n")
    with pytest.raises(
        InputError, match=r"another number of columns than the first, or without a tag on 2 lines \(3, 5\)"
    ):
        checked(rows, lambda row: None)
    assert len(checked(rows, lambda row: None, "skip")) == 2


def test_a_hash_that_is_a_word(tmp_path: Path) -> None:
    rows = read(tmp_path, "# id 7\n# O\nAnn B-PER\n# O\n\n# a comment\nsings O\n# two words\n")
    assert [row.values["tokens"] for row in rows] == [["#", "Ann", "#"], ["sings"]]


@pytest.mark.parametrize("name", ["sentence_id", "Sentence #"])
def test_a_word_in_each_row(name: str) -> None:
    """The number of a sentence on all of its words, or on the first alone."""
    words = [("1", "Ann", "B-PER"), ("" if "#" in name else "1", "sings", "O"), ("2", "Bob", "B-PER")]
    columns = (name, "words", "labels")
    rows = Rows([dict(zip(columns, word, strict=True)) for word in words], "d.csv", lines=[2, 3, 4])
    with collecting() as notes:
        layout = layout_of(rows)
        found = layout.read(rows)
    assert [(row.line, row.values["words"], row.values["labels"]) for row in found] == [
        (2, ["Ann", "sings"], ["B-PER", "O"]),
        (4, ["Bob"], ["B-PER"]),
    ]
    assert layout.task == "token_classification" and name in layout.used and f"by the column {name!r}" in notes[0]
    for record in rows.records:
        del record[name]
    with pytest.raises(InputError, match="one word in each row, and no column that tells the sentences"):
        layout_of(Rows(rows.records, "d.csv"))


@pytest.mark.parametrize(
    ("labels", "usual"),
    [
        ("O B-X I-X", "O B-X I-X"),
        ("O B-X M-X E-X S-X", "O B-X I-X E-X S-X"),
        ("O B-X I-X L-X U-Y", "O B-X I-X E-X S-Y"),
        ("o b_x i_x", "O B-x I-x"),
        ("O X-B X-I", "O B-X I-X"),
        ("O X", ""),
        ("NOUN VERB", ""),
        ("0 1 2", ""),
    ],
)
def test_schemes_of_tags(labels: str, usual: str) -> None:
    assert entity_tags(labels.split()) == (dict(zip(labels.split(), usual.split(), strict=True)) if usual else {})
