"""What tasks on single texts share: how values become numbers, and texts tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from reltune.data.rows import Row
from reltune.errors import InputError
from reltune.tasks.task import Task


class TextTask(Task):
    """A task on one text per row, in the column "text"."""

    def content(self, row: Row) -> str:
        return str(row.values[self.columns["text"]])

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads a batch to its longest text."""
        return DataCollatorWithPadding(processor)


def number_of(value: Any) -> float | None:
    """The finite number that a value is or spells, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def limit_of(tokenizer: PreTrainedTokenizerBase, max_length: int, least: int = 1) -> int:
    """The number of tokens that an example may have, special ones included; room for ``least`` others is needed."""
    limit = min(max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add()
    if limit < special + least:
        raise InputError(
            f"max_length {limit} leaves no room for text, because the tokenizer adds {special} "
            f"special tokens; use at least {special + least}."
        )
    return limit


def encode_texts(
    texts: Sequence[str], lines: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, Any]], int]:
    """The tokenizer's output for each text, cut to the limit, and how many were cut. ``lines`` are for messages."""
    limit = limit_of(tokenizer, max_length)
    if not texts:
        return [], 0
    encoded = tokenizer(list(texts), truncation=True, max_length=limit)
    items = [{key: values[i] for key, values in encoded.items()} for i in range(len(texts))]
    for item, line in zip(items, lines, strict=True):
        if not item["input_ids"]:
            raise InputError(f"The text on line {line} gives no tokens; delete it or use another model.")
    if encoded.encodings is not None:
        return items, sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    # tokenizers written in Python do not keep what they cut; verbose ones warn of every long text
    whole = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    return items, sum(len(ids) > limit for ids in whole)
