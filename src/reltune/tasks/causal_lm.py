"""Causal language modelling: plain text, prompts with completions, instructions and chats, through TRL's SFTTrainer.

Rows are encoded once, for the analysis as for training: token ids, and as labels those ids that the loss is taken of.
A completion's labels are its own tokens (unless ``completion_only_loss`` is false), a chat's those that the assistant
writes. Packing joins examples for training alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from reltune.data.rows import Row, text_problem
from reltune.errors import InputError
from reltune.losses import IGNORED
from reltune.tasks.decoder import (
    DecoderTask,
    Messages,
    as_transformers_has_them,
    ended,
    messages_problem,
    rendered,
    shared,
)
from reltune.tasks.generation import continuations, exact_match
from reltune.tasks.task import Columns, Examples, Written
from reltune.tasks.texts import limit_of

# The prompt of Alpaca (Taori et al. 2023), for tokenizers without a chat template.
INSTRUCTION = "### Instruction:\n{instruction}\n\n### Response:\n"
INSTRUCTION_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


class Source(NamedTuple):
    """What the model is asked to continue: the prompt's token ids, the prompt to read, and the text that should follow."""

    ids: list[int]
    prompt: str
    reference: str


@dataclass
class CausalLM(DecoderTask):
    """The task of continuing a text.

    Attributes:
        completion_only_loss: whether the loss is taken of what follows the prompt only; None where rows have one.
        max_length: tokens of an example, at most, and of a packed sequence.
        packing: whether training joins examples to sequences of ``max_length`` tokens, each blind to the others in it.
        max_new_tokens: tokens that the model may write for an example, in evaluation.
        generation_examples: held-out examples, at most, for which it writes.
    """

    columns: Columns = field(default_factory=lambda: {"text": "text"})
    completion_only_loss: bool | None = None
    packing: bool = False
    max_length: int = 1024
    max_new_tokens: int = 64
    generation_examples: int = 64

    name: ClassVar[str] = "causal_lm"
    loss: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy", "exact_match")
    learning_rates: ClassVar[dict[str, float]] = {"selection": 1e-3}
    fields: ClassVar[tuple[str, ...]] = (
        *("completion_only_loss", "packing", "max_length", "max_new_tokens", "generation_examples"),
    )

    @property
    def training_metrics(self) -> tuple[str, ...]:
        """Those of TRL's trainer."""
        return ("loss", "mean_token_accuracy", "entropy")

    def problem(self, row: Row) -> str | None:
        for role in ("text", "instruction"):
            if role in self.columns and (found := text_problem(row.values, self.columns[role])):
                return found
        for role in ("prompt", "completion", "messages", "output"):
            if role not in self.columns:
                continue
            column = self.columns[role]
            value = row.values.get(column)
            if isinstance(value, list) and role != "output":
                found = messages_problem(value, column)
            elif role == "messages":
                found = f"a {column!r} that is no list of messages"
            else:
                found = text_problem(row.values, column)
            if found:
                return found
        if "messages" in self.columns and not any(
            m["role"] == "assistant" for m in row.values[self.columns["messages"]]
        ):
            return f"{self.columns['messages']!r} in which the assistant says nothing"
        if {"prompt", "completion"} <= set(self.columns):
            kinds = {isinstance(row.values[self.columns[role]], list) for role in ("prompt", "completion")}
            if len(kinds) > 1:
                return "a prompt and a completion of which one is a text and the other messages"
        if "input" in self.columns and not isinstance(row.values.get(self.columns["input"]), str | None):
            return f"a {self.columns['input']!r} that is no string"
        return None

    def content(self, row: Row) -> str:
        return " ".join(str(row.values.get(column)) for column in self.columns.values())

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        """Token ids and labels of each row. An example's source is its ``Source``, or None where it has no prompt, or one that
        is cut itself.

        Rows of which no label is left when they are cut are left out, and their lines are in ``lost``.
        """
        limit = limit_of(processor, max_length, least=2)
        items, sources, n_truncated = [], [], 0
        lost: list[int] = []
        for row in rows:
            ids, labels, source = self._encoded(row, processor)
            n_truncated += len(ids) > limit
            ids, labels = ids[:limit], labels[:limit]
            if any(label != IGNORED for label in labels[1:]):  # nothing predicts the first
                items.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
                # a chat's last turn may come after the cut, and may be the first
                sources.append(source if source is not None and 0 < len(source.ids) < limit else None)
            else:
                lost.append(row.line)
        return Examples(items, n_truncated, sources, {f"a prompt of {limit} tokens or more": lost} if lost else {})

    def _encoded(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], Source | None]:
        values: dict[str, Any] = {role: row.values.get(column) for role, column in self.columns.items()}
        if "instruction" in values:
            values = instruction_as_prompt(values, tokenizer)
        only = self.completion_only_loss is not False
        if "text" in values:
            ids = ended(tokenizer(str(values["text"]))["input_ids"], tokenizer)
            return ids, list(ids), None
        if isinstance(values.get("prompt"), str):
            prompt = tokenizer(values["prompt"])["input_ids"]
            ids = ended(tokenizer(str(values["prompt"]) + str(values["completion"]))["input_ids"], tokenizer)
            # tokens may merge where the two meet: the completion starts at the first that differs
            start = shared(prompt, ids)
            source = Source(prompt, values["prompt"], str(values["completion"]))
            return ids, _labels(ids, [(start, len(ids))] if only else None), source
        if "prompt" in values:
            before, after = values["prompt"], values["completion"]
            prompt, ids = rendered(before, tokenizer, prompt=True), rendered([*before, *after], tokenizer)
            spans = [(shared(prompt, ids), len(ids))]
            reference = after[0]["content"] if len(after) == 1 else None
        else:
            messages = values["messages"]
            ids, spans = assistant_spans(messages, tokenizer, row.line)
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            before, reference = messages[:last], messages[last]["content"]
            prompt = rendered(before, tokenizer, prompt=True)
        labels = _labels(ids, spans if only else None)
        return ids, labels, Source(prompt, to_read(before), reference) if isinstance(reference, str) else None

    def collator(self, processor: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
        """Pads a batch to its longest example, and the labels with it."""
        return DataCollatorForSeq2Seq(processor, label_pad_token_id=IGNORED)

    @torch.no_grad()
    def misfit_of_model(self, model: nn.Module) -> str | None:
        """Of packing: whether a packed example changes with the one before it, as it does in models that count positions by
        themselves or carry a state along."""
        if not self.packing:
            return None
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)  # as it is in training
        training, logits = model.training, []
        model.eval()
        try:
            for first in (0, 1):
                batch = collate([{"input_ids": [first] * 4 + [0, 1, 0, 1], "seq_lengths": [4, 4]}])
                inputs = {
                    key: value.to(next(model.parameters()).device) if isinstance(value, Tensor) else value
                    for key, value in batch.items()
                    if key != "labels"
                }
                logits.append(model(**inputs, use_cache=False).logits[0].float())
        finally:
            model.train(training)
        moved = (logits[0] - logits[1]).abs().amax(-1)
        if moved[4:].max() > 0.02 * moved[:4].max():  # not 0 where rounding depends on the whole batch
            name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            return f"packing cannot be with a {name!r} model, in which packed examples see each other; leave --packing out."
        return None

    def make_arguments(self, **values: Any) -> TrainingArguments:
        from trl import SFTConfig

        return SFTConfig(
            packing=self.packing,
            eval_packing=False,
            dataset_kwargs={"skip_prepare_dataset": not self.packing},
            **as_transformers_has_them(values),
        )

    def trainer(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processor: Any,
        train: Examples,
        held_out: Examples | None = None,
        **options: Any,
    ) -> Trainer:
        """TRL's trainer. In its evaluations it gives the loss; its other metrics would take a second forward pass."""
        from datasets import Dataset, IterableDataset
        from trl import SFTTrainer

        class Tuner(SFTTrainer):
            def create_model_card(self, *_: Any, **__: Any) -> None:
                """The run writes its own, beside the adapter."""

        def tokens(examples: Any) -> Any:
            if isinstance(examples, IterableDataset):  # streamed
                return examples.map(lambda item: {key: item[key] for key in ("input_ids", "labels")})
            return Dataset.from_list([{key: item[key] for key in ("input_ids", "labels")} for item in examples.items])

        args.max_length = self.max_length  # type: ignore[attr-defined]
        return Tuner(
            model=model,  # type: ignore[arg-type]
            args=args,
            processing_class=processor,
            data_collator=None if self.packing else self.collator(processor),
            train_dataset=tokens(train),
            eval_dataset=None if held_out is None else tokens(held_out),
            **options,
        )

    def reduced(self, logits: Any, labels: Tensor) -> Tensor:
        """Of each example (B, 3): the sum of its label tokens' losses, their number, and how many are the likeliest."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        return token_sums(logits[:, :-1], labels[:, 1:])

    def compute_metrics(
        self, prediction: EvalPrediction, examples: Examples | None = None, processor: Any = None
    ) -> dict[str, float]:
        """Perplexity (of all label tokens alike, whatever example they are in) and the share of tokens guessed."""
        return token_metrics(prediction.predictions)

    def written(
        self, model: nn.Module, examples: Examples, processor: Any, batch_size: int, predictions: Any
    ) -> list[Written]:
        """Completions, of the last turn in chats, for ``generation_examples`` at most."""
        some = [source for source in examples.sources or () if source is not None][: self.generation_examples]
        texts = continuations(model, processor, [source.ids for source in some], self.max_new_tokens, batch_size)
        return [Written(source.prompt, source.reference, text) for source, text in zip(some, texts, strict=True)]

    def written_metrics(self, written: Sequence[Written]) -> dict[str, float]:
        """The share of examples whose completion the model writes to the letter, outer space aside."""
        if not written:
            return {}
        return {"exact_match": exact_match(written), "generations": len(written)}


def to_read(messages: Messages) -> str:
    """Messages as a text to look at: a single one's words, or each behind its role."""
    words = [message.get("content") or message.get("tool_calls") for message in messages]
    if len(words) == 1 and isinstance(words[0], str):
        return words[0]
    return "\n".join(f"{message['role']}: {said}" for message, said in zip(messages, words, strict=True))


