"""What is taken for the criterion, the granularity, the budget and the spread where the user names none of them, or some.

Measured in benchmarks/selection_study.py. A config that is made holds the values themselves, and config.yaml keeps them, so
that another version's table changes no run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A criterion, with what it chooses how much of and where."""

    criterion: str
    granularity: str
    budget: str
    spread: str

    def fields(self) -> dict[str, Any]:
        """The values by the names of the config's fields."""
        return {
            "criteria": [self.criterion],
            "granularity": [self.granularity],
            "budget": self.budget,
            "spread": self.spread,
        }


# Where nothing is named, or the criterion movement alone; single weights that are named as the granularity have another budget.
BEST = Recipe("movement", "element", "0.12%", "even")
SINGLE_WEIGHTS = dataclasses.replace(BEST, budget="0.5%")

# Where another granularity or other criteria are named.
COLUMNS = Recipe("fisher", "column", "0.5%", "global")

CHOICE = ("criteria", "granularity", "budget", "spread")  # the fields that a recipe fills


def completed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``CHOICE``: those that are given, and for those that are None what the recipe says."""
    criteria, granularity = given["criteria"], given["granularity"]
    if granularity is not None:
        recipe = SINGLE_WEIGHTS if "element" in granularity else COLUMNS
    else:
        recipe = BEST if criteria in (None, [BEST.criterion]) else COLUMNS
    filled = recipe.fields() | {name: value for name, value in given.items() if value is not None}
    if (
        given["spread"] is None
    ):  # that even shares are best was measured of single weights by movement, and of nothing else
        alone = (filled["criteria"][0], filled["granularity"]) == (BEST.criterion, [BEST.granularity])
        filled["spread"] = BEST.spread if alone else COLUMNS.spread
    return filled


def chosen_again(stored: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """A run's fields of ``CHOICE``, to choose units again with the ``given`` fields changed. None: ``completed`` fills it in.

    What a run holds stays, with one exception. A run with the best recipe holds a budget and a spread that are meant for
    single weights, and that nobody asked for: a new granularity does not take them over.
    """
    kept = {name: stored[name] for name in CHOICE}
    best = BEST.fields()
    if "granularity" in given and all(kept[name] == best[name] for name in ("criteria", "granularity")):
        kept |= {name: None for name in ("budget", "spread") if kept[name] == best[name]}
    return kept
