"""What tasks on a decoder share: the model, and how texts and chats become its tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from reltune.errors import InputError
from reltune.pretrained import as_it_is, load_config, load_model
from reltune.tasks.task import Task

Messages = list[dict[str, Any]]


class DecoderTask(Task):
    """A task on a language model that continues texts, trained by one of TRL's trainers."""

    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"

    @property
    def best(self) -> str:
        return "loss"

    def load_model(
        self, model_name_or_path: str | os.PathLike, dtype: torch.dtype | str | None = None, **options: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        name = os.fspath(model_name_or_path)
        config = load_config(name)
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
            raise InputError(
                f"{name} is a {config.model_type!r} model, which sees the whole text at once and cannot continue one; "
                "use a decoder such as Llama or GPT-2, or --task masked_lm."
            )
        return load_model(
            name,
            AutoModelForCausalLM,
            MODEL_FOR_CAUSAL_LM_MAPPING,
            "causal language modelling head",
            as_it_is,
            dtype,
            lambda: self.load_tokenizer(name).pad_token_id,
            **options,
        )

    def load_tokenizer(self, model_name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = super().load_tokenizer(model_name_or_path)
        tokenizer.padding_side = "right"  # positions count from the first token
        return tokenizer

    def not_tuned(self, model: nn.Module) -> list[str]:
        """The output embedding: TRL's trainers take its weight for the loss, past any adapter."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        return [name for name, module in model.named_modules() if module is head]


def as_transformers_has_them(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a config of TRL's, with what Transformers leaves off and TRL turns on left off."""
    values = {"bf16": False, **values}
    names = (
        "gradient_checkpointing",
        "activation_checkpointing",
    )  # the second is newer Transformers' name of the first
    known = [name for name in names if name in TrainingArguments.__dataclass_fields__]
    if not set(names) & set(values):
        values[known[-1]] = False
    return values


def messages_problem(messages: list[Any], column: str) -> str | None:
    """What is wrong with a list that should be messages, as a phrase, or None."""
    if not messages:
        return f"an empty {column!r}"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return f"a {column!r} with a message that has no role"
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            return f"a {column!r} with a message that has no content"
    return None


def rendered(messages: Messages, tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> list[int]:
    """A chat's token ids by the tokenizer's template; of a ``prompt``, with what opens the answer."""
    if tokenizer.chat_template is None:
        raise InputError(
            "the model's tokenizer has no chat template, which rows of messages need; use an instruction-tuned model, or "
            "rows of prompt and completion texts."
        )
    if not messages:
        return []
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=prompt
    )
    return list(encoded["input_ids"])


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids with the end-of-sequence token behind them."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def shared(items: Sequence[Any], others: Sequence[Any]) -> int:
    """How many leading items both have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(items, others, strict=False)))
