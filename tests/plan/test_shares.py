"""Choices that are a number of parameters, against trying every number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cost_cases import profile
from reltune.cost.profile import Chosen
from reltune.plan import shares
from reltune.plan.search import Group, Limits
from reltune.plan.shares import Shares

MODULES = ("model.layers.0.mlp.gate_proj", "model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.o_proj")
NUMBERS = {
    "column": 160,
    "row": 64,
    "element": 1,
}  # that one unit of gate_proj (160, 64) trains; of the others 64 and 64


def made(kind: str, units: int = 12, seed: int = 0) -> tuple[list[Group], list[int]]:
    """Groups of one granularity in modules of the blocks 0, 2 and 3, some units worth less than nothing."""
    numbers = np.random.default_rng(seed)
    worth = [numbers.permutation(np.arange(units) - 2.0) * (1 + place) for place in range(len(MODULES))]
    groups = [Group({name: Chosen(**{f"{kind}s": 1})}, values) for name, values in zip(MODULES, worth, strict=True)]
    return groups, [160 * 64, 64 * 64, 64 * 64]


def counts(kind: str, sizes: list[int], lowest: int, parameters: int) -> list[int]:
    """Every module above the cut-off has its share of the parameters, and takes as many units as it pays for."""
    open_ = [place >= lowest for place in (0, 2, 3)]
    total = sum(size for size, yes in zip(sizes, open_, strict=True) if yes)
    price = [NUMBERS[kind], *([1, 1] if kind == "element" else [64, 64])]
    return [
        min(parameters * size // total // one, 10) if yes else 0
        for size, one, yes in zip(sizes, price, open_, strict=True)
    ]


@pytest.mark.parametrize("kind", ["column", "row", "element"])
@pytest.mark.parametrize("lowest", [0, 1, 3])
def test_the_most_parameters_within_the_limits_are_found(kind: str, lowest: int) -> None:
    groups, sizes = made(kind)
    ways, costs = Shares(groups, sizes, profile(), together=False), profile()

    def cost(parameters: int) -> object:
        plan = {
            name: Chosen(**{f"{kind}s": count})
            for name, count in zip(MODULES, counts(kind, sizes, lowest, parameters), strict=True)
            if count
        }
        return costs.cost(plan) if plan else None

    most = 30 if kind == "element" else 900
    everything = cost(most)
    nothing = costs.frozen_memory(lowest)
    for part in (0.4, 1.0):
        wanted = Limits(most, nothing + part * (everything.memory - nothing))  # type: ignore[attr-defined]
        allowed = [p for p in range(1, most + 1) if (found := cost(p)) is not None and wanted.allow(found)]  # type: ignore[arg-type]
        choice = ways.at_cut_off(lowest, wanted)
        if not allowed:
            assert choice is None
            continue
        assert choice is not None and wanted.allow(choice.cost)
        taken = counts(kind, sizes, lowest, ways.limit(choice))
        assert taken == counts(kind, sizes, lowest, max(allowed)) == list(choice.counts[:-1])
        best = [sorted(group.worth, reverse=True)[:count] for group, count in zip(groups, taken, strict=True)]
        assert choice.worth == pytest.approx(sum(map(sum, best)))
        assert ways.plan(choice.counts) == {
            name: Chosen(**{f"{kind}s": count}) for name, count in zip(MODULES, taken, strict=True) if count
        }
        assert ways.names(lowest) == {name for name, place in zip(MODULES, (0, 2, 3), strict=True) if place >= lowest}


def test_the_best_of_all_modules_together_are_worth_their_sum() -> None:
    groups, sizes = made("element")
    ways = Shares(groups, sizes, profile(), together=True)
    choice = ways.at_cut_off(1, Limits(7))
    every = sorted(np.concatenate([groups[1].worth, groups[2].worth]), reverse=True)
    assert choice is not None and choice.worth == pytest.approx(sum(every[:7]))


def test_several_granularities_of_a_module_divide_its_share() -> None:
    (first, *_), (size, *_) = made("column")
    groups = [first, Group({MODULES[0]: Chosen(rows=1)}, first.worth)]
    choice = Shares(groups, [size, size], profile(), together=False).at_cut_off(0, Limits(1000))
    assert choice is not None and choice.counts == (3, 7, 1000)  # 500 of 160 and 500 of 64
    assert Shares(groups, [size, size], profile(), together=False).plan((3, 7)) == {MODULES[0]: Chosen(3, 7)}


def test_very_many_scores_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, sizes = made("element", units=4000)
    exact = [Shares(groups, sizes, profile(), together=t).at_cut_off(0, Limits(3000)) for t in (False, True)]
    monkeypatch.setattr(shares, "SAMPLED", 600)
    about = [Shares(groups, sizes, profile(), together=t).at_cut_off(0, Limits(3000)) for t in (False, True)]
    for one, other in zip(exact, about, strict=True):
        assert one is not None and other is not None and other.counts == one.counts
        assert other.worth != one.worth and other.worth == pytest.approx(one.worth, rel=0.05)


@pytest.mark.parametrize("kind", ["column", "element"])
def test_the_cheapest_choice_is_a_unit_in_each_module_of_the_highest_block(kind: str) -> None:
    groups, sizes = made(kind)
    groups.append(Group({"model.layers.3.self_attn.q_proj": groups[2].one[MODULES[2]]}, groups[2].worth))
    choice, lowest = Shares(groups, [*sizes, 64 * 64], profile(), together=False).smallest()
    assert lowest == 3 and Counter(choice.counts[:-1]) == {0: 2, 1: 2}
    nothing = [Group(group.one, np.where(place >= 2, -1.0, group.worth)) for place, group in enumerate(groups)]
    assert Shares(nothing, [*sizes, 64 * 64], profile(), together=False).smallest()[1] == 2


def test_nothing_is_chosen_where_nothing_can_be() -> None:
    groups, sizes = made("column")
    ways = Shares(groups[:1], sizes[:1], profile(), together=False)
    assert ways.at_cut_off(1, Limits(10**6)) is None  # no module is so high
    assert ways.at_cut_off(0, Limits(100)) is None  # less than a column
    assert ways.at_cut_off(0, Limits(10**6, 1.0)) is None  # takes more in any case
