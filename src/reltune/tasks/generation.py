"""What a model writes by itself: greedy decoding of many prompts, and how much of it is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from reltune.tasks.task import Written


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """The text that a decoder adds to each prompt (token ids), special tokens left out.

    Prompts of like length share a batch, padded on the left; every text ends at the end-of-sequence token, after
    ``max_new_tokens`` or where the model's positions do.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    for start in tqdm(range(0, len(order), batch_size), desc="generate", unit="batch", leave=False):
        places = order[start : start + batch_size]
        batch = tokenizer.pad(
            {"input_ids": [list(prompts[i]) for i in places]}, padding_side="left", return_tensors="pt"
        ).to(device)
        longest = batch["input_ids"].shape[1]
        settings = GenerationConfig(
            max_new_tokens=max(1, min(max_new_tokens, tokenizer.model_max_length - longest)),
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=_ends(model, tokenizer),
        )
        written = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=settings
        )
        decoded = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        for place, text in zip(places, decoded, strict=True):
            texts[place] = text
    model.train(training)
    return texts


def exact_match(written: Sequence[Written]) -> float:
    """The share of texts that are the reference to the letter, outer space aside; 0 of none."""
    return sum(of.text.strip() == of.reference.strip() for of in written) / max(len(written), 1)


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's own settings (a chat's end of turn)."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(token for token in ends if token is not None)
