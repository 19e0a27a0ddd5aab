"""What is raised for bad input and for an analysis that cannot go on, and the words of their messages."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable
from typing import Any, TypeVar

Failure = TypeVar("Failure", bound=BaseException)


class InputError(ValueError):
    """Bad input or configuration: the command line prints the message and exits with code 2.

    The message is one or two sentences: what is wrong, where, and the mend.
    """


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A phrase naming the known words that look most like ``name``, for error messages."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(word) for word in close) + "?"
    return f"known: {textwrap.shorten(', '.join(known), 200, placeholder=' …')}."


class AnalysisError(RuntimeError):
    """The measurement itself failed: a loss or a gradient is not finite, or a module mixes examples."""


def blaming(error: Failure, batch: Any) -> Failure:
    """The error, with the batch that it is about for whoever keeps it (``batch_of``)."""
    error.batch = batch  # type: ignore[attr-defined]
    return error


def batch_of(error: BaseException) -> Any:
    """The batch that an error is about, or None."""
    return getattr(error, "batch", None)


class StorageError(RuntimeError):
    """A file could not be written: the disk is full, or the directory is read-only. The message is a sentence or two."""


def first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0].rstrip(".: ")
    return textwrap.shorten(line, 160, placeholder=" …") or type(error).__name__
