"""JSON in the shapes that programs write: an object per line, a list of objects, or one object that holds all rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from reltune.data.cells import structure_in
from reltune.data.rows import SPLITS, Record
from reltune.errors import InputError
from reltune.notes import note

LISTS = {"tokens", "words", "ner_tags", "tags", "pos_tags", "chunk_tags", "messages", "conversations", "conversation"}
SPEAKERS = {"role", "from", "human", "user"}


def read_json(path: Path, content: str) -> tuple[dict[str, list[Record]], str]:
    """The records of a file by split ("train" where it names none), and what their numbers count: "line" or "row".

    Raises:
        InputError: no JSON, or JSON that holds no rows in a shape that is known.
    """
    start = content.lstrip()[:1]
    if start == "[" and not _list_on_each_line(content):
        records = _annotated(path, list(_list(path, content)))
        if len({line for line, _ in records}) < len(records):  # several objects on a line
            return {"train": _numbered(record for _, record in records)}, "row"
        flat = _flat(records)
        return {"train": flat}, "line" if flat is records else "row"
    records = list(json_lines(content.split("\n")))
    if start == "{" and (len(records) == 1 or not isinstance(records[0][1], dict)):
        objects = list(_objects(content))
        if len(objects) == 1 and (splits := _held(path, objects[0][1])) is not None:
            return splits, "row"
        if objects:  # over several lines each
            return {"train": list(objects)}, "line"
    return {"train": _annotated(path, records)}, "line"


def json_lines(lines: Iterable[str]) -> Iterator[Record]:
    """A record for each line that is not empty."""
    for line, source in enumerate(lines, start=1):
        if not source.strip():
            continue
        try:
            record = json.loads(source)
        except (ValueError, RecursionError) as error:
            record = _nearly(source)
            reason = f"no valid JSON ({getattr(error, 'msg', 'nested too deeply')})"
            yield line, _row(record) if record is not None else reason
        else:
            yield line, _row(record)


def _nearly(source: str) -> Any:
    """The object of a line that ends with a comma, or that is written as Python writes it; else None."""
    source = source.strip().removesuffix(",")
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(source)
    return structure_in(source)


def _row(value: Any) -> dict[str, Any] | str:
    """An object, or a conversation without a name; else a phrase that says that it is neither."""
    if isinstance(value, list) and value and all(isinstance(turn, dict) and SPEAKERS & set(turn) for turn in value):
        return {"messages": value}
    return value if isinstance(value, dict) else "no JSON object"


def _list_on_each_line(content: str) -> bool:
    """Whether the first line is a list by itself and another follows."""
    first, _, rest = content.strip().partition("\n")
    try:
        return rest.lstrip().startswith("[") and isinstance(json.loads(first), list)
    except (ValueError, RecursionError):
        return False


def _list(path: Path, content: str) -> Iterator[Record]:
    """The elements of one list; decoded one by one, so that each has its line."""
    decoder = json.JSONDecoder()
    place, line, counted = content.index("["), 1, 0
    while True:
        place = _skip(content, place + 1)  # the bracket, or the comma
        if content[place : place + 1] == "]":
            break
        line, counted = line + content.count("\n", counted, place), place
        try:
            record, place = decoder.raw_decode(content, place)
            place = _skip(content, place)
            if content[place : place + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", content, place)
        except (ValueError, RecursionError) as error:
            at = getattr(error, "lineno", line)
            reason = getattr(error, "msg", "nested too deeply")
            raise InputError(
                f"{path} line {at} is not valid JSON ({reason}); write a list of objects, or one object on each line."
            ) from error
        yield line, _row(record)
        if content[place] == "]":
            break
    if content[place + 1 :].strip():
        raise InputError(f"{path} goes on after the end of its list; keep one list.")


def _objects(content: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects that the whole content consists of, perhaps with commas between, each with its first line; none if it holds
    anything else."""
    decoder = json.JSONDecoder()
    objects = []
    place, line, counted = _skip(content, 0), 1, 0
    while place < len(content):
        line, counted = line + content.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(content, place)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        objects.append((line, value))
        place = _skip(content, place)
        if content[place : place + 1] == ",":
            place = _skip(content, place + 1)
    return objects


def _skip(content: str, place: int) -> int:
    """The next place that holds no whitespace, as JSON knows it."""
    while content[place : place + 1] in (" ", "\t", "\n", "\r") and place < len(content):
        place += 1
    return place


