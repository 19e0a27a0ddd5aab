"""Training selected units equals full fine-tuning in which all other weights have no gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from oracles import dense_update
from reltune.plan.plan import ModulePlan, Plan
from reltune.tuner import ReltuneConfig
from reltune.tuner.layer import ReltuneLayer

Selection = dict[str, dict[str, Any]]
LINEAR = ("first", "second", "head")

SELECTIONS: dict[str, Selection] = {
    "some columns": {"first": {"columns": [0, 5]}, "second": {"columns": [2]}},
    "some rows": {"first": {"rows": [1, 7]}, "second": {"rows": [0, 3, 4]}},
    "all columns": {
        "first": {"columns": list(range(6))},
        "second": {"columns": list(range(8))},
        "head": {"columns": list(range(8))},
    },
    "all rows": {
        "first": {"rows": list(range(8))},
        "second": {"rows": list(range(8))},
        "head": {"rows": list(range(3))},
    },
    "all modules": {name: {"weight": True, "bias": True} for name in (*LINEAR, "norm")},
    "overlapping rows and columns": {
        "first": {"columns": [1, 2], "rows": [2, 3]},
        "second": {"columns": [0, 7], "rows": [0, 7], "bias": True},
    },
    "mixture": {
        "first": {"rows": [4], "bias": True},
        "norm": {"weight": True, "bias": True},
        "second": {"columns": [3, 6], "rows": [6]},
        "head": {"weight": True},
    },
    "elements": {"first": {"elements": [0, 7, 8, 47]}, "head": {"elements": [5, 23]}},
    "all elements": {
        "first": {"elements": list(range(48))},
        "second": {"elements": list(range(64))},
        "head": {"elements": list(range(24))},
    },
    "elements beside columns and rows": {
        "first": {"columns": [1], "rows": [2], "elements": [0, 3, 47], "bias": True},
        "norm": {"weight": True},
        "second": {"elements": [63, 9, 10, 12]},
        "head": {"columns": [7], "elements": [6, 8]},
    },
    "gain, bias and columns": {"first": {"columns": [1]}, "norm": {"weight": True}, "head": {"bias": True}},
}

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0, foreach=True),
    "AdamW plain": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0, foreach=False),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


class Net(nn.Module):
    """Two linear maps with a norm between them, and a head; tanh, so that no unit is dead."""

    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.repeats = repeats

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        for _ in range(self.repeats):
            h = torch.tanh(self.second(h))
        return self.head(h)


def _net(repeats: int = 1, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(repeats).double()


def _plan(model: nn.Module, selection: Selection, **fields: Any) -> Plan:
    modules = {
        name: ModulePlan(tuple(model.get_submodule(name).weight.shape), **units)  # type: ignore[union-attr,arg-type]
        for name, units in selection.items()
    }
    return Plan(modules, "all", 10**9, 10**9, "", **fields)


def _tuned(model: nn.Module, selection: Selection, **fields: Any) -> PeftModel:
    return get_peft_model(model, ReltuneConfig(plan=_plan(model, selection, **fields)))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _batches(steps: int, each: int = 1, dtype: torch.dtype = torch.float64) -> list[list[Callable]]:
    """Losses on fixed data, a list for every step."""
    g = torch.Generator().manual_seed(1)

    def one() -> Callable[[nn.Module], Tensor]:
        x, y = torch.randn(4, 5, 6, generator=g).to(dtype), torch.randint(0, 3, (20,), generator=g)
        least = torch.float64 if dtype == torch.float64 else torch.float32
        return lambda model: nn.functional.cross_entropy(model(x).flatten(0, 1).to(least), y)

    return [[one() for _ in range(each)] for _ in range(steps)]


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[list[Callable]], max_norm: float | None = None
) -> list[float]:
    history = []
    for losses in steps:
        optimizer.zero_grad()
        values = [loss(model) for loss in losses]
        for value in values:
            value.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(_trained(model), max_norm)
        optimizer.step()
        history.append(sum(value.item() for value in values))
    return history


def _merged(model: PeftModel) -> dict[str, Tensor]:
    """The weights of a plain model that computes the same."""
    return copy.deepcopy(model).merge_and_unload().state_dict()


def _check_same_weights(model: PeftModel, expected: nn.Module, atol: float = 1e-9) -> None:
    state = expected.state_dict()
    merged = _merged(model)
    assert merged.keys() == state.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def _check_only_selected_moved(model: PeftModel, selection: Selection, start: nn.Module) -> None:
    where = dense_update.masks(start, selection)
    for name, before in start.named_parameters():
        after = _merged(model)[name]
        assert torch.equal(after[~where[name]], before[~where[name]]), f"unselected weights of {name} moved"
        assert not where[name].any() or (after != before)[where[name]].any(), f"{name} was not trained"


# -- trajectories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("chosen", SELECTIONS)
def test_trajectory_is_that_of_full_fine_tuning(chosen: str, optimizer: str) -> None:
    selection, steps = SELECTIONS[chosen], _batches(6)
    dense, model = _net(), _tuned(_net(), selection)
    expected = dense_update.train(dense, selection, OPTIMIZERS[optimizer], steps)
    losses = _train(model, OPTIMIZERS[optimizer](_trained(model)), steps)
    assert losses == pytest.approx(expected, rel=0, abs=1e-9)
    assert abs(losses[-1] - losses[0]) > 1e-4
    _check_same_weights(model, dense)
    _check_only_selected_moved(model, selection, _net())
    probe = torch.randn(7, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(probe), dense(probe), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "chosen", ["all columns", "overlapping rows and columns", "mixture", "elements beside columns and rows"]
)
def test_gradient_accumulation_and_clipping(chosen: str) -> None:
    """Clipping sees the same norm only if no cell is counted twice; all graphs of a step are alive at once."""
    selection, steps = SELECTIONS[chosen], _batches(5, each=3)
    optimizer: MakeOptimizer = lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0)  # noqa: E731
    dense, model = _net(), _tuned(_net(), selection)
    expected = dense_update.train(dense, selection, optimizer, steps, max_norm=0.1)
    losses = _train(model, optimizer(_trained(model)), steps, max_norm=0.1)
    assert losses == pytest.approx(expected, rel=0, abs=1e-9)
    _check_same_weights(model, dense)


def test_a_module_that_is_used_several_times() -> None:
    selection, steps = SELECTIONS["elements beside columns and rows"], _batches(5)
    dense, model = _net(repeats=3), _tuned(_net(repeats=3), selection)
    expected = dense_update.train(dense, selection, OPTIMIZERS["AdamW fused"], steps)
    assert _train(model, OPTIMIZERS["AdamW fused"](_trained(model)), steps) == pytest.approx(expected, abs=1e-9)
    _check_same_weights(model, dense)


def test_inputs_of_one_dimension_and_empty_inputs() -> None:
    selection = SELECTIONS["elements beside columns and rows"]
    dense, model = _net(), _tuned(_net(), selection)
    x = torch.randn(6, dtype=torch.float64)
    expected = dense_update.gradients(dense, selection, lambda m: m(x).square().sum())
    model(x).square().sum().backward()
    _check_gradients(model, expected)
    model.zero_grad()
    model(torch.zeros(0, 6, dtype=torch.float64)).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in _trained(model))


def _check_gradients(model: nn.Module, expected: dict[str, Tensor], atol: float = 1e-12) -> None:
    """Every trained tensor has the dense gradient's part; cells in both have it in the row."""
    found = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, ReltuneLayer):
            continue
        name = name.removeprefix("base_model.model.")
        for adapter in layer.active_adapters:
            full = expected[f"{name}.weight"]
            if adapter in layer.reltune_columns:
                part = full[:, layer.reltune_column_indices[adapter]].clone()
                if adapter in layer.reltune_row_indices:
                    part[layer.reltune_row_indices[adapter]] = 0
                torch.testing.assert_close(layer.reltune_columns[adapter].grad, part, rtol=0, atol=atol)
                found += 1
            if adapter in layer.reltune_rows:
                part = full[layer.reltune_row_indices[adapter]]
                torch.testing.assert_close(layer.reltune_rows[adapter].grad, part, rtol=0, atol=atol)
                found += 1
            if adapter in layer.reltune_elements:
                part = full.flatten()[layer.reltune_element_indices[adapter].long()]
                torch.testing.assert_close(layer.reltune_elements[adapter].grad, part, rtol=0, atol=atol)
                found += 1
            if adapter in layer.reltune_weight:
                torch.testing.assert_close(layer.reltune_weight[adapter].grad, full, rtol=0, atol=atol)
                found += 1
            if adapter in layer.reltune_bias:
                grad = layer.reltune_bias[adapter].grad
                torch.testing.assert_close(grad, expected[f"{name}.bias"], rtol=0, atol=atol)
                found += 1
    assert found


