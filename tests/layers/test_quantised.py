"""Quantised bases: relevance equals that of the same model with the dequantised weights in plain linear layers.

In float32: |a − b| ≤ 1e-5 · max|b| per kind of unit, since neither library computes in float64 on a CPU.
"""

from __future__ import annotations

import copy

import bitsandbytes
import numpy as np
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)
from transformers import BertForSequenceClassification, BitsAndBytesConfig

import reltune
from measured_models import tiny_bert, tiny_llama
from oracles.per_example_gradients import examples, gradient_sums
from relevance_cases import (
    assert_parts_equal,
    by_module,
    cross_entropy_of_one,
    measure,
    parts_by_formula,
    split,
    text_batch,
)
from reltune.errors import InputError
from reltune.layers.inventory import take_inventory
from reltune.layers.quantised import compute_as_in_training, dequantised
from reltune.layers.registry import canonical_weights
from reltune.plan.plan import ModulePlan, Plan
from reltune.relevance.scores import RelevanceScores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CRITERIA = ["fisher", "fisher_true", "gradient", "taylor", "activation", "magnitude"]


def tolerance(way):
    """Relative to the largest of a kind: on a GPU bitsandbytes' 8-bit product rounds its inputs too."""
    return 1e-5 if DEVICE == "cpu" else 0.3 if way == "8 bits" else 1e-4


def in_4_bits(linear, kind="nf4", double=False):
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.float32,
        quant_type=kind,
        compress_statistics=double,
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to(DEVICE)  # moving it is what quantises it


def in_8_bits(linear):
    layer = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=linear.bias is not None, has_fp16_weights=False
    )
    layer.load_state_dict(linear.state_dict())
    return layer.to(DEVICE)


def by_torchao(config):
    def quantise(linear):
        layer = nn.Sequential(copy.deepcopy(linear))
        quantize_(layer, config)
        return layer[0]

    return quantise


# How a layer is quantised, and its weight again by the library's own words or by definition.
WAYS = {
    "nf4": (in_4_bits, lambda layer: dequantize_4bit(layer.weight.data, layer.weight.quant_state)),
    "fp4 twice": (
        lambda linear: in_4_bits(linear, "fp4", double=True),
        lambda layer: dequantize_4bit(layer.weight.data, layer.weight.quant_state),
    ),
    "8 bits": (in_8_bits, lambda layer: layer.weight.data.float() * layer.weight.SCB[:, None] / 127),
    "torchao int8": (by_torchao(Int8WeightOnlyConfig()), lambda layer: layer.weight.dequantize()),
    "torchao fp8": (by_torchao(Float8WeightOnlyConfig()), lambda layer: layer.weight.dequantize()),
}


def pair(make, way, heads=("classifier", "score")):
    """A quantised model and the plain one that has the same weights."""
    quantise, weight_of = WAYS[way]
    quantised = make().float().to(DEVICE)
    for name, module in list(quantised.named_modules()):
        if type(module) is nn.Linear and name not in heads:
            quantised.set_submodule(name, quantise(module))
    plain = make().float().to(DEVICE)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if type(module) is nn.Linear and name not in heads:
                module.weight = nn.Parameter(weight_of(quantised.get_submodule(name)).float().clone())
    return quantised, plain


def batches():
    return [
        {key: value.to(DEVICE) for key, value in batch.items()}
        for batch in split(text_batch((3, 11, 6, 1, 9, 4, 2)), 4)
    ]


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


@pytest.mark.parametrize("granularity", ["layer", "module", "element"])
def test_what_has_no_trainable_numbers_is_refused_by_name(granularity):
    quantised, _ = pair(tiny_bert, "nf4")
    found = measure(quantised, batches(), None, ["fisher"], elements=True, always_trained="classifier")
    with pytest.raises(InputError, match=rf"attention\.self\.query is quantised, .* and no {granularity}"):
        reltune.select(found, "5%", granularity)


LINEAR = "bert.encoder.layer.1.intermediate.dense"
UNITS = {
    "columns": {"columns": [0, 5, 3]},
    "rows": {"rows": [2, 7]},
    "columns, rows and bias": {"columns": [1, 4], "rows": [0, 7], "bias": True},
    "bias": {"bias": True},
    "directions": {"directions": [0, 2], "bias": True},
}


def tuned(model, units, adapter="default"):
    shape = tuple(take_inventory(model)[LINEAR].shape)
    chosen = ModulePlan(shape, **units)
    if chosen.directions:
        chosen.vectors = np.random.default_rng(0).normal(size=(3, shape[1])).astype(np.float32)
    plan = Plan({LINEAR: chosen}, "all", chosen.parameters, 10**6, fingerprint="", always_trained=["classifier"])
    tuned = get_peft_model(model, reltune.ReltuneConfig(plan=plan), adapter_name=adapter).eval()
    compute_as_in_training(model)  # bitsandbytes computes in another way in evaluation on a CPU
    return tuned


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("units", UNITS.values(), ids=list(UNITS))
def test_it_is_trained_as_the_dequantised_weights_are(way, units):
    quantised, plain = pair(tiny_bert, way)
    weight = dequantised(quantised.get_submodule(LINEAR)).clone()
    models = tuned(quantised, units), tuned(plain, units)
    losses = []
    for model in models:
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1, momentum=0.9)
        losses.append([])
        for batch in batches() * 3:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    exact = DEVICE == "cpu" or way != "8 bits"  # on a GPU its product rounds the inputs too
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if exact else 3e-2) and losses[0][-1] < losses[0][0]
    ours, theirs = trained(models[0]), trained(models[1])
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-3, atol=1e-4 if exact else 3e-2), name
    assert torch.equal(dequantised(models[0].get_submodule(f"base_model.model.{LINEAR}").base_layer), weight)


