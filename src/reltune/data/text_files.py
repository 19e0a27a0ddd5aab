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
from typing import Any, TextIO

from reltune.data.rows import Rows, by_kind, no_good_rows
from reltune.errors import InputError, nearest

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (*DELIMITERS, *JSON_SUFFIXES)
COMMON_ENCODINGS = ("utf-8", "utf-16", "gbk", "gb18030", "big5", "shift_jis", "euc-kr", "latin-1", "cp1252")

# A line number with the values of the row that starts there, or with a phrase that says why there is none.
Record = tuple[int, dict[str, Any] | str]


def read_text_file(path: str | os.PathLike, encoding: str = "utf-8") -> Rows:
    """The rows of a text file; its suffix says which format it has.

    CSV values are strings, just as the file has them; a .json file holds a list of objects, or one on each line as
    .jsonl does. Lines that hold no row (another number of fields, no valid JSON) are in ``broken``.

    Raises:
        InputError: no file, another encoding or format, or CSV in which nothing after the fault can be trusted.
    """
    path = Path(path)
    check_text_file(path)
    content = _decode(path, encoding)
    suffix = path.suffix.lower()
    header: list[str] = []
    if suffix in DELIMITERS:
        header_line, header, records = _csv(path, io.StringIO(content, newline=""))
        found = list(records)
    else:
        # not splitlines(): a JSON string may hold U+2028 and other line separators as they are
        whole = suffix == ".json" and content.lstrip().startswith("[")
        found = list(_json_list(path, content) if whole else _json_lines(io.StringIO(content, newline="\n")))
        header_line = next((line for line, record in found if isinstance(record, dict)), 1)
    rows = [(line, record) for line, record in found if isinstance(record, dict)]
    broken = [(line, phrase) for line, phrase in found if isinstance(phrase, str)]
    if not rows:
        raise InputError(no_good_rows(str(path), by_kind(broken)))
    return Rows(
        [record for _, record in rows],
        str(path),
        header or None,
        [line for line, _ in rows],
        header_line=header_line,
        repeated=[name for name, count in Counter(header).items() if count > 1],
        broken=broken,
    )


def stream_text_file(path: str | os.PathLike, encoding: str = "utf-8") -> Iterator[Record]:
    """The records of a text file one after the other, the file being read as they are asked for.

    Raises:
        InputError: as for ``read_text_file``, at the record that is concerned; and for a list in a .json file.
    """
    path = Path(path)
    check_text_file(path)
    codec = _codec(encoding)
    delimited = path.suffix.lower() in DELIMITERS
    line = 0
    try:
        with path.open(encoding=codec, newline="" if delimited else "\n") as file:
            if path.suffix.lower() == ".json" and file.read(1000).lstrip().startswith("["):
                raise InputError(
                    f"{path} is one list, which cannot be streamed; write one object on each line (.jsonl)."
                )
            file.seek(0)
            for line, record in _csv(path, file)[2] if delimited else _json_lines(file):
                yield line, record
    except UnicodeError as error:
        raise InputError(
            f"{path} is not {encoding}: what follows line {line} cannot be decoded. Pass the file's own encoding, for "
            "example --encoding gbk or latin-1."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


def check_text_file(path: Path) -> None:
    """Raise InputError unless the path is a file of a text format."""
    if not os.path.exists(path):  # also false for a name that is too long
        raise InputError(f"{path} does not exist; check the path.")
    if path.is_dir():
        raise InputError(f"{path} is a directory; name one file in it.")
    if path.suffix.lower() not in TEXT_SUFFIXES:
        known = (*TEXT_SUFFIXES, ".parquet")
        raise InputError(
            f"{path} has the unknown suffix {path.suffix!r}; use one of {', '.join(known)} for its format."
        )


def _codec(encoding: str) -> str:
    """The encoding by its usual name; UTF-8 may start with a byte order mark."""
    try:
        codec = codecs.lookup(encoding).name
        io.TextIOWrapper(io.BytesIO(), codec)  # some codecs are not of text
    except (LookupError, ValueError) as error:
        raise InputError(f"The encoding {encoding!r} is unknown; {nearest(encoding, COMMON_ENCODINGS)}") from error
    return "utf-8-sig" if codec == "utf-8" else codec


def _decode(path: Path, encoding: str) -> str:
    """The whole file as text, line ends as they are."""
    codec = _codec(encoding)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if not data.strip():
        raise InputError(f"{path} is empty; it needs rows of data.")
    no_text = f"{path} holds no text but binary data; if it is UTF-16, pass --encoding utf-16."
    try:
        content = data.decode(codec)
    except UnicodeError as error:
        if b"\0" in data and codec == "utf-8-sig":
            raise InputError(no_text) from error
        start = getattr(error, "start", 0)
        line = data.count(b"\n", 0, start) + 1
        raise InputError(
            f"{path} is not {encoding}: line {line} cannot be decoded "
            f"(byte offset {start}). Pass the file's own encoding, for example --encoding gbk or latin-1."
        ) from error
    if "\0" in content:
        raise InputError(no_text)
    return content


def _csv(path: Path, file: TextIO) -> tuple[int, list[str], Iterator[Record]]:
    """The header's line, the header, and the records after it."""
    csv.field_size_limit(2**31 - 1)  # texts may be long
    # strict, because otherwise a quote that is never closed swallows the rest of the file silently
    reader = csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
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
            if fields and (len(fields) > 1 or fields[0].strip()):
                yield line, fields

    filled = lines()
    header_line, header = next(filled, (1, []))
    header = [name.strip() for name in header]

    def records() -> Iterator[Record]:
        for line, fields in filled:
            same = len(fields) == len(header)
            yield (
                line,
                dict(zip(header, fields, strict=True))
                if same
                else f"another number of fields than the header's {len(header)}",
            )

    return header_line, header, records()


def _json_lines(file: TextIO) -> Iterator[Record]:
    for line, source in enumerate(file, start=1):
        if not source.strip():
            continue
        try:
            record = json.loads(source)
        except (ValueError, RecursionError) as error:
            yield line, f"no valid JSON ({getattr(error, 'msg', 'nested too deeply')})"
        else:
            yield line, record if isinstance(record, dict) else "no JSON object"


def _json_list(path: Path, content: str) -> Iterator[Record]:
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
        yield line, record if isinstance(record, dict) else "no JSON object"
        if content[place] == "]":
            break
    if content[place + 1 :].strip():
        raise InputError(f"{path} goes on after the end of its list; keep one list.")


def _skip(content: str, place: int) -> int:
    """The next place that holds no whitespace, as JSON knows it."""
    while content[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place
