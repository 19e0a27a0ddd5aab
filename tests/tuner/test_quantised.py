"""Quantised bases: trained as the same model with the dequantised weights in plain linear layers is, by plain autograd.

In float32, since neither library computes in float64 on a CPU.
"""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import reltune
from measured_models import tiny_bert, tiny_llama
from oracles import dense_update
from quantised_models import DEVICE, WAYS, batches, in_4_bits, pair
from relevance_cases import measure
from reltune.errors import InputError
from reltune.layers.inventory import take_inventory
from reltune.layers.quantised import compute_as_in_training, dequantised
from reltune.ops import recompute
from reltune.ops.attach_elements import force
from reltune.plan.plan import ModulePlan, Plan
from reltune.runs.export import to_lora

LINEAR = "bert.encoder.layer.1.intermediate.dense"
UNITS = {
    "columns": {"columns": [0, 5, 3]},
    "rows": {"rows": [2, 7]},
    "columns, rows and bias": {"columns": [1, 4], "rows": [0, 7], "bias": True},
    "bias": {"bias": True},
    "single weights": {"elements": [0, 3, 17, 301, 639]},
    "directions": {"directions": [0, 2], "bias": True},
    "all together": {"columns": [1, 4], "rows": [0, 7], "elements": [18, 35, 639], "bias": True},
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
    exact = DEVICE == "cpu" or way != "8 bits"  # on a GPU the other maps' products round the inputs too
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if exact else 3e-2) and losses[0][-1] < losses[0][0]
    ours, theirs = trained(models[0]), trained(models[1])
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-3, atol=1e-4 if exact else 3e-2), name
    assert torch.equal(dequantised(models[0].get_submodule(f"base_model.model.{LINEAR}").base_layer), weight)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("units", ["columns", "single weights", "directions"])
def test_adapters_on_it_are_switched_disabled_saved_and_loaded(units, way, tmp_path):
    quantised, _ = pair(tiny_bert, way)
    batch = batches()[0]
    with torch.no_grad():
        base = tuned(quantised, UNITS[units], "first")
        with base.disable_adapter():
            start = base(**batch).logits
        near = 1e-6 if DEVICE == "cpu" or way != "8 bits" else 3e-2
        assert torch.allclose(base(**batch).logits, start, rtol=1e-5, atol=near)
        layer = base.get_submodule(f"base_model.model.{LINEAR}")
        values = getattr(layer, {"single weights": "reltune_elements"}.get(units, f"reltune_{units}"))["first"]
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
    chosen = ModulePlan((64, 64), columns=[3, 40], rows=[7], elements=[1, 645, 4095])
    plan = Plan({"0": chosen, "2": ModulePlan((64, 64), elements=[9, 70])}, "all", 10**4, 10**4, fingerprint="")
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


# -- single weights ------------------------------------------------------------------------------------------------------

ELEMENTS = UNITS["single weights"]


def in_every_map(model, step=7):
    """Single weights of every linear map but the classifier, as plan and as the oracle names them."""
    infos = [info for info in take_inventory(model).modules if info.layer_type in ("linear", "quantised")]
    chosen = {info.name: list(range(n, info.weight_parameters, step)) for n, info in enumerate(infos)}
    chosen = {name: own for name, own in chosen.items() if name not in ("score", "classifier")}
    shapes = {info.name: info.shape for info in infos}
    modules = {name: ModulePlan(shapes[name], elements=own) for name, own in chosen.items()}
    return Plan(modules, "all", 10**6, 10**6, fingerprint=""), {name: {"elements": own} for name, own in chosen.items()}


def adamw(parameters, **options):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0, **options)


