"""Text files as rows, with the line on which each row starts: tables, JSON, tagged words; as they are or compressed."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import itertools
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from reltune.data.bad_rows import lines_by_problem, no_good_rows
from reltune.data.json_files import json_lines, read_json
from reltune.data.rows import Record, Rows
from reltune.data.tables import LOOKED_AT, SEPARATORS, dialect_of, read_table
from reltune.data.tagged_words import SUFFIXES as TAGGED
from reltune.data.tagged_words import read_tagged_words
from reltune.errors import InputError, nearest

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (*SEPARATORS, *JSON_SUFFIXES, *TAGGED)
COMPRESSED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MENDS = {  # suffixes of what people have instead -> what they can do
    **dict.fromkeys(
        (".xlsx", ".xls", ".xlsm", ".ods", ".numbers"),
        "a spreadsheet; save it as CSV (in Excel: File, Save As, CSV UTF-8) and name that file.",
    ),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".zst"), "an archive; unpack it and name the file inside."),
    **dict.fromkeys(
        (".arrow", ".feather"), "a part of a saved data set; name the directory that it is in, or save it as Parquet."
    ),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt"),
        "a format that can run code when it is opened; save the rows as Parquet or JSON Lines.",
    ),
}
COMMON_ENCODINGS = ("utf-8", "utf-16", "gbk", "gb18030", "big5", "shift_jis", "euc-kr", "latin-1", "cp1252")
STARTS = {  # how files begin that are not what their suffix says -> what they are, and the mend
    b"PAR1": "is a Parquet file; rename it to .parquet.",
    b"\x1f\x8b": "is compressed; add .gz to its name.",
    b"BZh": "is compressed; add .bz2 to its name.",
    b"\xfd7zXZ": "is compressed; add .xz to its name.",
    b"PK\x03\x04": "is no text but a spreadsheet or an archive; save the sheet as CSV, or unpack it.",
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself; fetch that with git lfs pull.",
    b"<!doctype html": "is a web page and not the file itself; download that.",
    b"<html": "is a web page and not the file itself; download that.",
}
START = 200  # bytes that say what a file is
UNPACKED = 200, 64 * 2**20  # times its size, and bytes, that a compressed file may become; texts rarely exceed 50 times
UNPACKING = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


def read_text_file(path: str | os.PathLike, encoding: str = "utf-8") -> dict[str, Rows]:
    """The rows of a text file by split; its suffix says which format it has.

    CSV values are strings, just as the file has them. Lines that hold no row (another number of fields, no valid JSON) are
    in ``broken``. Only JSON can name splits; else all is "train".

    Raises:
        InputError: no file, another encoding or format, or CSV in which nothing after the fault can be trusted.
    """
    path = Path(path)
    check_text_file(path)
    content = _decode(path, encoding)
    suffix = format_of(path)
    header: list[str] = []
    header_line, unit = None, "line"
    if suffix in SEPARATORS:
        lines = io.StringIO(content, newline="")
        dialect = dialect_of(path, suffix, itertools.islice(lines, LOOKED_AT))
        lines.seek(0)
        header_line, header, records = read_table(path, dialect, lines)
        splits = {"train": list(records)}
    elif suffix in TAGGED:
        splits = {"train": list(read_tagged_words(path, content.split("\n")))}
    else:
        # not splitlines(): a JSON string may hold U+2028 and other line separators as they are
        splits, unit = read_json(path, content)
    return {split: _rows(path, records, header, header_line, unit) for split, records in splits.items()}


def read_lines(path: str | os.PathLike, encoding: str = "utf-8") -> list[str]:
    """The lines of a plain text that are not empty. Raises InputError as ``read_text_file`` does."""
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path} {'is a directory; name one file in it' if path.is_dir() else 'does not exist; check the path'}."
        )
    return [line.strip() for line in _decode(path, encoding).splitlines() if line.strip()]


def _rows(path: Path, records: list[Record], header: list[str], header_line: int | None, unit: str) -> Rows:
    rows = [(line, record) for line, record in records if isinstance(record, dict)]
    broken = [(line, phrase) for line, phrase in records if isinstance(phrase, str)]
    if not rows:
        raise InputError(no_good_rows(str(path), lines_by_problem(broken), unit))
    if header and not header[-1] and not any(record[""] for _, record in rows):
        header = [name for name in header if name]  # a spreadsheet's empty columns
    return Rows(
        [record for _, record in rows],
        str(path),
        header or None,
        [line for line, _ in rows],
        header_line=header_line if header else rows[0][0] if unit == "line" else None,
        repeated=[name for name, count in Counter(header).items() if count > 1],
        broken=broken,
        unit=unit,
    )


def stream_text_file(path: str | os.PathLike, encoding: str = "utf-8") -> Callable[[], Iterator[Record]]:
    """What starts a pass over the records of a text file, which is read as they are asked for.

    Raises:
        InputError: as for ``read_text_file``, in a pass at the record that is concerned; and for JSON that is one list.
    """
    path = Path(path)
    check_text_file(path)
    suffix = format_of(path)
    with _reading(path, encoding, [0]), _text(path, encoding) as file:
        if suffix in JSON_SUFFIXES and file.read(1000).lstrip().startswith("["):
            raise InputError(f"{path} is one list, which cannot be streamed; write one object on each line (.jsonl).")
        head = itertools.islice(file, LOOKED_AT)
        dialect = dialect_of(path, suffix, head) if suffix in SEPARATORS else None

    def records() -> Iterator[Record]:
        at = [0]
        with _reading(path, encoding, at), _text(path, encoding) as file:
            if dialect is not None:
                passed = read_table(path, dialect, file)[2]
            else:
                passed = read_tagged_words(path, file) if suffix in TAGGED else json_lines(file)
            for line, record in passed:
                at[0] = line
                yield line, record

    return records


@contextlib.contextmanager
def _reading(path: Path, encoding: str, line: Sequence[int]) -> Iterator[None]:
    """Turn what goes wrong after this line into InputError."""
    try:
        yield
    except UnicodeError as error:
        raise InputError(
            f"{path} is not {encoding}: what follows line {line[0]} cannot be decoded. Pass the file's own encoding, for "
            "example --encoding gbk or latin-1."
        ) from error
    except UNPACKING as error:
        raise _torn(path, error) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error


# -- files ----------------------------------------------------------------------------------------------------------


def format_of(path: Path) -> str:
    """The suffix that says the format, in lower case, without that of a compressed file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


