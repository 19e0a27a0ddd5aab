"""A language model's loss without all of its logits: the same loss and gradients, and whoever looks at the logits gets them."""

from __future__ import annotations

import contextlib
import copy
import pickle
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from reltune import ReltuneConfig
from reltune.layers.deferred_logits import DeferredLogits, defer, deferred, undo
from reltune.relevance.measure import analyze
from reltune.relevance.statistics import data_pass

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 41}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=False)


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).to(dtype)


def batch(seed=0, masked=True):
    ids = torch.randint(41, (3, 7), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    if masked:
        labels[0, :5] = labels[2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def plain_loss(model, inputs, items=None):
    """By torch's own operations, in the logits' dtype."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), reduction="sum")
    return losses / ((inputs["labels"][:, 1:] != -100).sum() if items is None else items)


@pytest.fixture
def tuned():
    return get_peft_model(llama(), ReltuneConfig(target_modules=["q_proj", "down_proj"], r=3))


@pytest.mark.parametrize("items", [None, 5, torch.tensor(9)])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_are_those_of_all_logits(tuned, masked, items):
    inputs = batch(masked=masked)
    extra = {} if items is None else {"num_items_in_batch": items}
    found = []
    for loss in (lambda: tuned(**inputs, **extra).loss, lambda: plain_loss(tuned, inputs, items)):
        value = loss()
        value.backward()
        found.append([value, *(p.grad for p in tuned.parameters() if p.requires_grad)])
        tuned.zero_grad()
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_only_tokens_with_a_label_reach_the_output_map(tuned):
    with mock.patch.object(DeferredLogits, "computed", side_effect=AssertionError):
        outputs = tuned(**batch())
    assert outputs.logits.of_tokens.losses.shape == (2 + 6,) and outputs.logits.shape == (3, 7, 41)
    assert outputs.logits.dtype == torch.float64 and outputs.logits.device.type == "cpu"


def test_accumulated_parts_sum_up_to_the_whole(tuned):
    inputs = batch()
    items = (inputs["labels"][:, 1:] != -100).sum()
    gradients = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):  # the last has no label at all
        for part in parts:
            tuned(**{name: value[part] for name, value in inputs.items()}, num_items_in_batch=items).loss.backward()
        gradients.append([p.grad for p in tuned.parameters() if p.requires_grad])
        tuned.zero_grad()
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_whoever_looks_at_the_logits_gets_them(tuned):
    inputs = batch()
    outputs = tuned(**inputs)
    wanted = tuned(input_ids=inputs["input_ids"]).logits
    assert type(outputs.logits) is DeferredLogits and type(wanted) is torch.Tensor
    for look in (
        lambda x: x[..., :-1, :],
        lambda x: x.argmax(-1),
        lambda x: torch.cat([x, x]),
        lambda x: x.float() * 2,
        lambda x: F.cross_entropy(input=x[0], target=inputs["input_ids"][0]),
        lambda x: x.detach().numpy(),
        lambda x: copy.deepcopy(x.detach()),
        lambda x: pickle.loads(pickle.dumps(x.detach())),
    ):
        found, expected = (torch.as_tensor(look(x)) for x in (outputs.logits, wanted))
        assert type(found) is torch.Tensor and torch.equal(found, expected)
    copied = outputs.logits.clone()
    with torch.no_grad():
        copied[0, 0, 0] = 7  # before anything has looked at it
    assert copied[0, 0, 0] == 7 != outputs.logits[0, 0, 0]
    (gradient,) = torch.autograd.grad(outputs.logits.square().sum(), outputs.logits.hidden)
    assert gradient.any() and outputs[1] is outputs.logits
    with pytest.raises(RuntimeError, match="deferred"):
        Next.apply(outputs.logits)


class Next(torch.autograd.Function):
    """Torch does not ask its argument before."""

    @staticmethod
    def forward(ctx, x):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.add(x, 1)


@pytest.mark.parametrize("model", ["gemma", "granite", "cohere"])
def test_models_that_cap_or_scale_their_logits_compute_them(model):
    kind, config = {
        "gemma": (
            Gemma2ForCausalLM,
            Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5),
        ),
        "granite": (GraniteForCausalLM, GraniteConfig(**SIZES, num_key_value_heads=1, logits_scaling=4.0)),
        "cohere": (CohereForCausalLM, CohereConfig(**SIZES, num_key_value_heads=1, logit_scale=0.25, pad_token_id=0)),
    }[model]
    torch.manual_seed(0)
    base = kind(config).double().requires_grad_(False)
    inputs = batch()
    embedded = base.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
    inputs = {"inputs_embeds": embedded, "labels": inputs["labels"]}
    found = []
    for on in (False, True):
        assert defer(base, inputs) == on if on else True
        outputs = base(**inputs)
        undo(base)
        assert type(outputs.logits) is torch.Tensor
        found.append([outputs.loss, outputs.logits, *torch.autograd.grad(outputs.loss, embedded)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b)


def test_what_is_not_a_plain_frozen_map_is_left_alone():
    inputs = batch()
    trained = llama()
    watched = llama().requires_grad_(False)
    watched.lm_head.register_forward_hook(lambda *_: None)
    other_loss = llama().requires_grad_(False)
    other_loss.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    own_forward = llama().requires_grad_(False)
    own_forward.lm_head.forward = lambda x: F.linear(x, own_forward.lm_head.weight)
    replica, sharded = (llama().requires_grad_(False) for _ in range(2))
    replica._is_replica, sharded.unshard = True, lambda: None
    for model in (trained, watched, other_loss, own_forward, replica, sharded, nn.Linear(3, 3)):
        assert not defer(model, inputs)
    frozen = llama().requires_grad_(False)
    assert not defer(frozen, {"input_ids": inputs["input_ids"]}) and not defer(frozen, {"labels": None})
    assert defer(frozen, inputs) and not defer(frozen, inputs)
    undo(frozen)
    undo(frozen)
    assert "forward" not in frozen.lm_head.__dict__ and "_loss_function" not in frozen.__dict__


def test_a_model_is_as_before_after_an_error_and_after_unloading(tuned):
    base = tuned.get_base_model()
    with pytest.raises(IndexError):
        tuned(input_ids=torch.tensor([[99]]), labels=torch.tensor([[1]]))
    assert "forward" not in base.lm_head.__dict__ and "_loss_function" not in base.__dict__
    assert tuned(**batch()).loss.requires_grad
    tuned.unload()
    for name, value in vars(base).items():
        if "hook" in name and hasattr(value, "__len__"):
            assert not value, name


def test_without_gradients_logits_are_logits(tuned):
    with torch.no_grad():
        assert type(tuned(**batch()).logits) is torch.Tensor
    assert type(tuned(input_ids=batch()["input_ids"]).logits) is torch.Tensor


def test_tied_and_trained_embeddings_keep_their_gradient():
    """GPT-2's output map has the weight of its embedding: it is trained here, and the map with it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=41, n_positions=16)).double()
    inputs = batch()
    outputs = model(**inputs)
    assert not defer(model, inputs) and type(outputs.logits) is torch.Tensor
    model.requires_grad_(False)
    assert defer(model, inputs)
    undo(model)


def test_mixed_precision_ends_in_float32_without_logits():
    tuned = get_peft_model(llama(torch.float32), ReltuneConfig(target_modules=["q_proj"], r=3))
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tuned(**inputs)
        wanted = tuned(input_ids=inputs["input_ids"]).logits
    assert outputs.logits.dtype == wanted.dtype == torch.bfloat16
    with mock.patch.object(DeferredLogits, "computed", side_effect=AssertionError):
        wide = outputs.logits.clone().float()
    assert wide.dtype == torch.float32 and wide.of_tokens is outputs.logits.of_tokens
    assert torch.equal(wide + 0, wanted.float()) and torch.equal(outputs.logits + 0, wanted)


@pytest.mark.parametrize("measured", [["q_proj", "down_proj"], ["q_proj", "lm_head"]], ids=str)
def test_the_analysis_measures_the_same_without_logits(measured):
    base, inputs = llama(), batch()
    found = []
    for ways in (deferred, lambda model: contextlib.nullcontext()):
        with (
            mock.patch.object(data_pass, "deferred", ways),
            mock.patch.object(DeferredLogits, "losses", autospec=True, side_effect=DeferredLogits.losses) as losses,
        ):
            scores = analyze(base, [inputs], "causal_lm", target_modules=measured, progress=False)
            found.append(scores.by("column", "fisher"))
        assert bool(losses.call_count) == (ways is deferred and "lm_head" not in measured)  # its input is looked at
    assert len(found[0]) == len(measured)
    for name, scores in found[0].items():
        assert scores.any() and torch.allclose(scores, found[1][name], rtol=1e-6)