@pytest.mark.parametrize("form", ["dense", "sampled"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_single_weights_train_as_masked_full_fine_tuning_of_the_dequantised_model(make, way, form):
    """Steps of AdamW with accumulation and clipping; in nothing that is packed a bit changes."""
    quantised, plain = pair(make, way)
    plain.eval()
    plan, selection = in_every_map(quantised)
    steps = [[lambda m, b=b: m(**b).loss for b in batches()] for _ in range(6)]
    model = get_peft_model(quantised, reltune.ReltuneConfig(plan=plan)).eval()
    compute_as_in_training(quantised)
    before = {name: dequantised(m.base_layer) for name, m in layers(model).items()}
    expected = dense_update.train(plain, selection, adamw, steps, max_norm=0.5)
    found, optimizer = [], adamw(trained(model).values(), fused=DEVICE == "cuda")
    with force(form):
        for losses in steps:
            values = [loss(model) for loss in losses]
            for value in values:
                value.backward()
            torch.nn.utils.clip_grad_norm_(trained(model).values(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            found.append(sum(value.item() for value in values))
    assert found == pytest.approx(expected, rel=2e-5) and found[-1] < 0.9 * found[0]
    for name, layer in layers(model).items():
        wanted = plain.get_submodule(name).weight.flatten()[layer.reltune_element_indices["default"].long()]
        assert torch.allclose(layer.reltune_elements["default"], wanted, rtol=0, atol=1e-4), name
        assert torch.equal(dequantised(layer.base_layer), before[name]), name


def layers(model):
    found = {name.removeprefix("base_model.model."): m for name, m in model.named_modules() if hasattr(m, "originals")}
    assert found
    return found


def one_map(way, dtype=torch.float32, **units):
    """A model of one map in few bits, and its adapter's layer."""
    torch.manual_seed(1)
    linear = nn.Linear(16, 32).to(DEVICE)
    base = nn.Sequential(WAYS[way][0](linear) if isinstance(way, str) else way(linear))
    plan = Plan({"0": ModulePlan((32, 16), **(units or ELEMENTS_OF_ONE))}, "all", 10**4, 10**4, fingerprint="")
    model = get_peft_model(base, reltune.ReltuneConfig(plan=plan))
    return model, model.get_submodule("base_model.model.0")


ELEMENTS_OF_ONE = {"elements": [0, 17, 200, 511]}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_unpacked_once_for_each_product_and_computed_once(way, monkeypatch):
    model, layer = one_map(way)
    unpacked, products = [], []
    monkeypatch.setattr("reltune.tuner.quantised.dequantised", lambda *a: unpacked.append(a) or dequantised(*a))
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: products.append(a) or linear(*a))
    x = torch.randn(5, 16, device=DEVICE)
    y = model(x)
    assert len(unpacked) == len(products) == 1
    y.sum().backward()
    assert len(unpacked) == 1  # nothing below it is trained
    assert layer.reltune_elements["default"].grad.abs().min() > 0
    model(x.requires_grad_()).sum().backward()
    assert len(unpacked) == 3 and x.grad is not None


def test_what_is_kept_for_the_backward_pass_is_the_input_and_the_values():
    model, _ = one_map("nf4")
    x = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert sorted(t.numel() for t in kept) == [4, 80] and any(t.data_ptr() == x.data_ptr() for t in kept)


@pytest.mark.parametrize("way", WAYS)
def test_the_graph_keeps_what_it_computed_with(way):
    """Disabling, switching, and values that an optimizer changes unnoticed, between the two passes: as TRL's DPO does it."""
    gradients = []
    for meddle in (False, True):
        quantised, _ = pair(tiny_bert, way)
        start = copy.deepcopy(quantised).eval()
        model = tuned(quantised, ELEMENTS)
        compute_as_in_training(start)
        model.add_adapter("other", reltune.ReltuneConfig(target_modules=["key"], r=2))
        # so that the weight is unpacked in the backward pass too
        embedded = quantised.get_input_embeddings().weight.requires_grad_()
        values = layers(model)[LINEAR].reltune_elements["default"]
        values.data += 0.5
        loss = model(**batches()[0]).loss
        if meddle:
            with torch.no_grad(), model.disable_adapter():
                assert torch.equal(model(**batches()[0]).logits, start(**batches()[0]).logits)
            model.set_adapter("other")
            model(**batches()[1])
            model.set_adapter("default")
            values.data += 3
        gradients.append(torch.autograd.grad(loss, [values, embedded]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_several_adapters_add_their_changes_and_samples_name_theirs(way):
    """As on the plain base, where they are written into the weight or added beside the product."""
    outputs, gradients = [], []
    for base in pair(tiny_bert, way):
        model = tuned(base, ELEMENTS)
        other = ModulePlan(
            tuple(take_inventory(pair(tiny_bert, way)[1])[LINEAR].shape), elements=[3, 40, 639], columns=[5], bias=True
        )
        plan = Plan({LINEAR: other}, "all", 10**4, 10**6, fingerprint="", always_trained=["classifier"])
        model.add_adapter("other", reltune.ReltuneConfig(plan=plan))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if ".reltune_" in name:
                    p += torch.randn(p.shape, generator=generator).to(DEVICE) / 2
        of = []
        with torch.no_grad():
            for names in (["default"], ["other"], ["default", "other"], ["other", "default"]):
                layers(model)[LINEAR].set_adapter(names)
                of.append(model(**batches()[0]).logits)
            layers(model)[LINEAR].set_adapter(["default"])
            names = ["default", "other", "__base__", "other"][: len(batches()[0]["labels"])]
            model.eval()
            compute_as_in_training(base)
            of.append(model(**batches()[0], adapter_names=names).logits)
        outputs.append(of)
        layers(model)[LINEAR].set_adapter(["default", "other"])
        model(**batches()[0]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if ".reltune_" in n})
        copied = copy.deepcopy(model)
        model.delete_adapter("other")
        assert torch.allclose(model(**batches()[0]).logits, of[0], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            layers(copied)[LINEAR].reltune_elements["default"].add_(1)
        assert not torch.allclose(copied(**batches()[0]).logits, of[2], atol=1e-3)
    exact = DEVICE == "cpu" or way != "8 bits"
    near = {"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 3e-2, "atol": 3e-2}
    assert all(torch.allclose(a, b, **near) for a, b in zip(*outputs, strict=True))
    assert not torch.allclose(outputs[0][0], outputs[0][2], atol=1e-3)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert gradient.abs().max() > 0 and torch.allclose(gradients[0][name], gradient, **near), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_with_dropout_changes_nothing(way, reentrant):
    gradients = []
    for checkpointed in (False, True):
        quantised, _ = pair(functools.partial(tiny_bert, hidden_dropout_prob=0.3), way)
        plan, _ = in_every_map(quantised)
        model = get_peft_model(quantised, reltune.ReltuneConfig(plan=plan)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        model(**batches()[0]).loss.backward()
        gradients.append([p.grad for p in trained(model).values()])
    assert len(gradients[0]) > 10 and all(p is not None for p in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def in_4_bits_by(dtype):
    return lambda linear: in_4_bits(linear, compute_dtype=dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "way",
    [*(in_4_bits_by(dtype) for dtype in (None, torch.float32, torch.bfloat16)), "8 bits", "torchao int8"],
    ids=["4 bits", "4 bits, float32", "4 bits, bfloat16", "8 bits", "torchao int8"],
)
def test_types_are_those_of_the_base_s_own_product(way, of_input, autocast):
    model, layer = one_map(way)
    if of_input == torch.bfloat16 and way == "torchao int8":
        layer.base_layer.bias.data = layer.base_layer.bias.data.bfloat16()
    x = torch.randn(3, 7, 16, device=DEVICE).to(of_input).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = model(x)
        with model.disable_adapter():
            wanted = model(x)
    assert y.dtype == wanted.dtype
    assert torch.allclose(y, wanted, rtol=2e-2, atol=2e-2)  # the values are the base's to begin with
    y.float().square().sum().backward()
    values = layer.reltune_elements["default"]
    assert x.grad.dtype == of_input and values.grad.dtype == values.dtype == torch.float32
    weight = dequantised(layer.base_layer).float()
    g = 2 * y.detach().float()
    gradient = (g.flatten(0, 1).mT @ x.detach().float().flatten(0, 1)).flatten()[ELEMENTS_OF_ONE["elements"]]
    assert torch.allclose(values.grad, gradient, rtol=5e-2, atol=5e-2 * float(gradient.abs().max()))
    assert torch.allclose(x.grad.float(), g @ weight, rtol=5e-2, atol=5e-2 * float((g @ weight).abs().max()))


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_the_base_layer_are_called_and_a_forward_of_its_own_is(way):
    model, layer = one_map(way, elements=[0, 17, 200, 511], rows=[], columns=[5], bias=True)
    layer.base_layer.eval()
    compute_as_in_training(layer.base_layer)
    for parameters in (layer.reltune_elements, layer.reltune_columns, layer.reltune_bias):
        parameters["default"].data += 1
    x = torch.randn(5, 16, device=DEVICE)
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    wanted = model(x)
    assert seen == [(5, 32)]
    handle.remove()
    own = layer.base_layer.forward
    layer.base_layer.forward = lambda x: seen.append(x.shape) or own(x)  # as accelerate moves inputs and weights
    found = model(x)
    assert seen == [(5, 32), (5, 16)]
    near = {"rtol": 1e-4, "atol": 1e-4} if DEVICE == "cpu" or way != "8 bits" else {"rtol": 3e-2, "atol": 3e-2}
    assert torch.allclose(found, wanted, **near)
    gradients = [torch.autograd.grad(y.square().sum(), trained(model).values()) for y in (found, wanted)]
    assert all(
        torch.allclose(a, b, rtol=10 * near["rtol"], atol=10 * near["atol"]) for a, b in zip(*gradients, strict=True)
    )


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_single_weights_of_every_map_are_saved_and_loaded(low_cpu_mem_usage, is_trainable, tmp_path):
    quantised, _ = pair(tiny_llama, "fp4 twice")
    plan, _ = in_every_map(quantised)
    model = get_peft_model(quantised, reltune.ReltuneConfig(plan=plan, init_weights=False)).eval()
    compute_as_in_training(quantised)
    model.save_pretrained(tmp_path)
    again, _ = pair(tiny_llama, "fp4 twice")
    options = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": is_trainable, "torch_device": DEVICE}
    loaded = PeftModel.from_pretrained(again, tmp_path, **options).eval()
    compute_as_in_training(again)
    assert torch.equal(loaded(**batches()[0]).logits, model(**batches()[0]).logits)
    assert len(trained(loaded)) == (14 if is_trainable else 0)
    with loaded.disable_adapter(), model.disable_adapter():
        assert torch.equal(loaded(**batches()[0]).logits, model(**batches()[0]).logits)
    state = {key: value for key, value in model.state_dict().items() if ".base_layer.weight" in key}
    assert state and all(torch.equal(value, loaded.state_dict()[key]) for key, value in state.items())


def test_merging_and_a_lora_file_are_refused_with_what_to_do_instead(tmp_path):
    model = tuned(pair(tiny_bert, "nf4")[0], ELEMENTS)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            InputError, match=r"cannot be merged into a quantised weight, .* or run the adapter unmerged"
        ):
            call()
    with pytest.raises(InputError, match=r"trains single weights, .* --granularity direction"):
        to_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("way", ["nf4", "8 bits", "torchao int8"])
@pytest.mark.parametrize("spread", ["even", "global"])
def test_single_weights_are_measured_chosen_and_trained(spread, way):
    """By the probe, whose votes are those of the dequantised weights."""
    quantised, plain = pair(tiny_bert, way)
    plans = []
    for base in (quantised, plain):
        options = {"movement": {"steps": 4}}
        found = measure(
            base, batches(), None, ["movement"], options=options, elements=True, always_trained="classifier"
        )
        plans.append(reltune.select(found, "5%", "element", spread=spread))
    mine, theirs = ({(name, i) for name, m in plan.modules.items() for i in m.elements} for plan in plans)
    assert mine and abs(len(mine) - len(theirs)) <= 2 and len(mine & theirs) >= 0.9 * len(theirs)
    model = get_peft_model(quantised, reltune.ReltuneConfig(plan=plans[0]))
    model(**batches()[0]).loss.backward()
    assert all(p.grad is not None for p in trained(model).values()) and len(trained(model)) > 5


@pytest.mark.parametrize("way", ["nf4", "torchao fp8"])
def test_inputs_that_are_made_again_are_the_same(way, monkeypatch):
    gradients, reads, read = [], [], recompute.Remade.read
    monkeypatch.setattr(recompute.Remade, "read", lambda self: reads.append(1) or read(self))
    for on in (False, True):
        quantised, _ = pair(tiny_llama, way)
        plan, _ = in_every_map(quantised)
        model = get_peft_model(quantised, reltune.ReltuneConfig(plan=plan)).eval()
        compute_as_in_training(quantised)
        with recompute.force(on):
            model(**batches()[0]).loss.backward()
        assert bool(reads) == on
        gradients.append([p.grad for p in trained(model).values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
