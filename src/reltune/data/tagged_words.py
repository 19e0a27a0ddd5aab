"""Words with tags: as the CoNLL tasks have them, a word and its tag on each line, an empty line after each sentence; and as
tables have them, a word and its tag in each row, beside the number of its sentence."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reltune.data.rows import Record, Rows
from reltune.notes import note

SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".conllu")
COLUMNS = ("tokens", "ner_tags")
OF_A_SENTENCE = (
    "sentence_id",
    "sentence #",
    "sent_id",
    "sentence_idx",
    "sentence",
)  # columns that tell sentences apart
ONE_SENTENCE = "write a sentence in each row (tokens, ner_tags), or add a column sentence_id"
TREEBANK = 10  # columns of the CoNLL-U format: the word is the second, the part of speech the fourth


def read_tagged_words(path: Path, lines: Iterable[str]) -> Iterator[Record]:
    """A record of words and tags for each sentence. Words are the first column and tags the last, unless it is CoNLL-U."""
    width = 0
    for line, sentence in _sentences(lines):
        width = width or len(sentence[0])
        if width < 2 or any(len(fields) != width for fields in sentence):
            yield line, "a line with another number of columns than the first, or without a tag"
            continue
        if width == TREEBANK and path.suffix.lower() == ".conllu":
            sentence = [fields for fields in sentence if fields[0].isdigit()]  # not ranges of joined words
            word, tag = 1, 3
        else:
            word, tag = 0, width - 1
        yield line, dict(zip(COLUMNS, ([fields[at] for fields in sentence] for at in (word, tag)), strict=True))
    if width > 2 and path.suffix.lower() != ".conllu":
        note(f"{path.name}: of {width} columns the first is read as words and the last as tags.")


def _sentences(lines: Iterable[str]) -> Iterator[tuple[int, list[list[str]]]]:
    """The fields of each sentence's words, with the line on which it starts."""
    sentence: list[list[str]] = []
    first = 1
    for line, text in enumerate(lines, start=1):
        fields = text.strip("\r\n").split("\t") if "\t" in text else text.split()
        if not text.strip() or fields[0].startswith("-DOCSTART-"):
            if sentence:
                yield first, sentence
            sentence = []
        elif not _is_comment(text, fields, sentence):
            first = first if sentence else line
            sentence.append(fields)
    if sentence:
        yield first, sentence


def _is_comment(text: str, fields: list[str], sentence: list[list[str]]) -> bool:
    """Whether a line that begins with # is no word: it has not the columns of the words before it, or no tag."""
    if not text.startswith("# "):
        return False
    return len(fields) != len(sentence[0]) if sentence else len(fields) < 2 or not (TAG.fullmatch(fields[-1]))


# -- a word in each row ---------------------------------------------------------------------------------------------


def one_word_each(rows: Rows, tokens: str, tags: str) -> bool:
    """Whether these columns hold a single word and its tag in every row."""
    cells = [row.values.get(column) for row in rows for column in (tokens, tags)]
    return len(rows) > 1 and all(isinstance(cell, str | int) and len(str(cell).split()) <= 1 for cell in cells)


def sentence_column(columns: Sequence[str]) -> str | None:
    """The column that says which sentence a row's word belongs to."""
    return next((name for name in columns if name.strip().casefold() in OF_A_SENTENCE), None)


def sentences(rows: Rows, sentence: str, tokens: str, tags: str) -> Rows:
    """A row for each sentence of rows that have a word each; rows with several words stay as they are."""
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    before: Any = None
    for row in rows:
        word, tag, own = (row.values.get(column) for column in (tokens, tags, sentence))
        if isinstance(word, list) or len(str(word).split()) > 1:
            records.append(row.values)
            lines.append(row.line)
            before = None
            continue
        if not records or before is None or (own not in (None, "") and own != before):
            records.append({**row.values, tokens: [], tags: []})
            lines.append(row.line)
        before = own if own not in (None, "") else before
        records[-1][tokens].append(word)
        records[-1][tags].append(tag)
    made = Rows(
        records,
        rows.source,
        rows.columns,
        lines,
        header_line=rows.header_line,
        repeated=rows.repeated,
        broken=rows.broken,
        unit=rows.unit,
    )
    made.skipped = rows.skipped
    return made


# -- schemes of tags ------------------------------------------------------------------------------------------------

TAG = re.compile(r"O|[BIESLUMW][-_].+|.+[-_][BIESLUMW]", re.I)  # of entities
PREFIXED = re.compile(r"(?P<place>[BIESLUMW])[-_](?P<kind>.+)", re.I)
SUFFIXED = re.compile(r"(?P<kind>.+)[-_](?P<place>[BIESLUMW])", re.I)
USUAL = {"M": "I", "L": "E", "U": "S", "W": "S"}  # of BMES, BILOU and BMEWO -> of BIOES


def entity_tags(labels: Collection[str]) -> dict[str, str]:
    """Tags that mark where entities begin and end, in the usual form: B-PER, I-PER, E-PER, S-PER and O. None if these do not.

    Read are IOB, IOB2, BIOES, BILOU, BMES and BMEWO, with the place before or after the kind, and in any case.
    """
    inside = [label for label in labels if label.upper() != "O"]
    for form in (PREFIXED, SUFFIXED):
        found = {label: match for label in inside if (match := form.fullmatch(label))}
        if found and len(found) == len(inside):
            tags = {label: (match["place"].upper(), match["kind"]) for label, match in found.items()}
            usual = {label: f"{USUAL.get(place, place)}-{kind}" for label, (place, kind) in tags.items()}
            return usual | {label: "O" for label in labels if label.upper() == "O"}
    return {}
