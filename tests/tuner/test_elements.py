"""Single weights through PEFT: trained as masked full fine-tuning and PEFT's own SHiRA train them, in both forms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from oracles import dense_update
from reltune.errors import InputError
from reltune.layers.inventory import take_inventory
from reltune.ops import attach_elements
from reltune.ops.attach_elements import SparseProduct, force
from reltune.plan.plan import ModulePlan, Plan
from reltune.tuner import ReltuneConfig
from reltune.tuner.layer import ReltuneLayer

Selection = dict[str, dict[str, Any]]
FORMS = ("dense", "sampled")
SELECTIONS: dict[str, Selection] = {
    "alone": {"0": {"elements": [3, 4, 7, 95, 50]}, "2": {"elements": [0, 17, 190, 191]}},
    "with columns, rows and bias": {
        "0": {"columns": [0, 5], "elements": [1, 2, 94], "bias": True},
        "2": {"columns": [3], "rows": [2], "elements": [0, 31, 188]},
    },
}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0, foreach=True),
    "plain": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0, foreach=False),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows and of places in every layer."""
    monkeypatch.setattr(attach_elements, "BLOCK_NUMBERS", 40)
    monkeypatch.setattr(attach_elements, "GATHERED_NUMBERS", 30)


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def plan_of(model: nn.Module, selection: Selection) -> Plan:
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in selection}  # type: ignore[union-attr,arg-type]
    return Plan({name: ModulePlan(shapes[name], **units) for name, units in selection.items()}, "all", 10**9, 10**9, "")


def tuned(selection: Selection, base: nn.Module | None = None, **fields: Any) -> PeftModel:
    base = base or net()
    return get_peft_model(base, ReltuneConfig(plan=plan_of(base, selection), **fields))


def steps(count: int, each: int) -> list[list[Callable[[nn.Module], Tensor]]]:
    g = torch.Generator().manual_seed(1)

    def one() -> Callable[[nn.Module], Tensor]:
        x, y = torch.randn(2, 5, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (10,), generator=g)
        return lambda model: nn.functional.cross_entropy(model(x).flatten(0, 1), y)

    return [[one() for _ in range(each)] for _ in range(count)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("chosen", SELECTIONS)
def test_twenty_steps_with_accumulation_and_clipping(chosen: str, optimizer: str, form: Any) -> None:
    selection, batches = SELECTIONS[chosen], steps(20, 2)
    dense, model = net(), tuned(selection)
    expected = dense_update.train(dense, selection, OPTIMIZERS[optimizer], batches, max_norm=0.3)
    trained = [p for p in model.parameters() if p.requires_grad]
    found, opt = [], OPTIMIZERS[optimizer](trained)
    with force(form):
        for losses in batches:
            opt.zero_grad()
            values = [loss(model) for loss in losses]
            for value in values:
                value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.3)
            opt.step()
            found.append(sum(value.item() for value in values))
    assert found == pytest.approx(expected, rel=0, abs=1e-9) and abs(found[-1] - found[0]) > 1e-2
    merged = model.merge_and_unload().state_dict()
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-9)


def test_the_same_weights_chosen_train_as_in_shira() -> None:
    shira = get_peft_model(net(), ShiraConfig(r=2, target_modules=["0", "2"], random_seed=0)).double()
    selection: Selection = {}
    for name in ("0", "2"):
        layer: Any = shira.get_submodule(f"base_model.model.{name}")
        row, column = layer.shira_indices["default"].long()
        selection[name] = {"elements": (row * layer.in_features + column).tolist()}
    model = tuned(selection)
    assert model.get_nb_trainable_parameters()[0] == shira.get_nb_trainable_parameters()[0]
    losses = []
    for each in (shira, model):
        optimizer = OPTIMIZERS["plain"]([p for p in each.parameters() if p.requires_grad])
        losses.append([])
        for (loss,) in steps(10, 1):
            optimizer.zero_grad()
            value = loss(each)
            value.backward()
            optimizer.step()
            losses[-1].append(value.item())
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-12) and losses[0][0] != losses[0][-1]


def test_forward_is_one_product_and_makes_nothing_of_the_weight_s_size() -> None:
    wide = nn.Sequential(nn.Linear(64, 64))
    model = tuned({"0": {"elements": [5, 100, 4000]}}, wide)
    x = torch.randn(3, 64)
    model(x).sum().backward()
    weight = model.get_submodule("base_model.model.0.base_layer").weight
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != weight.data_ptr():  # no view of it
                sizes.append(result.numel())
            return result

    with Watch():
        model(x)
        with model.disable_adapter():  # the graph is gone: the base's weight comes back, at the elements alone
            model(x)
    assert sizes and max(sizes) < 64 * 64


def test_disabling_while_a_graph_is_alive_corrects_at_the_elements_cost() -> None:
    model, base = tuned(SELECTIONS["alone"], init_weights=False), net()
    x = torch.randn(4, 6, dtype=torch.float64)
    pending = model(x)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-12)
    pending.square().sum().backward()
    reference = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    reference(x).square().sum().backward()
    for name in SELECTIONS["alone"]:
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        wanted = reference.get_submodule(name).weight.grad.flatten()[layer.reltune_element_indices["default"].long()]  # type: ignore[union-attr]
        torch.testing.assert_close(layer.reltune_elements["default"].grad, wanted, rtol=0, atol=1e-12)


