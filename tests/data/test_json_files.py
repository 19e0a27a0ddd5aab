"""JSON in the shapes that programs write: all give the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from reltune.data.bad_rows import checked
from reltune.data.rows import Rows
from reltune.data.sources import read_rows, read_splits
from reltune.errors import InputError
from reltune.notes import collecting

ROWS = [{"text": text, "label": number} for number, text in enumerate("abc")]
FRAME = pandas.DataFrame(ROWS)
COLUMNS = {"text": ["a", "b", "c"], "label": [0, 1, 2]}


def read(tmp_path: Path, content: Any, name: str = "d.json") -> Rows:
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        ROWS,
        json.dumps(ROWS, indent=2),
        "\n".join(map(json.dumps, ROWS)),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        " ".join(map(json.dumps, ROWS)),
        "\r".join(map(json.dumps, ROWS)),
        COLUMNS,
        json.dumps(COLUMNS, indent=1),
        {"data": ROWS},
        {"version": "1", "data": ROWS},
        {"train": ROWS},
        {"all": ROWS},
        {"train": COLUMNS},
        {"idA": ROWS[0], "idB": ROWS[1], "idC": ROWS[2]},
        *(FRAME.to_json(orient=orient) for orient in ("columns", "index", "records", "split")),
        FRAME.to_json(orient="records", lines=True),
    ],
)
def test_shapes(tmp_path: Path, content: Any, name: str) -> None:
    with collecting():
        rows = read(tmp_path, content, name)
    assert [row.values for row in rows] == ROWS and rows.columns == ["text", "label"]


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_conversations_without_a_name(tmp_path: Path, name: str) -> None:
    chats = [[{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}] for text in "abc"]
    for content in (chats, json.dumps(chats, indent=1), "\n".join(map(json.dumps, chats))):
        assert [row.values for row in read(tmp_path, content, name)] == [{"messages": chat} for chat in chats]


def test_pandas_tables(tmp_path: Path) -> None:
    rows = read(tmp_path, FRAME.to_json(orient="table"))
    assert [row.values for row in rows] == [{"index": number, **row} for number, row in enumerate(ROWS)]


def test_where_rows_come_from_is_said(tmp_path: Path) -> None:
    with collecting() as notes:
        read(tmp_path, {"examples": ROWS, "version": 1})
        read(tmp_path, {"data": ROWS})
    assert notes == ["d.json: the rows are those in 'examples'."]


def test_splits(tmp_path: Path) -> None:
    read(tmp_path, {"train": ROWS, "dev": COLUMNS, "test": ROWS[:1]})
    splits = read_splits(tmp_path / "d.json")
    assert {name: [row.values for row in rows] for name, rows in splits.items()} == {
        "train": ROWS,
        "validation": ROWS,
        "test": ROWS[:1],
    }
    with pytest.raises(InputError, match="splits dev, test and none called train"):
        read(tmp_path, {"dev": ROWS, "test": ROWS})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"tokens": ["a", "b"], "ner_tags": ["O", "O"]},
        {"text": "a", "label": ["b", "c"]},
        {"question": "q", "context": "c", "answers": [{"text": "c", "answer_start": 0}]},
        {"text": "a", "meta": {"b": 1}},
        {},
    ],
)
def test_one_row_is_a_row(tmp_path: Path, row: dict[str, Any]) -> None:
    assert [found.values for found in read(tmp_path, row)] == [row]
    assert [found.values for found in read(tmp_path, json.dumps(row, indent=1))] == [row]


def test_squad(tmp_path: Path) -> None:
    answer = {"text": "c", "answer_start": 0}
    questions = [
        {"id": "1", "question": "q", "answers": [answer], "is_impossible": False},
        {"id": "2", "question": "r", "answers": [], "plausible_answers": [answer], "is_impossible": True},
    ]
    articles = [{"title": "t", "paragraphs": [{"context": "c", "qas": questions}]}] * 2
    rows = [
        {"id": "1", "question": "q", "context": "c", "answers": [answer]},
        {"id": "2", "question": "r", "context": "c", "answers": []},
    ]
    for content in ({"version": "v2.0", "data": articles}, json.dumps(articles, indent=1)):
        found = read(tmp_path, content)
        assert [(row.line, row.values) for row in found] == list(enumerate(rows * 2, start=1)) and found.unit == "row"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"0": {"1": "a"}, "1": {"1": "b"}}, "does not say which are the rows"),
        ([{"id": 1, "data": {"text": "a"}, "annotations": []}], "full export of Label Studio"),
        ([["a", 1], ["b", 2]], r"no JSON object on 2 rows \(1, 2\)"),
        (FRAME.to_json(orient="values"), "no JSON object on 3 rows"),
        ('{"text": "a"}\n{"text": ', "no valid JSON .* on line 2"),
        ('{\n"text": "a"\n}\n{\n"text": \n}', "no valid JSON"),
        ('[{"a": 1}]\n[{"a": 1}]', r"no JSON object on 2 lines \(1, 2\)"),
        ({"columns": ["a", "b"], "data": [[1, 2], [1]]}, "no JSON object on row 2"),
    ],
)
def test_other_shapes_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        checked(read(tmp_path, content), lambda row: None)


@pytest.mark.parametrize(
    "content", ['{"a": 1},\n{"a": null},\n', "{'a': 1}\n{'a': None}\n", '{\n"a": 1\n},\n{\n"a": null\n}\n']
)
def test_lines_that_are_nearly_json(tmp_path: Path, content: str) -> None:
    """Commas between lines, and lines as Python writes them."""
    assert [row.values for row in read(tmp_path, content)] == [{"a": 1}, {"a": None}]


def test_paragraphs_with_questions(tmp_path: Path) -> None:
    """As simpletransformers has them."""
    answer = {"text": "c", "answer_start": 0}
    content = json.dumps([{"context": "c", "qas": [{"id": "1", "question": "q", "answers": [answer]}]}] * 2)
    row = {"id": "1", "question": "q", "context": "c", "answers": [answer]}
    assert [found.values for found in read(tmp_path, content)] == [row, row]
