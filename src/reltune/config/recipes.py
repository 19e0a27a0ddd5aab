"""What is taken for the criterion, the granularity, the budget and the spread where the user names none of them, or some.

Measured in benchmarks/selection_study.py. A config that is made holds the values themselves, and config.yaml keeps them, so
that another version's table changes no run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from reltune.names import LIMITS


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

# Where directions of a linear map's input are named as the granularity: "A from movement and fixed" in
# benchmarks/results/selection_explore.json, selection_encoder.json (MiniLM, 5 directions of every linear map, 0.46% of the model) and
# selection_decoder.json (SmolLM2-135M, 16, 1.85%). 0.5% allows those 5. Level with LoRA of equal size on the one, ahead of it on the
# other at equal training steps (docs/selection.md).
DIRECTIONS = Recipe("movement", "direction", "0.5%", "even")

# AdamW's rate for what is trained along directions of length 1, at scale 1. In those records they had the length 1/√3 and LoRA's scale
# was 2, so that a step at some rate did what one at 2/√3 times that rate does here. One rate for all was best at 1e-3, which is 1.2e-3
# here: on MiniLM 0.25 validation points below each task's own best, on average over 12 pairs of task and phase (2e-3 lost 0.60, 4e-3 1.68;
# a task's own best lay between 5e-4 and 8e-3); on SmolLM2 it was the best on all 4 tasks. So it depends neither on the number of directions
# nor on the task family.
DIRECTIONS_RATE = 1.2e-3

# Single weights for each training example. In benchmarks/results/selection_proof.json, selection_small_data.json and
# selection_proof_decoder.json the best mean had 57 (MiniLM, 2,000 examples), 45 (MiniLM, 10,000) and 80 (SmolLM2, 2,000); with 34 and fewer
# the next larger budget gained, with 57 and more none was shown to. 2% is the most that was tried, and nothing was tried on toys.
PER_EXAMPLE, MOST, TOY = 50, 0.02, 1_000_000

CHOICE = ("criteria", "granularity", "budget", "spread")  # the fields that a recipe fills


def larger_budget(chosen: int, examples: int, parameters: int) -> str | None:
    """A budget that suits so many training examples better than ``chosen`` single weights of a model with so many ``parameters``, as
    a share; None where these are enough, or were never found to be too few."""
    wanted = min(PER_EXAMPLE * examples, int(MOST * parameters))
    few = 3 * chosen < PER_EXAMPLE * examples and 2 * chosen < wanted
    return f"{100 * wanted / parameters:.2g}%" if few and parameters > TOY else None


def completed(given: Mapping[str, Any], ranks: bool = False) -> dict[str, Any]:
    """The fields of ``CHOICE``: those that are given, and for those that are None what the recipe says.

    Args:
        ranks: whether the choice becomes the ranks of a LoRA. Even shares would give every module the same one.
    """
    criteria, granularity = given["criteria"], given["granularity"]
    if granularity is not None:
        named = {"element": SINGLE_WEIGHTS, DIRECTIONS.granularity: DIRECTIONS}
        recipe = next((named[word] for word in granularity if word in named), COLUMNS)
    else:
        recipe = BEST if criteria in (None, [BEST.criterion]) and not ranks else COLUMNS
    filled = recipe.fields() | {name: value for name, value in given.items() if value is not None}
    filled["budget"] = with_parameters(filled["budget"], recipe.budget)
    if given["spread"] is None:  # that even is best was measured of these two, and of nothing else
        measured = [(of.criterion, [of.granularity]) for of in (BEST, DIRECTIONS)]
        alone = (filled["criteria"][0], filled["granularity"]) in measured
        filled["spread"] = BEST.spread if alone else COLUMNS.spread
    return filled


def with_parameters(budget: str, other: str | None) -> str:
    """A budget that says how many parameters, beside what else it limits: as it is, or as another budget says."""
    if other is None or parameters_of(budget):
        return budget
    return f"{parameters_of(other)} {budget}".strip()


def parameters_of(budget: str) -> str:
    """What a budget says of parameters, without what it says of memory and time; empty if nothing."""
    return re.sub(rf"({'|'.join(LIMITS)})\s*=\s*\S*", "", budget, flags=re.IGNORECASE).strip()


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
