"""Frozen weights in float8 while columns or single weights are trained, against a model of rounded linear maps (oracles/float8.py)."""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import reltune
from oracles.float8 import RoundedLinear, rounded_weight
from relevance_cases import measure, split, text_batch
from reltune.errors import InputError
from reltune.layers.fingerprint import fingerprint
from reltune.layers.float8 import Float8Linear, convertible, to_float8
from reltune.layers.inventory import take_inventory
from reltune.plan.plan import ModulePlan, Plan
from reltune.runs.export import to_lora
from reltune.tuner.float8 import ReltuneFloat8Linear

TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
FLOAT8 = "float8_e4m3fn"


def llama(dtype: torch.dtype = torch.float64, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.2, **changes)
    return LlamaForCausalLM(config).to(dtype).eval()


def bert(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32, num_labels=3, initializer_range=0.2)
    return BertForSequenceClassification(config).to(dtype).eval()


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(48, (2, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def loss_of(model: Any, number: int) -> Tensor:
    """Of the logits, in float64: Transformers rounds them to float32 first, and what is trained here does not."""
    inputs = batch(number)
    logits = model(**inputs).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


def config(**changes: Any) -> reltune.ReltuneConfig:
    return reltune.ReltuneConfig(**{"target_modules": TARGETS, "r": 3, "frozen_dtype": FLOAT8, **changes})


def tuned(dtype: torch.dtype = torch.float64, **changes: Any) -> PeftModel:
    return get_peft_model(llama(dtype), config(**changes)).eval()


def layers(model: nn.Module) -> dict[str, ReltuneFloat8Linear]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ReltuneFloat8Linear)
    }


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stir(model: PeftModel, adapter: str = "default", seed: int = 0) -> None:
    """Change the adapter's columns, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (layer for layer in layers(model).values() if adapter in layer.reltune_columns):
            values = layer.reltune_columns[adapter]
            values.add_(torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values.dtype) / 4)


def oracle(columns: dict[str, Tensor]) -> nn.Module:
    """The plain model with rounded maps in the places of all but the output layer, and columns trained at these indices."""
    model = llama().requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, RoundedLinear(module, columns.get(name)))
    return model


def test_it_trains_as_the_definition_says() -> None:
    model = tuned()
    wanted = oracle({name: layer.reltune_column_indices["default"] for name, layer in layers(model).items()})
    ours, theirs = list(trained(model).values()), list(trained(wanted).values())
    assert len(ours) == len(theirs) == 8
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in (ours, theirs)]
    losses: list[list[float]] = [[], []]
    for step in range(6):
        for i, (of, optimizer) in enumerate(zip((model, wanted), optimizers, strict=True)):
            loss = loss_of(of, step % 2)
            loss.backward()
            if step % 2:  # gradients of two batches are added up
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses[i].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[0][-1] < losses[0][0]
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()


# Single weights of some maps, as flat indices; columns beside them in one.
CHOSEN: dict[str, dict[str, Any]] = {
    "model.layers.0.self_attn.q_proj": {"elements": [0, 33, 200, 1023]},
    "model.layers.0.mlp.down_proj": {"elements": [5, 64, 2000]},
    "model.layers.1.mlp.up_proj": {"elements": [7, 40, 2047], "columns": [3, 20]},
}


class UnpackedLinear(nn.Module):
    """Rounded weights with single weights, and columns, in full precision in their places; inputs are not rounded."""

    def __init__(self, linear: nn.Linear, units: dict[str, Any]) -> None:
        super().__init__()
        self.rounded, _ = rounded_weight(linear.weight.detach())
        self.units, own = units, linear.weight.detach()
        self.columns = nn.Parameter(own[:, units["columns"]].clone()) if "columns" in units else None
        self.elements = nn.Parameter(own.flatten()[units["elements"]].clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rounded
        if self.columns is not None:
            weight = weight.index_copy(1, torch.tensor(self.units["columns"]), self.columns)
        weight = weight.flatten().index_copy(0, torch.tensor(self.units["elements"]), self.elements)
        return nn.functional.linear(x, weight.view(self.rounded.shape))


def with_elements(dtype: torch.dtype = torch.float64, **changes: Any) -> PeftModel:
    base = llama(dtype)
    modules = {
        name: ModulePlan(tuple(base.get_submodule(name).weight.shape), **units)  # type: ignore[union-attr,arg-type]
        for name, units in CHOSEN.items()
    }
    plan = Plan(modules, "all", 10**4, 10**5, fingerprint="")
    return get_peft_model(base, reltune.ReltuneConfig(plan=plan, frozen_dtype=FLOAT8, **changes)).eval()


def test_single_weights_train_as_the_definition_says() -> None:
    """In maps that are multiplied unpacked, from the weights as they were before rounding."""
    model, wanted = with_elements(), oracle({})
    for name, units in CHOSEN.items():
        wanted.set_submodule(name, UnpackedLinear(llama().get_submodule(name), units))  # type: ignore[arg-type]
    packed = {name: layer.weight.clone() for name, layer in layers(model).items()}
    ours, theirs = list(trained(model).values()), list(trained(wanted).values())
    assert len(ours) == len(theirs) == 4
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2) for parameters in (ours, theirs)]
    losses: list[list[float]] = [[], []]
    for step in range(8):
        for i, (of, optimizer) in enumerate(zip((model, wanted), optimizers, strict=True)):
            loss = loss_of(of, step % 2)
            loss.backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
            losses[i].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[0][-1] < losses[0][0]
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    assert all(torch.equal(layer.weight, packed[name]) for name, layer in layers(model).items())


def test_single_weights_live_as_columns_do(tmp_path: Path) -> None:
    """Disabled between the two passes, switched, saved, loaded on the plain base and merged there, loaded to go on."""
    model, alone = with_elements(init_weights=False), with_elements()
    base = tuned(r=1)
    with base.disable_adapter():
        rounded = base(**batch()).logits
    alone.load_state_dict(model.state_dict())
    loss = model(**batch()).loss
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, rounded)
    model.add_adapter("columns", config(target_modules=["q_proj"], r=2, init_weights=False))
    model.set_adapter("columns")
    assert not torch.equal(model(**batch()).logits, rounded)
    model.set_adapter("default")
    loss.backward()
    alone(**batch()).loss.backward()
    for a, b in zip(trained(model).values(), trained(alone).values(), strict=True):
        assert torch.equal(a.grad, b.grad)
    model.delete_adapter("columns")
    model.save_pretrained(tmp_path)
    plain = llama()
    with torch.no_grad():
        for name, layer in ((name, layers(model)[name]) for name in CHOSEN):
            weight, values = plain.get_submodule(name).weight, layer.reltune_elements["default"]
            weight.view(-1)[layer.reltune_element_indices["default"].long()] = values
            if "default" in layer.reltune_columns:
                weight[:, layer.reltune_column_indices["default"]] = layer.reltune_columns["default"]
    wanted = plain(**batch()).logits
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.allclose(loaded(**batch()).logits, wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(loaded.merge_and_unload()(**batch()).logits, wanted, rtol=1e-12, atol=1e-12)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    assert len(layers(again)) == 3 and torch.equal(again(**batch()).logits, model(**batch()).logits)
    for call in (again.merge_adapter, again.merge_and_unload):
        with pytest.raises(InputError, match="cannot be merged into a weight held in float8"):
            call()
    assert torch.equal(again.unload()(**batch()).logits, rounded)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing_for_single_weights(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = with_elements().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch()).loss.backward()
        gradients.append([p.grad for p in trained(model).values()])
    assert len(gradients[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_single_weights_start_unrounded_and_train_under_autocast(dtype: torch.dtype) -> None:
    plain, model = llama(dtype), with_elements(dtype)
    for name, layer in layers(model).items():
        values = layer.reltune_elements["default"]
        assert values.dtype == torch.float32
        assert torch.equal(values, plain.get_submodule(name).weight.float().flatten()[CHOSEN[name]["elements"]])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        loss = model(**batch()).loss
    loss.backward()
    found = {name: p.grad for name, p in trained(model).items()}
    exact = with_elements()
    exact(**batch()).loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in trained(exact).values()])
    error = torch.cat([gradient.double().flatten() for gradient in found.values()]) - wanted
    assert error.norm() <= 0.4 * wanted.norm()  # after bfloat16, float8 rounds other numbers up than before


def test_it_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == "triton" or name.startswith("reltune.ops.kernels."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # neither found nor imported
    with pytest.raises(ModuleNotFoundError):
        import_module("reltune.ops.kernels.float8")
    test_it_trains_as_the_definition_says()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_start_as_they_were_before_rounding(dtype: torch.dtype) -> None:
    plain = llama(dtype)
    model = tuned(dtype)
    assert layers(model)
    for name, layer in layers(model).items():
        idx = layer.reltune_column_indices["default"]
        original = plain.get_submodule(name).weight
        assert torch.equal(layer.reltune_columns["default"], original[:, idx].float())
        assert layer.reltune_columns["default"].dtype == torch.float32
        assert layer.originals["default"].columns.dtype == dtype
        rounded, _ = rounded_weight(original.detach())
        assert torch.equal(layer.originals["default"].columns.double(), rounded[:, idx])
        assert torch.equal(layer.base_layer.dequantised().double(), rounded)
        squares = original.float().square().sum(0)  # chosen by the weights as they were
        assert idx.tolist() == squares.topk(3).indices.sort().values.tolist()


def test_which_maps_are_held_in_float8() -> None:
    model = llama()
    model.model.layers[0].mlp.down_proj = nn.Linear(64, 33, bias=False).double()
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    own = model.model.layers[1].self_attn.o_proj
    own.forward = own.forward
    found = convertible(model, ["k_proj", "layers.1.mlp"])
    parts = {f"layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qvo"} - {"layers.1.self_attn.o_proj"}
    assert set(found) == {f"model.{name}" for name in (*parts, "layers.0.mlp.gate_proj")}
    tied = llama(tie_word_embeddings=True)
    assert "lm_head" not in convertible(tied)
    assert not any(isinstance(m, Float8Linear) for m in tied.modules())


def test_every_frozen_map_is_converted_whether_targeted_or_not() -> None:
    model = tuned(target_modules=["q_proj"]).base_model.model
    for i in (0, 1):
        layer = model.model.layers[i]
        assert isinstance(layer.self_attn.q_proj.base_layer, Float8Linear)
        others = [layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.down_proj]
        assert all(isinstance(m, Float8Linear) and m.weight.dtype == torch.int8 for m in others)
    assert type(model.lm_head) is nn.Linear


def test_heads_that_are_saved_whole_stay_as_they_are() -> None:
    model = get_peft_model(bert(), config(target_modules=["query"], modules_to_save=["pooler", "classifier"]))
    pooler = model.base_model.model.bert.pooler.modules_to_save["default"].dense
    assert type(pooler) is nn.Linear and pooler.weight.requires_grad
    model(**text_batch((3, 5, 2))).loss.backward()
    assert all(p.grad is not None for p in trained(model).values()) and len(trained(model)) == 2 + 4


UNITS: dict[str, dict[str, Any]] = {
    "columns and bias": {"columns": [1, 4], "bias": True},
    "bias": {"bias": True},
    "rows": {"rows": [0, 7]},
    "columns and rows": {"columns": [1, 4], "rows": [0, 7]},
    "elements": {"elements": [3, 500, 700]},
    "columns, elements and bias": {"columns": [1, 4], "elements": [3, 500, 700], "bias": True},
    "weight": {"weight": True},
}
LINEAR = "bert.encoder.layer.1.intermediate.dense"


@pytest.mark.parametrize("units", UNITS.values(), ids=list(UNITS))
def test_modules_of_a_plan_with_rows_or_whole_weights_are_left_in_full_precision(units: dict[str, Any]) -> None:
    base = bert()
    chosen = ModulePlan((48, 32), **{k: v for k, v in units.items() if k != "elements"})
    if "elements" in units:
        chosen.take_elements(torch.tensor(units["elements"]))
    plan = Plan({LINEAR: chosen}, "all", chosen.parameters, 10**6, fingerprint="", always_trained=["classifier"])
    model = get_peft_model(base, reltune.ReltuneConfig(plan=plan, frozen_dtype=FLOAT8))
    module = model.base_model.model.get_submodule(LINEAR)
    assert isinstance(module.base_layer, Float8Linear) == (not {"rows", "weight"} & set(units))
    assert isinstance(model.base_model.model.bert.encoder.layer[1].output.dense, Float8Linear)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(**text_batch((3, 5, 2))).loss
        loss.backward()
        assert all(p.grad is not None for p in trained(model).values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_an_adapter_is_disabled_between_the_two_passes() -> None:
    model, alone = tuned(), tuned()
    for m in (model, alone):
        stir(m)
    base = tuned(r=1)  # any adapter: disabled, it is the rounded base
    with base.disable_adapter():
        wanted = base(**batch()).logits
    loss = model(**batch()).loss
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, wanted)
        assert not torch.allclose(alone(**batch()).logits, wanted)
    loss.backward()
    alone(**batch()).loss.backward()
    for a, b in zip(trained(model).values(), trained(alone).values(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_adapters_are_switched_added_up_named_and_deleted() -> None:
    model = tuned()
    model.add_adapter("other", config(target_modules=["v_proj", "up_proj"], r=2, init_weights=False))
    stir(model)
    outputs = {}
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            outputs[name] = model(**batch()).logits
        with model.disable_adapter():
            base = model(**batch()).logits
        alone = tuned()
        stir(alone)
        assert torch.equal(outputs["default"], alone(**batch()).logits)
        both = {**batch(), "input_ids": batch()["input_ids"][[0, 1, 0]], "labels": None}
        mixed = model(**both, adapter_names=["default", "other", "__base__"]).logits
        wanted = torch.stack([outputs["default"][0], outputs["other"][1], base[0]])
        assert torch.allclose(mixed, wanted, rtol=1e-9, atol=1e-9)
        layer = model.base_model.model.model.layers[0].self_attn.v_proj
        x = torch.randn(3, 32, dtype=torch.float64)
        parts = []
        for names in (["default"], ["other"], ["default", "other"]):
            model.base_model.set_adapter(names)
            parts.append(layer(x) - layer.base_layer(x))
        assert torch.allclose(parts[0] + parts[1], parts[2], rtol=1e-9, atol=1e-9)
        model.base_model.set_adapter(["default"])
        model.delete_adapter("other")
        assert torch.equal(model(**batch()).logits, outputs["default"])


def test_training_after_a_first_pass_in_inference_mode() -> None:
    """Tensors that are made in inference mode can enter no graph; the layers must not keep any."""
    model, alone = tuned(), tuned()
    with torch.inference_mode():
        model(**batch())
    for m in (model, alone):
        m(**batch()).loss.backward()
    for a, b in zip(trained(model).values(), trained(alone).values(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_model_that_was_cast_in_inference_mode_runs() -> None:
    model = tuned()
    with torch.inference_mode():
        found = model.float()(**batch()).logits
    assert torch.equal(found, tuned().float()(**batch()).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tuned().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch()).loss.backward()
        gradients.append([p.grad for p in trained(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_is_differentiated_below_the_lowest_unit(monkeypatch: Any) -> None:
    model = tuned(target_modules=["q_proj"], layers_to_transform=[1])
    calls = []
    monkeypatch.setattr("reltune.ops.float8.transposed", lambda q: calls.append(q) or q.t().contiguous())
    model(**batch()).loss.backward()
    assert len(calls) == 4  # o, gate, up and down of layer 1; q, k and v have an input without a gradient


def test_autocast() -> None:
    model = tuned(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    found = [p.grad.clone() for p in trained(model).values()]
    model.zero_grad()
    model(**batch()).loss.backward()
    for a, p in zip(found, trained(model).values(), strict=True):
        assert (a - p.grad).norm() <= 0.2 * p.grad.norm()


def test_saved_it_is_what_it_was_on_the_plain_base(tmp_path: Path) -> None:
    model = tuned()
    stir(model)
    values = {name: layer.reltune_columns["default"].detach() for name, layer in layers(model).items()}
    model.save_pretrained(tmp_path)
    assert not any("int8" in str(t.dtype) for t in _file(tmp_path).values())
    plain = llama()
    with torch.no_grad():
        for name, columns in values.items():
            idx = layers(model)[name].reltune_column_indices["default"]
            plain.get_submodule(name).weight.index_copy_(1, idx, columns)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert not layers(loaded) and not any(isinstance(m, Float8Linear) for m in loaded.modules())
    wanted = plain(**batch()).logits
    assert torch.allclose(loaded(**batch()).logits, wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(loaded.merge_and_unload()(**batch()).logits, wanted, rtol=1e-12, atol=1e-12)


def _file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loaded_to_go_on_training_it_is_converted_again(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = tuned()
    stir(model)
    model.save_pretrained(tmp_path)
    wanted = model(**batch()).logits
    options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    loaded = PeftModel.from_pretrained(llama(), tmp_path, **options).eval()
    assert len(layers(loaded)) == 8 and len(trained(loaded)) == 8
    assert torch.equal(loaded(**batch()).logits, wanted)
    loaded.load_adapter(tmp_path, "second", **options)
    loaded.set_adapter("second")
    assert torch.equal(loaded(**batch()).logits, wanted)
    with loaded.disable_adapter(), model.disable_adapter():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_a_plan_knows_its_base_by_what_it_was(tmp_path: Path) -> None:
    base = llama()
    name = "model.layers.0.self_attn.q_proj"
    plan = Plan({name: ModulePlan((32, 32), [1, 5])}, "all", 64, 10**5, fingerprint=fingerprint(base))
    model = get_peft_model(base, reltune.ReltuneConfig(plan=plan, frozen_dtype=torch.float8_e4m3fn))
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        assert PeftModel.from_pretrained(llama(), tmp_path, is_trainable=is_trainable).peft_config["default"].units
    other = llama()
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(InputError, match="another base model"):
        PeftModel.from_pretrained(other, tmp_path, is_trainable=True)


def test_what_unloading_gives_back() -> None:
    model = tuned()
    stir(model)
    with model.disable_adapter():
        wanted = model(**batch()).logits
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(InputError, match="cannot be merged into a weight held in float8"):
            call()
    base = model.unload()
    assert torch.equal(base(**batch()).logits, wanted)
    assert sum(isinstance(m, Float8Linear) for m in base.modules()) == 14
    again = get_peft_model(base, config())  # its own columns are not there any more
    with again.disable_adapter():
        assert torch.equal(again(**batch()).logits, wanted)
    layer = next(iter(layers(again).values()))
    assert torch.equal(layer.reltune_columns["default"], layer.originals["default"].columns)


def test_copies_are_independent() -> None:
    model = tuned()
    other = copy.deepcopy(model)
    stir(other)
    assert not torch.allclose(other(**batch()).logits, model(**batch()).logits)
    other(**batch()).loss.backward()
    assert not any(p.grad is not None for p in model.parameters())
    fresh = tuned()
    assert torch.equal(model(**batch()).logits, fresh(**batch()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casting_the_model_does_not_change_its_weights(dtype: torch.dtype) -> None:
    model = tuned(torch.float32)
    before = {name: layer.base_layer.dequantised() for name, layer in layers(model).items()}
    model.to(dtype)
    for name, layer in layers(model).items():
        assert layer.weight.dtype == torch.int8 and layer.base_layer.weight_scale.dtype == dtype
        assert torch.equal(layer.base_layer.dequantised().float(), before[name])
        assert torch.equal(
            layer.originals["default"].columns.float(), before[name][:, layer.originals["default"].column_idx]
        )
    loss = model(**batch()).loss
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in trained(model).values())


def test_weights_that_are_loaded_are_rounded() -> None:
    plain = llama(torch.float32)
    module = nn.Linear(32, 48)
    to_float8(module)
    other = nn.Linear(32, 48)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.dequantised().double(), rounded_weight(other.weight.detach())[0])
    assert torch.equal(module.bias, other.bias)
    copied = nn.Linear(32, 48)
    to_float8(copied)
    copied.load_state_dict(module.state_dict())  # its own numbers, as they are
    assert torch.equal(copied.dequantised(), module.dequantised()) and copied.weight.dtype == torch.int8
    base = tuned(torch.float32, r=2).unload()
    wanted = base(**batch()).logits
    base.load_state_dict(plain.state_dict())
    assert torch.equal(base(**batch()).logits, wanted)


def test_hooks_stay_and_are_called() -> None:
    base = llama()
    seen = []
    module = base.model.layers[0].self_attn.q_proj
    module.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    model = get_peft_model(base, config())
    model(**batch())
    assert layers(model)["model.layers.0.self_attn.q_proj"].base_layer is module and seen == [(2, 7, 32)]


def test_trainer(tmp_path: Path) -> None:
    model = get_peft_model(bert(), config(target_modules=["query", "dense"], exclude_modules=["pooler.dense"]))
    rows = [{key: value[0] for key, value in part.items()} for part in split(text_batch((5,) * 16), 1)]
    args = TrainingArguments(
        str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=5e-2,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()


def test_a_model_without_numbers_is_converted_too() -> None:
    with torch.device("meta"):
        base = llama()
    model = get_peft_model(base, config())
    assert len(layers(model)) == 8 and all(p.device.type == "meta" for p in model.parameters())


def test_compiled() -> None:
    model = tuned()
    stir(model)
    wanted = model(**batch()).logits
    compiled = torch.compile(model, backend="eager")
    compiled(**batch()).loss.backward()
    assert torch.allclose(compiled(**batch()).logits, wanted, rtol=1e-9, atol=1e-9)
    assert all(p.grad is not None for p in trained(model).values())


def test_transformers_itself_may_put_it_in() -> None:
    model = inject_adapter_in_model(config(), llama())
    assert torch.equal(model(**batch()).logits, tuned()(**batch()).logits)


def test_models_that_look_at_their_weights_types_run() -> None:
    """T5 casts its input to the type of ``wo``'s weight, but not to int8."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 1}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model = get_peft_model(model, config(target_modules=["q", "wo"]))
    ids = torch.randint(1, 32, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(layers(model)) == 5 and all(p.grad is not None for p in trained(model).values())


def test_lora_runs_on_a_base_that_was_converted() -> None:
    base = tuned(torch.float32).unload()
    model = get_peft_model(base, LoraConfig(target_modules=TARGETS, r=2))
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in trained(model).values()) and trained(model)


