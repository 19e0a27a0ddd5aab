"""Preference tuning: pairs of a chosen and a rejected answer, through TRL's DPOTrainer.

Rows are encoded once, for the analysis as for training, as TRL's trainer takes them: the ids of the prompt and of both answers.
A pair is one example of two rows, and relevance is that for the pair's own loss. The reference is the base model, by the
adapter switched off: there is no second copy of the model and none of the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer, TrainingArguments

from reltune.data.rows import Row, text_problem
from reltune.losses import (
    COMPLETION,
    REFERENCE,
    Loss,
    completion_log_probs,
    preference_loss,
    preference_losses,
    rows_of,
)
from reltune.tasks.causal_lm import CausalLM, Prompt, answers
from reltune.tasks.chats import Chat, answer_span, check_heard, closing_token, messages_problem, rendered
from reltune.tasks.decoder import DecoderTask, as_transformers_has_them
from reltune.tasks.output_map import OutputMapOnDevice
from reltune.tasks.prediction import Predictions, not_numbers
from reltune.tasks.task import Columns, Examples, RowProblem, Seen
from reltune.tasks.texts import ended, limit_of, shared, tokens_of

ITEM = ("prompt_ids", "chosen_ids", "rejected_ids")  # TRL's names


def _enabled(model: Any) -> bool:
    """Whether there is something trained on the model that can be switched off: an adapter, or what acts like one
    (methods/freed.py)."""
    if isinstance(model, PeftModel):
        return model.get_model_status().enabled is not False
    return getattr(model, "adapter_enabled", False)


class PairTrainer(Trainer):
    """Evaluates pairs. For each pair it gives the loss, and the log probabilities of both answers under the model and under the
    reference, (B, 4).

    Those of the reference are nan where the model has no adapter to switch off, or where it is off. ``args`` is TRL's DPOConfig.
    """

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: Any = list(ITEM)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        batch = dict(self._prepare_inputs(inputs))
        beta, loss_type = self.args.beta, self.args.loss_type[0]  # type: ignore[attr-defined]
        rows = {**rows_of(batch, preference_loss(beta, loss_type)), "use_cache": False}
        own: Any = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.compute_loss_context_manager():
            if _enabled(own):
                with own.disable_adapter():
                    batch[REFERENCE] = completion_log_probs(model(**rows), batch)
            log_probs = completion_log_probs(model(**rows), batch)
            loss = preference_losses(log_probs, batch, beta, loss_type).mean()
        if prediction_loss_only:
            return loss, None, None
        reference = batch.get(REFERENCE, torch.full_like(log_probs, torch.nan))
        return loss, torch.cat([log_probs, reference], 1), batch["labels"]


@dataclass
class Preference(DecoderTask):
    """The task of preferring one answer to another.

    Attributes:
        beta: the strength of the pull to the reference model; a reward is ``beta`` times a change of log probability.
        loss_type: the loss of a pair, one of ``losses.PREFERENCE_LOSSES``.
        max_new_tokens: tokens that the model may write for a prompt.
    """

    columns: Columns = field(default_factory=lambda: {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"})
    beta: float = 0.1
    loss_type: str = "sigmoid"
    max_new_tokens: int = 64
    chat_template: str | None = None

    name: ClassVar[str] = "preference"
    loss: ClassVar[str] = "preference"
    metrics: ClassVar[tuple[str, ...]] = ("reward_accuracy", "reward_margin", "chosen_likelier")
    unit: ClassVar[str] = "pair"
    trainer_class: ClassVar[type[Trainer]] = PairTrainer
    # A pair is two sequences: as many of these as other tasks have.
    defaults: ClassVar[dict[str, Any]] = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32}
    fields: ClassVar[tuple[str, ...]] = ("beta", "loss_type", "max_new_tokens", "chat_template")
    told: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    predicts: ClassVar[tuple[str, ...]] = ("prediction",)

    @property
    def training_metrics(self) -> tuple[str, ...]:
        """Those of TRL's trainer."""
        rewards = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
        return ("loss", *rewards, "mean_token_accuracy", "entropy")

    @property
    def relevance_loss(self) -> Loss:
        return preference_loss(self.beta, self.loss_type)

    def problem(self, row: Row) -> str | None:
        names = [self.columns[role] for role in ("chosen", "rejected", "prompt") if role in self.columns]
        for column in names:
            value = row.values.get(column)
            problem = messages_problem(value, column) if isinstance(value, list) else text_problem(row.values, column)
            if problem:
                return problem
        chosen, rejected = names[:2]
        a, b = row.values[chosen], row.values[rejected]
        if type(a) is not type(b):
            return f"a {chosen!r} and a {rejected!r} of which one is a text and the other messages"
        if a == b:
            return f"a {chosen!r} that equals {rejected!r}"
        prompt, a, b = self._parts(row)
        if isinstance(prompt, list) and isinstance(a, str):
            return f"a {names[2]!r} of messages beside answers that are texts"
        if prompt is None:
            common = shared(a, b)
            if not (a[:common].strip() if isinstance(a, str) else common):
                return f"a {chosen!r} and a {rejected!r} that have no prompt in common"
        if isinstance(a, list):
            for column, turns in ((chosen, a), (rejected, b)):
                answer = turns if prompt is not None else turns[common:]
                if not any(message["role"] == "assistant" for message in answer):
                    return f"a {column!r} in which the assistant answers nothing"
        return None

    def _parts(self, row: Row) -> tuple[Any, Any, Any]:
        """The prompt for both answers, the chosen and the rejected one. The prompt is None where the answers are whole texts or
        conversations with a common beginning."""
        prompt = row.values.get(self.columns["prompt"]) if "prompt" in self.columns else None
        pair = [row.values[self.columns[role]] for role in ("chosen", "rejected")]
        if isinstance(prompt, str) and isinstance(pair[0], list):
            # Some data have the first question as a text beside whole conversations, or beside the answers alone.
            prompt = None if shared(*pair) else [{"role": "user", "content": prompt}]
        elif prompt and all(
            type(prompt) is type(answer) and len(answer) > len(prompt) and answer[: len(prompt)] == prompt
            for answer in pair
        ):
            pair = [answer[len(prompt) :] for answer in pair]  # both have it once more
        return prompt, *pair

    def content(self, row: Row) -> str:
        return " ".join(str(row.values.get(column)) for column in self.columns.values())

    def encode(self, rows: Sequence[Row], processor: PreTrainedTokenizerBase, max_length: int) -> Examples:
        """Token ids of each row's prompt and both answers, these cut to the limit with the prompt before them.

        Rows whose answers have no token before them, which nothing would predict, and those of which the cut leaves no answer, or
        two that are the same, are left out, and their lines are in ``lost``.
        """
        limit = limit_of(processor, max_length, least=2)
        full, alike = f"a prompt of {limit} tokens or more", f"answers that are the same in the first {limit} tokens"
        lost: dict[str, list[int]] = {}
        items, n_truncated = [], 0
        for row in rows:
            try:
                start, *pair = self._encoded(row, processor)
            except RowProblem as problem:
                lost.setdefault(str(problem), []).append(row.line)
                continue
            n_truncated += any(len(ids) > limit for ids in pair)
            chosen, rejected = (ids[start:limit] for ids in pair)
            if not start:
                lost.setdefault("answers that share no token of a prompt", []).append(row.line)
            elif not chosen or not rejected:
                lost.setdefault(full, []).append(row.line)
            elif chosen == rejected:
                lost.setdefault(alike, []).append(row.line)
            else:
                items.append(dict(zip(ITEM, (pair[0][:start], chosen, rejected), strict=True)))
        return Examples(items, n_truncated, lost=lost)

    def _encoded(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[int], list[int]]:
        """How many tokens are the prompt's, and all of both sequences.

        Tokens may merge where prompt and answer meet: answers start at the first token that is not the prompt's.
        """
        prompt, *pair = self._parts(row)
        if isinstance(pair[0], str):
            chosen, rejected = (ended(tokens_of((prompt or "") + text, tokenizer), tokenizer) for text in pair)
            before = chosen if prompt is None else tokens_of(prompt, tokenizer)
            return min(shared(before, chosen), shared(before, rejected)), chosen, rejected
        turns = pair[0][: shared(*pair)] if prompt is None else prompt
        chats = [Chat(answer if prompt is None else [*prompt, *answer]) for answer in pair]
        before = rendered(Chat(turns), tokenizer, prompt=True)
        chosen, rejected = (rendered(chat, tokenizer) for chat in chats)
        start = min(answer_span(before, ids, tokenizer)[0] for ids in (chosen, rejected))
        for chat, ids in zip(chats, (chosen, rejected), strict=True):
            check_heard(chat, tokenizer)
            closing_token(ids, (start, len(ids)), tokenizer)
        return start, chosen, rejected

    @property
    def asked(self) -> Columns:
        """The prompt, which rows of training need not have apart."""
        return {"prompt": self.columns.get("prompt", "prompt")}

    @property
    def _asking(self) -> CausalLM:
        """The task of answering the prompt."""
        return CausalLM({**self.asked, "completion": "completion"})

    def question_problem(self, row: Row) -> str | None:
        return self._asking.question_problem(row)

    def question(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """As ``CausalLM.question``, of the prompt."""
        return self._asking.question(row, tokenizer)

    def predict(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        batch_size: int,
        max_new_tokens: int = 64,
    ) -> Predictions:
        """The answer that the model writes to the prompt, the likeliest token each time."""
        return answers(self.question, model, rows, processor, batch_size, max_new_tokens)

    def seen(self, item: Mapping[str, Any], processor: Any) -> list[Seen]:
        prompt, *pair = (item[name] for name in ITEM)
        return [
            Seen(name, [*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
            for name, answer in zip(("chosen", "rejected"), pair, strict=True)
        ]

    def token_ids(self, item: Mapping[str, Any]) -> list[Sequence[int]]:
        return [[*item[ITEM[0]], *item[answer]] for answer in ITEM[1:]]

    def collator(self, processor: PreTrainedTokenizerBase) -> Pairs:
        return Pairs(processor.pad_token_id)

    def changes_inputs(self) -> str | None:
        return "TRL makes the batches of chosen and rejected answers itself"

    def make_arguments(self, **values: Any) -> TrainingArguments:
        from trl import DPOConfig

        own: dict[str, Any] = {"beta": self.beta, "loss_type": [self.loss_type], "max_length": None}  # cut already
        return DPOConfig(**own, **as_transformers_has_them(values))

    def trainer(
        self,
        model: nn.Module,
        args: TrainingArguments,
        processor: Any,
        train: Examples,
        held_out: Examples | None = None,
        **options: Any,
    ) -> Trainer:
        """TRL's trainer. It logs rewards and margins of its own while it trains, and evaluates by the loss."""
        from datasets import Dataset, IterableDataset
        from trl import DPOTrainer

        class Tuner(OutputMapOnDevice, DPOTrainer):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                # TRL copies an adapter that it is given, as the reference. Without the copy it switches the adapter off.
                if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
                    self.model.delete_adapter("ref")

            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset

            def create_model_card(self, *_: Any, **__: Any) -> None:
                """The run writes its own, beside the adapter."""

        def pairs(examples: Any) -> Any:
            return examples if isinstance(examples, IterableDataset) else Dataset.from_list(list(examples.items))

        return Tuner(
            model=model,
            args=args,
            processing_class=processor,
            train_dataset=pairs(train),
            eval_dataset=None if held_out is None else pairs(held_out),
            **options,
        )

    def spoilt(self, prediction: EvalPrediction, examples: Examples) -> Any:
        """Of the model's own log probabilities; those of the reference may be missing."""
        values: Any = prediction.predictions
        return not_numbers(values[:, :2])

    def compute_metrics(
        self, prediction: EvalPrediction, examples: Examples | None = None, processor: Any = None
    ) -> dict[str, float]:
        """The shares of pairs in which the chosen answer has the larger reward, and is the likelier one as it stands.

        Log probabilities are sums over an answer's tokens, as in the loss. A model without an adapter, or with its adapter off,
        is the reference itself and has no rewards.
        """
        chosen, rejected, *reference = torch.as_tensor(prediction.predictions).double().unbind(1)
        metrics = {"chosen_likelier": (chosen > rejected).double().mean().item()}
        margins = self.beta * ((chosen - reference[0]) - (rejected - reference[1]))
        if not margins.isnan().any():
            metrics = {
                "reward_accuracy": (margins > 0).double().mean().item(),
                "reward_margin": margins.mean().item(),
                **metrics,
            }
        return metrics


@dataclass
class Pairs:
    """Makes a batch of pairs: ids, attention mask and completion mask (B, 2, T), the chosen answer first, and labels of ones."""

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [item["prompt_ids"] for item in items]
        answers = [[item["chosen_ids"], item["rejected_ids"]] for item in items]
        longest = max(len(prompt) + len(one) for prompt, pair in zip(prompts, answers, strict=True) for one in pair)
        ids = torch.full((len(items), 2, longest), self.pad_token_id)
        attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (prompt, pair) in enumerate(zip(prompts, answers, strict=True)):
            for j, answer in enumerate(pair):
                end = len(prompt) + len(answer)
                ids[i, j, :end] = torch.tensor([*prompt, *answer])
                attention[i, j, :end] = 1
                completion[i, j, len(prompt) : end] = 1
        labels = torch.ones(len(items), dtype=torch.long)
        return {"input_ids": ids, "attention_mask": attention, COMPLETION: completion, "labels": labels}
