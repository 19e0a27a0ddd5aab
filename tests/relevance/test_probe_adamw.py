"""Movement against a plain loop of torch's AdamW on a copy; the model is handed back bit by bit as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from measured_models import MODELS, Convolutions, tiny_gpt2
from oracles.per_example_gradients import examples
from relevance_cases import (
    assert_directions_of,
    assert_parts_equal,
    by_module,
    causal_of_one,
    cross_entropy_of_one,
    data_for,
    lm_batch,
    measure,
    own_loss,
    parts_by_formula,
    split,
)
from reltune.errors import AnalysisError, InputError

MINE = ["movement"]


def moved_by_hand(model, batches, loss_of_one, steps, learning_rate):
    """|Δw| of every parameter, from single examples."""
    model = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(steps):
        optimizer.zero_grad()
        some = list(examples(batches[step % len(batches)]))
        for example in some:
            if isinstance(example, dict):
                outputs = model(**{key: value for key, value in example.items() if key != "labels"})
            else:
                outputs = model(example[0])
            (loss_of_one(outputs, example) / len(some)).backward()
        optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def case(name):
    if name == "gpt2":
        return tiny_gpt2(), lm_batch(), "causal_lm", causal_of_one
    if name == "convolutions":
        torch.manual_seed(0)
        model = Convolutions().double()
        return model, (torch.randn(6, 2, 9, 8).double(), torch.randint(3, (6,))), None, cross_entropy_of_one
    model = MODELS[name]()
    return model, data_for(model), None, cross_entropy_of_one


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "sequential", "convolutions"])
def test_is_the_way_that_adamw_goes(name):
    model, batch, loss, loss_of_one = case(name)
    batches = split(batch, 3)
    options = {"movement": {"steps": 4, "learning_rate": 1e-3}}
    found = measure(model, batches, loss, MINE, options=options, elements=True)
    moves = moved_by_hand(model, batches, loss_of_one, 4, 1e-3)
    conv1d = {info.name for info in found.inventory.modules if info.layer_type == "conv1d"}
    moves = {
        key: move.mT if key.removesuffix(".weight") in conv1d and key.endswith("weight") else move
        for key, move in moves.items()
    }
    signed = by_module(moves, [info.name for info in found.inventory.modules])
    wanted = {name: {key: move.abs() for key, move in of.items()} for name, of in signed.items()}
    # Adam divides by √v: a gradient of rounding errors alone (key biases) moves as far as any other.
    noise = [name for name in wanted if name.endswith(("key", "k_proj")) and "bias" in wanted[name]]
    parts = {name: dict(of) for name, of in found.parts["movement"].items()}
    formula = parts_by_formula(wanted)
    for info in found.inventory.modules:
        if info.layer_type in ("linear", "conv1d"):
            assert_directions_of(signed[info.name]["weight"], parts[info.name])
    for name in noise:
        del parts[name]["bias"], formula[name]["bias"]
    elements = {name: (of.pop("element"), of.pop("element_bias", None)) for name, of in parts.items()}
    if name != "convolutions":
        assert_parts_equal(parts, formula, relative=1e-8)
    for name, (weight, bias) in elements.items():
        torch.testing.assert_close(weight, wanted[name]["weight"], rtol=1e-7, atol=1e-11)
        if bias is not None and name not in noise:
            torch.testing.assert_close(bias, wanted[name]["bias"], rtol=1e-7, atol=1e-11)
    assert found.provenance["movement"].items() >= {**options["movement"], "update": "adamw"}.items()
    layer = next(iter(found.by("layer")), None)
    if layer:
        inside = [float(v) for key, v in found.by("module").items() if key.startswith(layer + ".")]
        assert float(found.by("layer")[layer]) == pytest.approx(sum(inside))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_as_before(model, state, gradients, random_state):
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random_state) and model.training
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["bert.pooler.dense.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fails_in_step", [None, 0, 2])
def test_everything_is_put_back(dtype, fails_in_step):
    model = MODELS["bert"]().to(dtype).train()
    model.bert.pooler.dense.weight.requires_grad_(False)
    batches = split(data_for(model), 3)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    state, random_state, seen = state_of(model), torch.get_rng_state(), []

    def loss(outputs, batch):
        seen.append(torch.equal(model.classifier.weight, state["classifier.weight"]))
        if fails_in_step == len(seen) - 1:
            raise KeyboardInterrupt
        return own_loss(outputs, batch)

    options = {"movement": {"steps": 4, "learning_rate": 1e-2}}
    if fails_in_step is None:
        measure(model, batches, loss, MINE, options=options)
    else:
        with pytest.raises(KeyboardInterrupt):
            measure(model, batches, loss, MINE, options=options)
    assert seen[0] and not any(seen[1:])  # it did move in between
    assert_as_before(model, state, gradients, random_state)
    assert torch.equal(model.classifier.weight.grad, torch.ones_like(model.classifier.weight))


def test_half_precision_moves_in_float32():
    """Ten steps of 1e-5 are far below what bfloat16 holds of a weight of 0.2, and are all counted."""
    model = MODELS["bert"]().bfloat16()
    batch = data_for(model)
    found = measure(model, [batch], own_loss, MINE, options={"movement": {"steps": 10, "learning_rate": 1e-5}})
    name = "bert.encoder.layer.0.output.dense"
    info = found.inventory[name]
    per_weight = found.parts["movement"][name]["weight"] / info.weight_parameters
    assert found.parts["movement"][name]["weight"].dtype == torch.float32
    assert 2e-5 < float(per_weight) <= 1.01e-4

    copied = copy.deepcopy(model).eval()
    masters = [p.detach().float().requires_grad_() for p in copied.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, weight_decay=0)
    for _ in range(10):
        copied.zero_grad()
        own_loss(copied(**{k: v for k, v in batch.items() if k != "labels"}), batch).mean().backward()
        for master, p in zip(masters, copied.parameters(), strict=True):
            master.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, copied.parameters(), strict=True):
                p.copy_(master)
    names = [key for key, _ in copied.named_parameters()]
    master = masters[names.index(f"{name}.weight")]
    wanted = (master.detach() - model.get_submodule(name).weight.float()).abs()
    torch.testing.assert_close(found.parts["movement"][name]["column"], wanted.sum(0))


def test_what_cannot_be_moved():
    model = MODELS["sequential"]()
    batch = data_for(model)
    options = {"movement": {"update": "adamw"}}
    with pytest.raises(AnalysisError, match="loss of batch 0 is not finite in step 0 of the probe"):
        measure(model, [batch], lambda outputs, batch: own_loss(outputs, batch) * torch.nan, MINE, options=options)
    with pytest.raises(InputError, match=r"shape \(\) for 7 examples"):
        measure(model, [batch], lambda outputs, batch: own_loss(outputs, batch).mean(), MINE, options=options)
    with pytest.raises(InputError, match="learning_rate is -1"):
        measure(model, [batch], None, MINE, options={"movement": {"learning_rate": -1}})
    model.quantised = nn.Linear(2, 2)
    model.quantised.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"quantised.weight is quantised \(torch.int8\); use update=sign"):
        measure(model, [batch], None, MINE, options=options)
    with pytest.raises(
        InputError, match=r"quantised.weight is quantised \(torch.int8\) in a way that cannot be probed"
    ):
        measure(model, [batch], None, MINE)


def test_with_criteria_of_every_sort_in_one_call():
    model = MODELS["bert"]()
    batches = split(data_for(model), 3)
    criteria = ["fisher", "ablation", "movement", "magnitude", "gradient"]
    options = {"ablation": {"kinds": ["layer"]}, "movement": {"steps": 2, "update": "adamw"}}
    together = measure(model, (batch for batch in batches), None, criteria, options=options)  # an iterator that ends
    assert together.criteria == criteria
    for criterion in criteria:
        own = {name: of for name, of in options.items() if name == criterion}
        alone = measure(model, batches, None, [criterion], options=own)
        assert alone.provenance["data"] == together.provenance["data"] or criterion == "magnitude"
        for kind in ("layer", "column"):
            a, b = alone.by(kind), together.by(kind, criterion)
            assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
