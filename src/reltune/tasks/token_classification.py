"""Token classification: one tag per word, cross entropy at each word's first token; entity F1 by seqeval."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from reltune.data.rows import Row, label_of
from reltune.data.tagged_words import entity_tags
from reltune.errors import InputError
from reltune.losses import IGNORED
from reltune.notes import note
from reltune.pretrained import load_tokenizer, saved_tokenizer
from reltune.tasks.classes import ClassTask
from reltune.tasks.prediction import Outputs, rounded
from reltune.tasks.task import Columns, Examples, RowProblem, Seen
from reltune.tasks.texts import limit_of, read

WORDS = {"add_prefix_space": True}  # what byte-level tokenizers want to be told of lists of words
NONE = -1  # in place of the likeliest tag, where the outputs are no numbers
NO_TAG = "-100"  # Transformers' mark for tokens that are not measured


@dataclass
class TokenClassification(ClassTask):
    """The task of giving each word one of ``labels``. Words are a list, or a text with spaces between; so are tags."""

    columns: Columns = field(default_factory=lambda: {"tokens": "tokens", "tags": "ner_tags"})

    name: ClassVar[str] = "token_classification"
    loss: ClassVar[str] = "token_classification"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "precision", "recall", "token_accuracy")
    peft_task_type: ClassVar[str] = "TOKEN_CLS"
    auto_class: ClassVar[Any] = AutoModelForTokenClassification
    mapping: ClassVar[Any] = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    head: ClassVar[str] = "token classification head"
    told: ClassVar[tuple[str, ...]] = ("tags",)
    predicts: ClassVar[tuple[str, ...]] = ("prediction", "scores")

    def problem(self, row: Row) -> str | None:
        words: Any = row.values.get(self.columns["tokens"])
        tags: Any = row.values.get(self.columns["tags"])
        for column, value in ((self.columns["tokens"], words), (self.columns["tags"], tags)):
            if not value:
                return f"an empty {column!r}"
            if not isinstance(value, list | str):
                return f"a {column!r} that is no list"
        if any(not isinstance(word, str) or not word.strip() for word in _listed(words)):
            return f"a {self.columns['tokens']!r} with an empty word or one that is no string"
        if any(not isinstance(tag, str | int) or not label_of(tag) for tag in _listed(tags)):
            return f"a {self.columns['tags']!r} with a tag that is neither a string nor an integer"
        if len(_listed(words)) != len(_listed(tags)):
            return "another number of tags than of words"
        if any(label_of(tag) == NO_TAG for tag in _listed(tags)):
            return f"a {self.columns['tags']!r} with {NO_TAG}, which stands for no tag"
        return None

    def content(self, row: Row) -> str:
        return " ".join(self.words(row))

    def words(self, row: Row) -> list[str]:
        return _listed(row.values[self.columns["tokens"]])

    def tags(self, row: Row) -> list[str]:
        return [label_of(tag) for tag in _listed(row.values[self.columns["tags"]])]

    def fitted(self, rows: Iterable[Row]) -> TokenClassification:
        """The task with the tags that occur in ``rows``, O first, then the kinds of entity with B before I."""
        labels = {tag for row in rows for tag in self.tags(row)}
        if len(labels) == 1:
            raise InputError(f"All training words have the tag {min(labels)!r}; there must be at least two.")
        if not entity_tags(labels) and ("O" in labels or ("0" in labels and all(label.isdigit() for label in labels))):
            note(
                f"The tags in {self.columns['tags']!r} do not say where entities begin, as B-PER, I-PER and O do; what is measured "
                "is the share of words, and not whole entities."
            )
        return replace(self, labels=sorted(labels, key=lambda tag: (tag != "O", tag.partition("-")[2], tag)))

    def labels_of(self, row: Row) -> list[str]:
        return self.tags(row)

    def misfit(self, row: Row) -> str | None:
        unknown = next((tag for tag in self.tags(row) if tag not in self.labels), None)
        return None if unknown is None else self.unknown(unknown, "tag")

    def describe(self) -> str:
        return f"{len(self.labels)} tags"

    @property
    def entities(self) -> bool:
        """Whether the tags mark entities (B-PER, I-PER, O) and not each word by itself, as parts of speech do."""
        return bool(entity_tags(self.labels))

    @property
    def best(self) -> str:
        return "f1" if self.entities else "token_accuracy"

    def load_tokenizer(self, model_name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = super().load_tokenizer(model_name_or_path)
        if not tokenizer.is_fast:
            raise InputError(
                f"The tokenizer of {os.fspath(model_name_or_path)} cannot tell which tokens belong to which word; "
                "token_classification needs a model with a fast tokenizer (tokenizer.json)."
            )
        if not _wants_words(tokenizer):
            return tokenizer
        return load_tokenizer(os.fspath(model_name_or_path), padding_side=self.padding_side, **WORDS)

    def saved_tokenizer(self, model_name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
        """As it came with the model; a byte-level one so that it takes lists of words, as in training."""
        tokenizer: PreTrainedTokenizerBase = super().saved_tokenizer(model_name_or_path)
        return saved_tokenizer(os.fspath(model_name_or_path), **WORDS) if _wants_words(tokenizer) else tokenizer

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        """Token ids of each row's words, with the tag at the first token of each and ``IGNORED`` elsewhere.

        Words of which no token is left when a row is cut are not measured either. An example's source is the places of the words
        that are.
        """
        limit = limit_of(processor, max_length)
        index = {label: position for position, label in enumerate(self.labels)}
        items, sources, n_truncated = [], [], 0
        lost: dict[str, list[int]] = {}
        for row, made in zip(rows, _tokenized([self.words(row) for row in rows], processor, limit), strict=True):
            if isinstance(made, RowProblem):
                lost.setdefault(str(made), []).append(row.line)
                continue
            encoded, i = made
            tags, labels, before = self.tags(row), [], None
            for word in encoded.word_ids(i):
                labels.append(IGNORED if word is None or word == before else index[tags[word]])
                before = word
            if all(label == IGNORED for label in labels):
                lost.setdefault("words that give no tokens", []).append(row.line)
                continue
            items.append({**{key: values[i] for key, values in encoded.items()}, "labels": labels})
            sources.append(list(dict.fromkeys(word for word in encoded.word_ids(i) if word is not None)))
            n_truncated += bool(encoded.encodings[i].overflowing)
        return Examples(items, n_truncated, sources, lost)

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorForTokenClassification:
        """Pads a batch to its longest example, and the labels with it."""
        return DataCollatorForTokenClassification(processor, label_pad_token_id=IGNORED)

    def reduced(self, logits: Any, labels: Tensor) -> Tensor:
        """The likeliest tag of each token (B, T); ``NONE`` where the outputs are no numbers."""
        most, best = (logits[0] if isinstance(logits, tuple) else logits).max(-1)
        return torch.where(most.isnan() | most.isposinf(), NONE, best)

    def seen(self, item: Mapping[str, Any], processor: Any) -> list[Seen]:
        learned = [label != IGNORED for label in item["labels"]]
        tags = [self.labels[label] if label != IGNORED else "" for label in item["labels"]]
        return [Seen("input", item["input_ids"], learned, tags)]

    def untold(self, row: Row) -> Row:
        words = row.values.get(self.columns["tokens"])
        count = len(_listed(words)) if isinstance(words, list | str) else 0
        return replace(row, values={**row.values, self.columns["tags"]: self.labels[:1] * count})

    def read_off(
        self, outputs: Sequence[Outputs], rows: Sequence[Row], examples: Examples, processor: Any
    ) -> list[dict[str, Any]]:
        """The likeliest tag of each word and its probability; None for words that were cut off or that give no tokens."""
        records = []
        for output, row, item, told in zip(outputs, rows, examples.items, examples.sources or (), strict=True):
            count = len(self.words(row))
            tags: list[Any] = [None] * count
            scores: list[Any] = [None] * count
            best, places = torch.softmax(output["logits"], -1).max(-1)
            firsts = (i for i, label in enumerate(item["labels"]) if label != IGNORED)
            for word, at in zip(told, firsts, strict=True):
                tags[word], scores[word] = self.labels[int(places[at])], rounded(best[at])
            records.append(dict(zip(self.predicts, (tags, scores), strict=True)))
        return records

    def spoilt(self, prediction: EvalPrediction, examples: Examples) -> Any:
        best: Any = prediction.predictions
        return ((best == NONE) & (prediction.label_ids != IGNORED)).any(1)

    def compute_metrics(
        self, prediction: EvalPrediction, examples: Examples | None = None, processor: Any = None
    ) -> dict[str, float]:
        """The share of tags right; of tags that mark entities also F1, precision and recall of whole entities, as the
        CoNLL shared tasks count them."""
        best: Any = prediction.predictions
        wanted: Any = prediction.label_ids
        counted = wanted != IGNORED
        right = (best == wanted)[counted]
        accuracy = float(right.mean()) if right.size else 0.0
        if not self.entities:
            return {"token_accuracy": accuracy}
        from seqeval.metrics import f1_score, precision_score, recall_score

        usual = entity_tags(self.labels)
        names = [usual[label] for label in self.labels]
        truth, guess = (
            [[names[index] for index in row[kept]] for row, kept in zip(rows, counted, strict=True)]
            for rows in (wanted, best)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing was found is what a 0 says
            return {
                "f1": float(f1_score(truth, guess, zero_division=0)),
                "precision": float(precision_score(truth, guess, zero_division=0)),
                "recall": float(recall_score(truth, guess, zero_division=0)),
                "token_accuracy": accuracy,
            }


def _tokenized(
    texts: Sequence[list[str]], tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[tuple[Any, int] | RowProblem]:
    """For each list of words the tokenizer's output with the place in it, or what is wrong with the words."""
    if not texts:
        return []
    try:
        encoded = read(tokenizer, list(texts), is_split_into_words=True, truncation=True, max_length=limit)
    except RowProblem as problem:  # of one of them: which?
        return [problem] if len(texts) == 1 else [one for own in texts for one in _tokenized([own], tokenizer, limit)]
    return [(encoded, i) for i in range(len(texts))]


def _wants_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has to be told that it is given lists of words: byte-level ones look for the space before them."""
    return getattr(tokenizer, "add_prefix_space", None) is False


def _listed(value: list[Any] | str) -> list[Any]:
    return value.split() if isinstance(value, str) else value
