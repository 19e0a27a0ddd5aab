"""Files of words with tags, as the CoNLL tasks have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from reltune.data.bad_rows import checked
from reltune.data.rows import Rows
from reltune.data.sources import read_rows, read_splits
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
