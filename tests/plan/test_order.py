"""The choice that is looked up, against the choice that is made."""

import random

import pytest
import torch

from reltune.cost.profile import Chosen
from reltune.errors import InputError
from reltune.layers.inventory import Inventory
from reltune.layers.units import ModuleInfo
from reltune.plan.order import SelectionOrder, counted, parameters_of
from reltune.plan.selection import select
from reltune.relevance.scores import RelevanceScores

KINDS = [
    *(["column"], ["row"], ["bias"], ["norm"], ["module"], ["layer"], ["element"]),
    *(["column", "norm"], ["element", "bias"]),
]


def measured(seed: int) -> RelevanceScores:
    """Maps of several shapes and a norm in each of three layers, and a map outside. Few different scores, some negative."""
    draw = torch.Generator().manual_seed(seed)
    modules, parts = [], {}

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 6, shape, generator=draw).float()

    for i in range(3):
        for name, shape in (("a", (4, 6)), ("b", (7, 3)), ("c", (2, 2))):
            info = ModuleInfo(f"b.{i}.{name}", "linear", f"b.{i}", i, shape, True)
            modules.append(info)
            parts[info.name] = {"element": numbers(*shape), "column": numbers(shape[1]), "row": numbers(shape[0])}
            parts[info.name] |= {"weight": numbers(), "bias": numbers()}
        modules.append(ModuleInfo(f"b.{i}.norm", "norm", f"b.{i}", i, (4,), True))
        parts[f"b.{i}.norm"] = {"norm": numbers()}
    modules.append(ModuleInfo("last", "linear", "last", 3, (3, 3), False))
    parts["last"] = {"column": numbers(3), "weight": numbers()}
    total = sum(info.weight_parameters + info.bias_parameters for info in modules)
    return RelevanceScores({"fisher": parts}, Inventory(modules, {}, total, 0), [], "f", {"model": "m"})


def made(relevance: RelevanceScores, limit: int, kinds: list[str], **options: object) -> dict[str, Chosen]:
    try:
        plan = select(relevance, limit, kinds, **options)
    except InputError:  # not even the smallest unit fits
        return {}
    return {name: counted(module) for name, module in plan.modules.items()}


@pytest.mark.parametrize("spread", ["global", "even", "columns"])
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
def test_what_is_looked_up_is_what_select_chooses(kinds: list[str], spread: str) -> None:
    if (spread == "columns" and kinds != ["element"]) or (spread == "even" and kinds not in KINDS[:2] + KINDS[6:7]):
        with pytest.raises(InputError):
            SelectionOrder(measured(0), kinds, spread=spread)
        return
    rng, different = random.Random(1), 0
    for seed in range(2):
        relevance = measured(seed)
        order = SelectionOrder(relevance, kinds, spread=spread)
        for limit in [*range(1, 30, 2), *rng.sample(range(30, relevance.inventory.base_parameters), 10)]:
            excluded = rng.sample(["b.0.a", "b.1.b", "b.2"], rng.randint(0, 2))
            without = [name for name in order.modules if any(f"{name}.".startswith(f"{one}.") for one in excluded)]
            found = order.at(limit, without)
            assert found == made(relevance, limit, kinds, spread=spread, exclude_modules=excluded), (
                seed,
                limit,
                excluded,
            )
            different += bool(found)
            trained = sum(parameters_of(relevance.inventory[name], units) for name, units in found.items())
            assert trained <= limit
    assert different > 10


def test_the_parameters_of_what_is_chosen_are_those_of_the_plan() -> None:
    relevance = measured(2)
    for kinds in KINDS:
        for name, module in select(relevance, 80, kinds).modules.items():
            assert parameters_of(relevance.inventory[name], counted(module)) == module.parameters


def test_of_many_single_weights_the_sum_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reltune.plan.order.FEW", 0)
    relevance = measured(1)
    order, without = SelectionOrder(relevance, "element"), ["b.0.a", "b.2.c"]
    for limit in (1, 20, 60, relevance.inventory.base_parameters):
        found = order.at(limit, without)
        wanted = made(relevance, limit, ["element"], exclude_modules=without)
        assert set(found).isdisjoint(without)
        assert sum(one.elements for one in found.values()) == sum(one.elements for one in wanted.values()) > 0


def test_directions_are_as_many_as_the_analysis_kept() -> None:
    relevance = measured(0)
    for name, parts in relevance.parts["fisher"].items():
        if "row" in parts:
            parts["direction"] = torch.rand(2)
            parts["direction_vectors"] = torch.zeros(2, relevance.inventory[name].shape[1])
    relevance.parts = {"movement": relevance.parts["fisher"]}
    order = SelectionOrder(relevance, "direction", spread="even")
    assert order.at(39) == made(relevance, 39, ["direction"], spread="even") != {}
    with pytest.raises(InputError, match="kept 2"):
        order.at(150)


def test_at_the_shapes_of_8b_the_choice_is_the_same() -> None:
    """224 maps with all their columns, more than a million."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    shapes |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
    modules = [ModuleInfo(f"l.{i}.{n}", "linear", f"l.{i}", i, s, False) for i in range(32) for n, s in shapes.items()]
    parts = {info.name: {"column": torch.rand(info.columns, generator=draw) ** 8} for info in modules}
    relevance = RelevanceScores({"fisher": parts}, Inventory(modules, {}, 8_030_261_248, 0), [], "f", {})
    order = SelectionOrder(relevance, "column")
    assert len(order.candidates.price) == 1_245_184 and len(order.modules) == 224
    for limit, without in ((8_030_261, []), (20_000_003, ["l.31.down", "l.0.q"])):
        assert order.at(limit, without) == made(relevance, limit, ["column"], exclude_modules=without)