def instruction_as_prompt(values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """An instruction, its input and output as prompt and completion: a chat's where the tokenizer has a template."""
    instruction, given, output = values["instruction"], values.get("input") or "", values["output"]
    if tokenizer.chat_template is not None:
        content = f"{instruction}\n\n{given}" if given.strip() else instruction
        return {
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": output}],
        }
    layout = INSTRUCTION_WITH_INPUT if given.strip() else INSTRUCTION
    return {"prompt": layout.format(instruction=instruction, input=given), "completion": output}


def assistant_spans(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, line: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """A chat's token ids, and from where to where the assistant wrote them.

    By the template's own marks, if it has some; else a turn is what the chat up to it has more than the prompt for it.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and "{% generation" in template.replace("{%-", "{%"):
        marked: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = marked["assistant_masks"]
        return marked["input_ids"], [(i, i + 1) for i, written in enumerate(mask) if written]
    ids = rendered(messages, tokenizer)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Before a first turn there is what the template puts before any: a system prompt of its own, the turn's marks.
        before = (
            rendered(messages[:i], tokenizer, prompt=True) if i else rendered([{**message, "content": ""}], tokenizer)
        )
        upto = rendered(messages[: i + 1], tokenizer)
        if ids[: len(upto)] != upto:
            raise InputError(
                f"The chat template renders the turns of line {line} otherwise when more turns follow, so that it cannot be "
                "told what the assistant wrote; use rows of prompt and completion, or a template with generation marks."
            )
        spans.append((shared(before, upto), len(upto)))
    return ids, spans


def _labels(ids: list[int], spans: Iterable[tuple[int, int]] | None) -> list[int]:
    if spans is None:
        return list(ids)
    labels = [IGNORED] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return labels


def token_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """For logits (B, T, classes) and labels (B, T), (B, 3): sum of cross entropies in nats, label tokens, those guessed."""
    sums = logits.new_zeros(len(labels), 3, dtype=torch.float64)
    for i, (scores, wanted) in enumerate(zip(logits, labels, strict=True)):  # one wide copy of one example at a time
        counted = wanted != IGNORED
        scores, wanted = scores[counted].float(), wanted[counted]
        sums[i, 0] = F.cross_entropy(scores, wanted, reduction="sum")
        sums[i, 1] = len(wanted)
        sums[i, 2] = (scores.argmax(-1) == wanted).sum()
    return sums


def token_metrics(sums: Any) -> dict[str, float]:
    """Perplexity and the share of tokens guessed, from ``token_sums`` of all examples (N, 3)."""
    loss, tokens, guessed = (float(value) for value in sums.sum(0))
    mean = loss / max(tokens, 1)
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "token_accuracy": guessed / max(tokens, 1),
    }