# -- ways to change the trained tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", ".data in place", ".data replaced"])
def test_update_written_by_hand(how: str) -> None:
    selection, steps = SELECTIONS["mixture"], _batches(6)
    dense, model = _net(), _tuned(_net(), selection)
    expected = dense_update.train(dense, selection, lambda p: torch.optim.SGD(p, lr=0.1), steps)
    losses = []
    for (loss,) in steps:
        value = loss(model)
        for p, grad in zip(_trained(model), torch.autograd.grad(value, _trained(model)), strict=True):
            if how == "in place":
                with torch.no_grad():
                    p -= 0.1 * grad
            elif how == ".data in place":
                p.data.sub_(0.1 * grad)
            else:
                p.data = p.data - 0.1 * grad
        losses.append(value.item())
    assert losses == pytest.approx(expected, rel=0, abs=1e-9)
    with torch.no_grad():  # still in training mode, and nothing has looked at the weights since
        probe = torch.randn(7, 6, dtype=torch.float64)
        torch.testing.assert_close(model(probe), dense(probe), rtol=0, atol=1e-9)
    _check_same_weights(model, dense)


def test_parameters_set_from_a_vector_count_in_the_next_forward_pass() -> None:
    """As evolution strategies and weight averaging do, without any gradient."""
    model = _tuned(_net(), SELECTIONS["overlapping rows and columns"]).eval()
    other = copy.deepcopy(model)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        for p in _trained(other):
            p.add_(0.3)
        vector = torch.nn.utils.parameters_to_vector(_trained(other))
        before = model(x)
        torch.nn.utils.vector_to_parameters(vector, _trained(model))
        assert not torch.allclose(model(x), before)
        torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-12)


