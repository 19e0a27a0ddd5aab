"""Sentences about what was assumed or left out: said in the first lines of a run, and kept for its report.

Whoever reads data or a model in one of several possible ways calls ``note``. The run collects the notes, prints each once
and saves them as ``notes.json``; the report lists them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar


class Note(UserWarning):
    """The category under which a note reaches the terminal."""


_collected: ContextVar[list[str] | None] = ContextVar("_collected", default=None)


def note(sentence: str) -> None:
    """Say what was assumed or left out, in one sentence that a user of the program understands.

    Inside ``collecting`` the sentence is kept, once; elsewhere it is a warning.
    """
    notes = _collected.get()
    if notes is None:
        warnings.warn(sentence, Note, stacklevel=2)
    elif sentence not in notes:
        notes.append(sentence)


@contextlib.contextmanager
def collecting() -> Iterator[list[str]]:
    """Collect the notes that are made inside, in their order."""
    notes: list[str] = []
    token = _collected.set(notes)
    try:
        yield notes
    finally:
        _collected.reset(token)
