"""Tiny models and batches for the tests of the cost model, on whatever device is torch's default."""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from reltune.cost.calibration import Calibration
from reltune.cost.profile import Profile
from reltune.cost.step import Conditions
from reltune.layers.inventory import take_inventory

BATCH, LENGTH = 4, 32
MACHINE = Calibration(
    "cpu",
    "made up",
    {},
    {},
    [(1e4, 1e9), (1e7, 1e10)],
    1e-6,
    stated=True,
    laws={
        "float32 product": (1e-5, 1e-10, 2e-11),
        "float32 forward": (0.0, 1e-8, 1e-10),
        "float32 backward": (0.0, 1e-8, 1e-10),
    },
)


def llama(layers: int = 3, tied: bool = False, kv_heads: int = 4) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        use_cache=False,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def bert(layers: int = 3) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=160,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=256,
        d_model=64,
        d_kv=16,
        d_ff=160,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


def mixtral(layers: int = 2) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        use_cache=False,
        experts_implementation="grouped_mm",
    )
    return MixtralForCausalLM(config)


def batch_for(model: nn.Module, device: str) -> dict[str, torch.Tensor]:
    with torch.device(device):
        ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
        classes = isinstance(model, BertForSequenceClassification)
        return {"input_ids": ids, "labels": torch.ones(BATCH, dtype=torch.long) if classes else ids.clone()}


@functools.cache
def profile(layers: int = 4) -> Profile:
    """The costs of ``llama(layers)`` on the made-up machine."""
    with torch.device("meta"):
        model = llama(layers)
    return Profile(model, batch_for(model, "meta"), Conditions(cuda=False), take_inventory(model), MACHINE)
