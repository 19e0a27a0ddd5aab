"""Quantised bases: relevance equals that of the same model with the dequantised weights in plain linear layers.

In float32: |a − b| ≤ 1e-5 · max|b| per kind of unit, since neither library computes in float64 on a CPU.
"""

from __future__ import annotations

import signal

import bitsandbytes
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import BertForSequenceClassification, BitsAndBytesConfig

import reltune
from measured_models import tiny_bert, tiny_llama
from oracles.per_example_gradients import examples, gradient_sums
from quantised_models import DEVICE, WAYS, batches, pair
from relevance_cases import assert_parts_equal, by_module, cross_entropy_of_one, measure, parts_by_formula
from reltune.errors import InputError
from reltune.layers.inventory import take_inventory
from reltune.layers.registry import canonical_weights
from reltune.relevance.probe.moving_weights import check_can_move
from reltune.relevance.scores import RelevanceScores

CRITERIA = ["fisher", "fisher_true", "gradient", "taylor", "activation", "magnitude"]


def tolerance(way):
    """Relative to the largest of a kind: on a GPU bitsandbytes' 8-bit product rounds its inputs too."""
    return 1e-5 if DEVICE == "cpu" else 0.3 if way == "8 bits" else 1e-4


def quantised_modules(scores):
    return [info.name for info in scores.inventory.modules if info.layer_type == "quantised"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_as_with_the_dequantised_weights(make, way):
    quantised, plain = pair(make, way)
    found = measure(quantised, batches(), None, CRITERIA)
    assert len(quantised_modules(found)) == (13 if make is tiny_bert else 14)
    squares, sums, count = gradient_sums(plain, batches(), cross_entropy_of_one)
    names = [info.name for info in found.inventory.modules]
    weights = {name: p.detach().double() for name, p in plain.named_parameters()}
    wanted = {
        "fisher": {name: of / count for name, of in squares.items()},
        "gradient": {name: (of / count).abs() for name, of in sums.items()},
        "magnitude": {name: of.square() for name, of in weights.items()},
    }
    for criterion, of in wanted.items():
        assert_parts_equal(found.parts[criterion], parts_by_formula(by_module(of, names)), tolerance(way))
    for name in quantised_modules(found):
        weight = plain.get_submodule(name).weight
        assert found.inventory[name].shape == weight.shape
        assert found.parts["fisher"][name]["column"].shape == weight.shape[1:]
        assert found.parts["fisher"][name]["row"].shape == weight.shape[:1]


@pytest.mark.parametrize("way", WAYS)
def test_products_with_the_weights(way):
    """Taylor and activation scores of one quantised layer, by their definitions, one example at a time."""
    quantised, plain = pair(tiny_bert, way)
    name = "bert.encoder.layer.1.intermediate.dense"
    found = measure(quantised, batches(), None, ["taylor", "activation"], target_modules=name)
    module = plain.eval().get_submodule(name)
    seen = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    column, whole = 0, 0
    every = [one for batch in batches() for one in examples(batch)]
    for one in every:
        outputs = plain(**{key: value for key, value in one.items() if key != "labels"})
        (gradient,) = torch.autograd.grad(F.cross_entropy(outputs.logits, one["labels"]), module.weight)
        product = gradient.double() * module.weight.detach()
        column, whole = column + product.sum(0).abs() / len(every), whole + product.sum().abs() / len(every)
    norms = sum(x.double().square().sum((0, 1)) for x in seen).sqrt()
    parts = {"column": column, "weight": whole}
    weighted = {"column": (module.weight.detach().double().abs() * norms).sum(0)}
    for criterion, wanted in (("taylor", parts), ("activation", weighted)):
        for part, value in wanted.items():
            got = found.parts[criterion][name][part].to(DEVICE)
            assert (got - value).abs().max() <= tolerance(way) * value.abs().max(), (criterion, part)


@pytest.mark.parametrize("way", WAYS)
def test_single_weights_and_counts_have_the_logical_shape(way, tmp_path):
    quantised, plain = pair(tiny_bert, way)
    packed, logical = take_inventory(quantised, ["classifier"]), take_inventory(plain, ["classifier"])
    assert packed.base_parameters == logical.base_parameters and packed.head_parameters == logical.head_parameters
    assert packed.left_out == logical.left_out
    found = measure(quantised, batches(), None, ["fisher", "taylor"], elements=True, always_trained="classifier")
    for name in quantised_modules(found):
        assert found.parts["fisher"][name]["element"].shape == plain.get_submodule(name).weight.shape
    found.save(tmp_path)
    assert RelevanceScores.load(tmp_path).inventory == found.inventory


def test_the_weight_is_made_only_when_asked_for(monkeypatch):
    quantised, _ = pair(tiny_bert, "nf4")
    made = []
    monkeypatch.setattr("reltune.layers.quantised.dequantised", lambda module: made.append(module) or 1 / 0)
    measure(quantised, batches(), None, ["fisher", "random"])
    assert not made
    info = next(info for info in take_inventory(quantised).modules if info.layer_type == "quantised")
    weights = canonical_weights(info, quantised.get_submodule(info.name))
    assert list(weights) == ["weight", "bias"] and not made


def test_a_base_that_transformers_quantised(tmp_path):
    tiny_bert().float().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=config, device_map=DEVICE)
    found = measure(model, batches(), None, ["fisher"])
    assert len(quantised_modules(found)) >= 12 and found.fingerprint == ""
    assert all(float(found.by("module")[name]) > 0 for name in quantised_modules(found))


