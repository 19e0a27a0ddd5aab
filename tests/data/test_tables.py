"""Tables in the dialects that spreadsheets and programs write."""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reltune.data import text_files
from reltune.data.bad_rows import checked
from reltune.data.sources import read_rows, read_splits
from reltune.data.streams import StreamedRows
from reltune.errors import InputError
from reltune.notes import collecting


def read(tmp_path: Path, content: str | bytes, name: str = "d.csv") -> tuple[list[tuple[str, ...]], list[str]]:
    """The values of the good rows, which are the same when they are streamed, and what is said of them."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with collecting() as notes:
        rows = checked(read_rows(path), lambda row: None, "skip")
    with collecting() as streamed_notes:
        streamed = read_splits(path, streaming=True)["train"]
        assert isinstance(streamed, StreamedRows)
        assert list(streamed.checked(lambda row: None, "skip")) == list(rows)
    assert streamed_notes == notes
    return [tuple(row.values.values()) for row in rows], notes


ROWS = [("a, x", "p"), ("b", "q"), ("c", "p")]


def table(separator: str, end: str = "\n", header: Sequence[str] = ("text", "label")) -> str:
    return end.join(separator.join(row) for row in [header, *ROWS]) + end


@pytest.mark.parametrize(
    ("name", "content", "separator"),
    [
        ("d.csv", table(";"), ";"),
        ("d.csv", table("\t"), "\t"),
        ("d.csv", table("|"), "|"),
        ("d.csv", table(";").replace("b;q", "b;q;too many"), ";"),
        ("d.tsv", table(";", "\r\n"), ";"),
        ("d.tsv", table(",").replace("a, x", '"a, x"'), ","),
    ],
)
def test_another_separator_than_the_suffix_implies(tmp_path: Path, name: str, content: str, separator: str) -> None:
    rows, notes = read(tmp_path, content, name)
    assert rows == [row for row in ROWS if row[0] != "b" or "many" not in content]
    assert len(notes) == 1 and f"{name}: fields are separated by {separator!r}" in notes[0]


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
def test_a_first_line_that_tells_the_separator(tmp_path: Path, first: str) -> None:
    assert read(tmp_path, f"{first}\r\n" + table(";", "\r\n")) == (ROWS, [])
    assert read_rows(tmp_path / "d.csv").header_line == 2


@pytest.mark.parametrize("content", ["text\na; b\nc\n", "text\na\tb\nc\td\n", "text; label\na\nb\n"])
def test_marks_in_a_single_column_are_text(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, content)[0] == [(line,) for line in content.splitlines()[1:]]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    content = table("\t", end).replace("a, x", "好").encode(encoding)
    assert read(tmp_path, content, "d.tsv") == ([("好", "p"), *ROWS[1:]], [])


def test_a_byte_order_mark_too_many(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("\ufeff\ufefftext,label\na,p\n".encode())
    assert read_rows(tmp_path / "d.csv").columns == ["text", "label"]


def test_space_before_quotes(tmp_path: Path) -> None:
    assert read(tmp_path, 'text, label\na, "p"\n"b, c",  "q, r"\n')[0] == [("a", "p"), ("b, c", "q, r")]
    assert read(tmp_path, 'label, text\np, "a, b, c"\nq, "d"\n')[0] == [("p", "a, b, c"), ("q", "d")]
    # quotes that are part of a text
    for content, rows in {
        'label,text\np, "a" b\nq,c\n': [("p", ' "a" b'), ("q", "c")],
        'label,text\np, "a"\nq, "b" c\n': [("p", ' "a"'), ("q", ' "b" c')],
        'label,text\np,"he said, ""a, b"""\nq, c\n': [("p", 'he said, "a, b"'), ("q", " c")],
    }.items():
        assert read(tmp_path, content)[0] == rows


