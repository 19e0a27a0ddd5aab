"""Preference tuning: pairs as examples, DPO's loss against TRL's and by hand, relevance against plain autograd, whole runs."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from oracles.criteria import expected
from relevance_cases import TEXT, VOCAB, assert_parts_equal, made, measure
from reltune.records import InputError
from reltune.relevance.batches import contents
from reltune.tasks.losses import LOSSES, preference_loss
from test_criteria import canonical
from test_experts import of_expert, tiny_mixtral

pytestmark = pytest.mark.usefixtures("one_thread")

BETA = 0.1
LENGTHS = ((3, 9, 5), (2, 3, 8), (4, 6, 6), (1, 4, 2), (5, 11, 7))  # of prompts, and of both sequences


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {key: value for key, value in TEXT.items() if key != "num_labels"}
    return made(LlamaForCausalLM, LlamaConfig(**sizes, num_key_value_heads=1, attention_bias=True, **changes))


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False, initializer_range=0.2
    )
    return made(GPT2LMHeadModel, config)


def pair_batch(lengths: Any = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    longest = max(max(of) for of in lengths)
    batch = {key: torch.zeros(len(lengths), 2, longest, dtype=torch.long) for key in ("input_ids", "attention_mask")}
    batch["completion_mask"] = torch.zeros_like(batch["input_ids"])
    for i, (prompt, *ends) in enumerate(lengths):
        start = torch.randint(1, VOCAB, (prompt,), generator=draw)
        for j, end in enumerate(ends):
            answer = torch.randint(1, VOCAB, (end - prompt,), generator=draw)
            batch["input_ids"][i, j, :end] = torch.cat([start, answer])
            batch["attention_mask"][i, j, :end] = 1
            batch["completion_mask"][i, j, prompt:end] = 1
    return {**batch, "labels": torch.ones(len(lengths), dtype=torch.long)}


def part(batch: dict[str, Tensor], *places: int) -> dict[str, Tensor]:
    """Some of the pairs, cut to their own longest sequence."""
    some = {key: value[list(places)] for key, value in batch.items()}
    longest = int(some["attention_mask"].sum(-1).max())
    return {key: value[..., :longest] if value.ndim == 3 else value for key, value in some.items()}


def log_prob(model: nn.Module, batch: dict[str, Tensor], i: int, j: int) -> Tensor:
    """One answer's log probability, alone and without padding."""
    end, answer = int(batch["attention_mask"][i, j].sum()), int(batch["completion_mask"][i, j].sum())
    ids = batch["input_ids"][i, j, :end]
    logits = model(input_ids=ids[None]).logits[0, :-1].double()
    return -F.cross_entropy(logits, ids[1:], reduction="none")[-answer:].sum()


def pair_losses(model: nn.Module, batch: dict[str, Tensor], reference: list[Tensor] | None = None) -> list[Tensor]:
    """DPO's loss of every pair by the paper's equation 7."""
    losses = []
    for i in range(len(batch["labels"])):
        log_probs = torch.stack([log_prob(model, batch, i, j) for j in (0, 1)])
        of_reference = log_probs.detach() if reference is None else reference[i]
        ratios = log_probs - of_reference
        losses.append(-torch.log(torch.sigmoid(BETA * ratios[0] - BETA * ratios[1])))
    return losses


def pair_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Every parameter's gradient of every pair's loss, by plain autograd."""
    named = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for loss in pair_losses(model.eval(), batch):
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        for (name, p), g in zip(named.items(), gradients, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g)
    return found


def by_module(model: nn.Module, infos: list[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values of parameters (or lists of them, one per pair) as each measured module's own, of experts each its part."""
    found = {}
    for info in infos:
        module = model.get_submodule(info.owner)
        own = {name: values[f"{info.owner}.{name}"] for name, _ in module.named_parameters(recurse=False)}
        if info.kind == "experts":
            projection, expert = info.name.split(".")[-2:]
            found[info.name] = of_expert(module, projection, int(expert), own)
        else:
            found[info.name] = canonical(module, own)
    return found


CRITERIA = ["fisher", "gradient", "taylor", "relative_gradient", "gradient_snr"]


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_mixtral])
def test_relevance_is_that_of_pairs(make: Any, size: int) -> None:
    model, batch = make(), pair_batch()
    batches = [part(batch, *range(start, min(start + size, 5))) for start in range(0, 5, size)]
    found = measure(model, batches, "preference", [*CRITERIA, "fisher_true"])
    infos = found.inventory.modules
    kinds = {info.kind for info in infos}
    assert {"linear", "norm", "embedding"} <= kinds
    gradients = pair_gradients(model, batch)
    each = [by_module(model, infos, {k: of[i] for k, of in gradients.items()}) for i in range(5)]
    weights = by_module(model, infos, {k: p.detach() for k, p in model.named_parameters()})
    for criterion in CRITERIA:
        wanted = {}
        for info in infos:
            shell = nn.LayerNorm(1) if info.kind == "norm" else nn.Linear(1, 1, bias=info.bias)
            wanted[info.name] = expected(criterion, shell, [of[info.name] for of in each], weights[info.name])
        own = {
            name: {p: v for p, v in parts.items() if p in wanted[name]}
            for name, parts in found.parts[criterion].items()
            if name in wanted
        }
        assert_parts_equal(own, wanted, 1e-7 if criterion in ("gradient_snr", "relative_gradient") else 1e-9)
    # whichever answer is drawn as the preferred one, at the untouched model its gradient is the same but for the sign
    assert_parts_equal(found.parts["fisher_true"], found.parts["fisher"], 1e-12)
