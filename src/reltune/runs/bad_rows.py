"""Rows that were skipped: written down by split, and said in words."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reltune.data.bad_rows import in_words as lines_in_words

if TYPE_CHECKING:
    from reltune.runs.splits import HeldOut, Splits


def bad_rows(splits: Splits | HeldOut) -> dict[str, dict[str, Any]]:
    """What was skipped so far: split -> its source, and how many lines (or rows) of each kind, and which."""
    record = {}
    for field in dataclasses.fields(splits):
        rows = getattr(splits, field.name)
        if not getattr(rows, "skipped", None):
            continue
        kinds = {phrase: {"count": len(lines), f"{rows.unit}s": lines} for phrase, lines in rows.skipped.items()}
        record[field.name] = {"source": rows.source, "skipped": kinds}
    return record


def in_words(record: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each split of a record of bad rows."""
    sentences = []
    for split in record.values():
        unit = "line" if all("lines" in kind for kind in split["skipped"].values()) else "row"
        lines = {phrase: kind[f"{unit}s"] for phrase, kind in split["skipped"].items()}
        sentences.append(f"{Path(split['source']).name}: skipped {lines_in_words(lines, unit)}.")
    return sentences


def warn_of(splits: Splits | HeldOut) -> None:
    """Say what is skipped."""
    for sentence in in_words(bad_rows(splits)):
        warnings.warn(sentence, stacklevel=2)
