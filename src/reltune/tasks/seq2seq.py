"""Sequence to sequence: a text from a text by an encoder and a decoder; ROUGE and exact match of what the model writes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from reltune.data.rows import Row, text_problem
from reltune.errors import InputError
from reltune.losses import IGNORED
from reltune.pretrained import load_config, load_model
from reltune.tasks.generation import ends_of, exact_match, remarks_on_answers
from reltune.tasks.prediction import NumbersOnly, Predictions
from reltune.tasks.task import Columns, Examples, RowProblem, Seen, Task, Written
from reltune.tasks.texts import encode_texts, ended, limit_of, tokenized

CERTAIN = {"do_sample": False, "min_new_tokens": 0}  # the same text every time


class WritingTrainer(Seq2SeqTrainer):
    """A Trainer whose model writes the same every time, and ends where the targets of training do, whatever its
    generation_config.json says. Beams and what is forced (the language, say) are the model's own."""

    ends: Sequence[int] = ()

    def prediction_step(self, *args: Any, **options: Any) -> Any:
        ends = {"eos_token_id": list(self.ends)} if self.ends else {}
        own = {**CERTAIN, **ends}
        self._gen_kwargs = {**getattr(self, "_gen_kwargs", {}), **own}
        return super().prediction_step(*args, **options)


ROUGE = ("rougeL", "rouge1", "rouge2")
# Letters and digits between others are one word; of scripts without spaces every character is one.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")