def test_it_is_analysed_as_other_quantised_maps_are() -> None:
    plain, base = bert(), get_peft_model(bert(), config(target_modules=["query"])).unload()
    inventory = take_inventory(base)
    kinds = {info.name: info.layer_type for info in inventory.modules}
    assert kinds[LINEAR] == "float8" and inventory.base_parameters == take_inventory(plain).base_parameters
    assert inventory[LINEAR].shape == (48, 32) and fingerprint(base) == ""
    scores = [
        measure(model, split(text_batch((3, 11, 6, 1)), 2), None, ["fisher", "magnitude"]).parts
        for model in (base, plain)
    ]
    for criterion in ("fisher", "magnitude"):
        a, b = (of[criterion][LINEAR]["column"] for of in scores)
        assert (a - b).norm() <= 0.3 * b.norm()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="frozen_dtype 'float8' is unknown; did you mean 'float8_e4m3fn'"):
        config(frozen_dtype="float8")
    with pytest.raises(InputError, match="no linear map that can be held in float8"):
        get_peft_model(nn.Sequential(nn.Linear(16, 3)), config(target_modules=["0"]))
    model = get_peft_model(llama(), config(frozen_dtype=None))
    with pytest.raises(InputError, match="give the first adapter frozen_dtype"):
        model.add_adapter("other", config())
    with pytest.raises(InputError, match=r"held in float8.*load the base anew"):
        to_lora(tuned(), tmp_path / "lora")
