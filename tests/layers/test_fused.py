"""Fused norms and gated MLPs take the place of what computes the same, of nothing else, and give the same numbers."""

from __future__ import annotations

import copy
import pickle
import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    GemmaConfig,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.t5.modeling_t5 import T5LayerNorm

from reltune.layers.fused import can_be_fused, fuse, fused, restore
from reltune.ops import recompute, rotation

SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 1}


class Reversed(LlamaMLP):
    """Of the same parts, and another computation."""

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Scaled(LlamaMLP):
    """Needs more of itself than its parts."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.config.pretraining_tp)


def gated_mlps():
    torch.manual_seed(0)
    return {
        "llama": LlamaMLP(LlamaConfig(**SIZES)),
        "qwen": Qwen3MLP(Qwen3Config(**SIZES)),
        "tanh": GemmaMLP(GemmaConfig(**SIZES, hidden_act="gelu_pytorch_tanh")),
        "gelu": LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu")),
    }


@pytest.fixture
def everywhere():
    with recompute.force(True):
        yield


def test_norms_that_compute_the_same_are_taken_and_the_rest_left(everywhere):
    model = nn.ModuleDict(
        {"llama": LlamaRMSNorm(48), "gemma": Gemma2RMSNorm(48), "t5": T5LayerNorm(48), "layer": nn.LayerNorm(48)}
    )
    model["own"], model["liger"] = LlamaRMSNorm(48), LlamaRMSNorm(48)
    model.to(torch.bfloat16).requires_grad_(False)
    for module in model.values():
        module.weight.normal_()
    model["own"].forward = own = model["t5"].forward

    def theirs(self, x):
        return LlamaRMSNorm.forward(self, x)

    theirs.__module__ = "liger_kernel.transformers.rms_norm"  # which puts its forwards into the modules of a model
    model["liger"].forward = liger = theirs.__get__(model["liger"])
    x = torch.randn(2, 3, 48, dtype=torch.bfloat16)
    before = {name: module(x) for name, module in model.items()}
    with pytest.raises(KeyError), fused(model):
        unpatched = {name for name, module in model.items() if module.__dict__.get("forward") in (None, own)}
        assert unpatched == {"gemma", "layer", "own"} and model["liger"].forward is not liger
        for name, module in model.items():
            assert torch.equal(module(x), before[name])
        raise KeyError
    assert {name: module.__dict__.get("forward") for name, module in model.items() if "forward" in module.__dict__} == {
        "own": own,
        "liger": liger,
    }


@pytest.mark.parametrize("name", gated_mlps())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_mlps_give_the_same_bits(name, dtype, everywhere):
    plain = gated_mlps()[name].to(dtype)
    taken = copy.deepcopy(plain)
    assert can_be_fused(taken) and fuse([taken]) == [taken] and fuse([taken]) == []
    x = torch.randn(2, 5, 16, dtype=dtype)
    found = []
    for module in (plain, taken):
        own = x.clone().requires_grad_()
        y = module(own)
        y.square().sum().backward()
        found.append([y, own.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    again = pickle.loads(pickle.dumps(taken))
    again.down_proj.weight.data.zero_()
    assert not again(x).any() and torch.equal(taken(x), plain(x))  # a copy computes with weights of its own
    restore(nn.Sequential(taken))
    assert "forward" not in taken.__dict__


class OfLiger(nn.Module):
    """As Liger's class, which takes the place of Llama's in its file: the activation is in the kernel."""

    def __init__(self, *parts):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = parts

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def test_a_gated_mlp_of_liger_s_own_class_is_fused(everywhere, monkeypatch):
    llama = gated_mlps()["llama"]
    theirs = OfLiger(llama.gate_proj, llama.up_proj, llama.down_proj)
    assert not can_be_fused(theirs)  # as any class without an activation
    monkeypatch.setattr(OfLiger, "__module__", "liger_kernel.transformers.swiglu")
    assert can_be_fused(theirs) and fuse([theirs]) == [theirs]
    x = torch.randn(2, 3, 16)
    assert torch.equal(theirs(x), llama(x))
    with recompute.force(False):  # computes as written where nothing is fused
        assert torch.equal(theirs(x), llama(x))


@pytest.mark.parametrize("act", ["relu", "gelu_new", "quick_gelu"])
def test_other_activations_and_computations_are_left(act, everywhere):
    llama, phi = LlamaConfig(**SIZES), Phi3Config(**SIZES, pad_token_id=0)
    others = [LlamaMLP(LlamaConfig(**SIZES, hidden_act=act)), Reversed(llama), Scaled(llama), Phi3MLP(phi)]
    if act == "gelu_new":  # the same function as gelu_pytorch_tanh, written out
        assert fuse(others[:1]) == others[:1]
        others = others[1:]
    assert fuse(others) == []


def test_hooks_in_between_are_called(everywhere):
    mlp = gated_mlps()["llama"]
    calls = []
    fuse([mlp])
    x = torch.randn(2, 3, 16)
    before = mlp(x)
    for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    assert torch.equal(mlp(x), before)
    assert calls == [mlp.gate_proj, mlp.act_fn, mlp.up_proj, mlp.down_proj]


def test_nothing_is_fused_on_a_cpu():
    assert fuse([*gated_mlps().values(), LlamaRMSNorm(8).bfloat16()]) == []
    mlp = gated_mlps()["llama"]
    with recompute.force(True):
        fuse([mlp])
    x = torch.randn(2, 3, 16, requires_grad=True)  # outside of the switch a module that was changed computes as written
    y = mlp(x)
    node = y.grad_fn.next_functions[0][0]
    while node is not None and "Mul" not in type(node).__name__:
        assert "GatedProduct" not in type(node).__name__
        node = next((of for of, _ in node.next_functions if of is not None), None)
    assert torch.equal(y, F.linear(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight))


def test_a_norm_that_is_trained_gets_its_gradient_although_it_was_fused_frozen(everywhere):
    norm = LlamaRMSNorm(48).to(torch.bfloat16).requires_grad_(False)
    x, g = torch.randn(2, 3, 48, dtype=torch.bfloat16), torch.randn(2, 3, 48, dtype=torch.bfloat16)
    model = nn.Sequential(norm)
    assert fuse(model.modules()) == [norm] and fuse(model.modules()) == []
    before = norm(x)
    norm.requires_grad_(True)
    norm(x).backward(g)
    found = norm.weight.grad
    restore(model)
    norm.weight.grad = None
    norm(x).backward(g)
    assert "forward" not in norm.__dict__ and torch.equal(norm(x), before)
    assert found.abs().sum() > 0 and torch.equal(found, norm.weight.grad)


# -- rotary position embeddings ----------------------------------------------------------------------------------------

ROTATING = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=40)),
    "qwen": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8, vocab_size=40)),
}


def attentions(model):
    return [module for name, module in model.named_modules() if name.endswith("self_attn")]


@pytest.mark.parametrize("name", ROTATING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotations_give_the_same_bits(name, dtype, everywhere):
    kind, config = ROTATING[name]
    torch.manual_seed(0)
    model = kind(config).to(dtype)
    of_file = sys.modules[kind.__module__].__dict__["apply_rotary_pos_emb"]
    ids = torch.arange(14).reshape(2, 7)
    found = []
    for on in (False, True):
        if on:
            assert all(map(can_be_fused, attentions(model))) and fuse(attentions(model)) == attentions(model)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        with mock.patch.object(rotation.Rotation, "apply", wraps=rotation.Rotation.apply) as rotating:
            logits = model(inputs_embeds=embedded, attention_mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2])).logits
        assert rotating.call_count == (config.num_hidden_layers if on else 0)
        logits.square().sum().backward()
        found.append([logits, embedded.grad])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert sys.modules[kind.__module__].__dict__["apply_rotary_pos_emb"] is of_file
    restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_rotation_is_fused_once_liger_s_own_is_out_of_the_file(everywhere, monkeypatch):
    """Liger's cannot be tried out on a CPU, and takes another's place while it is there."""
    kind, config = ROTATING["llama"]

    class Anew(modeling_llama.LlamaAttention):  # which nothing has asked for before
        pass

    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama, "LlamaAttention", Anew)
        model = kind(config)
    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama, "apply_rotary_pos_emb", mock.Mock(side_effect=RuntimeError("no CUDA device")))
        assert fuse(attentions(model)) == []
    assert fuse(attentions(model)) == attentions(model)


def test_gradients_of_a_rotation_are_those_of_plain_autograd():
    q, k = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 1, 5, 8, dtype=torch.float64)
    cos, sin = (torch.randn(1, 5, 8, dtype=torch.float64) for _ in range(2))
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rotation.Rotation.apply(q, k, cos, sin), (q, k))


def test_other_rotations_are_left(everywhere):
    """Phi-3 turns a part of the features, GPT-NeoX too and past another function's arguments, GPT-J neighbouring ones."""
    pairs = [
        (Phi3ForCausalLM, Phi3Config(**SIZES, pad_token_id=0, vocab_size=40, partial_rotary_factor=0.5)),
        (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES, vocab_size=40, rotary_pct=0.5)),
        (GPTJForCausalLM, GPTJConfig(n_embd=16, n_head=2, n_layer=1, rotary_dim=4, vocab_size=40)),
    ]
    for kind, config in pairs:
        torch.manual_seed(0)
        model = kind(config).eval()
        ids = torch.arange(14).reshape(2, 7)
        before = model(ids).logits
        with fused(model), mock.patch.object(rotation.Rotation, "apply", side_effect=AssertionError):
            assert torch.allclose(model(ids).logits, before, atol=1e-6)