@dataclass
class Seq2Seq(Task):
    """The task of writing a target for a source: a summary, a translation.

    Attributes:
        max_new_tokens: tokens that the model may write, in evaluation.
    """

    columns: Columns = field(default_factory=lambda: {"source": "source", "target": "target"})
    max_new_tokens: int = 64

    name: ClassVar[str] = "seq2seq"
    loss: ClassVar[str] = "seq2seq"
    metrics: ClassVar[tuple[str, ...]] = (*ROUGE, "exact_match")
    peft_task_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    trainer_class: ClassVar[type[Trainer]] = WritingTrainer
    fields: ClassVar[tuple[str, ...]] = ("max_new_tokens",)
    told: ClassVar[tuple[str, ...]] = ("target",)
    predicts: ClassVar[tuple[str, ...]] = ("prediction",)

    def problem(self, row: Row) -> str | None:
        return text_problem(row.values, self.columns["source"]) or text_problem(row.values, self.columns["target"])

    def content(self, row: Row) -> str:
        return str(row.values[self.columns["source"]])

    def load_model(
        self, model_name_or_path: str | os.PathLike, dtype: torch.dtype | str | None = None, **options: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        name = os.fspath(model_name_or_path)
        config = load_config(name)
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise InputError(
                f"{name} is a {config.model_type!r} model, which has no encoder; name the columns of the data prompt and completion "
                "(--task causal_lm), or use a model such as T5 or BART."
            )
        model, missing = load_model(
            name,
            AutoModelForSeq2SeqLM,
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
            "sequence-to-sequence head",
            self.adapt,
            dtype,
            **options,
        )
        if model.config.pad_token_id is None:  # the decoder's inputs are made of padded targets
            model.config.pad_token_id = self.load_tokenizer(name).pad_token_id
        return model, missing

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        """Token ids of sources and targets, each cut to the limit; an example's source is both, as texts."""
        encoded = encode_texts(rows, [(self.content(row),) for row in rows], processor, max_length)
        limit = limit_of(processor, max_length)
        texts = [str(row.values[self.columns["target"]]) for row in encoded.rows]
        targets = tokenized([(text,) for text in texts], processor, limit, targets=True)
        items, sources, n_truncated = [], [], encoded.n_truncated
        for item, row, text, target in zip(encoded.items, encoded.rows, texts, targets, strict=True):
            if isinstance(target, RowProblem):
                encoded.lost.setdefault(str(target), []).append(row.line)
                continue
            written, cut = target
            n_truncated += cut
            item["labels"] = self._ended(written["input_ids"], processor, limit)
            items.append(item)
            sources.append((self.content(row), text))
        return Examples(items, n_truncated, sources, encoded.lost)

    @staticmethod
    def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
        """A target's token ids, the end of sequence among the last: where a tokenizer puts none, the model would not learn to
        stop. Behind it some put the language."""
        return ids if tokenizer.eos_token_id in ids[-2:] else ended(ids[: limit - 1], tokenizer)

    def seen(self, item: Mapping[str, Any], processor: Any) -> list[Seen]:
        source, target = item["input_ids"], item["labels"]
        return [Seen("source", source, [False] * len(source)), Seen("target", target, [True] * len(target))]

    def token_ids(self, item: Mapping[str, Any]) -> list[Sequence[int]]:
        return [item["input_ids"], item["labels"]]

    def lengths(self, item: Mapping[str, Any]) -> tuple[int, ...]:
        return len(item["input_ids"]), len(item["labels"])

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
        """Pads sources and targets of a batch to their longest; the model makes the decoder's inputs of the targets."""
        return DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)

    def make_arguments(self, **values: Any) -> TrainingArguments:
        return Seq2SeqTrainingArguments(
            predict_with_generate=True,
            generation_max_length=self.max_new_tokens + 1,  # the token that starts the decoder counts too
            **values,
        )

    def make_trainer(self, trainer_class: type[Trainer], model: nn.Module, args: TrainingArguments, processor: Any, *rest: Any,
                     **options: Any) -> Trainer:  # fmt: skip
        trainer = super().make_trainer(trainer_class, model, args, processor, *rest, **options)
        trainer.ends = ends_of(model, processor)  # type: ignore[attr-defined]
        return trainer

    def remarks(self, model: nn.Module, processor: Any, examples: Examples) -> list[str]:
        """Of targets that the model cannot write."""
        answers = [
            (item["labels"], target) for item, (_, target) in zip(examples.items, examples.sources or (), strict=True)
        ]
        return remarks_on_answers(answers, processor, self.max_new_tokens)

    def reduced(self, logits: Any, labels: torch.Tensor) -> Any:
        """The token ids that the model wrote: Seq2SeqTrainer evaluates by letting it write."""
        return logits

    def compute_metrics(
        self, prediction: EvalPrediction, examples: Examples | None = None, processor: Any = None
    ) -> dict[str, float]:
        """F1 of ROUGE (Lin 2004) and the share of targets written to the letter, outer space aside."""
        assert examples is not None
        written = self._decoded(prediction.predictions, examples, processor)
        texts, references = [one.text for one in written], [one.reference for one in written]
        return {**rouge(texts, references), "exact_match": exact_match(written)}

    def written(
        self, model: nn.Module, examples: Examples, processor: Any, batch_size: int, predictions: Any
    ) -> list[Written]:
        """What the Trainer had the model write for every example."""
        return self._decoded(predictions, examples, processor)

    def untold(self, row: Row) -> Row:
        return replace(row, values={**row.values, self.columns["target"]: "-"})

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        max_new_tokens: int = 64,
    ) -> Predictions:
        """The text that the model writes, as evaluation has it write."""
        encoded = encode_texts(rows, [(self.content(row),) for row in rows], processor, max_length)
        order = sorted(range(len(encoded.items)), key=lambda i: len(encoded.items[i]["input_ids"]))
        records: dict[int, dict[str, Any]] = {}
        training = model.training
        model.eval()
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = processor.pad([encoded.items[i] for i in places], return_tensors="pt")
            tokens = model.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_length=max_new_tokens + 1,  # the token that starts the decoder counts too
                eos_token_id=ends_of(model, processor) or None,
                logits_processor=[NumbersOnly()],
                **CERTAIN,
            )
            texts = processor.batch_decode(tokens, skip_special_tokens=True)
            records |= {encoded.rows[i].line: {self.predicts[0]: text} for i, text in zip(places, texts, strict=True)}
        model.train(training)
        return Predictions(records, encoded.lost)

    def _decoded(self, tokens: Any, examples: Examples, processor: PreTrainedTokenizerBase) -> list[Written]:
        """The texts of token ids (N, T), one row per example."""
        assert examples.sources is not None
        tokens = np.where(tokens == IGNORED, processor.pad_token_id, tokens)  # Trainer pads with it
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        return [Written(source, target, text) for (source, target), text in zip(examples.sources, texts, strict=True)]


def rouge(texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """The mean F1 of each measure in ``ROUGE``."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), tokenizer=_Words())
    scores = [scorer.score(target, text) for text, target in zip(texts, targets, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / max(len(scores), 1) for name in ROUGE}


class _Words:
    """Words for ROUGE: as the library's own takes them from English, and of any script."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())
