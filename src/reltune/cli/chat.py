"""A conversation in the terminal, or through a pipe: a question on each line in, answers out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from reltune.errors import InputError

if TYPE_CHECKING:
    from reltune.runs.chat import Conversation

HELP = "/reset forgets what was said, /quit ends, Ctrl-C stops an answer."


def converse(conversations: Mapping[str, Conversation]) -> None:
    """Ask every conversation each question in turn, and print their answers as they are written."""
    typed = sys.stdin.isatty()
    if typed:
        print(HELP, file=sys.stderr)
    for line in _lines(typed):
        question = line.strip()
        if question in ("/quit", "/exit"):
            return
        if question == "/reset":
            for conversation in conversations.values():
                conversation.reset()
        elif question.startswith("/") and " " not in question:
            print(HELP, file=sys.stderr)
        elif question:
            _ask(conversations, question, typed)


def _lines(typed: bool) -> Iterator[str]:
    """What the user writes, up to the end of input."""
    if not typed:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited, and come back by the arrow keys)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _ask(conversations: Mapping[str, Conversation], question: str, typed: bool) -> None:
    for name, conversation in conversations.items():
        print(f"{name}: " if len(conversations) > 1 else "", end="", flush=True)
        parts = conversation.answer(question)
        try:
            for part in parts:
                print(part, end="", flush=True)
        except KeyboardInterrupt:
            if not typed:
                raise
            parts.close()  # type: ignore[attr-defined]
        except InputError as error:
            if not typed:
                raise
            print(f"reltune: {error}", file=sys.stderr)
        print(flush=True)
