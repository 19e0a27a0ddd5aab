"""Rows that are read anew on every pass and never held: for what does not fit on the disk or in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from reltune.data.rows import Row, Rows, by_kind, found, no_good_rows, row_problem
from reltune.errors import InputError, nearest
from reltune.names import ON_BAD_ROWS

CHUNK = 64  # rows encoded together
SHUFFLED = 10_000  # rows among which the next one is drawn


class StreamedRows(Iterable[Row]):
    """The rows of one source, in order, without a length.

    Args:
        records: starts a pass over (line, values), or (line, phrase) where there is no row.
        source: what the user named, for messages.
        columns: the columns' names; those of the first row when not given.
        problem: the rule that rows are checked by on the way, as for ``checked``.
        on_bad_rows: likewise. What was skipped so far is in ``skipped``, by kind.
        unit: what is counted, as for ``Rows``.
    """

    def __init__(
        self,
        records: Callable[[], Iterator[tuple[int, dict[str, Any] | str]]],
        source: str,
        columns: Sequence[str] | None = None,
        problem: Callable[[Row], str | None] = lambda row: None,
        on_bad_rows: str = "error",
        unit: str = "line",
    ) -> None:
        if on_bad_rows not in ON_BAD_ROWS:
            raise InputError(f"on_bad_rows {on_bad_rows!r} is unknown; {nearest(on_bad_rows, ON_BAD_ROWS)}")
        self.records, self.source, self.unit = records, source, unit
        self.problem, self.on_bad_rows = problem, on_bad_rows
        self.header_line, self.repeated = None, frozenset[str]()
        if columns is None:
            columns = next((list(record) for _, record in records() if isinstance(record, dict)), None)
            if columns is None:
                raise InputError(no_good_rows(source, {}, unit))
        self.columns = list(columns)
        self._skipped: dict[int, str] = {}  # by line: later passes meet the same rows

    @property
    def skipped(self) -> dict[str, list[int]]:
        return by_kind(self._skipped.items())

    def __iter__(self) -> Iterator[Row]:
        good = 0
        for line, record in self.records():
            phrase = record if isinstance(record, str) else row_problem(Row(record, line), self.problem)
            if phrase is None:
                good += 1
                yield Row(record, line)  # type: ignore[arg-type]
            elif self.on_bad_rows == "error":
                bad = found({phrase: [line]}, self.unit)
                raise InputError(f"{self.source} has {bad}. Mend or delete it, or pass --on_bad_rows skip.")
            else:
                self._skipped[line] = phrase
        if not good:
            raise InputError(no_good_rows(self.source, self.skipped, self.unit))

    def checked(self, problem: Callable[[Row], str | None], on_bad_rows: str = "error") -> StreamedRows:
        """The same rows, each checked by a task's rule when it comes."""
        return StreamedRows(self.records, self.source, self.columns, problem, on_bad_rows, self.unit)

    def mapped(
        self, convert: Callable[[dict[str, Any]], dict[str, Any]], more_columns: Sequence[str] = ()
    ) -> StreamedRows:
        """The same rows with other values, before they are checked."""

        def records() -> Iterator[tuple[int, dict[str, Any] | str]]:
            for line, record in self.records():
                yield line, record if isinstance(record, str) else convert(record)

        columns = list(dict.fromkeys([*self.columns, *more_columns]))
        return StreamedRows(records, self.source, columns, self.problem, self.on_bad_rows, self.unit)

    def skip(self, lines: Mapping[str, Sequence[int]]) -> None:
        """Put lines that are left out on record, by kind."""
        self._skipped |= {line: phrase for phrase, more in lines.items() for line in more}

    def take(self, count: int | None) -> Rows:
        """The first good rows, or all of them, in memory, with what was skipped on the way on record."""
        rows = self._held(itertools.islice(self, count))
        rows.skip(self.skipped)
        return rows

    def _held(self, rows: Iterable[Row]) -> Rows:
        held = list(rows)
        return Rows([row.values for row in held], self.source, self.columns, [row.line for row in held], unit=self.unit)

    def encoded(self, encode: Callable[[Rows], Any], seed: int) -> Any:
        """A ``datasets.IterableDataset`` of what a task makes of the rows, shuffled within a window, for Trainer.

        Args:
            encode: a task's encoding of some rows, which may be asked for its items by number.
            seed: of the shuffling.
        """
        import datasets

        def items() -> Iterator[dict[str, Any]]:
            rows = iter(self)
            while chunk := self._held(itertools.islice(rows, CHUNK)):
                encoded = encode(chunk)
                self.skip(chunk.skipped)
                yield from (encoded[index] for index in range(len(encoded)))

        return datasets.IterableDataset.from_generator(items).shuffle(seed=seed, buffer_size=SHUFFLED)