def test_what_spreadsheets_add(tmp_path: Path) -> None:
    expected = [("a", "p"), ("b", "q")]
    said = ["d.csv: rows without any text are left out, 1 of them, the first on line 3."]
    assert read(tmp_path, "text,label\na,p,,\n,,,\nb,q,\n,,,\n\n") == (expected, said)
    assert [row[:2] for row in read(tmp_path, "text,label,,\na,p,,\nb,q,,\n,,,\n")[0]] == expected
    assert read_rows(tmp_path / "d.csv").columns == ["text", "label"]
    (tmp_path / "d.csv").write_text("text,label,\na,p,5\nb,q,\n")
    assert read_rows(tmp_path / "d.csv").columns == ["text", "label", ""]
    (tmp_path / "d.csv").write_text("text,label\na,p,5\nb\n")
    with pytest.raises(InputError, match=r"another number of fields than the header's 2 on 2 lines \(2, 3\)"):
        read_rows(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("d.csv", 'text\na\n""\nb\n', ["d.csv: rows without any text are left out, 1 of them, the first on line 3."]),
        (
            "d.csv",
            "text,label\n\na,p\n,\n\n , \nb,q\n,\n,\n",
            ["d.csv: rows without any text are left out, 2 of them, the first on line 4."],
        ),
        (
            "d.tsv",
            "text\tlabel\na\tp\n\t\nb\tq\n",
            ["d.tsv: rows without any text are left out, 1 of them, the first on line 3."],
        ),
        ("d.tsv", "text\na\n\nb\n\n", []),
        ("d.csv", "\ntext\na\n\nb\n\n", []),
    ],
)
def test_rows_without_text_between_others_are_spoken_of(
    tmp_path: Path, name: str, content: str, said: list[str]
) -> None:
    """Answers to the rows of a file would otherwise stand beside the wrong ones."""
    rows, notes = read(tmp_path, content, name)
    assert [row[0] for row in rows] == ["a", "b"] and notes == said


@pytest.mark.parametrize("name", ["d.csv", "d.tsv"])
def test_long_texts(tmp_path: Path, name: str) -> None:
    csv.field_size_limit(131_072)  # the library's own limit
    text, mark = "word " * 50_000, "," if name == "d.csv" else "\t"
    assert read(tmp_path, f'text{mark}label\n"{text}"{mark}p\n"b"{mark} "q"\n', name)[0][0] == (text, "p")


def test_an_open_quote_is_said(tmp_path: Path) -> None:
    lines = ["text,label", "a,p", '"b,q', *[f"c{number},p" for number in range(10)], 'd",q', "e,p"]
    rows, notes = read(tmp_path, "\n".join(lines) + "\n")
    assert len(rows) == 3 and len(notes) == 1
    assert "lines 3 to 14 are read as one row, because a quote is open all along; if they are 12 rows" in notes[0]
    poem = 'text,label\n"one, two\nthree\nfour, five, six\nseven",p\nb,q\n'
    assert read(tmp_path, poem) == ([("one, two\nthree\nfour, five, six\nseven", "p"), ("b", "q")], [])


# -- tabs -----------------------------------------------------------------------------------------------------------


def test_bare_quotes_are_characters_of_tsv(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(14)]
    texts[1], texts[13] = '"an open quote', '"another'
    texts[5], texts[8], texts[9] = 'a "word" inside', '"first" word', '5"'
    content = "text\tlabel\n" + "".join(f"{text}\tp\n" for text in texts) + '"closed in\tthe next field"\n'
    rows = [*((text, "p") for text in texts), ('"closed in', 'the next field"')]
    assert read(tmp_path, content, "d.tsv") == (rows, [])


def test_quotes_that_close_are_quotes_of_tsv(tmp_path: Path) -> None:
    content = 'text\tlabel\n"a ""b"" c"\t"p"\n"tab\tinside"\tq\n\tr\n'
    assert read(tmp_path, content, "d.tsv")[0] == [('a "b" c', "p"), ("tab\tinside", "q"), ("", "r")]


@pytest.mark.parametrize("order", [1, -1])
def test_line_ends_in_quoted_fields_of_tsv(tmp_path: Path, order: int) -> None:
    rows = [("two\nlines", "p"), ("b", "q"), ('"three\n\nlines', "r"), ('"open', "s"), ("c", "t")]
    quoted = ['"two\nlines"', "b", '"""three\n\nlines"', '"open', "c"]
    lines = ["\t".join((text, label)[::order]) for text, (_, label) in zip(quoted, rows, strict=True)]
    read_rows, notes = read(tmp_path, "\n".join(["\t".join(("text", "label")[::order]), *lines]) + "\n", "d.tsv")
    assert read_rows == [row[::order] for row in rows]
    assert notes == ["d.tsv: 2 quoted fields span several lines, the first from line 2 on."]


@given(st.lists(st.tuples(*2 * [st.text(st.sampled_from('ab"\n\t ,'), min_size=1)]), min_size=1, max_size=6))
def test_what_is_written_with_all_quotes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    """Short of fields that look like several rows by themselves."""
    rows = [row for row in rows if all(field.strip() and "\n" not in field for field in row)] or [("a", "b")]
    path = tmp_path_factory.mktemp("tables") / "d.tsv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    found = read_rows(path)
    assert [tuple(row.values.values()) for row in found] == rows


