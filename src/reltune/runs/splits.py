"""A run's data: the task that they are for, the splits with every row checked, and what had to be left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reltune.config.run_config import RunConfig
from reltune.data import sources
from reltune.data.columns import LOOKED_AT, columns_of, guess_task, note_left_out
from reltune.data.rows import Row, Rows, checked, found, no_good_rows, other_separator, require_columns, split_off
from reltune.data.streams import StreamedRows
from reltune.errors import InputError
from reltune.runs.kept_rows import kept
from reltune.tasks.registry import TASKS
from reltune.tasks.task import Examples, Task

HELD_OUT = 0.15  # share of the data split off for each of validation and test, where there is none


@dataclasses.dataclass
class Splits:
    """Rows without a problem. ``train`` may be streamed."""

    train: Rows | StreamedRows
    validation: Rows
    test: Rows
    forgetting: Rows | None = None  # a second set for the same task


@dataclasses.dataclass
class HeldOut:
    """The rows that a run is measured on, without a problem."""

    validation: Rows
    test: Rows
    forgetting: Rows | None = None


@dataclasses.dataclass
class Data:
    """The splits as a model takes them.

    Attributes:
        train: all training examples; a ``datasets.IterableDataset`` where rows are streamed.
        sample: the training examples that relevance is measured on and new heads are trained on.
    """

    train: Any
    sample: Examples
    validation: Examples
    test: Examples
    forgetting: Examples | None = None


def read_data(config: RunConfig, fitted: Task | None = None) -> tuple[Task, Splits]:
    """The task of a config and its rows: of their files, else of the source's own splits, else split off.

    Args:
        fitted: the task of an existing run, to which the rows must fit; else one is made that fits the training rows.

    Raises:
        InputError: a source that cannot be read, columns that no task fits, bad rows, or too few good ones.
    """
    every: dict[str, Rows | StreamedRows] = {}
    if config.dataset_name is not None:
        name, variant, path = config.dataset_name, config.dataset_config, config.dataset_path
        every = sources.read_dataset(name, variant, path, config.streaming)
    elif config.train_file is not None:
        every = sources.read_splits(config.train_file, config.encoding, config.streaming)
    for split, file in (("test", config.test_file), ("validation", config.validation_file)):
        if file is not None:
            every[split] = sources.read_rows(file, config.encoding, split)
    if config.forgetting_file is not None:
        every["forgetting"] = sources.read_rows(config.forgetting_file, config.encoding, "test")
    if isinstance(every["train"], StreamedRows):  # lines without a row stop no pass that may skip them
        every["train"] = every["train"].checked(lambda row: None, config.on_bad_rows)
    task, flags = (fitted, {}) if fitted else _task(config, every["train"])
    note_left_out(every["train"], task.columns.values())

    rule = _rule(fitted) if fitted else task.problem
    good: dict[str, Rows | StreamedRows] = {}
    for split, rows in every.items():
        require_columns(rows, {column: flags.get(column, "") for column in task.columns.values()})
        if isinstance(rows, Rows):
            good[split] = checked(rows, rule, config.on_bad_rows)
        else:
            good[split] = rows.checked(rule, config.on_bad_rows)
    train = good.pop("train")
    held = {split: rows if isinstance(rows, Rows) else rows.take(None) for split, rows in good.items()}
    if isinstance(train, Rows):
        whole = len(train)
        for split in ("test", "validation"):
            if split not in held:
                fraction = HELD_OUT * whole / len(train)
                train, held[split] = split_off(train, fraction, config.seed, task.content, task.label)
    elif missing := [f"--{split}_file" for split in ("validation", "test") if split not in held]:
        raise InputError(f"Nothing can be split off streamed rows; give {' and '.join(missing)}.")
    if fitted is None:
        task = task.fitted(train)
        held = {split: checked(rows, task.misfit, config.on_bad_rows) for split, rows in held.items()}
    return task, Splits(train, held["validation"], held["test"], held.get("forgetting"))


def read_held_out(config: RunConfig, task: Task, kept_rows: Path) -> HeldOut:
    """The held-out rows of an existing run: of their files, else those in the directory ``kept_rows``, else read with the
    training data as they were when the run was made.

    Raises:
        InputError: as ``read_data``; bad rows are also those that do not fit the task.
    """
    held: dict[str, Rows] = {}
    for split in ("validation", "test", "forgetting"):
        file = getattr(config, f"{split}_file")
        if file is not None:
            rows = sources.read_rows(file, config.encoding, "test" if split == "forgetting" else split)
            require_columns(rows, dict.fromkeys(task.columns.values(), ""))
            held[split] = checked(rows, _rule(task), config.on_bad_rows)
        elif own := kept(kept_rows / f"{split}.jsonl", str(config.train_file or config.dataset_name)):
            held[split] = own
    if not {"validation", "test"} <= set(held):
        config.check_data()
        _, splits = read_data(config, task)
        held = {"validation": splits.validation, "test": splits.test, **held}
    return HeldOut(**held)


def _rule(task: Task) -> Callable[[Row], str | None]:
    """What is wrong with a row for a fitted task: by itself, or because training had nothing like it."""
    return lambda row: task.problem(row) or task.misfit(row)


def _task(config: RunConfig, train: Rows | StreamedRows) -> tuple[Task, dict[str, str]]:
    """The task that the config names or the columns are for, and the flags that name columns."""
    named = (config.text_column, config.label_column)
    flags = {config.text_column: "--text_column", config.label_column: "--label_column"}
    usual = (RunConfig.text_column, RunConfig.label_column)
    require_columns(train, {column: flag for column, flag in flags.items() if column not in usual})
    if train.columns[:1] != [config.text_column] and (mend := other_separator(train.columns)):
        raise InputError(f"{train.source} has one column only, {train.columns[0]!r}. {mend}")
    first = train if isinstance(train, Rows) or config.task else train.take(LOOKED_AT)
    try:
        name = config.task or guess_task(train.columns, first, *named)[0]
        columns = columns_of(name, train.columns, *named)
    except InputError as error:
        raise InputError(f"{train.source}: {error}") from error
    return TASKS[name](columns=columns, **{field: getattr(config, field) for field in TASKS[name].fields}), flags


def encode(task: Task, splits: Splits, processor: Any, config: RunConfig) -> Data:
    """The examples of every split. Rows in which cutting left nothing to learn join those that were skipped.

    Raises:
        InputError: such rows where bad rows are refused, or no others.
    """

    if isinstance(splits.train, Rows):
        train: Any = _examples(task, splits.train, processor, config)
        sample = train
    else:
        sample = _examples(task, splits.train.take(config.analysis_examples), processor, config)
        train = splits.train.encoded(lambda rows: _encoded(task, rows, processor, config), config.seed)
    held_out = HeldOut(splits.validation, splits.test, splits.forgetting)
    return Data(train, sample, *encode_held_out(task, held_out, processor, config))


def encode_held_out(
    task: Task, rows: HeldOut, processor: Any, config: RunConfig
) -> tuple[Examples, Examples, Examples | None]:
    """The examples of validation, test and, where there is one, the second set, as ``encode`` makes them."""

    def examples(rows: Rows) -> Examples:
        return task.held_out(_examples(task, rows, processor, config), processor)

    forgetting = None if rows.forgetting is None else examples(rows.forgetting)
    return examples(rows.validation), examples(rows.test), forgetting


def _examples(task: Task, rows: Rows, processor: Any, config: RunConfig) -> Examples:
    made = _encoded(task, rows, processor, config)
    if not len(made):
        raise InputError(no_good_rows(rows.source, rows.skipped, rows.unit))
    return made


def _encoded(task: Task, rows: Rows, processor: Any, config: RunConfig) -> Examples:
    """The rows' examples, of which there may be none."""
    made = task.encode(rows, processor, config.max_length)
    if made.lost and config.on_bad_rows == "error":
        raise InputError(
            f"{rows.source} has {found(made.lost, rows.unit)}, in which nothing is left to learn. Mend them (a larger "
            "--max_length cuts less), or pass --on_bad_rows skip."
        )
    rows.skip(made.lost)
    return made