@pytest.mark.parametrize("units", ["columns", "directions"])
@pytest.mark.parametrize("way", WAYS)
def test_adapters_on_it_are_switched_disabled_saved_and_loaded(way, units, tmp_path):
    quantised, _ = pair(tiny_bert, way)
    batch = batches()[0]
    with torch.no_grad():
        base = tuned(quantised, UNITS[units], "first")
        start = base(**batch).logits
        values = base.get_submodule(f"base_model.model.{LINEAR}")
        values = getattr(values, f"reltune_{units}")["first"]
        values.add_(torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE))
        changed = base(**batch).logits
        assert not torch.allclose(changed, start, atol=1e-3)
        with base.disable_adapter():
            assert torch.equal(base(**batch).logits, start)
        with pytest.raises(InputError, match="cannot be merged into a quantised weight"):
            base.merge_adapter()
        base.save_pretrained(tmp_path)
        again, _ = pair(tiny_bert, way)
        loaded = PeftModel.from_pretrained(again, tmp_path / "first").eval()
        compute_as_in_training(again)
        assert torch.allclose(loaded(**batch).logits, changed, rtol=1e-5, atol=1e-6)
        assert torch.equal(base.unload()(**batch).logits, start)


@pytest.mark.parametrize("way", WAYS)
def test_no_plan_is_needed(way):
    quantised, plain = pair(tiny_bert, way)
    models = [
        get_peft_model(model, reltune.ReltuneConfig(target_modules=["query", "dense"], r=3)).eval()
        for model in (quantised, plain)
    ]
    compute_as_in_training(quantised)
    chosen = [{n: b for n, b in model.named_buffers() if "reltune_column_indices" in n} for model in models]
    assert len(chosen[0]) >= 8 and all(torch.equal(idx, chosen[1][name]) for name, idx in chosen[0].items())
    near = 1e-5 if DEVICE == "cpu" or way != "8 bits" else 3e-2
    assert torch.allclose(models[0](**batches()[0]).logits, models[1](**batches()[0]).logits, rtol=1e-4, atol=near)


def test_a_selection_for_it_is_trained():
    quantised, _ = pair(tiny_bert, "nf4")
    found = measure(quantised, batches(), None, ["fisher"], always_trained="classifier")
    plan = reltune.select(found, "5%", ["column", "bias"])
    model = get_peft_model(quantised, reltune.ReltuneConfig(plan=plan))
    model(**batches()[0]).loss.backward()
    assert all(p.grad is not None for p in trained(model).values()) and len(trained(model)) > 5


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


def packable(kind):
    """Two quantised maps, one behind the other, of sizes that bitsandbytes' packing for AVX-512 BF16 takes."""
    torch.manual_seed(0)
    first, second = (in_4_bits(nn.Linear(64, 64), kind, double=True) for _ in range(2))
    for layer in (first, second):
        layer.support_avx512bf16_for_cpu = True  # whatever this machine's processor has
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(64, 3)).to(DEVICE)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_evaluations_between_steps_change_nothing(kind):
    """bitsandbytes packs 4-bit weights anew in the first evaluation, where the processor has AVX-512 BF16."""
    x, labels = torch.randn(6, 64).to(DEVICE), torch.tensor([0, 1, 2, 0, 1, 2]).to(DEVICE)
    plan = Plan({"0": ModulePlan((64, 64), columns=[3, 40], rows=[7])}, "all", 10**4, 10**4, fingerprint="")
    models = [get_peft_model(packable(kind), reltune.ReltuneConfig(plan=plan)) for _ in range(2)]
    losses = []
    for evaluated, model in zip((True, False), models, strict=True):
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.3)
        for _ in range(4):
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if evaluated:
                with torch.no_grad():
                    assert torch.equal(model.eval()(x), model.train()(x))
    assert losses[:4] == losses[4:] and losses[3] < losses[0]
    for name, value in trained(models[0]).items():
        assert torch.equal(value, trained(models[1])[name]), name


def test_a_base_that_was_packed_before_is_refused_by_name():
    model = packable("nf4")
    state = model[2].weight.quant_state
    model[2].weight.data, model[2].weight.quant_state = _convert_weight_packed_for_cpu(model[2].weight.data, state)
    plan = Plan({"0": ModulePlan((64, 64), columns=[3])}, "all", 10**4, 10**4, fingerprint="")
    with pytest.raises(InputError, match=r"2 .Linear4bit. lets no gradient through, .* load the model again"):
        get_peft_model(model, reltune.ReltuneConfig(plan=plan))


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