# -- one object that holds all rows ---------------------------------------------------------------------------------


def _held(path: Path, value: Mapping[str, Any]) -> dict[str, list[Record]] | None:
    """The rows that an object holds, by split; None where it is a row itself."""
    if value and set(value) <= set(SPLITS) and all(isinstance(part, list | dict) for part in value.values()):
        parts = {SPLITS[name]: _rows(path, part) for name, part in value.items()}
        if "train" not in parts and len(parts) > 1:
            raise InputError(f"{path} has the splits {', '.join(value)} and none called train; rename one.")
        if all(rows is not None for rows in parts.values()):
            splits = {name: _numbered(rows) for name, rows in parts.items() if rows is not None}
            return splits if "train" in splits else {"train": next(iter(splits.values()))}
    rows = _rows(path, value)
    return None if rows is None else {"train": _numbered(rows)}


def _rows(path: Path, value: Any) -> list[Any] | None:
    """The rows in any shape that holds several, or None."""
    if isinstance(value, list):
        return value if all(isinstance(row, dict) for row in value) else None
    columns, data = value.get("columns"), value.get("data")
    if (
        isinstance(columns, list)
        and isinstance(data, list)
        and set(value) <= {"columns", "index", "data", "index_names"}
    ):
        return [dict(zip(map(str, columns), row, strict=True)) if len(row) == len(columns) else row for row in data]
    if all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        scalars = any(name in LISTS and not any(isinstance(cell, list) for cell in value[name]) for name in value)
        if len(lengths) == 1 and lengths != {0} and not scalars and not _one_list_of_objects(value):
            return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if len(value) > 0 and all(isinstance(inner, dict) for inner in value.values()):
        inner = list(value.values())
        if all(set(one) == set(inner[0]) for one in inner):
            return _of_index(path, value)
    held = _one_list_of_objects(value)
    if held:
        if held != "data":
            note(f"{path.name}: the rows are those in {held!r}.")
        return value[held]
    return None


def _one_list_of_objects(value: Mapping[str, Any]) -> str:
    """The name of the only list of objects in an object, where nothing else in it is a list; messages are no rows."""
    lists = {name: part for name, part in value.items() if isinstance(part, list)}
    name, part = next(iter(lists.items())) if len(lists) == 1 else ("", [])
    objects = part and all(isinstance(row, dict) and not SPEAKERS & set(row) for row in part)
    return name if objects and name not in LISTS and "question" not in value else ""


def _of_index(path: Path, value: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Rows of objects in an object: a column of cells by number, as pandas writes them, or rows by number or name."""
    inner = list(next(iter(value.values())))
    numbered = [all(str(name).isdigit() for name in names) for names in (value, inner)]
    if all(numbered):
        raise InputError(
            f"{path} holds objects in an object, and does not say which are the rows; write a list of rows."
        )
    if numbered[1]:
        return [{column: cells[name] for column, cells in value.items()} for name in inner]
    return list(value.values())


def _numbered(rows: Iterable[Any]) -> list[Record]:
    return _flat([(number, _row(row)) for number, row in enumerate(rows, start=1)])


def _flat(records: list[Record]) -> list[Record]:
    """SQuAD's articles, or their paragraphs alone, as a row for each question; other records as they are."""
    for name in ("paragraphs", "qas"):
        if all(isinstance(record, dict) and isinstance(record.get(name), list) for _, record in records):
            break
    else:
        return records
    flat: list[Record] = []
    for line, article in records:
        assert isinstance(article, dict)
        for paragraph in article["paragraphs"] if name == "paragraphs" else [article]:
            for question in paragraph.get("qas", ()):
                answers = [] if question.get("is_impossible") else question.get("answers", [])
                own = {name: question[name] for name in ("id", "question") if name in question}
                flat.append((line, {**own, "context": paragraph.get("context"), "answers": answers}))
    return [(number, record) for number, (_, record) in enumerate(flat, start=1)]


def _annotated(path: Path, records: list[Record]) -> list[Record]:
    """The records, unless they are annotations in a shape that cannot be told from here."""
    if records and all(isinstance(record, dict) and {"data", "annotations"} <= set(record) for _, record in records):
        raise InputError(
            f"{path} is a full export of Label Studio; export JSON-MIN or CSV, which have a column for each field."
        )
    return records
