"""A tuned model beside its base, asked on the page. One run's model is in memory at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reltune.errors import InputError
from reltune.names import WRITING
from reltune.runs.preflight import kept_as

if TYPE_CHECKING:
    from reltune.runs.chat import Conversation
    from reltune.runs.prediction import SideBySide


class Bench:
    """The model that is tried.

    Attributes:
        writes: whether it writes texts, and is talked to; else it is asked about rows with the ``roles``.
        without_template: whether it is a language model that has no chat template, and goes on from texts as they stand.
    """

    def __init__(self) -> None:
        self.run: Path | None = None
        self.task, self.writes, self.roles = "", False, dict[str, str]()
        self.without_template = False
        self._pair: SideBySide | None = None
        self._talks: dict[str, Conversation] = {}
        self._lock = threading.Lock()

    def load(self, run: Path) -> None:
        """Raises InputError for a run that was not tuned."""
        with self._lock:
            kept_as(run)
            from reltune.runs import flow
            from reltune.runs.prediction import SideBySide
            from reltune.runs.tuned import Tuned

            self.run, self._pair, self._talks, self.without_template = None, None, {}, False
            tuned = Tuned.open(run)
            self.task, self.writes = tuned.task.name, tuned.task.name in WRITING
            self.roles = {} if self.writes else dict(tuned.task.asked)
            if "image" in self.roles:
                return
            if self.writes:
                self._talks = flow.chat(str(run), compare=True)
                one = self._talks["tuned"]
                self.without_template = (
                    self.task != "seq2seq" and one.form == "text" and not one.tokenizer.chat_template
                )
            else:
                self._pair = SideBySide(tuned)
            self.run = run

    def answers(self, values: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """What "base" and "tuned" say of a row, given by role. Raises InputError for one that cannot be predicted."""
        with self._lock:
            if self._pair is None:
                raise InputError("no model is loaded; load one first.")
            row = {
                self.roles[role]: value.split() if role == "tokens" else value
                for role, value in values.items()
                if role in self.roles
            }
            return self._pair.answers(row)

    def talk(self, question: str) -> Iterator[dict[str, list[tuple[str, str]]]]:
        """The turns of both conversations, as the answers are written: first the base's."""
        with self._lock:
            if not self._talks:
                raise InputError("no model is loaded; load one first.")
            for name, conversation in self._talks.items():
                written = ""
                for part in conversation.answer(question):
                    written += part
                    yield {**self._turns(), name: [*conversation.turns, (question, written)]}
            yield self._turns()

    def _turns(self) -> dict[str, list[tuple[str, str]]]:
        return {name: list(conversation.turns) for name, conversation in self._talks.items()}

    def reset(self) -> None:
        with self._lock:
            for conversation in self._talks.values():
                conversation.reset()
