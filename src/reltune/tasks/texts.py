"""What tasks on texts share: how values become numbers, and texts tokens."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from reltune.data.rows import Row, text_problem
from reltune.errors import InputError, first_line
from reltune.notes import note
from reltune.tasks.task import Examples, RowProblem, Task, Written

SHOWN = 64  # examples whose predictions a run keeps for its report
ENDS = (
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|return|>",
)


class TextTask(Task):
    """A task on one text per row, in the column "text"; or on two that are read together, the second in "text_pair"."""

    def texts(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row.values[self.columns[role]]) for role in ("text", "text_pair") if role in self.columns)

    def content(self, row: Row) -> str:
        return " ".join(self.texts(row))

    def text_problem(self, row: Row) -> str | None:
        """What is wrong with the row's texts, as a phrase, or None."""
        columns = [self.columns[role] for role in ("text", "text_pair") if role in self.columns]
        return next((problem for column in columns if (problem := text_problem(row.values, column))), None)

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads a batch to its longest text."""
        return DataCollatorWithPadding(processor)

    @abc.abstractmethod
    def told_of(self, item: Mapping[str, Any]) -> Any:
        """What an encoded example should be predicted as: a label, a list of labels, a number."""

    def written(
        self, model: nn.Module, examples: Examples, processor: Any, batch_size: int, predictions: Any
    ) -> list[Written]:
        """What was predicted for the first examples, beside their texts as far as the model read them."""
        items = [examples[index] for index in range(min(SHOWN, len(examples)))]
        logits = [{"logits": torch.as_tensor(one)} for one in predictions[: len(items)]]
        read = self.read_off(logits, [], examples, processor)
        return [
            Written(
                as_read(processor, item["input_ids"]),
                spelled(self.told_of(item)),
                spelled(record[self.predicts[0]]),
            )
            for item, record in zip(items, read, strict=True)
        ]


def as_read(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Tokens as text without special ones, but with that of what the tokenizer does not know, unless it is another's too."""
    named = (token for name, token in tokenizer.special_tokens_map.items() if name != "unk_token")
    shown = {tokenizer.unk_token_id} if tokenizer.unk_token not in named else set()
    hidden = set(tokenizer.all_special_ids) - shown
    return str(tokenizer.decode([token for token in map(int, ids) if token not in hidden]))


def spelled(value: str | float | Sequence[str]) -> str:
    """A prediction as text."""
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, int | float) else ", ".join(value) or "no label"


def number_of(value: Any) -> float | None:
    """The finite number that a value is or spells, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def limit_of(tokenizer: PreTrainedTokenizerBase, max_length: int, least: int = 1, pair: bool = False) -> int:
    """The number of tokens that an example may have, special ones included; room for ``least`` others is needed."""
    limit = min(max_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair)
    if limit < special + least:
        raise InputError(
            f"max_length {limit} leaves no room for text, because the tokenizer adds {special} "
            f"special tokens; use at least {special + least}."
        )
    return limit


# -- one text -------------------------------------------------------------------------------------------------------


def read(tokenizer: PreTrainedTokenizerBase, *texts: Any, **options: Any) -> Any:
    """What the tokenizer makes of texts. Raises RowProblem for those that it cannot read."""
    try:
        return tokenizer(*texts, **options)
    except MemoryError:
        raise
    except Exception as error:  # of the tokenizers library, or of a tokenizer written in Python
        raise RowProblem(f"a text that the tokenizer cannot read ({first_line(error)})") from error


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text's token ids with the tokenizer's special tokens; those that it adds are there once where the text has them too."""
    for mark in ENDS:
        known = mark == tokenizer.unk_token  # as GPT-2 has it
        if mark in text and not known and tokenizer.convert_tokens_to_ids(mark) in (None, tokenizer.unk_token_id):
            note(
                f"Texts have {mark!r}, with which other models end a text or a turn: the model's tokenizer has no such token, and "
                "reads it as plain characters."
            )
    ids = list(read(tokenizer, text, verbose=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos] and text.startswith(str(tokenizer.bos_token)):
        ids = ids[1:]
        note(f"Texts begin with {tokenizer.bos_token!r}, which the tokenizer puts there too; it is taken once.")
    if eos is not None and ids[-2:] == [eos, eos] and text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
        note(f"Texts end with {tokenizer.eos_token!r}, which the tokenizer puts there too; it is taken once.")
    return ids


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids with the end-of-sequence token behind them, unless it is there already, and nothing but space behind it."""
    end = tokenizer.eos_token_id
    if end is None:
        note("The tokenizer has no end-of-sequence token, so that the model learns nothing to stop at.")
        return ids
    for token in reversed(ids):
        if token == end:
            return ids
        if str(tokenizer.decode([token])).strip():
            break
    return [*ids, end]


def shared(items: Sequence[Any], others: Sequence[Any]) -> int:
    """How many leading items both have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(items, others, strict=False)))


# -- many texts -----------------------------------------------------------------------------------------------------


class EncodedTexts(NamedTuple):
    """The tokenizer's output for rows, these rows, how many were cut, and the lines of other rows by what is wrong there."""

    items: list[dict[str, Any]]
    rows: list[Row]
    n_truncated: int
    lost: dict[str, list[int]]


def encode_texts(
    rows: Sequence[Row], texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedTexts:
    """The tokenizer's output for each row's text, or for its two, cut to the limit. Of two the longer one is cut."""
    pair = any(len(own) > 1 for own in texts)
    limit = limit_of(tokenizer, max_length, pair=pair)
    if pair and tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add():
        note("The tokenizer puts nothing between the two texts of a pair; the second one is read on a new line.")
        texts = [(first, f"\n{second}") for first, second in texts]
    encoded = EncodedTexts([], [], 0, {})
    n_truncated = 0
    for row, made in zip(rows, tokenized(texts, tokenizer, limit), strict=True):
        problem = str(made) if isinstance(made, RowProblem) else None
        item, cut = ({}, False) if isinstance(made, RowProblem) else made
        if problem is None and not item["input_ids"]:
            problem = "a text that gives no tokens"
        if problem is not None:
            encoded.lost.setdefault(problem, []).append(row.line)
            continue
        encoded.items.append(item)
        encoded.rows.append(row)
        n_truncated += cut
    return encoded._replace(n_truncated=n_truncated)


def tokenized(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, limit: int, targets: bool = False
) -> list[tuple[dict[str, Any], bool] | RowProblem]:
    """For each row the tokenizer's output and whether it was cut, or what is wrong with it. ``targets`` are what a model is to
    write, which tokenizers of several languages read otherwise."""
    if not texts:
        return []
    columns = [list(column) for column in zip(*texts, strict=True)]
    given = {"text_target": columns.pop()} if targets else {}
    try:
        batch = read(tokenizer, *columns, truncation=True, max_length=limit, **given)
        if batch.encodings is not None:
            cut = [bool(encoding.overflowing) for encoding in batch.encodings]
        else:  # tokenizers written in Python do not keep what they cut; verbose ones warn of every long text
            whole = read(tokenizer, *columns, truncation=False, verbose=False, **given)["input_ids"]
            cut = [len(ids) > limit for ids in whole]
    except RowProblem as problem:  # of one of them: which?
        if len(texts) == 1:
            return [problem]
        return [one for own in texts for one in tokenized([own], tokenizer, limit, targets)]
    return [({key: values[i] for key, values in batch.items()}, cut[i]) for i in range(len(texts))]
