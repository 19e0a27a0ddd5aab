"""Readers of files that may come from anybody: YAML, JSON and the headers of safetensors.

A file is judged before anything of its content is made: no code runs, nothing is allocated for sizes that it only claims, and what
it becomes in memory is bounded by about twice its size plus 64 MiB (``SLACK``). docs/files.md lists what is refused.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import datetime
import json
import math
import os
import re
import stat
import types
import typing
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn, Protocol

import yaml

DEPTH = 64  # of lists and mappings inside one another
SLACK = 64 * 2**20  # bytes that reading may take beside twice the file
LARGEST_YAML = 16 * 2**20  # bytes; it is read slowly
MOST_YAML = 300_000  # values
LARGEST_JSON = 256 * 2**20
PIECE = 2**16  # bytes that are read at a time
LARGEST_HEADER = 100 * 10**6  # bytes, the limit of the safetensors library
ALIASES = 16  # in one YAML file
LARGEST_INT = 2**63 - 1
DIGITS = 1000  # of a whole number
# Bits of the numbers that safetensors knows and torch can hold.
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}
FLOATS = ("F16", "BF16", "F32", "F64")


class SupportsRead(Protocol):
    """A file that is open for bytes."""

    def read(self, size: int, /) -> bytes: ...


class Damaged(ValueError):
    """What is wrong with a file's content; ``line`` where that is known (from 1). ``reason`` goes on after the file's name and
    ``place``: "is no UTF-8 text"."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(f"it {reason}" if line is None else f"line {line} {reason}")
        self.reason, self.line = reason, line

    @property
    def place(self) -> str:
        """The line as it stands behind the name of a file, or nothing."""
        return "" if self.line is None else f" line {self.line}"


def read_within(file: SupportsRead, largest: int) -> bytes:
    """All that an open file gives. Raises Damaged for more than ``largest`` bytes, whatever its size is said to be: it may be a device.

    Piece by piece, as ``read(n)`` of an ordinary file takes memory for all n bytes before it reads the first.
    """
    data = bytearray()
    while piece := file.read(PIECE):
        data += piece
        if len(data) > largest:
            raise Damaged(f"is larger than {largest:,} bytes")
    return bytes(data)


def _content(path: str | os.PathLike, largest: int) -> bytes:
    """The bytes of a file. Raises Damaged for one that is larger, and OSError."""
    with open(path, "rb") as file:
        return read_within(file, largest)


def _text(data: bytes) -> str:
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged("is no UTF-8 text", data.count(b"\n", 0, error.start) + 1) from None
    if "\0" in text:
        raise Damaged("holds a NUL character", text.count("\n", 0, text.index("\0")) + 1)
    return text


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise Damaged(f"has the number {digits[:20]}…, of more than {DIGITS} digits")
    return int(digits)


# -- JSON -----------------------------------------------------------------------------------------------------------

HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: str | os.PathLike, finite: bool = False) -> Any:
    """What a JSON file holds. Raises OSError and what ``parse_json`` raises."""
    return parse_json(_content(path, LARGEST_JSON), finite)


