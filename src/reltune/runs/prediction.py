"""Predictions of a tuned model for a file of rows, in their order: what each row has, and beside it what the model says.

Rows are read as they are needed and written as they are predicted, so that a file may be larger than memory. They are read
twice: the first pass finds bad rows before the model is loaded.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from tqdm.auto import tqdm

from reltune.data.bad_rows import in_words
from reltune.data.columns import LOOKED_AT
from reltune.data.layout import known_layout
from reltune.data.rows import Record, Row, Rows
from reltune.data.sources import read_splits
from reltune.data.streams import StreamedRows
from reltune.data.tagged_words import one_word_each, sentence_column
from reltune.data.text_files import format_of
from reltune.errors import InputError
from reltune.files import whole_file
from reltune.runs.evaluation import DEFAULTS
from reltune.runs.tuned import Tuned
from reltune.tasks.prediction import Predictions
from reltune.tasks.task import Task

READ = "\0read"  # the key under which a row has the values that the file has
SPLIT = "test"
BATCHES = 8  # are encoded together, so that examples of like length can share one


class Predicted(NamedTuple):
    """How many rows were predicted, and the lines of those that were left out, by problem."""

    rows: int
    skipped: dict[str, list[int]]


def predict(
    tuned: Tuned,
    input_file: str,
    output_file: str = "-",
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    on_bad_rows: str = "error",
    encoding: str = "utf-8",
) -> Predicted:
    """Write a prediction for each row of a file, beside the row's own columns.

    Args:
        input_file: whatever training reads; labels are not needed, and not looked at.
        output_file: CSV, TSV or JSON Lines by its suffix; it appears when it is whole. ``-`` is standard output, in JSON
            Lines, as they come.
        batch_size: examples that one forward pass takes; as many as in the run's evaluation if None.
        max_new_tokens: for models that write texts, tokens at most; the run's own if None.
        on_bad_rows: "error" refuses a file with bad rows; "skip" leaves them out.

    Raises:
        InputError: a source that cannot be read, a column that is missing, bad rows.
    """
    task = tuned.task
    rows = read_questions(task, input_file, encoding)
    columns, total = _looked_through(rows)
    if on_bad_rows == "error":
        _refuse(rows.skipped, rows)
    if taken := next((name for name in task.predicts if name in columns), None):
        raise InputError(f"{input_file} has a column {taken!r}, which is where predictions are written; rename it.")
    model, tokenizer = tuned.load()
    usual = {**DEFAULTS, **task.defaults, **tuned.config.training}["per_device_eval_batch_size"]
    batch_size = batch_size or int(usual)
    longest = min(tuned.config.max_length, getattr(tokenizer, "model_max_length", tuned.config.max_length))
    count = 0
    with _writing(output_file, columns, task) as write, tqdm(total=total, desc="predict", unit="row") as bar:
        passed = iter(rows)
        while chunk := list(itertools.islice(passed, BATCHES * batch_size)):
            found = task.predict(
                model, chunk, tokenizer, longest, batch_size, max_new_tokens or tuned.config.max_new_tokens
            )
            if on_bad_rows == "error":
                _refuse(found.lost, rows)
            rows.skip(found.lost)
            for row in chunk:
                if row.line in found.records:
                    write({**_shown(row.values.get(READ, row.values)), **found.records[row.line]})
                    count += 1
            bar.update(len(chunk))
    return Predicted(count, rows.skipped)


class SideBySide:
    """A tuned model and its base, asked about one row after another."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned
        self.model, self.tokenizer = tuned.load(beside_base=True)

    def answers(self, row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What "base" and "tuned" say of a row, which has the columns of a file that ``predict`` reads.

        Raises InputError for a row that cannot be predicted.
        """
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "row.jsonl"
            file.write_text(_json(row) + "\n", encoding="utf-8")
            questions = read_questions(self.tuned.task, str(file), "utf-8")
            rows = list(questions)
        _refuse(questions.skipped, questions)
        found = {}
        for name, state in (("base", self.model.disable_adapter), ("tuned", contextlib.nullcontext)):
            with state():
                said = self._said(rows)
            _refuse(said.lost, questions)
            found[name] = said.records[rows[0].line]
        return found

    def _said(self, rows: Sequence[Row]) -> Predictions:
        config = self.tuned.config
        longest = min(config.max_length, getattr(self.tokenizer, "model_max_length", config.max_length))
        return self.tuned.task.predict(self.model, rows, self.tokenizer, longest, 1, config.max_new_tokens)


def read_questions(task: Task, source: str, encoding: str) -> StreamedRows:
    """The rows of a source with the values that the task wants of a row to predict, each with those that the source has under
    ``READ``. Rows that cannot be predicted are skipped."""
    rows = _streamed(source, encoding).checked(lambda row: None, "skip")
    rows = rows.mapped(lambda values: {**values, READ: values})
    tokens = task.asked.get("tokens")
    if tokens and sentence_column(rows.columns) and one_word_each(rows.take(LOOKED_AT), tokens, tokens):
        raise InputError(
            f"{source} has one word in each row; write the words of a sentence in one row, with spaces between or as a list."
        )
    layout = known_layout(rows, task.name, task.asked, getattr(task, "labels", ()))
    read = layout.read(rows)
    assert isinstance(read, StreamedRows)
    return read.checked(task.question_problem, "skip")


def _streamed(source: str, encoding: str) -> StreamedRows:
    """The rows of a source, of ``SPLIT`` if it has several, read as they are needed; JSON that is one list or object is read at once."""
    path = Path(source)
    try:
        splits = read_splits(path, encoding, streaming=path.is_dir() or format_of(path) != ".json")
    except InputError:
        if path.is_dir():
            raise
        splits = read_splits(path, encoding)  # a list, in a file whose suffix says that it has an object on each line
    if len(splits) > 1 and SPLIT not in splits:
        raise InputError(
            f"{source} has the splits {', '.join(splits)} and none called {SPLIT}; name one of their files."
        )
    rows = splits[SPLIT] if SPLIT in splits else next(iter(splits.values()))
    return rows if isinstance(rows, StreamedRows) else _passed_again(rows)


def _passed_again(rows: Rows) -> StreamedRows:
    """Rows in memory as if they were streamed."""

    def records() -> Iterator[Record]:
        return iter(sorted((*zip(rows.lines, rows.records, strict=True), *rows.broken), key=lambda record: record[0]))

    return StreamedRows(records, rows.source, rows.columns, unit=rows.unit)


def _looked_through(rows: StreamedRows) -> tuple[list[str], int]:
    """The columns that any row of the source has, and how many good rows there are."""
    columns: dict[str, None] = {}
    count = 0
    for row in tqdm(rows, desc="check rows", unit="row", leave=False):
        columns |= dict.fromkeys(row.values.get(READ, row.values))
        count += 1
    return list(columns), count


def _refuse(bad: Mapping[str, Sequence[int]], rows: StreamedRows) -> None:
    """Raise InputError for bad rows, if there are any."""
    if bad:
        words = in_words(bad, rows.unit)
        raise InputError(f"{rows.source} has {words}. Mend or delete these {rows.unit}s, or pass --on_bad_rows skip.")


# -- what is written ------------------------------------------------------------------------------------------------


def _shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """A row's values as a file can have them: of an image its path."""
    return {
        name: value.get("path") if isinstance(value, Mapping) and "bytes" in value else value
        for name, value in values.items()
        if name != READ
    }


@contextlib.contextmanager
def _writing(output_file: str, columns: Sequence[str], task: Task) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What writes a record after another, to standard output or into a file that gets its name when it is whole."""
    if output_file == "-":
        yield lambda record: print(_json(record), flush=True)
        return
    path = Path(output_file)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        yield _table(file, path.suffix.lower(), columns, task) or (lambda record: _line(file, record))


def _line(file: TextIO, record: Mapping[str, Any]) -> None:
    file.write(_json(record) + "\n")


def _table(file: TextIO, suffix: str, columns: Sequence[str], task: Task) -> Callable[[Mapping[str, Any]], None] | None:
    """What writes rows of a table, with a column for the score of each label (``scores.LABEL``); None for JSON Lines."""
    if suffix not in (".csv", ".tsv"):
        return None
    labels = getattr(task, "labels", ()) if "label" in task.told else ()
    names: list[str] = []
    for name in (*columns, *task.predicts):
        names += [f"{name}.{label}" for label in labels] if name == "scores" and labels else [name]
    writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
    writer.writerow(names)

    def write(record: Mapping[str, Any]) -> None:
        flat = dict(record)
        if isinstance(scores := flat.get("scores"), Mapping):
            flat |= {f"scores.{label}": score for label, score in scores.items()}
        writer.writerow([_cell(flat.get(name)) for name in names])

    return write


def _cell(value: Any) -> Any:
    """A value in a table: lists and objects are JSON."""
    return "" if value is None else _json(value) if isinstance(value, list | Mapping) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
