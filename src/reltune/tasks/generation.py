"""What a model writes by itself: greedy decoding of many prompts, and how much of it is right."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from reltune.tasks.prediction import NumbersOnly
from reltune.tasks.task import Written

LOOKED_AT = 2000  # answers
# Each token is the likeliest one: without what generation_config.json of chat models says beside the tokens that end a text.
LIKELIEST = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,  # which wins over min_length
}


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    stops: Collection[int] = (),
    progress: bool = True,
) -> list[str]:
    """The text that a decoder adds to each prompt (token ids), special tokens left out.

    Prompts of like length share a batch, padded on the left, and none shares one with a longer prompt where the model is told no
    positions; every text ends at the end-of-sequence token or one of ``stops``, after ``max_new_tokens`` or where the model's
    positions do. The processes of torch.distributed, each of which calls this with the whole model, share the prompts, and all
    get all texts.
    """
    if not prompts:
        return []
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batch_size = max(1, min(batch_size, -(-len(prompts) // processes)))
    texts: dict[int, str] = {}
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    batches = _batches([len(prompt) for prompt in prompts], batch_size, _is_told_positions(model))[rank::processes]
    for places in tqdm(batches, desc="generate", unit="batch", leave=False, disable=rank > 0 or not progress):
        batch = tokenizer.pad(
            {"input_ids": [list(prompts[i]) for i in places]}, padding_side="left", return_tensors="pt"
        ).to(device)
        longest = batch["input_ids"].shape[1]
        settings = GenerationConfig(
            max_new_tokens=max(1, min(max_new_tokens, tokenizer.model_max_length - longest)),
            **LIKELIEST,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted({*ends_of(model, tokenizer), *stops}),
        )
        written = model.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=settings,
            logits_processor=[NumbersOnly()],
        )
        decoded = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        texts |= zip(places, decoded, strict=True)
    model.train(training)
    if processes > 1:
        shares: list[Any] = [None] * processes
        dist.all_gather_object(shares, texts)
        texts = {place: text for share in shares for place, text in share.items()}
    return [texts[i] for i in range(len(prompts))]


def _batches(lengths: Sequence[int], batch_size: int, padded: bool) -> list[list[int]]:
    """The places of prompts that share a batch, short ones first; of one length each unless they may be padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [order] if padded else [list(same) for _, same in groupby(order, key=lengths.__getitem__)]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def _is_told_positions(model: Any) -> bool:
    """Whether generation tells the model each token's position, which padding before a prompt would shift."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(own.forward).parameters


def exact_match(written: Sequence[Written]) -> float:
    """The share of texts that are the reference to the letter, outer space aside; 0 of none."""
    return sum(one.text.strip() == one.reference.strip() for one in written) / max(len(written), 1)


def remarks_on_answers(
    answers: Sequence[tuple[Sequence[int], str]], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[str]:
    """Sentences on answers that no model could write to the letter. Each is given as the token ids that are learned, the one that
    ends it among them, and as the text that it stands for."""
    remarks: list[str] = []
    if not answers:
        return remarks
    answers = answers[:LOOKED_AT]
    long = sum(len(ids) - 1 > max_new_tokens for ids, _ in answers)
    if long:
        remarks.append(
            f"{long:,} of {len(answers):,} answers are longer than the {max_new_tokens} tokens that the model may write in evaluation, "
            "so that it cannot match them; a larger --max_new_tokens lets it."
        )
    texts = tokenizer.batch_decode([list(ids) for ids, _ in answers], skip_special_tokens=True)
    pairs = [(text.strip(), wanted.strip()) for text, (_, wanted) in zip(texts, answers, strict=True)]
    others = [(text, wanted) for text, wanted in pairs if not wanted.startswith(text)]  # some are cut
    if others:
        text, wanted = (one if len(one) < 60 else f"{one[:60]}…" for one in min(others, key=lambda pair: len(pair[1])))
        remarks.append(
            f"The tokenizer cannot write {len(others):,} of {len(answers):,} answers as they are, so that the model cannot match them: "
            f"{wanted!r} becomes {text!r}."
        )
    return remarks


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's own settings (a chat's end of turn)."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return sorted(token for token in ends if token is not None)
