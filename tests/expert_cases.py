"""Tiny mixtures of experts, and one expert's part of their gradients."""

from __future__ import annotations

from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
)

from relevance_cases import TEXT, made

SIZES = {**{key: value for key, value in TEXT.items() if key != "num_labels"}, "eos_token_id": 1}


def tiny_mixtral(**changes):
    sizes = {**SIZES, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return made(MixtralForCausalLM, MixtralConfig(**{**sizes, "experts_implementation": "eager", **changes}))


def of_expert(module, projection, expert, values):
    """One expert's weight (out, in) and bias out of ``values``, the owner's parameters or their gradients by name."""
    weight = values[projection][expert]
    found = {"weight": weight.mT if isinstance(module, nn.Module) and module.is_transposed else weight}
    if f"{projection}_bias" in values:
        found["bias"] = values[f"{projection}_bias"][expert]
    return found
