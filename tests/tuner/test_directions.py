"""Fixed directions of a linear map's input through PEFT: trained as the written-out weight W₀ + B A is, on every sort of base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from oracles import directions
from reltune.errors import InputError
from reltune.layers.float8 import Float8Linear
from reltune.plan.plan import ModulePlan, Plan
from reltune.runs.export import to_lora
from reltune.tuner import ReltuneConfig
from reltune.tuner.layer import ReltuneLayer

Chosen = dict[str, list[int]]
CHOSEN: Chosen = {"0": [2, 0], "4": [1]}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0, fused=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The last map is stored as (in, out)."""
    torch.manual_seed(0)
    layers = nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), Conv1D(3, 16)
    return nn.Sequential(*layers).to(dtype)


def vectors(name: str, size: int) -> np.ndarray:
    return np.random.default_rng(len(name) + size).normal(size=(4, size)).astype(np.float32)


def shape_of(module: Any) -> tuple[int, ...]:
    return tuple(module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape)


def config_of(model: nn.Module, chosen: Chosen, **fields: Any) -> ReltuneConfig:
    modules = {}
    for name, own in chosen.items():
        shape = shape_of(model.get_submodule(name))
        modules[name] = ModulePlan(shape, directions=own, vectors=vectors(name, shape[1]))
    return ReltuneConfig(plan=Plan(modules, "all", 10**9, 10**9, ""), **fields)


def tuned(base: nn.Module | None = None, chosen: Chosen = CHOSEN, **fields: Any) -> PeftModel:
    base = base or net()
    return get_peft_model(base, config_of(base, chosen, **fields))


def written_out(model: nn.Module, chosen: Chosen = CHOSEN) -> dict[str, nn.Parameter]:
    sizes = {name: shape_of(model.get_submodule(name))[1] for name in chosen}
    return directions.along(model, {n: torch.from_numpy(vectors(n, sizes[n])[chosen[n]]) for n in chosen})


def steps(count: int, each: int, dtype: torch.dtype = torch.float64) -> list[list[Callable[[nn.Module], Tensor]]]:
    g = torch.Generator().manual_seed(1)

    def one() -> Callable[[nn.Module], Tensor]:
        x, y = torch.randn(2, 5, 16, generator=g).to(dtype), torch.randint(0, 3, (10,), generator=g)
        return lambda model: nn.functional.cross_entropy(model(x).flatten(0, 1).double(), y)

    return [[one() for _ in range(each)] for _ in range(count)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def layers(model: nn.Module) -> dict[str, ReltuneLayer]:
    return {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, ReltuneLayer)
    }


def stir(model: nn.Module, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn(p.shape, generator=g, dtype=torch.float64).to(p) / 4)


X = torch.randn(3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_steps_with_accumulation_and_clipping(optimizer: str) -> None:
    plain, model, batches = net(), tuned(), steps(20, 2)
    expected = directions.train(plain, written_out(plain).values(), OPTIMIZERS[optimizer], batches, max_norm=0.3)
    found = directions.train(model, trained(model), OPTIMIZERS[optimizer], batches, max_norm=0.3)
    assert found == pytest.approx(expected, rel=0, abs=1e-9) and abs(found[0] - found[-1]) > 1e-2
    merged = model.merge_and_unload().state_dict()
    for name, tensor in directions.finished(plain).state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-9)


def test_the_start_is_the_base_and_only_what_is_along_the_directions_is_trained() -> None:
    model = tuned()
    with torch.no_grad():
        torch.testing.assert_close(model(X), net()(X), rtol=0, atol=0)
    shapes = {tuple(p.shape) for p in trained(model)}
    assert shapes == {(32, 2), (3, 1)}
    assert model.get_nb_trainable_parameters()[0] == 32 * 2 + 3
    assert sorted(tuple(b.shape) for b in model.buffers()) == [(1, 16), (2, 16)]


def test_the_base_weight_is_never_written_and_its_input_not_kept() -> None:
    model = tuned()
    before = {name: p.clone() for name, p in net().named_parameters()}
    directions.train(model, trained(model), OPTIMIZERS["plain"], steps(3, 1))
    for name in CHOSEN:
        assert torch.equal(layers(model)[name].weight, before[f"{name}.weight"])
    kept: list[Tensor] = []
    x = torch.randn(10, 7, 16, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layers(model)["0"](x)
    assert sorted(tuple(t.shape) for t in kept if t.ndim == 3) == [(10, 7, 2)]


def test_a_bfloat16_base_trains_in_float32_and_keeps_its_directions_in_float32() -> None:
    plain = net().float()
    model = tuned(net(torch.bfloat16))
    assert {p.dtype for p in trained(model)} == {torch.float32}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    make, batches = OPTIMIZERS["plain"], steps(6, 1, torch.bfloat16)
    expected = directions.train(plain, written_out(plain).values(), make, steps(6, 1, torch.float32))
    assert directions.train(model, trained(model), make, batches) == pytest.approx(expected, abs=0.03)


def test_a_float8_base_is_trained_beside_its_own_product_and_exported() -> None:
    base = net(torch.float32)
    model = tuned(base, {"0": [2, 0]}, frozen_dtype="float8_e4m3fn")
    assert isinstance(layers(model)["0"].get_base_layer(), Float8Linear)
    x = X.float()
    with torch.no_grad(), model.disable_adapter():
        start = layers(model)["0"](x)
    stir(model)
    layer = layers(model)["0"]
    own = layer.reltune_directions["default"]
    with torch.no_grad():
        along = (x @ torch.from_numpy(vectors("0", 16)[[2, 0]]).T) @ own.T
        torch.testing.assert_close(layer(x), start + along, rtol=1e-5, atol=1e-5)
    model(x).square().sum().backward()
    assert own.grad is not None and own.grad.any()
    with pytest.raises(InputError, match="cannot be merged into a weight held in float8"):
        model.merge_adapter()
    assert layer.why_no_lora("default") == ""


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_loaded_and_loaded_over_others(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = tuned()
    stir(model)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2]: t.dtype for name, t in held.items()} == {
        "reltune_directions": torch.float64,
        "reltune_direction_vectors": torch.float64,
    }
    loaded = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    others = tuned(chosen={"0": [1, 3], "4": [0]})
    others.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_cpu_mem_usage)
    with torch.no_grad():
        for again in (loaded, others):
            torch.testing.assert_close(again(X), model(X), rtol=0, atol=1e-14)