def test_int32_indices_survive_moves_and_dtypes() -> None:
    model = tuned(SELECTIONS["alone"], init_weights=False)
    x = torch.randn(4, 6)
    before = model(x.double())
    layer: Any = model.get_submodule("base_model.model.0")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        assert layer.reltune_element_indices["default"].dtype == torch.int32
        assert layer.originals["default"].places.index.dtype == torch.int32
        assert layer.originals["default"].elements.dtype == dtype
    torch.testing.assert_close(model(x.double()), before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = tuned(SELECTIONS["with columns, rows and bias"], init_weights=False)
    x = torch.randn(4, 6, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, torch_device="cpu")
    assert torch.equal(again(x), model(x))
    fresh: Any = get_peft_model(net(), ReltuneConfig.from_pretrained(tmp_path))
    with pytest.raises(InputError, match="single weights are trained but not which"):
        fresh(x)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for damaged in ([95, 1, 2], [1, 1, 2], [1, 2, 96], [-1, 1, 2]):
        key = "base_model.model.0.reltune_element_indices"
        save_file({**tensors, key: torch.tensor(damaged, dtype=torch.int32)}, path)
        with pytest.raises((InputError, IndexError, RuntimeError), match=r"file is damaged|out of range|out of bounds"):
            PeftModel.from_pretrained(net(), tmp_path)(x)


def test_a_weight_that_is_not_contiguous() -> None:
    base = net()
    base[0].weight = nn.Parameter(base[0].weight.detach().mT.contiguous().mT)
    model = tuned(SELECTIONS["alone"], base, init_weights=False)
    x = torch.randn(4, 6, dtype=torch.float64)
    layer: Any = model.get_submodule("base_model.model.0")
    assert not layer.weight.is_contiguous()
    expected = net()
    with torch.no_grad():
        for name in SELECTIONS["alone"]:
            of: Any = model.get_submodule(f"base_model.model.{name}")
            expected.get_submodule(name).weight.view(-1)[of.reltune_element_indices["default"].long()] = (  # type: ignore[operator,union-attr]
                of.reltune_elements["default"]
            )
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_is_stored_the_other_way_round(form: Any) -> None:
    """Indices count the weight as it is stored, and ascend there; each place has its own gradient."""
    torch.manual_seed(0)
    base = nn.Sequential(Conv1D(16, 6)).double()
    chosen = [5, 6, 17, 40, 95]  # of (out, in) = (16, 6): (0, 5), (1, 0), (2, 5), (6, 4), (15, 5)
    stored = sorted(i % 6 * 16 + i // 6 for i in chosen)
    x, weight = torch.randn(7, 6, dtype=torch.float64), base[0].weight.detach().clone().requires_grad_()
    (x @ weight + base[0].bias.detach()).square().sum().backward()
    config = ReltuneConfig(plan=Plan({"0": ModulePlan((16, 6), elements=chosen)}, "all", 10**9, 10**9, ""))
    model = get_peft_model(base, config)
    layer: Any = model.get_submodule("base_model.model.0")
    assert layer.reltune_element_indices["default"].tolist() == stored
    with force(form):
        model(x).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(layer.reltune_elements["default"].grad, weight.grad.flatten()[stored])


def test_a_plan_of_elements_is_for_linear_maps_only() -> None:
    base = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    plan = Plan({"1": ModulePlan((6,), elements=[1])}, "all", 100, 100, "")
    with pytest.raises(InputError, match="1 is a norm and has no columns or rows or elements"):
        get_peft_model(base, ReltuneConfig(plan=plan))
    assert not any(isinstance(module, ReltuneLayer) for module in base.modules())


def test_elements_of_other_layer_types_are_refused_by_name() -> None:
    words = nn.Sequential(nn.Embedding(5, 6))
    with pytest.raises(
        InputError,
        match=r"plan: single weights of 0 cannot be trained; choose .* of layer type embedding: columns, rows, the whole weight",
    ):
        tuned({"0": {"elements": [7]}}, words)
    with pytest.raises(InputError, match="0 is a convolution, whose single weights cannot be trained; choose columns"):
        tuned({"0": {"elements": [7]}}, nn.Sequential(nn.Conv2d(3, 4, 2)))
    plan = plan_of(words, {"0": {"elements": [7]}})
    with pytest.raises(
        InputError, match=r"single weights of 0 cannot be trained; choose .* of layer type embedding: columns, rows"
    ):
        plan.check_model(take_inventory(words), "")


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize(
    "of", [net, lambda: nn.Sequential(Conv1D(16, 6), nn.Tanh(), Conv1D(12, 16)).double()], ids=["linear", "conv1d"]
)
def test_a_spread_weight_is_copied_for_them(group: None, selection: Selection, of: Callable[[], nn.Module]) -> None:
    """FSDP2's weights are not written into. The values are put into a copy of the weight, at the cost of reading it, instead of being
    multiplied one by one."""
    torch.manual_seed(0)
    plan = plan_of(net(), selection)
    plain = get_peft_model(of(), ReltuneConfig(plan=plan, init_weights=False))
    spread = copy.deepcopy(plain)
    for module in spread.modules():
        if isinstance(module, ReltuneLayer):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
            module.write_back()  # as an optimizer's step does
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    found: list[list[Tensor]] = []
    with mock.patch.object(SparseProduct, "apply", side_effect=AssertionError):
        for model in (plain, spread):
            x.grad = None
            y = model(x)
            y.sin().sum().backward()
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            found.append([y, x.grad, *(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