def test_closure_that_is_evaluated_several_times_in_a_step() -> None:
    selection, (loss,) = SELECTIONS["mixture"], _batches(1)[0]
    dense, model = _net(), _tuned(_net(), selection)
    where = dense_update.masks(dense, selection)
    results = []
    for net, parameters in ((dense, list(dense.parameters())), (model, _trained(model))):
        optimizer = torch.optim.LBFGS(parameters, lr=0.3, max_iter=4, tolerance_grad=0)

        def closure(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = loss(net)
            value.backward()
            if net is dense:
                dense_update.mask_gradients(net, where)
            return value

        for _ in range(3):
            optimizer.step(closure)
        results.append(loss(net).item())
    assert results[1] == pytest.approx(results[0], abs=1e-8)
    _check_same_weights(model, dense, atol=1e-6)


@pytest.mark.parametrize("chosen", ["overlapping rows and columns", "mixture", "elements beside columns and rows"])
def test_resumed_training_equals_uninterrupted_training(chosen: str, tmp_path: Path) -> None:
    """Model and optimizer restored in a fresh model from the same base, half-way."""
    selection, steps = SELECTIONS[chosen], _batches(8)
    make = OPTIMIZERS["AdamW fused"]
    straight = _tuned(_net(), selection)
    expected = _train(straight, make(_trained(straight)), steps)

    first = _tuned(_net(), selection)
    optimizer = make(_trained(first))
    _train(first, optimizer, steps[:4])
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    del first, optimizer

    second = _tuned(_net(), selection)
    optimizer = make(_trained(second))
    state = torch.load(tmp_path / "state.pt")
    second.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    assert _train(second, optimizer, steps[4:]) == pytest.approx(expected[4:], rel=0, abs=1e-12)
    torch.testing.assert_close(_merged(second), _merged(straight), rtol=0, atol=1e-12)
    _check_base_is(second, _net())


def test_state_loaded_into_the_same_model_rewinds_it() -> None:
    model = _tuned(_net(), SELECTIONS["mixture"])
    optimizer = OPTIMIZERS["AdamW fused"](_trained(model))
    steps = _batches(6)
    _train(model, optimizer, steps[:2])
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    once = _train(model, optimizer, steps[2:])
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert _train(model, optimizer, steps[2:]) == once
    _check_base_is(model, _net())


def _check_base_is(model: PeftModel, base: nn.Module, heads: Iterable[str] = ()) -> None:
    """Bit for bit. PEFT's unload() leaves trained heads in the model, so they are left out."""
    restored = copy.deepcopy(model).unload().state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(restored[name], tensor) or name.startswith(tuple(heads)), name


def test_a_step_of_one_model_leaves_the_graph_of_another_alone() -> None:
    selection = SELECTIONS["all columns"]
    one, other = _tuned(_net(), selection), _tuned(_net(seed=1), selection)
    (loss,) = _batches(1)[0]
    loss(other).backward()
    expected = {n: p.grad.clone() for n, p in other.named_parameters() if p.grad is not None}
    other.zero_grad()
    pending = loss(other)
    before = copy.deepcopy(other.state_dict())
    _train(one, OPTIMIZERS["AdamW fused"](_trained(one)), _batches(3))
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)
    pending.backward()
    gradients = {n: p.grad for n, p in other.named_parameters() if p.grad is not None}
    assert gradients
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