def check_text_file(path: Path) -> None:
    """Raise InputError unless the path is a file of a text format."""
    if not os.path.exists(path):  # also false for a name that is too long
        raise InputError(f"{path} does not exist; check the path.")
    if path.is_dir():
        raise InputError(f"{path} is a directory; name one file in it.")
    suffix = format_of(path)
    if suffix in MENDS:
        raise InputError(f"{path} has the suffix {suffix!r}: {MENDS[suffix]}")
    if suffix not in TEXT_SUFFIXES:
        known = (*TEXT_SUFFIXES, ".parquet")
        raise InputError(
            f"{path} has the unknown suffix {path.suffix!r}; use one of {', '.join(known)} for its format."
        )


def _open(path: Path) -> BinaryIO:
    """The file's bytes, unpacked where it is compressed."""
    opener = COMPRESSED.get(path.suffix.lower())
    return open(path, "rb") if opener is None else io.BufferedReader(_Unpacked(path, opener(path, "rb")))


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file. Raises InputError where they become more than a text does: a few KB can hold terabytes."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        times, least = UNPACKED
        self.path, self.file, self.left = path, file, max(times * path.stat().st_size, least)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise InputError(
                f"{self.path} unpacks to more than {UNPACKED[0]} times its size; unpack it yourself, if it is what you want, and name "
                "that file."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _check_start(path: Path, start: bytes) -> None:
    """Raise InputError where a file begins as one of another format does."""
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    found = next((what for mark, what in STARTS.items() if text.lower().startswith(mark.lower())), "")
    suffix = format_of(path)
    if not found and suffix in SEPARATORS and re.match(rb"\[?\s*\{\s*\"", text):
        found = "holds JSON; rename it to .jsonl (an object on each line) or .json."
    if not found and suffix in JSON_SUFFIXES and text and text[0] < 128 and text[:1] not in (b"{", b"["):
        found = "holds no JSON, which begins with { or [; if it is a table, rename it to .csv or .tsv."
    if found:
        raise InputError(f"{path} {found}")


def _text(path: Path, encoding: str) -> io.TextIOWrapper:
    """The file as text, line ends as they are. JSON lines end at a line feed alone."""
    with _open(path) as file:
        start = file.read(START)
    _check_start(path, start)
    codec = _codec(encoding, start[:2])
    return io.TextIOWrapper(_open(path), codec, newline="" if format_of(path) in SEPARATORS else "\n")


def _codec(encoding: str, start: bytes = b"") -> str:
    """The encoding by its usual name. UTF-8 may start with a byte order mark; one of UTF-16 says that the file is that."""
    try:
        codec = codecs.lookup(encoding).name
        io.TextIOWrapper(io.BytesIO(), codec)  # some codecs are not of text
    except (LookupError, ValueError) as error:
        raise InputError(f"The encoding {encoding!r} is unknown; {nearest(encoding, COMMON_ENCODINGS)}") from error
    if codec != "utf-8":
        return codec
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _decode(path: Path, encoding: str) -> str:
    """The whole file as text, line ends as they are."""
    _codec(encoding)
    try:
        with _open(path) as file:
            data = file.read()
    except UNPACKING as error:
        raise _torn(path, error) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    codec = _codec(encoding, data[:2])
    if not data.strip():
        raise InputError(f"{path} is empty; it needs rows of data.")
    _check_start(path, data[:START])
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
    nulls = content.count("\0")
    if nulls > len(content) / 100:
        raise InputError(no_text)
    if nulls:
        line = content.count("\n", 0, content.index("\0")) + 1
        raise InputError(
            f"{path} line {line} holds a NUL character, which no text has; remove it, for example with tr -d '\\000'."
        )
    return content


def _torn(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be unpacked ({error}); write or download it again.")
