"""Tiny models in float64, held in memory alone: what relevance is measured on and adapters are trained on in the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB, LABELS = 20, 3
LANGUAGE_MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
CLASSIFIER = {**LANGUAGE_MODEL, "num_labels": LABELS}


def made(kind: type, config: PretrainedConfig) -> Any:
    """A model of the class with this config, the same at every call."""
    torch.manual_seed(0)
    return _stirred(kind(config).double())


def _stirred(model: Any) -> Any:
    """Gains that are not all one and biases that are not all zero, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


# -- classifiers ----------------------------------------------------------------------------------------------------


def tiny_bert(**changes: Any) -> BertForSequenceClassification:
    return made(BertForSequenceClassification, BertConfig(**{**CLASSIFIER, **changes}))


def tiny_roberta() -> RobertaForSequenceClassification:
    return made(RobertaForSequenceClassification, RobertaConfig(**CLASSIFIER))


def tiny_llama(**changes: Any) -> LlamaForSequenceClassification:
    return made(LlamaForSequenceClassification, LlamaConfig(**{**CLASSIFIER, "num_key_value_heads": 1, **changes}))


def tiny_qwen2() -> Qwen2ForSequenceClassification:
    return made(Qwen2ForSequenceClassification, Qwen2Config(**CLASSIFIER, num_key_value_heads=1))


def tiny_vit() -> ViTForImageClassification:
    sizes = {key: value for key, value in CLASSIFIER.items() if key.endswith(("size", "layers", "heads", "labels"))}
    sizes.pop("vocab_size")
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, initializer_range=0.2)
    return made(ViTForImageClassification, config)


def tiny_sequential() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 5, bias=False), nn.RMSNorm(5)]
    return _stirred(nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, LABELS)).double())


MODELS = {
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "vit": tiny_vit,
    "sequential": tiny_sequential,
}


class Convolutions(nn.Module):
    """Plain, strided with padding, grouped and depthwise, reflecting at the border, dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(6, 4, (1, 3), padding="same", groups=2, bias=False),
            nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
            nn.Tanh(),
            nn.Conv2d(4, 5, 2, dilation=2),
        )
        self.head = nn.Linear(5, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


# -- language models ------------------------------------------------------------------------------------------------


def tiny_gpt2(**changes: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return made(GPT2LMHeadModel, GPT2Config(**{**sizes, "tie_word_embeddings": False, **changes}))


def tiny_mixtral(**changes: Any) -> MixtralForCausalLM:
    """Four experts in each layer, two of which see a token."""
    sizes = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1}
    config = MixtralConfig(**{**LANGUAGE_MODEL, **sizes, "experts_implementation": "eager", **changes})
    return made(MixtralForCausalLM, config)
