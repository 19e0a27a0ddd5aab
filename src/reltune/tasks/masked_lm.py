"""Masked language modelling: hidden tokens of plain texts; perplexity of the hidden tokens.

Masks are drawn anew in every epoch of training, by Transformers' collator (15% of the tokens, as BERT was trained), and
once for held-out texts. A text of which none was drawn is drawn again: it would have no loss. The draw depends on the text
and the epoch alone, so that training that was interrupted, or is shared by processes, hides the same tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from reltune.data.rows import Row, text_problem
from reltune.errors import InputError
from reltune.losses import IGNORED
from reltune.pretrained import load_model
from reltune.tasks.causal_lm import token_metrics, token_sums
from reltune.tasks.prediction import Predictions, check_outputs, outputs_of, rounded
from reltune.tasks.task import Columns, Examples, Seen, Task
from reltune.tasks.texts import encode_texts

MASKED = 0.15  # of the tokens


@dataclass
class MaskedLM(Task):
    """The task of guessing tokens that are hidden from a text."""

    columns: Columns = field(default_factory=lambda: {"text": "text"})

    name: ClassVar[str] = "masked_lm"
    loss: ClassVar[str] = "masked_lm"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy")
    peft_task_type: ClassVar[str | None] = None
    told: ClassVar[tuple[str, ...]] = ()
    predicts: ClassVar[tuple[str, ...]] = ("prediction", "words", "scores")
    draws_tokens: ClassVar[bool] = True  # a tenth of the hidden ones become random tokens

    def problem(self, row: Row) -> str | None:
        return text_problem(row.values, self.columns["text"])

    def content(self, row: Row) -> str:
        return str(row.values[self.columns["text"]])

    def load_model(
        self, model_name_or_path: str | os.PathLike, dtype: torch.dtype | str | None = None, **options: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        name = os.fspath(model_name_or_path)
        model, missing = load_model(
            name, AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING, "masked language modelling head", self.adapt, dtype,
            **options,
        )  # fmt: skip
        if missing:
            raise InputError(
                f"The weights of {name} have no masked language modelling head ({missing[0]} is missing); "
                "name a model that was saved with one."
            )
        return model, missing

    def load_tokenizer(self, model_name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = super().load_tokenizer(model_name_or_path)
        if tokenizer.mask_token is None:
            raise InputError(
                f"The tokenizer of {os.fspath(model_name_or_path)} has no mask token; "
                "masked_lm is for models such as BERT and RoBERTa."
            )
        return tokenizer

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        """Token ids of each text, cut to the limit; nothing is hidden yet."""
        encoded = encode_texts(rows, [(self.content(row),) for row in rows], processor, max_length)
        special = set(processor.all_special_ids)
        empty = [special.issuperset(item["input_ids"]) for item in encoded.items]
        lines = [row.line for row, lost in zip(encoded.rows, empty, strict=True) if lost]
        items = [item for item, lost in zip(encoded.items, empty, strict=True) if not lost]
        lost = {**encoded.lost, "a text of unknown tokens alone": lines} if lines else encoded.lost
        return Examples(items, encoded.n_truncated, lost=lost)

    def held_out(self, examples: Examples, processor: PreTrainedTokenizerBase) -> Examples:
        """The texts with tokens hidden, once and for all."""
        hide = MaskingCollator(processor)
        return Examples([hide.masked(item) for item in examples.items], examples.n_truncated, lost=examples.lost)

    def changes_inputs(self) -> str | None:
        return "other tokens are masked in every pass over the data"

    def collator(self, processor: PreTrainedTokenizerBase) -> MaskingCollator:
        """Hides tokens of texts in which none are hidden, and pads the batch."""
        return MaskingCollator(processor)

    def seen(self, item: Mapping[str, Any], processor: Any) -> list[Seen]:
        """With the tokens hidden that the first pass of training hides; those that stay, or become others, are learned too."""
        shown = item if "labels" in item else MaskingCollator(processor).masked(dict(item))
        return [Seen("input", shown["input_ids"], [label != IGNORED for label in shown["labels"]])]

    def trainer(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processor: Any,
        train: Examples,
        held_out: Examples | None = None,
        **options: Any,
    ) -> Trainer:
        """A Trainer whose collator knows the epoch."""
        trainer = super().trainer(model, args, processor, train, held_out, **options)
        trainer.add_callback(_EpochOfMasks(trainer.data_collator))
        return trainer

    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        max_new_tokens: int = 64,
    ) -> Predictions:
        """The text with each mask filled, each by itself, the likeliest token at each and its probability. A text without a mask
        is a row of which nothing is said."""
        mask = str(processor.mask_token)
        some = [row for row in rows if mask in self.content(row)]
        none = [row.line for row in rows if mask not in self.content(row)]
        encoded = encode_texts(some, [(self.content(row),) for row in some], processor, max_length)
        padding = DataCollatorWithPadding(processor)
        outputs = outputs_of(model, Examples(encoded.items), padding, batch_size)
        check_outputs(outputs, self.unit)
        records = {}
        for row, item, output in zip(encoded.rows, encoded.items, outputs, strict=True):
            places = [i for i, token in enumerate(item["input_ids"]) if token == processor.mask_token_id]
            best, tokens = torch.softmax(output["logits"][places], -1).max(-1)
            words = [str(processor.decode([token])).strip() for token in tokens.tolist()]
            first, *rest = self.content(row).split(mask)
            # masks that were cut off stay
            filled = first + "".join(
                word + part for word, part in zip([*words, *[mask] * len(rest)], rest, strict=False)
            )
            records[row.line] = dict(zip(self.predicts, (filled, words, [rounded(one) for one in best]), strict=True))
        return Predictions(records, {**encoded.lost, **({f"a text without {mask}": none} if none else {})})

    def reduced(self, logits: Any, labels: Tensor) -> Tensor:
        """Of each example (B, 3): the sum of its hidden tokens' losses, their number, and how many are the likeliest."""
        return token_sums(logits[0] if isinstance(logits, tuple) else logits, labels)

    def compute_metrics(
        self, prediction: EvalPrediction, examples: Examples | None = None, processor: Any = None
    ) -> dict[str, float]:
        """Perplexity of all hidden tokens alike, and the share of them guessed."""
        return token_metrics(prediction.predictions)


class MaskingCollator:
    """Makes a batch of texts, hiding tokens where there are no labels yet: the same ones of a text within an ``epoch``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
        self.seed, self.epoch = seed, 0
        self.masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
        self.masking.generator = self.generator = torch.Generator()
        self.padding = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return self.padding([item if "labels" in item else self.masked(item) for item in items])

    def masked(self, item: dict[str, Any]) -> dict[str, Any]:
        """The item with tokens hidden and with labels."""
        drawn_by = hashlib.sha256(f"{self.seed}/{self.epoch}/{list(item['input_ids'])}".encode()).digest()
        self.generator.manual_seed(int.from_bytes(drawn_by[:8], "big") >> 1)
        while True:
            batch = self.masking([item])
            if (batch["labels"] != IGNORED).any():
                return {**item, "input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}


class _EpochOfMasks(TrainerCallback):
    """Tells the collator which pass over the texts begins, also where training goes on in the middle of one."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int(state.epoch or 0) - 1

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch += 1
