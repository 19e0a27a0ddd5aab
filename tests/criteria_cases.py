"""Models, batches and losses that the tests of several criteria share."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from relevance_cases import TEXT, labels_of, made, text_batch


def tiny_gpt2():
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False)
    return made(GPT2LMHeadModel, config)


def tiny_mixtral():
    sizes = {**TEXT, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
    return made(MixtralForCausalLM, MixtralConfig(**sizes, experts_implementation="eager"))


class Convolutions(nn.Module):
    """Plain, strided with padding, grouped and depthwise, reflecting at the border, dilated."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(6, 4, (1, 3), padding="same", groups=2, bias=False),
            nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
            nn.Tanh(),
            nn.Conv2d(4, 5, 2, dilation=2),
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


def lm_batch(lengths=(3, 11, 6, 2, 9)):
    batch = text_batch(lengths)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    return batch


def causal_of_one(outputs, example):
    labels = example["labels"][:, 1:]
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten())


def canonical(module, values):
    return {key: value.mT if isinstance(module, Conv1D) and value.ndim == 2 else value for key, value in values.items()}


def own_loss(outputs, batch):
    """A user's loss: the metric is minus the loss, which unlike an accuracy moves with everything."""
    return nn.functional.cross_entropy(getattr(outputs, "logits", outputs), labels_of(batch), reduction="none")