# -- compressed files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files(tmp_path: Path, suffix: str, pack: object) -> None:
    assert callable(pack)
    assert read(tmp_path, pack(table("\t").encode()), f"d.tsv.{suffix}") == (ROWS, [])
    for torn in (pack(table("\t").encode())[:-6], b"text\tlabel\na\tp\n"):
        (tmp_path / f"d.tsv.{suffix}").write_bytes(torn)
        for streaming in (False, True):
            with pytest.raises(InputError, match=r"d\.tsv\.\w+ cannot be (unpacked|read)"):
                list(read_splits(tmp_path / f"d.tsv.{suffix}", streaming=streaming)["train"])


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize(
    "content", [b"text\n" + b"x" * 2**18, b"text,label\n" + b"a,b\n" * 2**16], ids=["a line", "lines"]
)
def test_a_small_file_that_unpacks_to_much(
    tmp_path: Path, suffix: str, pack: object, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(pack)
    path = tmp_path / f"d.csv.{suffix}"
    path.write_bytes(pack(content))
    assert 200 * path.stat().st_size < 2**18
    monkeypatch.setattr(text_files, "UNPACKED", (200, 2**17))
    for streaming in (False, True):
        with pytest.raises(InputError, match="unpacks to more than 200 times its size; unpack it yourself"):
            list(read_splits(path, streaming=streaming)["train"])
    monkeypatch.setattr(text_files, "UNPACKED", (200, 2**20))
    if content.startswith(b"text,label"):
        assert len(read_rows(path)) == 2**16


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("d.xlsx", "the suffix '.xlsx': a spreadsheet; save it as CSV"),
        ("d.csv.zip", "an archive; unpack it"),
        ("d.pkl", "can run code"),
        ("d.gz", "unknown suffix"),
        ("d.txt", "unknown suffix '.txt'"),
        ("d.arrow", "name the directory that it is in"),
    ],
)
def test_files_that_must_be_saved_otherwise(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"\x00")
    with pytest.raises(InputError, match=words):
        read_rows(tmp_path / name)


# -- what does not belong into a table ------------------------------------------------------------------------------


def test_files_put_one_behind_another(tmp_path: Path) -> None:
    assert read(tmp_path, "text,label\na,p\ntext,label\nb,q\n")[0] == [("a", "p"), ("b", "q")]
    assert read_rows(tmp_path / "d.csv").broken == [(3, "the header once more")]
    assert read(tmp_path, "text\na\ntext\n")[0] == [("a",), ("text",)]  # a text like any other


@pytest.mark.parametrize("above", ["Export of May\n", "# by a program\n# version 1\n", "Export,\n,\n"])
def test_titles_above_the_columns(tmp_path: Path, above: str) -> None:
    for streaming in (False, True):
        (tmp_path / "d.csv").write_text(above + "text,label\na,p\nb,q\nc,p\n")
        with pytest.raises(InputError, match="one field, and goes on with 2; the first line must name the columns"):
            read_splits(tmp_path / "d.csv", streaming=streaming)
    assert read(tmp_path, ",text\n0,a\n1,b\n")[0] == [("0", "a"), ("1", "b")]  # a program's numbers


@pytest.mark.parametrize("start", [0, 1])
def test_numbers_of_rows_without_a_name(tmp_path: Path, start: int) -> None:
    """As R writes tables."""
    content = '"text"\t"label"\n' + "".join(f'"{start + number}"\t"a{number}"\t"p"\n' for number in range(3))
    assert read(tmp_path, content, "d.tsv")[0] == [(str(start + number), f"a{number}", "p") for number in range(3)]
    assert read_rows(tmp_path / "d.tsv").columns == ["", "text", "label"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", b"PAR1\x15\x04", "is a Parquet file; rename it to .parquet"),
        ("d.csv", gzip.compress(b"text,label\n", mtime=0), "is compressed; add .gz"),
        ("d.csv", b'{"text": "a", "label": "p"}\n', "holds JSON; rename it to .jsonl"),
        ("d.csv", b'[\n {"text": "a"}]', "holds JSON"),
        ("d.jsonl", b"text,label\na,p\n", "holds no JSON.*rename it to .csv or .tsv"),
        ("d.csv", b"\xef\xbb\xbf<!DOCTYPE html><html>, not found</html>", "is a web page"),
        ("d.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_are_not_what_their_name_says(
    tmp_path: Path, name: str, content: bytes, words: str, streaming: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_splits(tmp_path / name, streaming=streaming)