def test_a_saved_config_alone_does_not_run(tmp_path: Path) -> None:
    model = tuned()
    stir(model)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    empty = get_peft_model(net(), config)
    for ask in (lambda: empty(X), empty.merge_adapter, lambda: to_lora(empty, tmp_path / "lora")):
        with pytest.raises(InputError, match="directions, columns, rows or single weights are trained but not which"):
            ask()
    assert not (tmp_path / "lora").exists()
    set_peft_model_state_dict(empty, load_file(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(empty(X), model(X), rtol=0, atol=0)


def test_a_plan_without_its_vectors_is_refused() -> None:
    plan = Plan({"0": ModulePlan((32, 16), directions=[0])}, "all", 10**9, 10**9, "")
    with pytest.raises(InputError, match="the vectors of the directions of 0 are missing"):
        ReltuneConfig(plan=plan)


def test_a_reference_by_disabling_between_forward_and_backward() -> None:
    """As DPOTrainer does."""
    model = tuned()
    stir(model)
    (loss,) = steps(1, 1)[0]
    loss(model).backward()
    expected = [p.grad.clone() for p in trained(model)]  # type: ignore[union-attr]
    model.zero_grad()
    value = loss(model)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(X), net()(X), rtol=0, atol=0)
    value.backward()
    for p, own in zip(trained(model), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, own, rtol=0, atol=0)


def test_merging_is_undone_to_the_bit_also_in_bfloat16() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model, base = tuned(net(dtype)), net(dtype).state_dict()
        stir(model)
        with torch.no_grad():
            before = model(X.to(dtype))
            model.merge_adapter(safe_merge=True)
            atol = 1e-12 if dtype == torch.float64 else 0.1
            torch.testing.assert_close(model(X.to(dtype)), before, rtol=0, atol=atol)
            model.unmerge_adapter()
            torch.testing.assert_close(model(X.to(dtype)), before, rtol=0, atol=0)
        state = copy.deepcopy(model).unload().state_dict()
        assert all(torch.equal(state[name], value) for name, value in base.items())


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **dropout, intermediate_size=32)).double()


BATCH = {
    "input_ids": torch.randint(1, 20, (4, 8), generator=torch.Generator().manual_seed(2)),
    "labels": torch.tensor([0, 1, 1, 0]),
}
TOP: Chosen = {"bert.encoder.layer.2.attention.self.value": [0], "bert.encoder.layer.2.output.dense": [3, 1]}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_nothing_below_the_lowest_unit_is_differentiated(reentrant: bool | None) -> None:
    """Nor with gradient checkpointing, which gives the same gradients; checkpoints that re-enter autograd need the whole way."""
    plain = bert()
    wanted = written_out(plain, TOP)
    plain(**BATCH).loss.backward()
    base = bert()
    if reentrant is not None:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = tuned(base, TOP, task_type="SEQ_CLS").train()
    model.requires_grad_(False)
    for layer in layers(model).values():
        layer.reltune_directions.requires_grad_(True)
    seen: dict[int, bool] = {}
    for number, block in enumerate(base.bert.encoder.layer):
        block.register_forward_hook(
            lambda _m, _a, y, at=number: seen.__setitem__(at, (y[0] if isinstance(y, tuple) else y).requires_grad)
        )
    model(**BATCH).loss.backward()
    for name, change in wanted.items():
        got = layers(model)[name].reltune_directions["default"].grad
        torch.testing.assert_close(got, change.grad, rtol=0, atol=1e-10)
    if not reentrant:
        assert seen == {0: False, 1: False, 2: True}


def test_one_adapter_for_each_sample() -> None:
    model = tuned().eval()
    stir(model)
    model.add_adapter("other", config_of(net(), {"0": [1, 3]}, init_weights=False))
    with torch.no_grad():
        mixed = model(X, adapter_names=["other", "__base__", "default"])
        for sample, name in enumerate(("other", None, "default")):
            if name is None:
                with model.disable_adapter():
                    alone = model(X)
            else:
                model.set_adapter(name)
                alone = model(X)
            torch.testing.assert_close(mixed[sample], alone[sample], rtol=0, atol=1e-12)
