"""transformers' gradient checkpointing in the analysis: blocks are recomputed, in evaluation mode, with equal scores."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from measured_models import made, tiny_bert, tiny_llama, tiny_vit
from relevance_cases import assert_parts_equal, data_for, measure, split, text_batch

CRITERIA = ["fisher", "fisher_true", "gradient", "taylor", "activation"]


def gpt2():
    # with dropout and caches on, as pretrained ones are
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False)
    return made(GPT2LMHeadModel, config)


def t5():
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return made(T5ForConditionalGeneration, T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False))


def bart():
    """Its blocks themselves, and not only modules in them, have dropout."""
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.3, "activation_dropout": 0.3}
    sizes |= {"vocab_size": 20, "d_model": 16, "max_position_embeddings": 32, "num_labels": 3}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 19, "decoder_start_token_id": 1}
    return made(BartForSequenceClassification, BartConfig(**sizes, **heads, **tokens))


def labelled(batch):
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    return batch


def ended(batch):
    batch["input_ids"].clamp_(max=18)
    batch["input_ids"][torch.arange(7), batch["attention_mask"].sum(1) - 1] = 19  # BART reads its answer there
    return batch


def decoded(batch):
    batch = labelled(batch)
    return {**batch, "decoder_input_ids": batch["input_ids"].roll(1, 1)}


MODELS = {
    "bert": (lambda: tiny_bert(hidden_dropout_prob=0.3), None, lambda batch: batch),
    "llama": (tiny_llama, None, lambda batch: batch),
    "gpt2": (gpt2, "causal_lm", labelled),
    "t5": (t5, "seq2seq", decoded),
    "vit": (tiny_vit, None, lambda batch: batch),
    "bart": (bart, None, ended),
}


def enable(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers have another name for it
        model.gradient_checkpointing_enable(**options)


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, None) for name in MODELS), ("bert", True), ("bert", False), ("gpt2", True)]
)
def test_blocks_are_recomputed_with_equal_scores(name, reentrant):
    make, loss, prepared = MODELS[name]
    model = make().train()
    batches = split(prepared(data_for(model)), 4)
    options = {"always_trained": (), "exclude_modules": ["classification_head"] if name == "bart" else ()}
    wanted = measure(model, batches, loss, CRITERIA, **options)
    enable(model, **({} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}))
    functions = [block._gradient_checkpointing_func for block in blocks_of(model)]

    calls = {}
    maps = (torch.nn.Linear, Conv1D)
    leaves = [next(m for m in block.modules() if isinstance(m, maps)) for block in blocks_of(model)]
    handles = [
        leaf.register_forward_pre_hook(lambda module, _: calls.update({module: calls.get(module, 0) + 1}))
        for leaf in leaves
    ]
    measure(model, batches[:1], loss, ["fisher"], **options)
    for handle in handles:
        handle.remove()
    assert len(blocks_of(model)) >= 2
    # the pass and the one that tells examples apart, each forward and again backward
    assert {calls[leaf] for leaf in leaves} == {4}

    found = measure(model, batches, loss, CRITERIA, **options)
    assert found.provenance == wanted.provenance
    for criterion in CRITERIA:
        assert_parts_equal(found.parts[criterion], wanted.parts[criterion])
    assert all(module.training for module in model.modules())
    assert [block._gradient_checkpointing_func for block in blocks_of(model)] == functions
    assert getattr(model.config, "use_cache", True)


def test_all_is_put_back_after_an_error():
    model = gpt2().eval()
    enable(model)
    before = [(m, m.training, getattr(m, "_gradient_checkpointing_func", None)) for m in model.modules()]
    with pytest.raises(ZeroDivisionError):
        measure(model, [labelled(text_batch((3, 4)))], lambda outputs, batch: 1 / 0)
    assert [(m, m.training, getattr(m, "_gradient_checkpointing_func", None)) for m in model.modules()] == before
    assert model.config.use_cache


def test_blocks_left_out_are_not_recomputed():
    model = tiny_bert()
    enable(model)
    blocks_of(model)[0].gradient_checkpointing = False  # as every_n_layers=2 would have it for the other
    calls = []
    for block in blocks_of(model):
        block.attention.self.query.register_forward_pre_hook(lambda module, _: calls.append(module))
    measure(model, [text_batch((5,))])
    first, second = (block.attention.self.query for block in blocks_of(model))
    assert calls.count(first) == 1 and calls.count(second) == 2