@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_what_has_no_trainable_numbers_is_refused_by_name(granularity):
    quantised, _ = pair(tiny_bert, "nf4")
    found = measure(quantised, batches(), None, ["fisher"], elements=True, always_trained="classifier")
    with pytest.raises(
        InputError, match=rf"attention\.self\.query is quantised, .* no whole {granularity} can be trained"
    ):
        reltune.select(found, "5%", granularity)


def test_what_stops_the_gradient_is_refused_by_name():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: name == "2")
    batch = [(torch.randn(4, 16), torch.tensor([0, 1, 2, 0]))]
    with pytest.raises(InputError, match=r"2 .Linear. lets no gradient through, because it rounds its inputs"):
        measure(model, batch)
    assert "is a Int8Tensor, which is not covered" in take_inventory(model).left_out["2.weight"]


def test_weights_packed_for_inference_are_refused_by_name():
    quantised, _ = pair(tiny_bert, "nf4")
    name = "bert.encoder.layer.0.attention.self.key"
    quantised.get_submodule(name).weight.quant_state.packing_format_for_cpu = True  # as some processors have it
    with pytest.raises(InputError, match=f"{name} .Linear4bit. lets no gradient through, because it was packed"):
        measure(quantised, batches())


@pytest.mark.parametrize("way", WAYS)
def test_modes_and_weights_are_left_as_they_were(way):
    quantised, _ = pair(tiny_bert, way)
    quantised.eval()
    before = {
        name: canonical_weights(info, quantised.get_submodule(name))["weight"].clone()
        for name, info in ((i.name, i) for i in take_inventory(quantised).modules)
    }
    measure(quantised, batches(), None, CRITERIA)
    assert not any(module.training for module in quantised.modules())
    for info in take_inventory(quantised).modules:
        assert torch.equal(canonical_weights(info, quantised.get_submodule(info.name))["weight"], before[info.name])


@pytest.mark.parametrize("way", WAYS)
def test_a_probe_of_full_tuning_refuses_it_by_name(way):
    quantised, _ = pair(tiny_bert, way)
    with pytest.raises(InputError, match=r"the probe by AdamW trains every weight, and bert\.\S+ is quantised"):
        measure(quantised, batches(), None, ["movement"], options={"movement": {"update": "adamw"}})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_a_sign_probe_moves_it_as_if_it_were_unpacked(make, way):
    quantised, plain = pair(make, way)
    weights = {
        info.name: canonical_weights(info, quantised.get_submodule(info.name)) for info in inventoried(quantised)
    }
    before = {name: of["weight"].clone() for name, of in weights.items()}
    options = {"movement": {"steps": 4, "step_size": 0.01, "relative": True, "move": "allowed", "training": False}}
    found, wanted = (
        measure(m, batches(), None, ["movement"], options=options, elements=True) for m in (quantised, plain)
    )
    modules = quantised_modules(found)
    assert modules
    votes = [[of.parts["movement"][name]["element"].floor() for name in modules] for of in (found, wanted)]
    a, b = (torch.cat([of.flatten() for of in own]) for own in votes)
    assert (a != b).float().mean() <= 0.01  # roundings of float32
    assert all(torch.equal(of["weight"], before[name]) for name, of in weights.items())


def inventoried(model):
    return take_inventory(model).modules


def test_a_layer_that_is_not_quantised_yet_is_left_out_by_name():
    layer = bitsandbytes.nn.Linear4bit(16, 16)
    inventory = take_inventory(nn.Sequential(layer, nn.Linear(16, 3)))
    assert inventory.left_out["0.weight"] == "the weight of Linear4bit is a Params4bit, which is not covered"


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupted_probe_of_another_quantised_base_is_not_continued(way, tmp_path):
    """Quantised bases have no fingerprint that plain ones could be compared with, but votes know the numbers they are held in."""
    quantised, _ = pair(tiny_bert, way)

    def interrupting(outputs, batch):
        signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(outputs.logits, batch["labels"], reduction="none")

    def probe(model, loss=None):
        options = {"movement": {"steps": 3}}
        return measure(model, batches(), loss, ["movement"], options=options, resume_directory=tmp_path)

    with pytest.raises(KeyboardInterrupt):
        probe(quantised, interrupting)
    other = tiny_bert()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(-1)
    with pytest.raises(InputError, match="of another model, with other modules or with other options"):
        probe(pair(lambda: other, way)[0])
    found = probe(pair(tiny_bert, way)[0])  # loaded anew
    wanted = measure(pair(tiny_bert, way)[0], batches(), None, ["movement"], options={"movement": {"steps": 3}})
    for name, parts in wanted.parts["movement"].items():
        assert all(torch.equal(found.parts["movement"][name][part], value) for part, value in parts.items())


def test_weights_in_float8_that_nobody_knows_are_named():
    """As fine-grained float8 checkpoints have them, whose scales lie elsewhere."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].weight = nn.Parameter(model[0].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        InputError, match=r"0\.weight is quantised \(torch.float8_e4m3fn\) in a way that cannot be probed"
    ):
        check_can_move(model)
    check_can_move(pair(tiny_bert, "nf4")[0])
