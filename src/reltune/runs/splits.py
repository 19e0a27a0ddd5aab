"""A run's data: the task that they are for, the splits with every row checked, and what had to be left out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reltune.config.run_config import RunConfig, writes_nothing
from reltune.data import sources
from reltune.data.bad_rows import checked, in_words, no_good_rows
from reltune.data.columns import aligned, note_left_out, other_separator, require_columns
from reltune.data.deception import check_leaks, note_columns, note_conflicts
from reltune.data.labels import MULTILABEL, note_odd_labels, note_one_class, note_rare_classes
from reltune.data.layout import Layout, known_layout, layout_of
from reltune.data.rows import Row, Rows
from reltune.data.splitting import HELD_OUT, split_off
from reltune.data.streams import StreamedRows
from reltune.errors import InputError
from reltune.names import WRITING
from reltune.notes import note
from reltune.runs.kept_rows import kept
from reltune.runs.sizes import Sizes, TextLengths
from reltune.tasks.registry import TASKS
from reltune.tasks.task import Examples, Task

HELD = ("test", "validation")  # in the order in which they are split off
WITH_ONE_ANSWER = (  # tasks in which a text has one right answer
    *("sequence_classification", "multilabel_classification", "regression", "token_classification"),
)


@dataclasses.dataclass
class Splits:
    """Rows without a problem. ``train`` may be streamed.

    Attributes:
        used: columns of the source that anything is made of.
    """

    train: Rows | StreamedRows
    validation: Rows
    test: Rows
    forgetting: Rows | None = None  # a second set for the same task
    used: Sequence[str] = ()


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


def sizes_of(task: Task, train: Any, validation: Examples, test: Examples) -> Sizes:
    """How many examples there are, how long, and which head they want; of a streamed ``train`` only the last is known."""

    def lengths(*some: Examples) -> TextLengths | None:
        return TextLengths([task.lengths(item) for one in some for item in one.items]) if task.padding_sides else None

    known = isinstance(train, Examples)
    return Sizes(
        len(train) if known else None,
        len(validation),
        len(test),
        lengths(train) if known else None,
        lengths(validation, test),
        task.adapt,
    )


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
    for split, file in zip(HELD, (config.test_file, config.validation_file), strict=True):
        if file is not None:
            every[split] = sources.read_rows(file, config.encoding, split)
    if config.forgetting_file is not None:
        every["forgetting"] = sources.read_rows(config.forgetting_file, config.encoding, "test")
    if isinstance(every["train"], StreamedRows):  # lines without a row stop no pass that may skip them
        every["train"] = every["train"].checked(lambda row: None, config.on_bad_rows)
    layout = _layout(config, every["train"], fitted)
    note_left_out(every["train"], layout.used)
    task = fitted or _task(config, layout)
    rule = _rule(fitted) if fitted else task.problem
    good: dict[str, Rows | StreamedRows] = {}
    for split, rows in every.items():
        if split != "train" and isinstance(rows, Rows):
            rows = aligned(rows, [*layout.columns.values(), *layout.label_columns])
        if split in HELD and isinstance(rows, Rows) and layout.lacks_labels(rows):
            _say_unlabelled(split, rows, layout, config)
            continue
        read = (layout if split == "train" else dataclasses.replace(layout, flags={})).read(rows)
        good[split] = (
            checked(read, rule, config.on_bad_rows)
            if isinstance(read, Rows)
            else read.checked(rule, config.on_bad_rows)
        )
    train = good.pop("train")
    if layout.task in ("sequence_classification", "image_classification"):
        for split, rows in good.items():
            note_one_class(split, [] if isinstance(rows, StreamedRows) else map(task.label, rows))
    if isinstance(train, Rows):
        if layout.task in WITH_ONE_ANSWER:
            note_conflicts(train, task.content, task.answer, several=layout.task == "sequence_classification")
        if layout.task in ("sequence_classification", "image_classification"):
            note_rare_classes(Counter(map(task.label, train)), train.source, guessed=config.task is None)
        if "image" not in layout.columns:
            note_columns(train, layout.columns, task.told)
    held = {split: rows if isinstance(rows, Rows) else rows.take(None) for split, rows in good.items()}
    if isinstance(train, Rows) and "image" not in layout.columns:
        check_leaks(train, held, task.content, task.answer, config.on_leak)
    if isinstance(train, Rows):
        whole = len(train)
        for split in HELD:
            if split not in held:
                fraction = HELD_OUT * whole / len(train)
                train, held[split] = split_off(train, fraction, config.seed, task.content, task.label, task.labels_of)
    elif missing := [f"--{split}_file" for split in reversed(HELD) if split not in held]:
        raise InputError(f"Nothing can be split off streamed rows; give {' and '.join(missing)}.")
    layout.conversion.note_labels()
    if fitted is None:
        task = task.fitted(train)
        if labels := getattr(task, "labels", ()):
            note_odd_labels(labels, next(layout.columns[role] for role in ("label", "tags") if role in layout.columns))
        held = {split: checked(rows, task.misfit, config.on_bad_rows) for split, rows in held.items()}
    return task, Splits(train, held["validation"], held["test"], held.get("forgetting"), layout.used)


def read_held_out(config: RunConfig, task: Task, kept_rows: Path) -> HeldOut:
    """The held-out rows of an existing run: of their files, else those in the directory ``kept_rows``, else read with the
    training data as they were when the run was made.

    Raises:
        InputError: as ``read_data``; bad rows are also those that do not fit the task.
    """
    held: dict[str, Rows] = {}
    for split in ("validation", "test", "forgetting"):
        file = getattr(config, f"{split}_file")
        own = kept(kept_rows / f"{split}.jsonl", str(config.train_file or config.dataset_name))
        if file is not None:
            rows = sources.read_rows(file, config.encoding, "test" if split == "forgetting" else split)
            rows = aligned(rows, [*task.columns.values(), *getattr(task, "labels", ())])
            layout = _layout(config, rows, task)
            if own is None or not layout.lacks_labels(rows):
                held[split] = checked(layout.read(rows), _rule(task), config.on_bad_rows)
                continue
        if own is not None:
            held[split] = own
    if not {"validation", "test"} <= set(held):
        config.check_data()
        _, splits = read_data(config, task)
        held = {"validation": splits.validation, "test": splits.test, **held}
    return HeldOut(**held)


def _rule(task: Task) -> Callable[[Row], str | None]:
    """What is wrong with a row for a fitted task: by itself, or because training had nothing like it."""
    return lambda row: task.problem(row) or task.misfit(row)


def _layout(config: RunConfig, rows: Rows | StreamedRows, task: Task | None) -> Layout:
    """What the rows are for: the task of an existing run, or what the config and their columns say."""
    if task is not None:
        return known_layout(rows, task.name, task.columns, getattr(task, "labels", ()))
    return layout_of(rows, config.task, config.text_column, config.label_column, config.text_pair_column)


def _task(config: RunConfig, layout: Layout) -> Task:
    """The task for rows of this layout, before it is fitted to those of training."""
    kind = TASKS[layout.task]
    fields = {field: getattr(config, field) for field in kind.fields}
    # max_length is a field of some tasks alone, and cuts the texts of all.
    others = {field for other in TASKS.values() for field in other.fields} - {*kind.fields, "max_length"}
    if config.sample_prompts and layout.task not in WRITING:
        raise InputError(writes_nothing(layout.task))
    idle = [field for field in sorted(others) if getattr(config, field) != getattr(RunConfig, field)]
    if kind.unit == "image" and config.max_length != RunConfig.max_length:
        idle.append("max_length")
    for field in ("text_column", "text_pair_column", "label_column"):
        if (named := getattr(config, field)) != getattr(RunConfig, field) and named not in layout.columns.values():
            idle.append(field)
    if idle:
        takers = [name for name, other in TASKS.items() if idle[0] in other.fields]
        flags, them = ", ".join(f"--{field}" for field in idle), "it" if len(idle) == 1 else "them"
        for_others = f" ({flags.partition(',')[0]} is for {', '.join(takers)})" if takers else ""
        raise InputError(
            f"{layout.task} does not use {flags}{for_others}; leave {them} out, or name another --task if the data are for one."
        )
    if layout.task == MULTILABEL:
        fields["labels"] = layout.labels  # also those that no row of training has
    return kind(columns=layout.columns, **fields)


def _say_unlabelled(split: str, rows: Rows, layout: Layout, config: RunConfig) -> None:
    """Say that a split without labels is left out.

    Raises:
        InputError: a file that the user named has no column of labels.
    """
    missing = [name for name in layout.label_columns if name not in rows.columns]
    if other_separator(rows.columns):
        require_columns(rows, dict.fromkeys(missing, ""))  # which has the mend
    if missing and getattr(config, f"{split}_file") is not None:
        raise InputError(
            f"{rows.source} has no column {missing[0]!r}, and nothing can be measured without labels. Rename its column of labels "
            f"as in the training data, or leave --{split}_file out: then a part of the training data is split off."
        )
    note(
        f"{Path(rows.source).name}: no row of the {split} split has a label; the split is left out, and a part of the training "
        "data takes its place."
    )


def encode(task: Task, splits: Splits, processor: Any, config: RunConfig) -> Data:
    """The examples of every split. Rows that turn out to be no examples join those that were skipped: the tokenizer cannot take
    them, or cutting left nothing to learn.

    Raises:
        InputError: such rows where bad rows are refused, or no others.
    """
    held_out = HeldOut(splits.validation, splits.test, splits.forgetting)
    if isinstance(splits.train, Rows):
        sample, *held = _encoded(task, [splits.train, *_rows_of(held_out)], processor, config)
        train: Any = sample
    else:
        first = splits.train.take(config.analysis_examples)
        sample, *held = _encoded(task, [first, *_rows_of(held_out)], processor, config)
        train = splits.train.encoded(lambda rows: _encoded(task, [rows], processor, config, True)[0], config.seed)
    return Data(train, sample, *(task.held_out(examples, processor) for examples in held))


def encode_held_out(task: Task, held_out: HeldOut, processor: Any, config: RunConfig) -> list[Examples]:
    """The examples of validation, test and, where there is one, the second set, as ``encode`` makes them."""
    return [
        task.held_out(examples, processor) for examples in _encoded(task, list(_rows_of(held_out)), processor, config)
    ]


def _rows_of(held_out: HeldOut) -> Iterator[Rows]:
    return (rows for rows in (held_out.validation, held_out.test, held_out.forgetting) if rows is not None)


def _encoded(
    task: Task, every: Sequence[Rows], processor: Any, config: RunConfig, may_be_empty: bool = False
) -> list[Examples]:
    """The examples of several splits; all of their rows that turn out to be bad are refused together."""
    made = [task.encode(rows, processor, config.max_length) for rows in every]
    bad: dict[tuple[str, str], dict[str, list[int]]] = {}
    for rows, examples in zip(every, made, strict=True):
        for phrase, lines in examples.lost.items():
            bad.setdefault((rows.source, rows.unit), {}).setdefault(phrase, []).extend(lines)
    if bad and config.on_bad_rows == "error":
        (source, unit), kinds = next(iter(bad.items()))
        kinds = {phrase: sorted(lines) for phrase, lines in kinds.items()}
        cut = " (a larger --max_length cuts less)" if any(" tokens" in phrase for phrase in kinds) else ""
        raise InputError(
            f"{source} has {in_words(kinds, unit)}. Mend or delete these {unit}s{cut}, or pass --on_bad_rows skip."
        )
    for rows, examples in zip(every, made, strict=True):
        rows.skip(examples.lost)
        if not len(examples) and not may_be_empty:
            raise InputError(no_good_rows(rows.source, rows.skipped, rows.unit))
    return made
