"""Choices under budgets of memory and time, against trying every set of layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import pytest
import torch

from cost_cases import llama, profile
from relevance_cases import measure
from reltune.cost.devices import LIBRARIES
from reltune.cost.profile import Chosen, PlanCost
from reltune.errors import InputError
from reltune.plan.plan import Plan
from reltune.plan.search import Limits
from reltune.plan.selection import Unaffordable, frontier, limits_of, select
from reltune.relevance.scores import RelevanceScores

LAYERS = [f"model.layers.{i}" for i in range(4)]


@pytest.fixture(scope="module")
def relevance() -> RelevanceScores:
    torch.manual_seed(0)
    model = llama(4)
    for i, layer in enumerate(model.model.layers):  # the third matters most, the last least
        for p in layer.parameters():
            p.data *= (1.5, 1.0, 3.0, 0.5)[i]
    return measure(model, None, None, ["magnitude"], elements=True)


def whole(relevance: RelevanceScores, layers: Iterable[str]) -> dict[str, Chosen]:
    return {info.name: Chosen(weight=True) for info in relevance.inventory.modules if info.layer in layers}


def sets(from_layer: int = 0) -> list[tuple[str, ...]]:
    layers = LAYERS[from_layer:]
    return [chosen for n in range(1, len(layers) + 1) for chosen in itertools.combinations(layers, n)]


def cost_of(plan: Plan) -> PlanCost:
    return profile().cost(
        {
            name: Chosen(len(m.columns), len(m.rows), len(m.elements), weight=m.weight)
            for name, m in plan.modules.items()
        }
    )


def written(tensors: float) -> str:
    """The budget in which tensors may hold so much on a CPU."""
    return f"memory={(LIBRARIES + tensors) / 1000:.3f}KB"


def between(relevance: RelevanceScores, part: float) -> int:
    """Bytes: so far from nothing trained to everything."""
    least, most = profile().frozen_memory(4), profile().cost(whole(relevance, LAYERS)).memory
    return int(least + part * (most - least))


@pytest.mark.parametrize(
    ("parameters", "memory", "time"),
    [(0.5, 0.5, None), (1.0, 0.8, None), (1.0, None, 0.75), (0.7, 0.6, 0.8), (1.0, 1.01, 1.0)],
)
def test_layers_are_chosen_as_brute_force_does(
    relevance: RelevanceScores, parameters: float, memory: float | None, time: float | None
) -> None:
    costs, base = profile(), relevance.inventory.base_parameters
    budget, limits = f"{100 * parameters:g}%", [int(parameters * base), float("inf"), float("inf")]
    if memory is not None:
        limits[1] = between(relevance, memory)
        budget += f" {written(limits[1])}"
    if time is not None:
        limits[2] = time * costs.cost({name: Chosen(weight=True) for name in costs.modules}).seconds
        budget += f" time={time}"
    worth = {name: float(v) for name, v in relevance.by("layer", "magnitude").items() if name in LAYERS}
    allowed = [s for s in sets() if Limits(*limits).allow(costs.cost(whole(relevance, s)))]
    plan = select(relevance, budget, "layer", profile=costs)
    assert limits_of(budget, limits[0], costs) == Limits(*limits)
    assert {relevance.inventory[name].layer for name in plan.modules} == set(
        max(allowed, key=lambda s: sum(worth[name] for name in s))
    )
    assert plan.budget == budget and plan.budget_parameters == limits[0]


def test_the_frontier_is_the_best_set_of_each_depth(relevance: RelevanceScores) -> None:
    costs, base = profile(), relevance.inventory.base_parameters
    worth = {name: float(v) for name, v in relevance.by("layer", "magnitude").items() if name in LAYERS}

    def best(start: int, limits: Limits) -> float:
        allowed = [s for s in sets(start) if limits.allow(costs.cost(whole(relevance, s)))]
        return max((sum(worth[name] for name in s) for s in allowed), default=0.0)

    wanted = Limits(int(0.6 * base), between(relevance, 0.55))
    rows = frontier(relevance, wanted, costs, "layer")
    assert rows and [row.layer for row in rows] == [LAYERS[row.lowest] for row in rows]
    for row in rows:
        assert row.share == pytest.approx(best(row.lowest, wanted) / best(0, Limits(wanted.parameters)))
        assert row.counts == whole(relevance, {relevance.inventory[name].layer for name in row.counts})
        found = costs.cost(row.counts)
        assert (row.parameters, row.memory, row.seconds) == (found.trained, found.memory, found.seconds)
    reached = {row.lowest for row in rows}
    assert all(best(start, wanted) == best(start + 1, wanted) for start in range(3) if start not in reached)


@pytest.mark.parametrize(("granularity", "spread"), [("column", "global"), ("element", "even"), ("row", "even")])
def test_of_every_module_the_best_units_are_taken(relevance: RelevanceScores, granularity: str, spread: str) -> None:
    limit = between(relevance, 0.25)
    plan = select(relevance, f"30% {written(limit)}", granularity, spread=spread, profile=profile())
    found = cost_of(plan)
    assert 0.8 * limit < found.memory <= limit and plan.parameters <= 0.3 * relevance.inventory.base_parameters
    for name, scores in relevance.by(granularity, "magnitude").items():
        if name in plan.modules:
            chosen = list(getattr(plan.modules[name], f"{granularity}s"))
            order = scores.reshape(-1).argsort(descending=True, stable=True)
            assert sorted(order[: len(chosen)].tolist()) == sorted(chosen)


def test_what_no_profile_knows_is_refused(relevance: RelevanceScores) -> None:
    assert limits_of("2%", 100, None) == Limits(100)
    for budget in ("time=0.5", "memory=1GiB", "hours=1"):
        with pytest.raises(InputError, match=r"pass profile=reltune\.profile"):
            select(relevance, budget, "layer")
    with pytest.raises(InputError, match="hours depend on the data"):
        select(relevance, "hours=1", "layer", profile=profile())
    slow = copy.copy(profile())
    slow.calibration = None
    with pytest.raises(InputError, match="the speed of the device is not known"):
        select(relevance, "time=0.5", "layer", profile=slow)
    with pytest.raises(InputError, match=r"units of model\.layers\.3.* is not known; leave it out by exclude_modules"):
        select(relevance, "memory=1GiB", "column", profile=profile(3))
    for granularities in (["layer", "norm"], ["module", "column"]):
        with pytest.raises(InputError, match="takes one granularity, or column, row and bias, and not"):
            select(relevance, "memory=1GiB", granularities, profile=profile())


@pytest.mark.parametrize("granularity", ["layer", "element"])
def test_where_nothing_fits_the_cheapest_choice_is_told(relevance: RelevanceScores, granularity: str) -> None:
    with pytest.raises(Unaffordable, match="no unit fits; the cheapest choice takes") as caught:
        select(relevance, "memory=15.1MiB", granularity, profile=profile())
    plan = caught.value.plan
    assert {relevance.inventory[name].layer for name in plan.modules} == {LAYERS[3]}
    assert f"takes {cost_of(plan).memory / 2**20:,.1f} MiB" in str(caught.value)
