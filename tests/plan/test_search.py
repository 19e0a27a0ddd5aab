"""The search for a cut-off and units against brute force over all sets of units."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_cases import profile
from reltune.cost.profile import Chosen
from reltune.plan import search
from reltune.plan.search import Choice, Group, Limits, Search

LAYERS = 4
PLACES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
KINDS = {"column": Chosen(columns=1), "row": Chosen(rows=1), "module": Chosen(weight=True)}


def full() -> Any:
    costs = profile()
    names = [name for name in costs.modules if ".layers." in name and name.endswith("_proj")]
    return costs.cost({name: Chosen(weight=True) for name in names})


@st.composite
def groups(draw: st.DrawFn, units: int = 10) -> list[Group]:
    """Groups of different modules, with so many units in all."""
    places = [(layer, place) for layer in range(LAYERS) for place in PLACES]
    chosen = draw(st.lists(st.sampled_from(places), min_size=1, max_size=units, unique=True))
    made, left = [], units
    for layer, place in chosen:
        kind = draw(st.sampled_from(list(KINDS)))
        count = 1 if kind == "module" else draw(st.integers(1, max(1, min(4, left))))
        if left < count:
            break
        left -= count
        worth = draw(st.lists(st.integers(-2, 40).map(float), min_size=count, max_size=count))
        made.append(Group({f"model.layers.{layer}.{place}": KINDS[kind]}, np.array(worth)))
    return made


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    """Somewhere between training nothing and training everything."""
    costs, everything = profile(), full()
    part = st.floats(0.0, 0.6)
    memory = costs.frozen_memory(LAYERS) + draw(part) * (everything.memory - costs.frozen_memory(LAYERS))
    seconds = costs.seconds(LAYERS) + draw(part) * (everything.seconds - costs.seconds(LAYERS))
    return Limits(
        draw(st.integers(64, 20_000)),
        draw(st.sampled_from([memory, float("inf")])),
        draw(st.sampled_from([seconds, float("inf")])),
    )


def best_of_all(made: list[Group], wanted: Limits) -> float:
    """The most relevance of any set of units that keeps the limits; −1 where none does."""
    units = [(i, float(worth)) for i, group in enumerate(made) for worth in group.worth]
    most = -1.0
    for taken in itertools.product((False, True), repeat=len(units)):
        chosen = [unit for unit, yes in zip(units, taken, strict=True) if yes]
        worth = sum(worth for _, worth in chosen)
        if not chosen or worth <= most or any(worth < 0 for _, worth in chosen):
            continue
        plan: dict[str, Chosen] = {}
        for i, _ in chosen:
            for name, one in made[i].one.items():
                plan[name] = plan.get(name, Chosen()) + one
        if wanted.allow(profile().cost(plan)):
            most = worth
    return most


def found(made: list[Group], wanted: Limits) -> tuple[Search, list[Choice | None]]:
    search_ = Search(made, profile())
    return search_, [search_.at_cut_off(lowest, wanted) for lowest in range(LAYERS)]


@settings(deadline=None, max_examples=60)
@given(groups(), limits())
def test_few_units_are_chosen_as_brute_force_does(made: list[Group], wanted: Limits) -> None:
    _, choices = found(made, wanted)
    winner = search.best(choices)
    assert (-1.0 if winner is None else choices[winner].worth) == best_of_all(made, wanted)
    for lowest, choice in enumerate(choices):
        assert choice is None or (wanted.allow(choice.cost) and choice.cost.lowest >= lowest)


@settings(deadline=None, max_examples=60)
@given(groups(), limits())
def test_prices_keep_the_limits_and_are_never_better_than_brute_force(made: list[Group], wanted: Limits) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "FEW", 0)
        _, choices = found(made, wanted)
    optimum = best_of_all(made, wanted)
    for choice in choices:
        assert choice is None or (wanted.allow(choice.cost) and choice.worth <= optimum)
    if wanted.is_parameters_alone and optimum >= 0:  # one limit: within the worth of one unit of the optimum
        winner = search.best(choices)
        largest = max(float(group.worth.max()) for group in made)
        assert (0.0 if winner is None else choices[winner].worth) >= optimum - largest
