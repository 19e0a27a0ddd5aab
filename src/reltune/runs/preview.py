"""Data as a model will see them: which column is used for what, classes, lengths, and an example token by token.

Nothing of the model but its config and its tokenizer is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reltune.config.run_config import RunConfig
from reltune.data.rows import Rows
from reltune.errors import InputError
from reltune.notes import collecting, note
from reltune.pretrained import load_config
from reltune.runs.splits import Splits, encode, read_data
from reltune.tasks.task import Examples, Seen, Task

if TYPE_CHECKING:
    from reltune.runs.materials import Materials

MEASURED = 2000  # training examples whose whole length is measured
BROKEN = "\ufffd"  # stands for bytes that are a part of a character
ENDLESS = 10**9  # tokens that no text has
SPLITS = ("train", "validation", "test", "forgetting")


@dataclasses.dataclass
class Token:
    """A token as a reader sees it. ``special`` tokens are none of the text's own."""

    text: str
    id: int
    special: bool
    learned: bool
    tag: str = ""


@dataclasses.dataclass
class Lengths:
    """Tokens per training example, special ones included.

    Attributes:
        whole: whether they are counted as they were before anything is cut.
        examples: how many were counted.
        limit: where examples are cut.
        limit_of: what says so: "max_length", or "model" where it takes less.
        cut: how many of the training examples are.
        unknown: the share of their tokens that stand for what the tokenizer does not know.
        windows: whether what is too long is read in several windows.
    """

    median: int
    most: int
    nearly_all: int
    whole: bool
    examples: int
    limit: int
    limit_of: str
    cut: int
    share_cut: float
    unknown: float = 0.0
    windows: bool = False


@dataclasses.dataclass
class Preview:
    """What a run would work with.

    Attributes:
        unit: what one example is called.
        columns: column of the source -> what it is used for; "" for nothing.
        learned: the columns of what is to be learned.
        rows: split -> rows; None where they are streamed.
        skipped: split -> bad rows that are left out.
        classes: label -> split -> how often it is there; of training, where rows are streamed, in the first ones.
        numbers: split -> least, mean and largest of what is to be learned, where it is a number.
        number: which training example is shown, from 1.
        example: its sequences of tokens, by name.
        wanted: what is to be learned of it as a whole.
    """

    task: str
    unit: str
    source: str
    tokenizer: str | None
    columns: dict[str, str]
    learned: list[str]
    rows: dict[str, int | None]
    skipped: dict[str, int]
    classes: dict[str, dict[str, int]]
    numbers: dict[str, tuple[float, float, float]]
    lengths: Lengths | None = None
    number: int = 1
    example: dict[str, list[Token]] = dataclasses.field(default_factory=dict)
    wanted: str = ""
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def preview_data(config: RunConfig, example: int = 1, tokens: bool = True) -> Preview:
    """What a run with this config would work with.

    Args:
        example: the number of the training example that is shown, from 1.
        tokens: whether the model's tokenizer is asked; else what there is to see of the rows alone.

    Raises:
        InputError: whatever is wrong with the data, or with tokenizer and data together.
    """
    with collecting() as notes:
        config.check_data()
        task, splits = read_data(config)
        if not tokens:
            preview = preview_rows(task, splits, config)
        else:
            task = task.suited_to(load_config(config.model_name_or_path))
            tokenizer = task.load_tokenizer(config.model_name_or_path)
            data = encode(task, splits, tokenizer, config)
            if not 1 <= example <= len(data.sample):
                raise InputError(
                    f"--example {example} is not there; there are {len(data.sample):,} training {task.unit}s."
                )
            preview = preview_of(task, splits, data.sample, tokenizer, config, example)
            if preview.lengths is not None:
                preview.lengths = _whole_lengths(task, splits, data.sample, tokenizer, preview.lengths)
    for sentence in notes:
        note(sentence)
    preview.notes = notes
    return preview


def preview_rows(task: Task, splits: Splits, config: RunConfig) -> Preview:
    """What there is to see of rows alone."""
    counted = {split: rows for split in SPLITS if (rows := getattr(splits, split)) is not None}
    held = {
        split: rows if isinstance(rows, Rows) else rows.take(config.analysis_examples)
        for split, rows in counted.items()
    }
    roles = {column: role for role, column in task.columns.items()}
    named = getattr(task, "labels", ())
    if named and set(named) <= set(splits.train.columns):  # each label has a column of 0 and 1
        roles = {column: role for column, role in roles.items() if role not in task.told} | dict.fromkeys(
            named, "label"
        )
    uses = {
        column: roles.get(column) or ("belongs to it" if column in splits.used else "")
        for column in splits.train.columns
        if column in roles or column not in task.columns.values()
    }
    learned = [column for column, role in uses.items() if role in task.told]
    classes: dict[str, dict[str, int]] = {label: {} for label in named}
    numbers = {}
    for split, rows in held.items():
        if named:
            for label, count in Counter(label for row in rows for label in task.labels_of(row)).items():
                classes.setdefault(label, {})[split] = count
        elif task.name == "regression":
            values = [float(task.answer(row)) for row in rows]
            numbers[split] = (min(values), math.fsum(values) / len(values), max(values))
    return Preview(
        task.name,
        task.unit,
        splits.train.source,
        None,
        uses,
        learned,
        {split: len(rows) if isinstance(rows, Rows) else None for split, rows in counted.items()},
        {split: sum(map(len, rows.skipped.values())) for split, rows in counted.items()},
        classes,
        numbers,
    )


