"""Inputs that are made again in the backward pass: the same scores, bit by bit, and nothing kept for them."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from measured_models import MODELS, tiny_gpt2, tiny_mixtral
from relevance_cases import data_for, lm_batch, measure, split
from reltune.errors import AnalysisError
from reltune.ops import recompute
from reltune.ops.recompute import is_exact, recipe
from reltune.relevance.statistics import data_pass
from reltune.relevance.statistics.collector import Collector

CRITERIA = ["fisher", "gradient", "taylor"]


@pytest.fixture
def recomputing(monkeypatch):
    """Analyses as on an accelerator; gives the collectors that they made."""
    made = []

    class Recomputing(Collector):
        def __init__(self, model, measured, **options):
            super().__init__(model, measured, recompute=True, **options)
            made.append(self)

    monkeypatch.setattr(data_pass, "Collector", Recomputing)
    return made


def values():
    torch.manual_seed(0)
    return torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True) * 3


MADE = {
    "product": lambda x: F.silu(x) * (x + 1),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu of tanh": functools.partial(F.gelu, approximate="tanh"),
    "rms norm": LlamaRMSNorm(8).bfloat16().requires_grad_(False),
    "layer norm": nn.LayerNorm(8, eps=1e-3).bfloat16().requires_grad_(False),
    "layer norm without weights": lambda x: F.layer_norm(x, (8,), eps=1e-3),
    "view": lambda x: F.gelu(x).view(6, 8),
    "cast": lambda x: F.gelu(x).float(),
}


@pytest.mark.parametrize("name", MADE)
def test_recipes_give_the_same_bits(name):
    x = MADE[name](values())
    how = recipe(x.grad_fn, 1e-3)
    assert how is not None and is_exact(how, x)


@pytest.mark.parametrize("make", [lambda x: x + 1, torch.relu, lambda x: F.gelu(x + 1) + x, torch.tanh])
def test_no_recipe_where_the_result_itself_is_kept_or_the_operands_are_not(make):
    assert recipe(make(values()).grad_fn) is None


def test_a_wrong_epsilon_is_found_out():
    x = F.layer_norm(values(), (8,), eps=1e-3)
    assert not is_exact(recipe(x.grad_fn, 0.5), x)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_same_bits(name, recomputing, monkeypatch):
    model = MODELS[name]()
    batches = split(data_for(model), 3)
    found = measure(model, batches, criteria=CRITERIA).parts
    rules = recomputing[0].rules
    monkeypatch.undo()
    wanted = measure(model, batches, criteria=CRITERIA).parts
    for criterion, modules in wanted.items():
        for module, parts in modules.items():
            for part, value in parts.items():
                assert torch.equal(found[criterion][module][part], value), (criterion, module, part)
    if (
        name != "sequential"
    ):  # what lies behind a norm or an activation is made again, what lies behind attention is not
        again = {module.rsplit(".", 1)[-1] for module, epsilon in rules.items() if epsilon is not None}
        assert again & {"down_proj", "dense", "fc2"} and again & {"q_proj", "gate_proj", "query", "fc1"}, rules


def test_inputs_are_not_kept(recomputing):
    model = MODELS["llama"]()
    layer = model.get_submodule("model.layers.1")
    norm, down = layer.input_layernorm, layer.mlp.down_proj
    held, alive = {}, {}
    norm.register_forward_hook(lambda _, args, y: held.update(norm=weakref.ref(y.untyped_storage())))
    down.register_forward_pre_hook(lambda _, args: held.update(down=weakref.ref(args[0].untyped_storage())))
    model.register_forward_hook(lambda *_: alive.update({name: ref() is not None for name, ref in held.items()}))
    measure(model, split(data_for(model), 3))
    assert alive == {"norm": False, "down": False}


def test_a_changed_operand_is_an_error(recomputing):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.first(x)
            y = self.second(F.gelu(x))
            x.zero_()
            return y

    with pytest.raises(AnalysisError, match="second was changed in place"):
        measure(Changed(), [(torch.randn(2, 4), torch.tensor([0, 1]))])


def test_maps_with_one_input_share_its_gram_matrix(monkeypatch):
    from reltune.layers import linear

    made = []
    original = linear.input_gram
    monkeypatch.setattr(linear, "input_gram", lambda x: made.append(x.shape) or original(x))
    monkeypatch.setattr(linear, "wants_gram", lambda *_, **__: True)
    model = MODELS["bert"]()
    wanted = measure(model, [data_for(model)]).parts["fisher"]
    assert len(made) == 2  # one per layer: query, key and value
    monkeypatch.setattr(linear, "wants_gram", lambda *_, **__: False)
    found = measure(model, [data_for(model)]).parts["fisher"]
    for module, parts in wanted.items():
        for part, value in parts.items():
            assert torch.allclose(found[module][part], value, rtol=1e-9, atol=0), (module, part)


# -- the probe ----------------------------------------------------------------------------------------------------------


PROBED = {**MODELS, "gpt2": tiny_gpt2, "mixtral": tiny_mixtral}


@pytest.mark.parametrize("move", ["all", "allowed"])
@pytest.mark.parametrize("name", PROBED)
def test_votes_are_the_same(name, move):
    model = PROBED[name]()
    loss = None if name in MODELS else "causal_lm"
    batches = split(data_for(model) if loss is None else lm_batch(), 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = []
    for on in (False, True):
        with recompute.force(on):
            options = {"movement": {"steps": 4, "move": move}}
            found.append(measure(model, batches, loss, ["movement"], elements=True, options=options).parts["movement"])
    for module, parts in found[0].items():
        for part, value in parts.items():
            votes, others = value.trunc(), found[1][module][part].trunc()
            assert torch.equal(votes, others), (module, part)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_probe_keeps_no_inputs_of_norms_and_products(monkeypatch):
    model = MODELS["llama"]()
    layer = model.get_submodule("model.layers.1")
    held, alive = {}, []
    layer.input_layernorm.register_forward_hook(lambda _, args, y: held.update(norm=weakref.ref(y.untyped_storage())))
    down = layer.mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: held.update(down=weakref.ref(args[0].untyped_storage())))
    model.register_forward_hook(lambda *_: alive.append({name: ref() is not None for name, ref in held.items()}))
    for on in (False, True):
        with recompute.force(on):
            measure(model, [data_for(model)], None, ["movement"], options={"movement": {"steps": 1}})
    assert alive[0] == {"norm": True, "down": True} and alive[-1] == {"norm": False, "down": False}
