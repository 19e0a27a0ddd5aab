"""Fused norms and gated MLPs take the place of what computes the same, of nothing else, and give the same numbers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GemmaConfig, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.t5.modeling_t5 import T5LayerNorm

from reltune.layers.fused import can_be_fused, fuse, fused, restore
from reltune.ops import recompute

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
