"""What tasks on a decoder share: the model, and the arguments of TRL's trainers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainingArguments,
)

from reltune.errors import InputError
from reltune.pretrained import load_config, load_model
from reltune.tasks.chat_templates import with_chat_template
from reltune.tasks.task import Task


class DecoderTask(Task):
    """A task on a language model that continues texts, trained by one of TRL's trainers.

    Attributes:
        chat_template: by which chats are written, as ``chat_templates.text_of`` takes it; None for the model's own.
    """

    peft_task_type: ClassVar[str | None] = "CAUSAL_LM"
    padding_sides: ClassVar[tuple[str, ...]] = ("right",)

    chat_template: str | None

    def load_tokenizer(self, model_name_or_path: str | os.PathLike) -> Any:
        return with_chat_template(super().load_tokenizer(model_name_or_path), self.chat_template)

    def saved_tokenizer(self, model_name_or_path: str | os.PathLike) -> Any:
        return with_chat_template(super().saved_tokenizer(model_name_or_path), self.chat_template)

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
        if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise InputError(
                f"{name} is a {config.model_type!r} model, which has an encoder and cannot continue a text; name the columns of the data "
                "source and target (--task seq2seq), or use a decoder such as Llama or GPT-2."
            )
        return load_model(
            name,
            AutoModelForCausalLM,
            MODEL_FOR_CAUSAL_LM_MAPPING,
            "causal language modelling head",
            self.adapt,
            dtype,
            **options,
        )

    def not_tuned(self, model: nn.Module) -> list[str]:
        """The output embedding: TRL's trainers take its weight for the loss, past any adapter."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        return [name for name, module in model.named_modules() if module is head]


def as_transformers_has_them(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a config of TRL's. What TRL turns on by default, and Transformers does not, stays off."""
    values = {"bf16": False, **values}
    names = (
        "gradient_checkpointing",
        "activation_checkpointing",
    )  # the second is newer Transformers' name of the first
    known = [name for name in names if name in TrainingArguments.__dataclass_fields__]
    if not set(names) & set(values):
        values[known[-1]] = False
    return values
