"""Causal language modelling: plain text, prompts with completions, instructions and chats, through TRL's SFTTrainer.

Rows are encoded once, for the analysis as for training: token ids, and as labels those ids that the loss is taken of.
A completion's labels are its own tokens (unless ``completion_only_loss`` is false), a chat's those that the assistant
writes. Packing joins examples for training alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from reltune.losses import IGNORED
from reltune.notes import note
from reltune.tasks.chats import (
    Chat,
    Span,
    answer_span,
    check_heard,
    closing_token,
    examples_of,
    messages_problem,
    rendered,
    to_read,
)
from reltune.tasks.decoder import DecoderTask, as_transformers_has_them
from reltune.tasks.generation import continuations, ends_of, exact_match, remarks_on_answers
from reltune.tasks.prediction import Predictions
from reltune.tasks.sft_step import SFTStep
from reltune.tasks.task import Columns, Examples, RowProblem, Seen, Written
from reltune.tasks.texts import ended, limit_of, shared, tokens_of

# The prompt of Alpaca (Taori et al. 2023), for tokenizers without a chat template.
INSTRUCTION = "### Instruction:\n{instruction}\n\n### Response:\n"
INSTRUCTION_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
UNSPACED = "\u0700"  # from here on there are scripts without spaces between words


STAND_IN = "x"  # in place of an answer that is not known
ANSWERED = [{"role": "assistant", "content": STAND_IN}]


class Prompt(NamedTuple):
    """What the model is asked to go on from, for an example: its token ids, as training has them too; the same to read; the
    text that should follow; where its tokens end in the example; and the token that ends it, where it is not the end of sequence."""

    ids: list[int]
    text: str
    reference: str
    until: int
    stop: int | None = None


Encoded = tuple[
    list[int], list[Span] | None, Prompt | None
]  # ids, what is learned of them (None: all), what is asked for


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
    chat_template: str | None = None

    name: ClassVar[str] = "causal_lm"
    loss: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "token_accuracy", "exact_match")
    learning_rates: ClassVar[dict[str, float]] = {"selection": 1e-3}
    told: ClassVar[tuple[str, ...]] = ("completion", "output")
    predicts: ClassVar[tuple[str, ...]] = ("prediction",)
    fields: ClassVar[tuple[str, ...]] = (
        *("completion_only_loss", "packing", "max_length", "max_new_tokens", "generation_examples"),
        "chat_template",
    )

    @property
    def training_metrics(self) -> tuple[str, ...]:
        """Those of TRL's trainer."""
        return ("loss", "mean_token_accuracy", "entropy")

    def problem(self, row: Row) -> str | None:
        """What is wrong with the columns, one by one, and then with what they are together."""
        for role, column in self.columns.items():
            if problem := _column_problem(role, column, row):
                return problem
        values = self._values(row)
        if "messages" in values and not any(message["role"] == "assistant" for message in values["messages"]):
            return f"{self.columns['messages']!r} in which the assistant says nothing"
        if {"prompt", "completion"} <= set(values) and isinstance(values["prompt"], list) != isinstance(
            values["completion"], list
        ):
            return "a prompt and a completion of which one is a text and the other messages"
        return None

    def _values(self, row: Row) -> dict[str, Any]:
        """The row's values by role."""
        return {role: row.values.get(column) for role, column in self.columns.items()}

    def content(self, row: Row) -> str:
        return " ".join(str(row.values.get(column)) for column in self.columns.values())

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        """Token ids and labels of each row. An example's source is its ``Prompt``, or None where it has none, or one that is
        cut itself.

        Rows that the tokenizer or its chat template cannot take, and those of which no label is left when they are cut, are left
        out, and their lines are in ``lost``.
        """
        limit = limit_of(processor, max_length, least=2)
        items: list[dict[str, Any]] = []
        prompts: list[Prompt | None] = []
        n_truncated = 0
        lost: dict[str, list[int]] = {}
        for row in rows:
            try:
                encoded = self._encoded(row, processor)
            except RowProblem as problem:
                lost.setdefault(str(problem), []).append(row.line)
                continue
            whole, kept = len(items), None
            for ids, spans, prompt in encoded:
                labels = _labels(ids, None if self.completion_only_loss is False else spans)[:limit]
                if any(label != IGNORED for label in labels[1:]):  # nothing predicts the first
                    n_truncated += len(ids) > limit
                    ids = ids[:limit]
                    items.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
                    # a chat's last answer may come after the cut, and may be the first
                    prompts.append(prompt if prompt is not None and 0 < len(prompt.ids) < limit else None)
                elif len(ids) <= limit:
                    kept = "messages of which the chat template marks nothing as the assistant's"
            if len(items) == whole:
                n_truncated += kept is None
                lost.setdefault(kept or f"a prompt of {limit} tokens or more", []).append(row.line)
        return Examples(items, n_truncated, prompts, lost)

    def _encoded(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
        values = self._values(row)
        if "instruction" in values:
            values = instruction_as_prompt(values, tokenizer)
        if "text" in values:
            ids = ended(tokens_of(str(values["text"]), tokenizer), tokenizer)
            return [(ids, None, None)]
        if isinstance(values.get("prompt"), str):
            return [_completed(str(values["prompt"]), str(values["completion"]), tokenizer)]
        return _chatted(values, tokenizer)

    def seen(self, item: Mapping[str, Any], processor: Any) -> list[Seen]:
        learned = [False, *(label != IGNORED for label in item["labels"][1:])]  # nothing predicts the first
        return [Seen("input", item["input_ids"], learned)]

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

    def changes_inputs(self) -> str | None:
        return "packing joins other examples in every pass over the data" if self.packing else None

    def remarks(self, model: nn.Module, processor: Any, examples: Examples) -> list[str]:
        """With which token answers of chats end, where generation does not stop at it by itself; and of answers that the model
        cannot write."""
        asked = [(item, prompt) for item, prompt in zip(examples.items, examples.sources or (), strict=False) if prompt]
        answers = [(item["input_ids"][len(prompt.ids) : prompt.until], prompt.reference) for item, prompt in asked]
        remarks = remarks_on_answers(answers, processor, self.max_new_tokens) if self.generation_examples else []
        unknown = sorted(
            {prompt.stop for _, prompt in asked if prompt.stop is not None} - set(ends_of(model, processor))
        )
        if not unknown:
            return remarks
        tokens = ", ".join(repr(processor.convert_ids_to_tokens(token)) for token in unknown)
        return [
            *remarks,
            f"Answers end with {tokens}, which the model's generation_config.json does not name as an end of sequence; reltune "
            "stops there, and other programs that use the tuned model have to be told to.",
        ]

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

        class Tuner(SFTStep, SFTTrainer):
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

    def untold(self, row: Row) -> Row:
        """With an answer: a chat's last one is the one that is asked for, if it ends with one."""
        values = dict(row.values)
        turns = values.get(self.columns.get("messages", ""))
        if (
            isinstance(turns, list)
            and turns
            and isinstance(turns[-1], Mapping)
            and turns[-1].get("role") != "assistant"
        ):
            values[self.columns["messages"]] = [*turns, *ANSWERED]
        for role in self.told:
            if role in self.columns:
                chat = isinstance(values.get(self.columns.get("prompt", "")), list)
                values[self.columns[role]] = ANSWERED if chat else STAND_IN
        return replace(row, values=values)

    def question(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """What the model is asked to go on from for a row without its answer: the tokens that training has before it.

        Raises RowProblem for a row that asks nothing.
        """
        values = self._values(self.untold(row))
        if "instruction" in values:
            values = instruction_as_prompt(values, tokenizer)
        text = values.get("text", values.get("prompt"))
        prompt = _opened(text, tokenizer) if isinstance(text, str) else _chatted(values, tokenizer)[-1][2]
        if prompt is None or not prompt.ids:
            raise RowProblem("nothing that the model could go on from")
        return prompt

    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        max_new_tokens: int = 64,
    ) -> Predictions:
        """The text that the model writes, the likeliest token each time. Prompts are never cut: they are not held to ``max_length``, but to
        the model's own limit."""
        return answers(self.question, model, rows, processor, batch_size, max_new_tokens)

    def written(
        self, model: nn.Module, examples: Examples, processor: Any, batch_size: int, predictions: Any
    ) -> list[Written]:
        """Completions, of the last turn in chats, for ``generation_examples`` at most."""
        some = [prompt for prompt in examples.sources or () if prompt is not None][: self.generation_examples]
        stops = {prompt.stop for prompt in some if prompt.stop is not None}
        ids = [prompt.ids for prompt in some]
        texts = continuations(model, processor, ids, self.max_new_tokens, batch_size, stops)
        return [Written(prompt.text, prompt.reference, text) for prompt, text in zip(some, texts, strict=True)]

    def written_metrics(self, written: Sequence[Written]) -> dict[str, float]:
        """The share of examples whose completion the model writes to the letter, outer space aside."""
        if not written:
            return {}
        return {"exact_match": exact_match(written), "generations": len(written)}


def _column_problem(role: str, column: str, row: Row) -> str | None:
    """What is wrong with the value of one column, as a phrase, or None."""
    value = row.values.get(column)
    if role in ("text", "instruction", "output"):
        return text_problem(row.values, column)
    if role in ("prompt", "completion", "messages"):
        if isinstance(value, list):
            return messages_problem(value, column)
        return f"a {column!r} that is no list of messages" if role == "messages" else text_problem(row.values, column)
    if role == "history":
        pairs = value is None or (isinstance(value, list) and all(map(_is_exchange, value)))
        return None if pairs else f"a {column!r} that is no list of questions with their answers"
    if role == "tools":
        return None if isinstance(value, list | None) else f"a {column!r} that is no list of tools"
    return None if isinstance(value, str | None) else f"a {column!r} that is no string"


def _is_exchange(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(said, str) for said in value)


def instruction_as_prompt(values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """An instruction with its input and output, and what was said before, as prompt and completion: a chat's where the
    tokenizer has a template. What was said before is read, and not learned."""
    instruction, given, output = values["instruction"], values.get("input") or "", values["output"]
    system, history = values.get("system") or "", values.get("history") or []
    if tokenizer.chat_template is not None:
        messages = [{"role": "system", "content": system}] if system.strip() else []
        for question, answer in history:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        content = f"{instruction}\n\n{given}" if given.strip() else instruction
        return {
            "prompt": [*messages, {"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": output}],
        }
    layout = INSTRUCTION_WITH_INPUT if given.strip() else INSTRUCTION
    before = [f"{system}\n\n"] if system.strip() else []
    before += [f"{INSTRUCTION.format(instruction=question)}{answer}\n\n" for question, answer in history]
    return {"prompt": "".join([*before, layout.format(instruction=instruction, input=given)]), "completion": output}


def _completed(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Token ids of a prompt with its completion, where the completion stands, and what the model is asked to go on from: the
    ids that the prompt by itself and both together begin with."""
    before = tokens_of(prompt, tokenizer)
    ids = ended(tokens_of(prompt + completion, tokenizer), tokenizer)
    start = shared(before, ids)
    while before[start:] and before[-1] in tokenizer.all_special_ids:  # the tokenizer ends every text with it
        before.pop()
    if before[start:]:
        note(
            "Some prompts end within a token of prompt and completion, as one that ends in a space does before a word; the loss, "
            "and what the model is asked to write, begin with that token. Put the space at the start of the completion."
        )
        prompt, completion = (
            str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:start], ids[start:])
        )
    elif all(letter.isalpha() and letter < UNSPACED for letter in (prompt[-1], completion[0])):
        note(
            "Some prompts end with a letter and their completions begin with one, and nothing is put between the two; put a space at the "
            "start of the completion, unless they are parts of one word."
        )
    return ids, [(start, len(ids))], Prompt(ids[:start], prompt, completion, len(ids))


def _opened(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A text that is to be continued: without what the tokenizer puts behind every text, and without a space at its end, which is part
    of the token that follows."""
    ids = tokens_of(text, tokenizer)
    kept = shared(ids, tokens_of(text + STAND_IN, tokenizer))
    while len(ids) > kept and (text.endswith(" ") or ids[-1] in tokenizer.all_special_ids):
        ids.pop()
    return Prompt(ids, text, "", len(ids))


def answers(
    question: Callable[[Row, PreTrainedTokenizerBase], Prompt],
    model: nn.Module,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int,
) -> Predictions:
    """What a decoder writes for the prompt that ``question`` makes of each row."""
    lost: dict[str, list[int]] = {}
    prompts: dict[int, Prompt] = {}
    for row in rows:
        try:
            prompts[row.line] = question(row, tokenizer)
        except RowProblem as problem:
            lost.setdefault(str(problem), []).append(row.line)
            continue
        if len(prompts[row.line].ids) >= tokenizer.model_max_length:
            lost.setdefault(f"a prompt of {tokenizer.model_max_length} tokens or more", []).append(row.line)
            del prompts[row.line]
    stops = {prompt.stop for prompt in prompts.values() if prompt.stop is not None}
    ids = [prompt.ids for prompt in prompts.values()]
    texts = continuations(model, tokenizer, ids, max_new_tokens, batch_size, stops, progress=False)
    return Predictions({line: {"prediction": text} for line, text in zip(prompts, texts, strict=True)}, lost)


def _chatted(values: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """The same of a chat: of prompt and completion in messages, or of messages in which the assistant answers several times and
    the last answer is asked for, as the template writes it."""
    tools = values.get("tools")
    if "messages" in values:
        chat = Chat(values["messages"], tools)
        examples = examples_of(chat, tokenizer)
        before = chat.messages[: max(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")]
        asked = bool(before)
    else:
        before, answers = values["prompt"], values["completion"]
        chat = Chat([*before, *answers], tools)
        ids = rendered(chat, tokenizer)
        examples = [(ids, [answer_span(rendered(Chat(before, tools), tokenizer, prompt=True), ids, tokenizer)])]
        asked = len(answers) == 1
    check_heard(chat, tokenizer)
    stops = [closing_token(ids, span, tokenizer) for ids, spans in examples for span in spans]
    encoded: list[Encoded] = [(ids, spans, None) for ids, spans in examples]
    ids, spans = examples[-1]
    if spans and asked:
        start, stop = spans[-1]
        reference = str(tokenizer.decode(ids[start:stop], skip_special_tokens=True)).strip()
        encoded[-1] = (ids, spans, Prompt(ids[:start], to_read(before), reference, stop, stops[-1]))
    return encoded


def _labels(ids: list[int], spans: Iterable[Span] | None) -> list[int]:
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
