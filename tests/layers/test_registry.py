"""Layer types that are made up here are measured, chosen, tuned and exported, and no file of the package is edited for them.

One is a linear map times a fixed scale, the other a 1-D convolution, whose weight has three dimensions. Everything is
compared with plain autograd through the module's own forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import reltune
from oracles.per_example_gradients import gradient_sums
from relevance_cases import assert_parts_equal, by_module, measure, parts_by_formula, split
from reltune.errors import InputError
from reltune.layers import linear, registry
from reltune.layers.conv2d import Conv2dType
from reltune.layers.inventory import take_inventory
from reltune.layers.linear import LinearType
from reltune.plan.plan import ModulePlan, Plan
from reltune.relevance.scores import RelevanceScores
from reltune.runs.export import to_lora
from reltune.tuner import trainable
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.linear import ReltuneLinear


class ScaledLinear(nn.Linear):
    """y = s (x Wᵀ + b)."""

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class ScaledLinearType(LinearType):
    name = "scaled_linear"
    covers = "ScaledLinear"
    trains = frozenset({"column", "row", "bias"})

    def matches(self, module: nn.Module) -> bool:
        return type(module) is ScaledLinear

    def by_example(self, module: nn.Module, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        x, g = super().by_example(module, x, g, examples)
        return x, module.scale * g


class ReltuneScaledLinear(ReltuneLinear):
    @property
    def scale(self) -> float:
        return self.get_base_layer().scale

    def attach_columns(self, y: Tensor, x: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None) -> Tensor:
        return super().attach_columns(y, self.scale * x, columns, idx, row_idx)

    def attach_rows(self, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor) -> Tensor:
        return super().attach_rows(y, self.scale * x, rows, idx)

    def change_of_output(self, x: Tensor, kept: Any, columns: Tensor | None, rows: Tensor | None) -> Tensor:
        return super().change_of_output(self.scale * x, kept, columns, rows)

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = super().lora_factors(adapter_name)
        return lora_a, self.scale * lora_b


@pytest.fixture
def registered() -> Iterator[None]:
    registry.register(ScaledLinearType())
    trainable.register_trainable("scaled_linear", ReltuneScaledLinear)
    yield
    trainable.deregister_trainable("scaled_linear")
    registry.deregister("scaled_linear")


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(ScaledLinear(6, 12, 0.5), nn.Tanh(), ScaledLinear(12, 8, -2.0), nn.Linear(8, 3)).double()


def data(size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 6, dtype=torch.float64, generator=generator), torch.arange(size) % 3


def loss_of_one(outputs: Tensor, example: Any) -> Tensor:
    return F.cross_entropy(outputs, example[1])


SCALED = ["0", "2"]


@pytest.mark.usefixtures("registered")
def test_it_is_measured() -> None:
    model, batches = made(), split(data(), 4)
    found = measure(model, batches, None, ["fisher", "gradient", "taylor", "activation", "magnitude"], elements=True)
    assert [info.layer_type for info in found.inventory.modules] == ["scaled_linear", "scaled_linear", "linear"]
    squares, sums, count = gradient_sums(model, batches, loss_of_one)
    names = [info.name for info in found.inventory.modules]
    for criterion, values in (
        ("fisher", {name: square / count for name, square in squares.items()}),
        ("gradient", {name: (total / count).abs() for name, total in sums.items()}),
    ):
        by_unit = {
            name: {part: of[part] for part in of if not part.startswith("element")}
            for name, of in found.parts[criterion].items()
        }
        assert_parts_equal(by_unit, parts_by_formula(by_module(values, names)))
        for name in SCALED:
            torch.testing.assert_close(found.parts[criterion][name]["element"], values[f"{name}.weight"])


@pytest.mark.usefixtures("registered")
def test_it_is_taken_out() -> None:
    model, (x, labels) = made(), data()
    found = measure(model, split((x, labels), 4), None, ["ablation"])
    for name in SCALED:
        without = copy.deepcopy(model)
        without.get_submodule(name).requires_grad_(False).weight.zero_()
        without.get_submodule(name).bias.zero_()
        hits = [(m(x).argmax(1) == labels).double().mean() for m in (model, without)]
        assert float(found.parts["ablation"][name]["module"]) == pytest.approx(float(hits[0] - hits[1]))


def columns_of(plan: Plan) -> dict[str, list[int]]:
    return {name: module.columns for name, module in plan.modules.items()}


@pytest.mark.usefixtures("registered")
def test_it_is_chosen_and_tuned() -> None:
    """The path of the trained columns is that of plain autograd on W₀ + Δ, with Δ zero outside of them."""
    base, (x, labels) = made(), data()
    found = measure(base, split((x, labels), 4), None, ["fisher"], target_modules=SCALED)
    plan = reltune.select(found, 60, "column", spread="even", target_modules=SCALED)
    assert set(columns_of(plan)) == set(SCALED) and plan.parameters == 2 * 12 + 4 * 8
    with pytest.raises(
        InputError, match=r"0 is scaled_linear, and .* no whole module can be trained, only columns, rows, the bias;"
    ):
        reltune.select(found, "50%", "module", target_modules=SCALED)

    deltas = {
        name: torch.zeros(len(base.get_submodule(name).weight), len(columns), dtype=torch.float64, requires_grad=True)
        for name, columns in columns_of(plan).items()
    }

    def materialised() -> dict[str, Tensor]:
        weights = {}
        for name, columns in columns_of(plan).items():
            weight = base.get_submodule(name).weight.detach()
            change = torch.zeros_like(weight).index_copy(1, torch.tensor(columns), deltas[name])
            weights[f"{name}.weight"] = weight + change
        return weights

    tuned = get_peft_model(copy.deepcopy(base), reltune.ReltuneConfig(plan=plan))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == plan.parameters
    ours = torch.optim.SGD(trained, lr=0.3, momentum=0.9)
    theirs = torch.optim.SGD(deltas.values(), lr=0.3, momentum=0.9)
    for step in range(6):
        rows = slice(step % 3, None, 3)
        losses = [F.cross_entropy(tuned(x[rows]), labels[rows])]
        losses.append(F.cross_entropy(functional_call(base, materialised(), (x[rows],)), labels[rows]))
        for loss, optimizer in zip(losses, (ours, theirs), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(x), base(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(tuned(x), functional_call(base, materialised(), (x,)), rtol=1e-10, atol=0)
    assert all(bool(delta.abs().max() > 1e-3) for delta in deltas.values())


@pytest.mark.usefixtures("registered")
def test_it_is_exported(tmp_path: Path) -> None:
    modules = {
        "0": ModulePlan((12, 6), columns=[1, 4], rows=[3]),
        "2": ModulePlan((8, 12), columns=[0, 11]),
    }
    plan = Plan(modules, "all", 1000, 1000, "")
    tuned = get_peft_model(made(), reltune.ReltuneConfig(plan=plan))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
        wanted = tuned(data()[0])
        to_lora(tuned, tmp_path / "lora")
        base = made()
        loaded = PeftModel.from_pretrained(base, tmp_path / "lora").double()
        torch.testing.assert_close(loaded(data()[0]), wanted, rtol=1e-5, atol=1e-5)  # the file is in float32
        assert not torch.allclose(wanted, made()(data()[0]), atol=0.1)


@pytest.mark.usefixtures("registered")
def test_scores_of_it_are_read_where_it_is_not_registered(tmp_path: Path) -> None:
    found = measure(made(), [data()], None, ["fisher"])
    found.save(tmp_path)
    known = registry.layer_type("scaled_linear")
    registry.deregister("scaled_linear")
    try:
        scores = RelevanceScores.load(tmp_path)
        assert scores.inventory == found.inventory
        with pytest.raises(InputError, match="layer type 'scaled_linear' is not registered here; import the package"):
            reltune.select(scores, "10%")
        left_out = take_inventory(made()).left_out
        assert left_out["0.weight"] == "layer type ScaledLinear has no units yet"
        with pytest.raises(TypeError, match="0 is a ScaledLinear, which reltune cannot train"):
            get_peft_model(made(), reltune.ReltuneConfig(target_modules=["0"]))
    finally:
        registry.register(known)


class Duck:
    """Has the name alone."""

    name = "duck"


class Otherwise(ScaledLinearType):
    name = "otherwise"
    statistics = {}  # noqa: RUF012


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "linear"}, "has the name 'linear', which is taken"),
        ({"name": "a/b"}, "has the name 'a/b'; use letters"),
        ({"trains": frozenset({"columns"})}, "trains 'columns', which is unknown; did you mean 'column'"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_registered(changes: dict[str, Any], message: str) -> None:
    before = registry.layer_types()
    with pytest.raises(InputError, match=message):
        registry.register(type("Changed", (ScaledLinearType,), changes)())
    assert registry.layer_types() == before


def test_what_is_missing_is_named_when_it_is_registered() -> None:
    with pytest.raises(InputError, match=r"layer type Duck has no covers, .*no weights"):
        registry.register(Duck())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Otherwise has a statistics that is not a function"):
        registry.register(Otherwise())
    with pytest.raises(TypeError, match="abstract"):
        registry.register(type("Bare", (registry.LayerType,), {"name": "bare"})())


def test_what_does_not_train_it_is_refused_when_it_is_entered() -> None:
    register = trainable.register_trainable
    with pytest.raises(InputError, match="layer type 'scaled_linear' is not registered"):
        register("scaled_linear", ReltuneScaledLinear)
    with pytest.raises(InputError, match="'router' says that nothing of it can be trained"):
        register("router", ReltuneLinear)
    with pytest.raises(InputError, match="'linear' is trained by ReltuneLinear already"):
        register("linear", ReltuneScaledLinear)
    registry.register(ScaledLinearType())
    try:
        with pytest.raises(InputError, match="is not a subclass of"):
            register("scaled_linear", nn.Linear)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="has no attach_columns, no attach_rows, no change_of_output"):
            register("scaled_linear", type("Lacking", (ReltuneLayer,), {}))
        plan = Plan({"0": ModulePlan((12, 6), columns=[1])}, "all", 1000, 1000, "")
        with pytest.raises(InputError, match="'scaled_linear' has no class that trains it"):
            get_peft_model(made(), reltune.ReltuneConfig(plan=plan))
    finally:
        registry.deregister("scaled_linear")


# -- a weight with three dimensions ------------------------------------------------------------------------------------


class WindowType(Conv2dType):
    """nn.Conv1d without padding."""

    name = "window"
    covers = "nn.Conv1d"

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Conv1d

    def by_example(self, module: nn.Module, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        return windows(module, x), g.mT

    def squared_inputs(self, module: nn.Module, x: Tensor, mask: Tensor | None, route: Any) -> dict[str, Tensor]:
        return linear.squared_inputs(windows(module, x), None)


def windows(module: Any, x: Tensor) -> Tensor:
    return F.unfold(x[..., None], (*module.kernel_size, 1), stride=(*module.stride, 1)).mT


class ReltuneWindow(ReltuneLayer):
    def attach_columns(self, y: Tensor, x: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None) -> Tensor:
        change = columns - columns.detach()
        change = change if row_idx is None else change.index_fill(0, row_idx, 0)
        return y + F.conv1d(x[:, idx], change, stride=self.get_base_layer().stride)

    def attach_rows(self, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor) -> Tensor:
        return y.index_add(1, idx, F.conv1d(x, rows - rows.detach(), stride=self.get_base_layer().stride))

    def change_of_output(self, x: Tensor, kept: Any, columns: Tensor | None, rows: Tensor | None) -> Tensor:
        change = torch.zeros_like(self.weight)
        if columns is not None:
            change = change.index_copy(1, kept.column_idx, columns)
        if rows is not None:
            change = change.index_add(0, kept.row_idx, rows)
        return F.conv1d(x, change, stride=self.get_base_layer().stride)


@pytest.fixture
def window_registered() -> Iterator[None]:
    registry.register(WindowType())
    trainable.register_trainable("window", ReltuneWindow)
    yield
    trainable.deregister_trainable("window")
    registry.deregister("window")


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 6, 3),
        nn.Tanh(),
        nn.Conv1d(6, 5, 2, stride=2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    ).double()


def signals(size: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 4, 11, dtype=torch.float64, generator=generator), torch.arange(size) % 3


@pytest.mark.usefixtures("window_registered")
def test_a_weight_with_three_dimensions(tmp_path: Path) -> None:
    base, (x, labels) = convolutions(), signals()
    batches = split((x, labels), 4)
    found = measure(base, batches, None, ["fisher"], target_modules=["0", "2"])
    squares, _, count = gradient_sums(base, batches, loss_of_one)
    for name in ("0", "2"):
        weight, bias = (squares[f"{name}.{part}"] / count for part in ("weight", "bias"))
        parts = {"column": weight.sum((0, 2)), "row": weight.sum((1, 2)), "weight": weight.sum(), "bias": bias.sum()}
        assert_parts_equal({name: found.parts["fisher"][name]}, {name: parts})

    plan = reltune.select(found, "50%", ["column", "row"], target_modules=["0", "2"])
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan and any(module.columns for module in plan.modules.values())
    tuned = get_peft_model(base, reltune.ReltuneConfig(plan=plan))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=3)
    before = tuned(x)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(tuned(x), labels).backward()
        optimizer.step()
    wanted = tuned(x)
    assert (wanted - before).abs().max() > 0.1

    to_lora(tuned, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(convolutions(), tmp_path / "lora").double()
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-5, atol=1e-5)  # the file is in float32
    torch.testing.assert_close(tuned.merge_and_unload()(x), wanted, rtol=1e-10, atol=0)