def test_backward_through_weights_that_have_changed_is_refused() -> None:
    """As PyTorch refuses it of plain parameters; a wrong gradient would go unseen."""
    model = _tuned(_net(), SELECTIONS["all columns"])
    optimizer = OPTIMIZERS["AdamW fused"](_trained(model))
    (first,), (second,) = _batches(2)
    pending = first(model)
    second(model).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pending.backward()


def test_long_training_keeps_no_trace_of_past_graphs() -> None:
    model = _tuned(_net(), SELECTIONS["all columns"])
    optimizer = OPTIMIZERS["SGD momentum"](_trained(model))
    _train(model, optimizer, _batches(30))
    # the graph of the step before may still have been held when the last one was made
    assert all(len(m._graphs) <= 2 for m in model.modules() if isinstance(m, ReltuneLayer))


def test_a_layer_with_columns_keeps_no_input() -> None:
    """Neither the frozen product nor the columns' gradient needs all of x."""
    model = _tuned(nn.Sequential(nn.Linear(64, 64)), {"0": {"columns": [1, 5, 9, 63], "bias": True}})
    x = torch.randn(10, 7, 64, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    kept = sorted(tuple(t.shape) for t in saved if t.is_floating_point())
    assert kept == [(10, 7, 4), (64, 64)]
    assert all(t.untyped_storage().nbytes() < x.nbytes for t in saved)


# -- dtypes ----------------------------------------------------------------------------------------------------------


def test_float32_columns_of_a_bfloat16_base_keep_updates_that_the_base_cannot_hold() -> None:
    torch.manual_seed(0)
    selection: Selection = {"0": {"columns": [2, 9], "rows": [1], "elements": [0, 40, 63]}}
    base = nn.Sequential(nn.Linear(16, 4, bias=False)).bfloat16()
    where = dense_update.masks(base, selection)["0.weight"]
    start = base[0].weight.detach().clone()
    model = _tuned(base, selection)
    assert {p.dtype for p in _trained(model)} == {torch.float32}
    assert model.get_submodule("base_model.model.0.base_layer").weight.dtype == torch.bfloat16
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(_trained(model), lr=2.0**-16)  # with a gradient of 1, far below the base's resolution
    for _ in range(512):
        optimizer.zero_grad()
        model(x).float().sum().backward()
        optimizer.step()
    merged = _merged(model)["0.weight"]
    expected = start.float()
    expected[where] -= 512 * 2.0**-16
    assert torch.equal(merged, expected.bfloat16())
    assert (merged != start)[where].any()
    with torch.no_grad():
        torch.testing.assert_close(model(x), x @ merged.T)


@pytest.mark.parametrize("chosen", ["mixture", "overlapping rows and columns", "elements beside columns and rows"])
def test_bfloat16_base_follows_full_fine_tuning(chosen: str) -> None:
    selection, steps = SELECTIONS[chosen], _batches(5, dtype=torch.bfloat16)
    dense, model = _net().float(), _tuned(_net().bfloat16(), selection)
    make: MakeOptimizer = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    expected = dense_update.train(dense, selection, make, _batches(5, dtype=torch.float32))
    losses = _train(model, make(_trained(model)), steps)
    assert losses == pytest.approx(expected, abs=0.03)
    _check_only_selected_moved(model, selection, _net().bfloat16())


def test_autocast_on_a_float32_base() -> None:
    """The gradients are the dense ones under the same autocast, up to the rounding of one bfloat16 product."""
    selection = SELECTIONS["mixture"]
    (loss,) = _batches(1, dtype=torch.float32)[0]

    def run(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(net)

    dense, model = _net().float(), _tuned(_net().float(), selection)
    expected = dense_update.gradients(dense, selection, run)
    value = run(model)
    assert value.item() == run(dense).item()
    value.backward()
    assert {p.grad.dtype for p in _trained(model) if p.grad is not None} == {torch.float32}
    largest = max(g.abs().max().item() for g in expected.values())
    _check_gradients(model, expected, atol=2.0**-7 * largest)
    optimizer = OPTIMIZERS["AdamW fused"](_trained(model))
    optimizer.step()
    with torch.no_grad():
        assert run(model).item() < value.item()


def test_a_change_of_dtype_in_between_keeps_the_trained_values() -> None:
    """float32 columns were rounded into a bfloat16 base; a float32 base must hold them in full."""
    model = _tuned(_net().bfloat16(), SELECTIONS["overlapping rows and columns"])
    with torch.no_grad():
        for p in _trained(model):
            p.add_(torch.randn_like(p) * 0.1)
    x = torch.randn(4, 6)
    model(x.bfloat16())
    model.float()
    fresh = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(model(x), fresh(x), rtol=0, atol=1e-6)


# -- transformers ----------------------------------------------------------------------------------------------------

BERT_SELECTION: Selection = {
    "bert.encoder.layer.2.attention.self.value": {"columns": [0, 9], "rows": [3], "elements": [1, 100, 255]},
    "bert.encoder.layer.2.output.dense": {"columns": [4, 5, 30], "bias": True},
    "bert.encoder.layer.2.output.LayerNorm": {"weight": True, "bias": True},
}
HEADS = ["bert.pooler", "classifier"]


def _bert(seed: int = 0, dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def _examples(count: int = 24) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(1, 20, (8,), generator=g), "labels": torch.randint(0, 3, (), generator=g)}
        for _ in range(count)
    ]


def _batch() -> dict[str, Tensor]:
    return {key: torch.stack([e[key] for e in _examples(6)]) for key in ("input_ids", "labels")}


def _differentiated(model: PeftModel, run: Callable[[], Any]) -> dict[str, bool]:
    """For each encoder layer, whether its output is part of a graph."""
    seen: dict[str, bool] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(("encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "bert.embeddings")):

            def hook(_: Any, __: Any, output: Any, name: str = name) -> None:
                tensor = output[0] if isinstance(output, tuple) else output
                seen[name.rpartition("bert.")[2]] = tensor.requires_grad and torch.is_grad_enabled()

            handles.append(module.register_forward_hook(hook))
    run()
    for handle in handles:
        handle.remove()
    return seen


ONLY_THE_TOP = {"embeddings": False, "encoder.layer.0": False, "encoder.layer.1": False, "encoder.layer.2": True}


def test_nothing_below_the_lowest_unit_is_differentiated() -> None:
    model = _tuned(_bert(), BERT_SELECTION, always_trained=HEADS, task_type="SEQ_CLS").train()
    assert _differentiated(model, lambda: model(**_batch()).loss.backward()) == ONLY_THE_TOP
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("layer.0" in n or "layer.1" in n for n in trained)


@pytest.mark.parametrize("when", ["before wrapping", "after wrapping"])
def test_checkpointing_does_not_differentiate_below_the_lowest_unit(when: str) -> None:
    base = _bert()
    if when == "before wrapping":
        base.gradient_checkpointing_enable()
    model = _tuned(base, BERT_SELECTION, always_trained=HEADS, task_type="SEQ_CLS").train()
    if when == "after wrapping":
        model.gradient_checkpointing_enable()
    assert base.is_gradient_checkpointing
    assert _differentiated(model, lambda: model(**_batch()).loss.backward()) == ONLY_THE_TOP


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    dense = _bert().double().train()
    selection: Selection = {
        **BERT_SELECTION,
        "bert.encoder.layer.0.intermediate.dense": {"columns": [1], "rows": [0, 31]},
    }
    expected = dense_update.gradients(dense, selection, lambda m: m(**_batch()).loss)
    base = _bert().double()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = _tuned(base, selection, task_type="SEQ_CLS").train()
    for _ in range(2):  # the second pass meets what the first has left
        model.zero_grad()
        loss = model(**_batch()).loss
        loss.backward()
        _check_gradients(model, expected)


def _arguments(path: Path, **given: Any) -> TrainingArguments:
    fields: dict[str, Any] = {
        "per_device_train_batch_size": 6,
        "num_train_epochs": 2,
        "learning_rate": 0.05,
        "weight_decay": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_strategy": "no",
        "seed": 7,
        "dataloader_pin_memory": False,
        **given,
    }
    return TrainingArguments(output_dir=str(path), **fields)


def test_trainer_trains_saves_and_reloads_with_the_head(tmp_path: Path) -> None:
    base = _bert()
    base.save_pretrained(tmp_path / "base")
    model = _tuned(base, BERT_SELECTION, always_trained=HEADS, task_type="SEQ_CLS")
    start = _merged(model)
    seen = _differentiated(
        model,
        lambda: Trainer(
            model, _arguments(tmp_path / "run", gradient_checkpointing=True), train_dataset=_examples()
        ).train(),
    )
    assert seen == ONLY_THE_TOP
    selection = {**BERT_SELECTION, "bert.pooler.dense": {"weight": True, "bias": True}}
    selection["classifier"] = {"weight": True, "bias": True}
    _check_only_selected_moved(model, selection, _bert())
    assert not torch.equal(_merged(model)["classifier.weight"], start["classifier.weight"])

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3), tmp_path / "adapter"
    )
    model.eval()
    loaded.eval()
    with torch.no_grad():
        ids = _batch()["input_ids"]
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.allclose(loaded(input_ids=ids).logits, _bert().eval()(input_ids=ids).logits, atol=1e-3)


def test_trainer_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    def fresh() -> PeftModel:
        return _tuned(_bert(dropout=0.1), BERT_SELECTION, always_trained=HEADS, task_type="SEQ_CLS")

    straight = fresh()
    Trainer(straight, _arguments(tmp_path / "run"), train_dataset=_examples()).train()
    resumed = fresh()
    trainer = Trainer(resumed, _arguments(tmp_path / "again"), train_dataset=_examples())
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert trainer.state.global_step == 8
    torch.testing.assert_close(_merged(resumed), _merged(straight), rtol=0, atol=1e-6)
    _check_base_is(resumed, _bert(), HEADS)
