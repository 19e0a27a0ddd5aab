"""CSV, TSV, JSON Lines and JSON files as rows, with the line on which each row starts."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reltune.records import InputError, nearest
from reltune.tasks.rows import Rows, by_kind, no_good_rows

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (*DELIMITERS, *JSON_SUFFIXES)
COMMON_ENCODINGS = ("utf-8", "utf-16", "gbk", "gb18030", "big5", "shift_jis", "euc-kr", "latin-1", "cp1252")


def read_text_file(path: str | os.PathLike, encoding: str = "utf-8") -> Rows:
    """The rows of a text file; its suffix says which format it has.

    CSV values are strings, just as the file has them; a .json file holds a list of objects, or one on each line as
    .jsonl does. Lines that hold no row (another number of fields, no valid JSON) are in ``broken``.

    Raises:
        InputError: no file, another encoding or format, or CSV in which nothing after the fault can be trusted.
    """
    path = Path(path)
    content = _decode(path, encoding)
    suffix = path.suffix.lower()
    header, header_line = [], None
    broken: list[tuple[int, str]] = []
    if suffix in DELIMITERS:
        records = _csv_records(path, content, DELIMITERS[suffix], broken)
        header_line, header = next(records, (None, []))
        rows = [(line, dict(zip(header, fields, strict=True))) for line, fields in records]
    elif suffix == ".json" and content.lstrip().startswith("["):
        rows = list(_json_list(path, content, broken))
    else:
        rows = list(_json_lines(content, broken))
    if not header:
        header = list(dict.fromkeys(name for _, record in rows for name in record))
        header_line = rows[0][0] if rows else None
    if not rows:
        raise InputError(no_good_rows(str(path), by_kind(broken)))
    return Rows(
        [record for _, record in rows],
        str(path),
        header,
        [line for line, _ in rows],
        header_line=header_line,
        repeated=[name for name, count in Counter(header).items() if count > 1],
        broken=broken,
    )


def _decode(path: Path, encoding: str) -> str:
    """The whole file as text, line ends as they are."""
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path.")
    if path.is_dir():
        raise InputError(f"{path} is a directory; name one file in it.")
    if path.suffix.lower() not in TEXT_SUFFIXES:
        raise InputError(
            f"{path} has the unknown suffix {path.suffix!r}; use one of {', '.join(TEXT_SUFFIXES)} for its format."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if not data.strip():
        raise InputError(f"{path} is empty; it needs rows of data.")
    no_text = f"{path} holds no text but binary data; if it is UTF-16, pass --encoding utf-16."
    try:
        codec = codecs.lookup(encoding).name
        content = data.decode("utf-8-sig" if codec == "utf-8" else codec)
    except UnicodeError as error:
        if b"\0" in data and codec == "utf-8":
            raise InputError(no_text) from error
        start = getattr(error, "start", 0)
        line = data.count(b"\n", 0, start) + 1
        raise InputError(
            f"{path} is not {encoding}: line {line} cannot be decoded "
            f"(byte offset {start}). Pass the file's own encoding, for example --encoding gbk or latin-1."
        ) from error
    except (LookupError, ValueError) as error:
        raise InputError(f"The encoding {encoding!r} is unknown; {nearest(encoding, COMMON_ENCODINGS)}") from error
    if "\0" in content:
        raise InputError(no_text)
    return content


def _csv_records(
    path: Path, content: str, delimiter: str, broken: list[tuple[int, str]]
) -> Iterator[tuple[int, list[str]]]:
    """The header, then the fields of each record that has as many; each with its first line."""
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))
    # strict, because otherwise a quote that is never closed swallows the rest of the file silently
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    width = 0
    while True:
        line = reader.line_num + 1  # a record with quoted newlines spans several lines
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{path} line {line} is not valid CSV: {error}. "
                'Put fields with quotes in quotes and double the quotes inside: "say ""so""".'
            ) from error
        if not fields or (len(fields) == 1 and not fields[0].strip()):
            continue
        if not width:
            width, fields = len(fields), [name.strip() for name in fields]
        if len(fields) != width:
            broken.append((line, f"another number of fields than the header's {width}"))
        else:
            yield line, fields


def _json_lines(content: str, broken: list[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    # not splitlines(): a JSON string may hold U+2028 and other line separators as they are
    for line, source in enumerate(content.split("\n"), start=1):
        if not source.strip():
            continue
        try:
            record = json.loads(source)
        except (ValueError, RecursionError) as error:
            broken.append((line, f"no valid JSON ({getattr(error, 'msg', 'nested too deeply')})"))
            continue
        if isinstance(record, dict):
            yield line, record
        else:
            broken.append((line, "no JSON object"))


def _json_list(path: Path, content: str, broken: list[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
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
        if isinstance(record, dict):
            yield line, record
        else:
            broken.append((line, "no JSON object"))
        if content[place] == "]":
            break
    if content[place + 1 :].strip():
        raise InputError(f"{path} goes on after the end of its list; keep one list.")


def _skip(content: str, place: int) -> int:
    """The next place that holds no whitespace, as JSON knows it."""
    while content[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place
