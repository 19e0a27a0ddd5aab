"""Sequence classification: one label per text, cross entropy, accuracy and macro F1."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch.utils.data import Dataset
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from reltune.records import InputError, nearest
from reltune.tasks.pretrained import first_line, load_config
from reltune.tasks.rows import Row, label_of, label_problem, text_problem


class TextDataset(Dataset):
    """Encoded texts: lists of ``input_ids`` and ``attention_mask`` and the integer ``labels`` of each."""

    def __init__(self, items: list[dict[str, Any]], n_truncated: int) -> None:
        self.items = items
        self.n_truncated = n_truncated

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@dataclass
class SequenceClassification:
    """The task of giving each text one of ``labels``; a label's place in the list is its class index."""

    labels: list[str]
    text_column: str = "text"
    label_column: str = "label"

    name: ClassVar[str] = "sequence_classification"
    peft_task_type: ClassVar[str] = "SEQ_CLS"

    @classmethod
    def from_rows(
        cls, rows: Iterable[Row], text_column: str = "text", label_column: str = "label"
    ) -> SequenceClassification:
        """The task with the labels that occur in ``rows``: numbers by value, then words by character."""
        labels = {label_of(row.values[label_column]) for row in rows}
        return cls(sorted(labels, key=_label_order), text_column, label_column)

    def problem(self, row: Row) -> str | None:
        """What keeps the row from being a text with a label, in a phrase; None if nothing does."""
        return text_problem(row.values, self.text_column) or label_problem(row.values, self.label_column)

    def content(self, row: Row) -> str:
        """What two rows must not share across splits."""
        return row.values[self.text_column]

    def label(self, row: Row) -> str:
        """The row's class, of which splits keep the proportions."""
        return label_of(row.values[self.label_column])

    @staticmethod
    def load_tokenizer(model_name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with a padding token and a ``model_max_length`` the model can take."""
        name = os.fspath(model_name_or_path)
        config = load_config(name)
        mend = "Save it there with tokenizer.save_pretrained, or name a model that comes with one."
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exceptions on a damaged file
            raise InputError(f"{name} has no usable tokenizer ({first_line(error)}). {mend}") from error
        # without any file transformers returns a tokenizer of special tokens only (T5's: one more)
        if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
            raise InputError(f"{name} has no tokenizer files. {mend}")
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise InputError(
                    f"The tokenizer of {name} has neither a padding nor an end-of-sequence token; "
                    "set pad_token in its tokenizer_config.json."
                )
            tokenizer.pad_token = tokenizer.eos_token
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions and positions > 0:
            # RoBERTa and its kin pad with token 1 and count positions from 2 on
            offset = 2 if tokenizer.pad_token_id == 1 and tokenizer.model_max_length > positions else 0
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions - offset)
        return tokenizer

    def load_model(
        self, model_name_or_path: str | os.PathLike, dtype: torch.dtype | str | None = None
    ) -> tuple[PreTrainedModel, list[str]]:
        """The model with a head for ``labels``, and the sorted names of the parameters that must be learned.

        Those are the parameters that loading reports as missing or of another size (freshly initialised from
        torch's global generator: seed it first), and a loaded head's when it was made for other labels.
        ``dtype`` None keeps the checkpoint's own. Code from model repositories is never run.
        """
        name = os.fspath(model_name_or_path)
        config = load_config(name)
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            raise InputError(
                f"{name} is a {config.model_type!r} model, for which transformers has no sequence "
                "classification head; name a text model such as BERT, RoBERTa or Llama."
            )
        label2id = {label: index for index, label in enumerate(self.labels)}
        same_labels = config.label2id == label2id
        config.num_labels = len(self.labels)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = label2id
        config.problem_type = "single_label_classification"
        options = {} if dtype is None else {"dtype": dtype}
        with _held_load_report(name) as report:
            try:
                model, loading = AutoModelForSequenceClassification.from_pretrained(
                    name,
                    config=config,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    trust_remote_code=False,
                    **options,
                )
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except OSError as error:
                raise InputError(
                    f"The weights of {name} cannot be found or read: "
                    "it needs a complete model.safetensors; copy or download the model again."
                ) from error
            except Exception as error:  # safetensors, pickle and quantisation packages each raise their own
                raise InputError(
                    f"The weights of {name} cannot be loaded ({first_line(error)}); "
                    "if the files are damaged, copy or download the model again."
                ) from error
        # heads on decoders look for the last token that is not this one; set only now, because an embedding
        # made with a padding token gives it no gradient, and here it may be the end of sequence
        pad_token_id = self.load_tokenizer(name).pad_token_id
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_token_id
        parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
        body = {key for key in parameters if key.startswith(model.base_model_prefix + ".")}
        missing = parameters & set(loading["missing_keys"])
        mismatched = {key for key, *_ in loading["mismatched_keys"]}
        if body & mismatched or (body and body <= missing):
            what = min(body & mismatched, default="everything but the head")
            raise InputError(
                f"The weights of {name} do not fit its config.json ({what} differs); "
                "use the config.json that was saved with these weights."
            )
        # a head is always missing, and so is the pooler of masked language models; anything else is news
        if any(".pooler." not in key for key in body & missing):
            for record in report:
                logging.getLogger(record.name).handle(record)
        head = parameters - body if body else set()
        return model, sorted(missing | (parameters & mismatched) | (set() if same_labels else head))

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TextDataset:
        """Token ids of each text, cut to ``max_length`` tokens or the tokenizer's limit if that is less."""
        limit = min(max_length, tokenizer.model_max_length)
        special = tokenizer.num_special_tokens_to_add()
        if limit <= special:
            raise InputError(
                f"max_length {limit} leaves no room for text, because the tokenizer adds {special} "
                f"special tokens; use at least {special + 1}."
            )
        index = {label: position for position, label in enumerate(self.labels)}
        labels = [label_of(row.values[self.label_column]) for row in rows]
        for row, label in zip(rows, labels, strict=True):
            if label not in index:
                raise InputError(
                    f"The label {label!r} on line {row.line} is none of the task's; {nearest(label, self.labels)}"
                )
        if not rows:
            return TextDataset([], 0)
        texts = [row.values[self.text_column] for row in rows]
        encoded = tokenizer(texts, truncation=True, max_length=limit)
        items: list[dict[str, Any]] = []
        for position, row in enumerate(rows):
            item = {key: values[position] for key, values in encoded.items()}
            if not item["input_ids"]:
                raise InputError(f"The text on line {row.line} gives no tokens; delete it or use another model.")
            items.append({**item, "labels": index[labels[position]]})
        if encoded.encodings is not None:
            n_truncated = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        else:  # tokenizers written in Python do not keep what they cut; verbose ones warn of every long text
            whole = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
            n_truncated = sum(len(ids) > limit for ids in whole)
        return TextDataset(items, n_truncated)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads a batch to its longest text."""
        return DataCollatorWithPadding(tokenizer)

    @staticmethod
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy, and F1 averaged over all classes; a class neither present nor predicted counts as 0."""
        logits = prediction.predictions
        if isinstance(logits, tuple):  # models that also return hidden states
            logits = logits[0]
        predicted = logits.argmax(-1)
        f1 = f1_score(prediction.label_ids, predicted, labels=range(logits.shape[-1]), average="macro", zero_division=0)
        return {"accuracy": float(accuracy_score(prediction.label_ids, predicted)), "f1_macro": float(f1)}


def _label_order(label: str) -> tuple[bool, float, str]:
    number = re.fullmatch(r"[+-]?\d+(\.\d+)?", label)
    return number is None, float(label) if number else 0.0, label


@contextlib.contextmanager
def _held_load_report(name: str) -> Iterator[list[logging.LogRecord]]:
    """Hold back transformers' table of missing parameters and, for local models, its progress bar.

    A new head is what is wanted here, not a warning. Every other log record passes.
    """
    held: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        report = "LOAD REPORT" in record.getMessage()
        if report:
            held.append(record)
        return not report

    logger = logging.getLogger("transformers.modeling_utils")
    # the same switch governs download bars, which a user wants to see
    bar = Path(name).is_dir() and transformers_logging.is_progress_bar_enabled()
    logger.addFilter(keep)
    if bar:
        transformers_logging.disable_progress_bar()
    try:
        yield held
    finally:
        logger.removeFilter(keep)
        if bar:
            transformers_logging.enable_progress_bar()