def preview_of_run(materials: Materials) -> Preview:
    """What a run works with, lengths after cutting."""
    config, task = materials.config, materials.task
    return preview_of(task, materials.splits, materials.sample, materials.tokenizer, config)


def preview_of(
    task: Task, splits: Splits, examples: Examples, tokenizer: Any, config: RunConfig, example: int = 1
) -> Preview:
    """The same with lengths after cutting, and a training example."""
    preview = preview_rows(task, splits, config)
    preview.tokenizer = config.model_name_or_path
    preview.lengths = _lengths(task, examples, tokenizer, config.max_length, examples)
    preview.number = example
    item = examples[example - 1]
    preview.example = {seen.name: shown(seen, tokenizer) for seen in task.seen(item, tokenizer)}
    preview.wanted = task.wanted(item, tokenizer)
    if not preview.example:
        pixels = task.collator(tokenizer)([item])["pixel_values"]
        preview.wanted += f"; the image becomes numbers {' × '.join(map(str, pixels.shape[1:]))}"
    return preview


def _lengths(
    task: Task, counted: Examples, tokenizer: Any, max_length: int, examples: Examples, whole: bool = False
) -> Lengths | None:
    """Tokens of the ``counted`` examples, of the longer sequence where one has two; None of images."""
    some = [task.token_ids(counted[i]) for i in range(min(len(counted), MEASURED))]
    lengths = [max(map(len, ids)) for ids in some if ids]
    if not lengths:
        return None
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        unknown = None  # it stands for an end too
    tokens = Counter(token == unknown for ids in some for own in ids for token in own)
    median, nearly_all = np.percentile(lengths, [50, 95], method="inverted_cdf").tolist()
    limit = min(max_length, tokenizer.model_max_length)
    cut, share = examples.n_truncated, examples.n_truncated / len(examples)
    return Lengths(
        *(
            int(median),
            max(lengths),
            int(nearly_all),
            whole,
            len(lengths),
            limit,
            "max_length" if limit == max_length else "model",
            cut,
            share,
        ),
        tokens[True] / tokens.total(),
        task.unit == "window",
    )


def _whole_lengths(task: Task, splits: Splits, sample: Examples, tokenizer: Any, lengths: Lengths) -> Lengths:
    """The lengths before anything is cut."""
    rows = splits.train[:MEASURED] if isinstance(splits.train, Rows) else splits.train.take(MEASURED)
    with _without_limit(tokenizer), collecting():  # what there is to note was noted
        counted = task.encode(rows, tokenizer, ENDLESS)
        found = _lengths(task, counted, tokenizer, ENDLESS, sample, whole=True)
    return dataclasses.replace(found, limit=lengths.limit, limit_of=lengths.limit_of) if found else lengths


@contextlib.contextmanager
def _without_limit(tokenizer: Any) -> Iterator[None]:
    before, tokenizer.model_max_length = tokenizer.model_max_length, ENDLESS
    try:
        yield
    finally:
        tokenizer.model_max_length = before


# -- tokens ---------------------------------------------------------------------------------------------------------


def shown(seen: Seen, tokenizer: Any) -> list[Token]:
    """The tokens as text, with the space that belongs to them. What stands for a part of a character is joined with the others."""
    special = set(tokenizer.all_special_ids)
    tags = seen.tags or [""] * len(seen.ids)
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(list(seen.ids))]
    texts = _texts(names, [id in special for id in seen.ids], _byte_decoder(tokenizer))
    return [
        Token(text, int(id), id in special, bool(learned), tag)
        for text, id, learned, tag in zip(texts, seen.ids, seen.learned, tags, strict=True)
    ]


def _texts(names: Sequence[str], special: Sequence[bool], byte_decoder: Any) -> list[str]:
    """The text of each token; the first of those that make a character together has it, the others have none."""
    if byte_decoder is None:
        return [name if own else name.replace("▁", " ") for name, own in zip(names, special, strict=True)]
    texts = list(names)
    place = 0
    while place < len(names):
        end = place + 1
        if not special[place]:
            while BROKEN in (text := byte_decoder.decode(names[place:end])) and end < min(place + 4, len(names)):
                if special[end]:
                    break
                end += 1
            if BROKEN in text:  # bytes that are no character
                end, text = place + 1, byte_decoder.decode(names[place : place + 1])
            texts[place:end] = [text, *[""] * (end - place - 1)]
        place = end
    return texts


def _byte_decoder(tokenizer: Any) -> Any:
    """What makes text of the tokens of byte-level tokenizers, such as GPT-2's; None for others."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None or "ByteLevel" not in repr(decoder):
        return None
    from tokenizers.decoders import ByteLevel

    return ByteLevel()
