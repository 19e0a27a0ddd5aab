"""Rows that are streamed: the same rows as read at once, one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reltune.data.rows import Row, Rows, text_problem
from reltune.data.sources import read_rows, read_splits
from reltune.data.streams import StreamedRows
from reltune.errors import InputError

CSV = 'text,label\r\n"two\nlines",好\n\nx,y,z\nplain,坏\n,坏\n"a ""quote""",好\n'
JSONL = '{"text": "好\u2028", "label": 1}\n\nnot json\n{"text": ""}\n{"text": "b"}\n'


def streamed(path: Path, encoding: str = "utf-8") -> StreamedRows:
    rows = read_splits(path, encoding, streaming=True)["train"]
    assert isinstance(rows, StreamedRows)
    return rows


def problem(row: Row) -> str | None:
    return text_problem(row.values, "text")


@pytest.mark.parametrize(("name", "content"), [("d.csv", CSV), ("d.jsonl", JSONL), ("d.json", JSONL)])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_as_read_at_once(tmp_path: Path, name: str, content: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    encoding = encoding.removesuffix("-sig")
    rows = streamed(tmp_path / name, encoding).checked(problem, "skip")
    whole = read_rows(tmp_path / name, encoding)
    good = [row for row in whole if problem(row) is None]
    assert list(rows) == good == list(rows), "a second pass gives them again"
    assert rows.columns == whole.columns[: len(rows.columns)]
    bad = {line for lines in rows.skipped.values() for line in lines}
    assert bad == {line for line, _ in whole.broken} | {row.line for row in whole if problem(row)}
    assert sum(map(len, rows.skipped.values())) == len(bad), "counted once in two passes"
    assert list(rows.take(1)) == good[:1] and isinstance(rows.take(1), Rows)


def test_a_bad_row_ends_the_pass(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(CSV, encoding="utf-8")
    rows = iter(streamed(tmp_path / "d.csv").checked(problem))
    assert next(rows).line == 2
    with pytest.raises(InputError, match="number of fields than the header's 2 on line 5"):
        next(rows)
    with pytest.raises(InputError, match="no good rows: a word on 4 lines"):
        list(streamed(tmp_path / "d.csv").checked(lambda row: "a word", "skip"))


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 100_000 + "很".encode("gbk"))
    rows = streamed(path)
    assert len(rows.take(10)) == 10  # far before the end, which is not UTF-8
    with pytest.raises(InputError, match=r"what follows line [0-9]+ cannot be decoded"):
        list(rows)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", "text,label\n", "no rows of data"),
        ("d.jsonl", "nothing\n", "holds no JSON"),
        ("d.json", "[{}]", "one list, which cannot be streamed"),
        ("d.txt", "text\na\n", "unknown suffix"),
        ("d.csv", 'text,label\n"open,b\n', "line 2 is not valid CSV"),
    ],
)
def test_what_cannot_be_streamed(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        list(streamed(tmp_path / name))


def test_encoded_for_a_trainer(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(200)))
    chunks = []

    def encode(rows: Rows) -> list[dict]:
        chunks.append(len(rows))
        return [{"input_ids": [int(row.values["text"])], "line": row.line} for row in rows]

    data = streamed(path).encoded(encode, seed=3)
    items = list(data)
    assert sorted(item["input_ids"][0] for item in items) == list(range(200)) and max(chunks) <= 64
    assert [item["line"] for item in items] != list(range(1, 201)), "shuffled"
    assert items == list(streamed(path).encoded(encode, seed=3)) != list(streamed(path).encoded(encode, seed=4))