def parse_json(text: str | bytes, finite: bool = False) -> Any:
    """What a JSON text holds. NaN and infinite numbers are let through unless all are to be ``finite``.

    Raises Damaged: no JSON, a key that is there twice, nesting deeper than ``DEPTH``, a whole number of more than ``DIGITS`` digits, or more
    values than its size justifies.
    """
    text = _text(text) if isinstance(text, bytes) else text
    _check_values(text)
    number, constant = (_finite, _no_number) if finite else (None, None)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_whole_number,
            parse_float=number,
            parse_constant=constant,
        )
    except RecursionError:
        raise Damaged(f"is nested deeper than {DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise Damaged(f"is not valid JSON ({error.msg})", error.lineno) from None
    _check_depth(value)
    if HALF_CHARACTER.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Damaged("holds half a character (\\ud800 to \\udfff)") from None
    return value


def _check_values(text: str) -> None:
    """Raise Damaged for a text that is nearly all brackets and commas, each of which would take many times its size."""
    made = 80 * text.count("[") + 240 * text.count("{") + 150 * text.count(":") + 40 * text.count(",")
    if made > 2 * len(text) + SLACK:
        raise Damaged("holds more values than a file of its size can")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Damaged(f"gives {twice[:80]!r} a second time")
    return values


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        _no_number(number)
    return value


def _no_number(word: str) -> NoReturn:
    raise Damaged(f"has {word[:20]}, which is no finite number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH + 1):
        inner = [part for part in level if isinstance(part, dict | list)]
        if not inner:
            return
        level = [held for part in inner for held in (part.values() if isinstance(part, dict) else part)]
    raise Damaged(f"is nested deeper than {DEPTH} levels")


def typed(kind: Any, value: Any, where: str = "it") -> Any:
    """A value of JSON as what an annotation says: a dataclass of its fields, lists, mappings with texts as keys, unions, plain values.

    Raises Damaged where it is none, or a field is missing or unknown.
    """
    shown = getattr(kind, "__name__", str(kind))
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        fields = {each.name: each for each in dataclasses.fields(kind)}
        needed = {
            name
            for name, each in fields.items()
            if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        }
        if not isinstance(value, dict) or not needed <= set(value) <= set(fields):
            raise Damaged(f"has fields of {where} that are not those of {shown}")
        kinds = typing.get_type_hints(kind)
        return kind(**{name: typed(kinds[name], held, f"{where}.{name}") for name, held in value.items()})  # type: ignore[operator]
    if origin in (types.UnionType, typing.Union):
        for each in inner:
            with contextlib.suppress(Damaged):
                return typed(each, value, where)
    elif origin is list and isinstance(value, list):
        return [typed(inner[0], held, where) for held in value]
    elif origin is dict and isinstance(value, dict):
        return {name: typed(inner[1], held, f"{where}.{name[:40]}") for name, held in value.items()}
    elif (
        (kind is float and type(value) in (int, float))
        or (kind is types.NoneType and value is None)
        or (isinstance(kind, type) and type(value) is kind)
    ):
        return value
    raise Damaged(f"has {where} that is no {shown}")


# -- YAML -----------------------------------------------------------------------------------------------------------

# libyaml's parser where PyYAML was built with it: some ten times as fast.
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MERGE, SEQUENCE, MAPPING, BINARY = (f"tag:yaml.org,2002:{word}" for word in ("merge", "seq", "map", "binary"))
PLAIN_INT = re.compile(r"0|-?[1-9][0-9]*")


def read_yaml(path: str | os.PathLike, finite: bool = False) -> Any:
    """What a YAML file holds. Raises OSError and what ``parse_yaml`` raises."""
    return parse_yaml(_text(_content(path, LARGEST_YAML)), finite)


def parse_yaml(text: str, finite: bool = False) -> Any:
    """What a YAML text holds, as ``yaml.safe_load`` gives it: plain values alone.

    Raises Damaged: no YAML, a key that is there twice or is no plain value, a tag for anything but plain values, more than ``ALIASES``
    aliases or one of itself, nesting deeper than ``DEPTH``, more than ``MOST_YAML`` values, a whole number of more than ``DIGITS`` digits; and
    for numbers that are not finite where all are to be ``finite``.
    """
    if len(text) > LARGEST_YAML:
        raise Damaged(f"is larger than {LARGEST_YAML:,} bytes")
    loader = _Parser(text)
    try:
        return _Document(loader, finite).value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        last = text.rstrip().count("\n") + 1  # libyaml finds what is missing a line after it
        raise Damaged(f"is not valid YAML ({problem})", min(mark.line + 1, last) if mark else None) from None
    except RecursionError:
        raise Damaged(f"is nested deeper than {DEPTH} levels") from None
    finally:
        loader.dispose()


class _Document:
    """One document, built event by event: without nodes for every value, and without recursion."""

    def __init__(self, loader: Any, finite: bool) -> None:
        self.finite, self.made, self.aliases = finite, 0, 0
        self.anchors: dict[str, Any] = {}
        self.open: list[tuple[str, Any]] = []  # anchor and content of what is being built; of a mapping with its key
        self.scalars = yaml.SafeLoader("")  # which knows what plain words mean
        self.value: Any = None
        documents = 0
        while loader.check_event():
            event = loader.get_event()
            kind = type(event)
            line = event.start_mark.line + 1
            if kind is yaml.DocumentStartEvent:
                documents += 1
                if documents > 1:
                    raise Damaged("holds a second document", line)
            elif kind is yaml.ScalarEvent:
                self._count(line)
                self._put(self._scalar(event, line), event.anchor, line)
            elif kind is yaml.AliasEvent:
                self._put(self._alias(event, line), None, line)
            elif kind in (yaml.SequenceStartEvent, yaml.MappingStartEvent):
                self._count(line)
                if event.tag not in (None, "!", SEQUENCE if kind is yaml.SequenceStartEvent else MAPPING):
                    raise Damaged(f"has the tag {event.tag[:80]}, which is for no plain value", line)
                if len(self.open) >= DEPTH:
                    raise Damaged(f"is nested deeper than {DEPTH} levels", line)
                self.open.append((event.anchor, [] if kind is yaml.SequenceStartEvent else _Mapping()))
            elif kind in (yaml.SequenceEndEvent, yaml.MappingEndEvent):
                anchor, built = self.open.pop()
                self._put(built.whole() if isinstance(built, _Mapping) else built, anchor, line)

    def _count(self, line: int, values: int = 1) -> None:
        self.made += values
        if self.made > MOST_YAML:
            raise Damaged(f"holds more than {MOST_YAML:,} values", line)

    def _put(self, value: Any, anchor: str | None, line: int) -> None:
        if anchor is not None:
            self.anchors[anchor] = value
        if not self.open:
            self.value = value
        elif isinstance(holder := self.open[-1][1], list):
            holder.append(value)
        else:
            holder.put(value, line)

    def _alias(self, event: Any, line: int) -> Any:
        self.aliases += 1
        if self.aliases > ALIASES:
            raise Damaged(f"holds more than {ALIASES} aliases", line)
        if event.anchor not in self.anchors:
            raise Damaged(f"has the alias {event.anchor[:80]!r} without an anchor before it", line)
        return self.anchors[event.anchor]

    def _scalar(self, event: Any, line: int) -> Any:
        text = event.value
        if event.tag is None and event.implicit[0]:
            if PLAIN_INT.fullmatch(text):
                return _whole_number(text)
            tag = self.scalars.resolve(yaml.ScalarNode, text, (True, False))
        else:
            tag = event.tag if event.tag not in (None, "!") else "tag:yaml.org,2002:str"
        if tag == "tag:yaml.org,2002:str":
            return text
        if tag == MERGE:
            return _MERGE
        self._count(line, 4)  # what takes longer to make
        if len(text) > DIGITS and tag != BINARY:
            raise Damaged(f"has the value {text[:20]}…, which is too long for the tag {tag[:80]}", line)
        make = yaml.SafeLoader.yaml_constructors.get(tag)
        if make is None or tag in (SEQUENCE, MAPPING):
            raise Damaged(f"has the tag {tag[:80]}, which is for no plain value", line)
        try:
            value = make(self.scalars, yaml.ScalarNode(tag, text, event.start_mark, event.end_mark))
        except (ValueError, KeyError, AttributeError, IndexError, OverflowError, TypeError, yaml.YAMLError):
            raise Damaged(f"has {text[:80]!r}, which is no value of the tag {tag[:80]}", line) from None
        if self.finite and isinstance(value, float) and not math.isfinite(value):
            raise Damaged(f"has {text[:20]}, which is no finite number", line)
        if not isinstance(value, str | int | float | bool | bytes | datetime.date | None):
            raise Damaged(f"has the tag {tag[:80]}, which is for no plain value", line)
        return value


_MERGE = object()  # the key <<
_NO_KEY = object()


class _Mapping:
    """A mapping that is being built: keys and values come in turn."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.merged: list[dict] = []
        self.key: Any = _NO_KEY

    def put(self, value: Any, line: int) -> None:
        if self.key is _NO_KEY:
            if isinstance(value, dict | list):
                raise Damaged("has a key that is a list or a mapping", line)
            if value in self.values:
                raise Damaged(f"gives {str(value)[:80]!r} a second time", line)
            self.key = value
            return
        if self.key is _MERGE:
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, dict) for part in parts):
                raise Damaged("merges (<<) what is no mapping", line)
            self.merged += parts
        else:
            self.values[self.key] = value
        self.key = _NO_KEY

    def whole(self) -> dict[Any, Any]:
        for part in self.merged:
            self.values = {**part, **self.values}
        return self.values


# -- safetensors ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Header:
    """What a safetensors file says that it holds: the type and the shape of each tensor, and the metadata."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike, dtypes: Collection[str] = tuple(BITS)) -> Header:
    """The header of a safetensors file, when everything that it says fits the file. ``dtypes``: those that may occur.

    Raises OSError, and Damaged: no header or one that is too long, a name that is there twice, an unknown type, a size that is
    negative or has more than 63 bits, and numbers that lie outside of the file, overlap, or are not as many as the shape says.
    """
    with open(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Damaged("is no regular file")
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(start, "little") if len(start := file.read(8)) == 8 else size
        if length > min(size - 8, LARGEST_HEADER):
            raise Damaged(f"has {size:,} bytes, and its header is said to have {length:,}")
        held = file.read(length)
    values = parse_json(held, finite=True)
    if not isinstance(values, dict) or held[:1] != b"{":
        raise Damaged("has a header that is no mapping of tensors")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Damaged("has metadata that are no mapping of texts")
    tensors, places = {}, []
    for name, entry in values.items():
        dtype, shape, begin, end = _entry(name, entry, dtypes)
        tensors[name] = dtype, shape
        places.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(places):
        if begin != reached:
            raise Damaged(f"has the numbers of {name[:200]!r} at {begin:,} and not at {reached:,}, where others end")
        reached = end
    if reached != size - 8 - length:
        raise Damaged(f"has tensors of {reached:,} bytes, and holds {size - 8 - length:,}")
    return Header(tensors, metadata)


def _entry(name: str, entry: Any, dtypes: Collection[str]) -> tuple[str, tuple[int, ...], int, int]:
    shown = repr(name[:200])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Damaged(f"does not describe {shown} by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise Damaged(f"has {shown} in the type {str(dtype)[:20]!r}, which has no place here")
    for sizes in (shape, offsets):
        if not isinstance(sizes, list) or any(type(each) is not int or each < 0 for each in sizes):
            raise Damaged(f"has sizes of {shown} that are none")
    if len(shape) > 8 or math.prod(max(1, each) for each in shape) > LARGEST_INT:
        raise Damaged(f"has {shown} of the shape {str(shape)[:80]}, which is too large")
    if len(offsets) != 2 or (offsets[1] - offsets[0]) * 8 != math.prod(shape) * BITS[dtype]:
        raise Damaged(f"has {shown} in another number of bytes than its type and shape say")
    return dtype, tuple(shape), offsets[0], offsets[1]


# -- paths in files -------------------------------------------------------------------------------------------------


def inside(directory: str | os.PathLike, name: Any) -> Path:
    """The path of a file that another file in the directory names.

    Raises Damaged for a name that leads out of the directory, by itself or by symbolic links. Those of the Hub's cache, which lead
    from ``snapshots/…`` to ``blobs`` beside it, may.
    """
    directory = Path(directory)
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise Damaged(f"names {str(name)[:80]!r}, which is no name of a file")
    path, root = (directory / name).resolve(), directory.resolve()
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise Damaged(f"names {name[:80]!r}, which leads out of the directory")
    cache = next((parent.parent for parent in root.parents if parent.name == "snapshots"), None)
    if not path.is_relative_to(root) and not (cache is not None and path.is_relative_to(cache / "blobs")):
        raise Damaged(f"names {name[:80]!r}, a link that leads out of the directory")
    return directory / name
