"""A causal language model of Llama-3.1-8B's shapes with random weights, made where it is to run, and texts for it.

Times and memory depend on shapes, not on what the weights are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Shape:
    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256


TINY = Shape(hidden=64, intermediate=160, layers=2, heads=4, kv_heads=2, vocabulary=300)


def configuration(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )


def llama(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(configuration(shape), dtype=dtype)
    return model.eval().requires_grad_(False)


def texts(shape: Shape, examples: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids, each the label of the token before it; on the CPU, as a data loader gives them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.vocabulary, (examples, tokens), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def made_up_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(vocabulary - 4)}
    words |= {mark: len(words) + i for i, mark in enumerate(("<s>", "</s>", "<unk>", "<pad>"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def weights_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def described(shape: Shape, **more: Any) -> dict[str, Any]:
    return dataclasses.asdict(shape) | more
