"""The sign probe against plain autograd on a copy whose weights are written; the model itself is never touched."""

from __future__ import annotations

import pytest
import torch

from measured_models import MODELS, Convolutions, tiny_gpt2, tiny_mixtral
from oracles.per_example_gradients import examples
from oracles.sign_probe import sign_probe, steps_by_rule
from relevance_cases import (
    assert_directions_of,
    assert_parts_equal,
    causal_of_one,
    cross_entropy_of_one,
    data_for,
    lm_batch,
    measure,
    of_expert,
    own_loss,
    parts_by_formula,
    split,
)
from reltune.errors import AnalysisError, InputError

MINE = ["movement"]
RATE = 0.01  # larger than usual, so that after a few steps the path matters
HOW = {"step_size": RATE, "relative": True, "move": "allowed", "training": False}


def mean_of(loss_of_one):
    """The mean loss of a batch, each example run by itself without its padding."""

    def mean_loss(model, batch):
        losses = []
        for example in examples(batch):
            if isinstance(example, dict):
                outputs = model(**{key: value for key, value in example.items() if key != "labels"})
            else:
                outputs = model(example[0])
            losses.append(loss_of_one(outputs, example))
        return torch.stack(losses).mean()

    return mean_loss


def case(name):
    if name == "gpt2":
        return tiny_gpt2(), lm_batch(), "causal_lm", causal_of_one
    if name == "mixtral":
        return tiny_mixtral(), lm_batch(), "causal_lm", causal_of_one
    if name == "convolutions":
        torch.manual_seed(0)
        model = Convolutions().double()
        return model, (torch.randn(6, 2, 9, 8).double(), torch.randint(3, (6,))), None, cross_entropy_of_one
    model = MODELS[name]()
    return model, data_for(model), None, cross_entropy_of_one


def laid_out(info, model, values):
    """One module's weight and bias, (out, in) and so on, out of values by parameter name."""
    owner = model.get_submodule(info.owner)
    own = {key: values[f"{info.owner}.{key}"] for key, _ in owner.named_parameters(recurse=False)}
    if info.layer_type == "experts":
        *_, projection, expert = info.name.split(".")
        return of_expert(owner, projection, int(expert), own)
    return {key: value.mT if info.layer_type == "conv1d" and value.ndim == 2 else value for key, value in own.items()}


def without_noise(name):
    """Keys' biases have no gradient but rounding errors, whose signs are anyone's."""
    return not name.endswith(("key", "k_proj", "c_attn"))


def assert_is_the_probe(found, model, votes, gradients):
    """Units are sums of |V|; single weights are |V| and, among equals, in the order of the last gradient's size; directions of linear
    maps are V's first right singular vectors."""
    infos = found.inventory.modules
    wanted = {info.name: {key: v.abs() for key, v in laid_out(info, model, votes).items()} for info in infos}
    parts = {name: dict(of) for name, of in found.parts["movement"].items()}
    for info in infos:
        if info.layer_type in ("linear", "conv1d"):
            assert_directions_of(laid_out(info, model, votes)["weight"], parts[info.name])
        last = laid_out(info, model, gradients)
        for key, part in (("weight", "element"), ("bias", "element_bias")):
            single = parts[info.name].pop(part, None)
            assert (single is None) == (key not in wanted[info.name])
            if single is None or (key == "bias" and not without_noise(info.name)):
                continue
            assert torch.equal(single.floor().double(), wanted[info.name][key].double()), info.name
            level = (single.double() - wanted[info.name][key]) * 280 - 150
            size = last[key].abs()
            seen = (size > 1e-9) & (level > -149)
            assert (level[seen] - size[seen].log2()).abs().max() < 0.01, info.name
            assert not seen.numel() or not (~seen & (size > 1e-9)).any()
    formula = parts_by_formula(wanted)
    for name in parts:
        if not without_noise(name) and "bias" in formula[name]:
            del parts[name]["bias"], formula[name]["bias"]
    convolutions = {info.name for info in infos if info.layer_type == "conv2d"}  # their columns: test_criteria.py
    for name in convolutions:
        del parts[name]["column"], formula[name]["column"]
    assert_parts_equal(parts, formula, relative=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "sequential", "convolutions", "mixtral"])
