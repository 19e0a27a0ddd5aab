"""Rows that are read again on every pass and never kept, for data that fit neither on the disk nor in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from reltune.data.bad_rows import in_words, lines_by_problem, no_good_rows, row_problem
from reltune.data.rows import Row, Rows
from reltune.errors import InputError, nearest
from reltune.names import ON_BAD_ROWS

CHUNK = 64  # rows encoded together
SHUFFLED = 10_000  # rows in the window from which the next one is drawn


class StreamedRows(Iterable[Row]):
    """The rows of one source, in order. Their number is not known.

    Args:
        records: a function that starts a pass and gives (line, values) for each row, or (line, phrase) for a line without one.
        source: the file or data set as the user named it, for messages.
        columns: the names of the columns; those of the first row if not given.
        problem: a task's rule, as for ``checked``: what is wrong with a row, or None. Rows are checked as they are read.
        on_bad_rows: "error" or "skip", as for ``checked``. ``skipped`` has the lines that were left out so far, by problem.
        unit: what the lines count, as for ``Rows``.
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
        return lines_by_problem(self._skipped.items())

    def __iter__(self) -> Iterator[Row]:
        good = 0
        for line, record in self.records():
            phrase = record if isinstance(record, str) else row_problem(Row(record, line), self.problem)
            if phrase is None:
                good += 1
                yield Row(record, line)  # type: ignore[arg-type]
            elif self.on_bad_rows == "error":
                bad = in_words({phrase: [line]}, self.unit)
                raise InputError(f"{self.source} has {bad}. Mend or delete it, or pass --on_bad_rows skip.")
            else:
                self._skipped[line] = phrase
        if not good:
            raise InputError(no_good_rows(self.source, self.skipped, self.unit))

    def checked(self, problem: Callable[[Row], str | None], on_bad_rows: str = "error") -> StreamedRows:
        """The same rows, each of which is checked by a task's rule when it is read."""
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
        """Record lines that are left out, by problem."""
        self._skipped |= {line: phrase for phrase, more in lines.items() for line in more}

    def take(self, count: int | None) -> Rows:
        """The first ``count`` good rows in memory, or all of them for None, with the record of lines skipped before them."""
        rows = self._held(itertools.islice(self, count))
        rows.skip(self.skipped)
        return rows

    def _held(self, rows: Iterable[Row]) -> Rows:
        held = list(rows)
        return Rows([row.values for row in held], self.source, self.columns, [row.line for row in held], unit=self.unit)

    def encoded(self, encode: Callable[[Rows], Any], seed: int) -> Any:
        """The examples that a task makes of the rows, as a ``datasets.IterableDataset`` for Trainer.

        Each next example is drawn from a window of ``SHUFFLED`` rows.

        Args:
            encode: encodes some rows; its result is indexed by number.
            seed: seeds the shuffling.
        """
        import datasets

        def items() -> Iterator[dict[str, Any]]:
            rows = iter(self)
            while chunk := self._held(itertools.islice(rows, CHUNK)):
                encoded = encode(chunk)
                self.skip(chunk.skipped)
                yield from (encoded[index] for index in range(len(encoded)))

        return datasets.IterableDataset.from_generator(items).shuffle(seed=seed, buffer_size=SHUFFLED)
