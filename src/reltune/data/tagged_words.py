"""Words with tags as the CoNLL tasks have them: a word and its tag on each line, an empty line after each sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from reltune.data.rows import Record
from reltune.notes import note

SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".conllu")
COLUMNS = ("tokens", "ner_tags")
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
        elif not text.startswith("# "):
            first = first if sentence else line
            sentence.append(fields)
    if sentence:
        yield first, sentence