def test_is_the_way_that_signs_go(name):
    model, batch, loss, loss_of_one = case(name)
    batches = split(batch, 3)
    options = {"movement": {**HOW, "steps": 5}}
    found = measure(model, batches, loss, MINE, options=options, elements=True, always_trained=())
    assert {info.layer_type for info in found.inventory.modules} >= {"mixtral": {"experts", "router"}}.get(name, set())
    moving = {
        f"{info.owner}.{key}"
        for info in found.inventory.modules
        for key, _ in model.get_submodule(info.owner).named_parameters(recurse=False)
    }
    votes, gradients = sign_probe(model.eval(), batches, mean_of(loss_of_one), steps_by_rule(model, RATE), 5, moving)
    assert_is_the_probe(found, model, votes, gradients)
    layer = next(iter(found.by("layer")), None)
    if layer:
        inside = [float(v) for key, v in found.by("module").items() if key.startswith(layer + ".")]
        assert float(found.by("layer")[layer]) == pytest.approx(sum(inside))


def test_weights_move_indeed():
    """At fixed weights the votes would be others."""
    model = MODELS["bert"]()
    batches = split(data_for(model), 3)
    mean_loss = mean_of(cross_entropy_of_one)
    moving, _ = sign_probe(model.eval(), batches, mean_loss, steps_by_rule(model, RATE), 5)
    fixed, _ = sign_probe(model.eval(), batches, mean_loss, dict.fromkeys(moving, 0.0), 5)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (moving[name] != fixed[name]).double().mean() > 0.05


def test_only_the_modules_that_may_be_chosen_move_unless_all_are_to():
    model = MODELS["bert"]()
    batches = split(data_for(model), 3)
    targets = {"target_modules": ["query", "LayerNorm"], "always_trained": ["classifier"], "elements": True}
    wanted = {n for n, _ in model.named_parameters() if ".query." in n or "LayerNorm" in n}
    for move, moving in (("allowed", wanted), ("all", None)):
        options = {"movement": {**HOW, "steps": 5, "move": move}}
        found = measure(model, batches, None, MINE, options=options, **targets)
        assert {info.name for info in found.inventory.modules} == {name.rpartition(".")[0] for name in wanted}
        votes, gradients = sign_probe(
            model.eval(), batches, mean_of(cross_entropy_of_one), steps_by_rule(model, RATE), 5, moving
        )
        assert_is_the_probe(found, model, votes, gradients)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("fails_in_step", [None, 0, 2])
def test_the_model_is_not_touched(fails_in_step):
    model = MODELS["bert"]().train()
    model.bert.pooler.dense.weight.requires_grad_(False)
    batches = split(data_for(model), 3)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    parameters = {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    state, random_state, logits = state_of(model), torch.get_rng_state(), []

    def loss(outputs, batch):
        logits.append(outputs.logits.detach())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())  # a save meanwhile
        if fails_in_step == len(logits) - 1:
            raise KeyboardInterrupt
        return own_loss(outputs, batch)

    options = {"movement": {**HOW, "steps": 4}}
    if fails_in_step is None:
        measure(model, batches[:1], loss, MINE, options=options)
        assert not torch.equal(logits[0], logits[1])  # it did move
    else:
        with pytest.raises(KeyboardInterrupt):
            measure(model, batches, loss, MINE, options=options)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()} == parameters
    assert [type(module) for module in model.modules()] == classes and model.training
    assert not any("_reltune_moving" in vars(module) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["bert.pooler.dense.weight"]


def test_what_cannot_be():
    model = MODELS["sequential"]()
    batch = data_for(model)
    with pytest.raises(AnalysisError, match="loss of batch 0 is not finite in step 0 of the probe"):
        measure(model, [batch], lambda outputs, batch: own_loss(outputs, batch) * torch.nan, MINE)
    with pytest.raises(InputError, match=r"shape \(\) for 7 examples"):
        measure(model, [batch], lambda outputs, batch: own_loss(outputs, batch).mean(), MINE)
    with pytest.raises(InputError, match="steps is 32768; it must be at most 32767"):  # or votes would run over
        measure(model, [batch], None, MINE, options={"movement": {"steps": 2**15}})
    for key, value in {
        "steps": 0,
        "step_size": 0,
        "update": "sgd",
        "move": "some",
        "batch_size": 0,
        "agreement": 2,
    }.items():
        with pytest.raises(InputError, match=f"{key} (is )?'?{value}"):
            measure(model, [batch], None, MINE, options={"movement": {key: value}})


def test_a_compiled_model_has_the_names_of_the_model_in_it():
    model = MODELS["sequential"]()
    batches = [data_for(model)]
    wanted = measure(model, batches, None, ["movement", "fisher"])
    found = measure(torch.compile(model, backend="eager"), batches, None, ["movement", "fisher"])
    assert found.fingerprint == wanted.fingerprint and found.inventory == wanted.inventory
    assert found.by("module", "movement") == wanted.by("module", "movement")
