"""The order in which units are chosen, so that the choice under any budget is looked up and not made anew.

``select`` sorts all units for one budget. Whoever asks for many budgets, as a slider does, sorts once: under a budget the units up to
a place in that order are chosen, and behind it those that still fit. Counts per module are told, not indices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np

from reltune.cost.profile import Chosen
from reltune.layers.units import ModuleInfo
from reltune.plan.granularities import ALONE, WHOLE
from reltune.plan.plan import ModulePlan
from reltune.plan.selection import SPREAD_OUT, check_kept, share_size, units_to_choose
from reltune.plan.threshold import Counts, largest
from reltune.relevance.scores import RelevanceScores

FEW = 1 << 22  # single weights that are gone through for every budget
ONE_MODULE = (
    "module",
    "column",
    "row",
    "element",
    "direction",
    "bias",
    "norm",
)  # each of whose units lies in one module


class SelectionOrder:
    """What ``select`` would choose of each module, for any budget.

    Looked up: units of one granularity that lie in one module each. Of more than ``FEW`` single weights that compete over the whole
    model, what each module gives is told to within a part of a step of 0.8% of the scores (``threshold.Counts``), and their sum exactly.
    Layers, attention heads and several granularities share weights: of those there are few, and ``select``'s own rule goes through them.

    The arguments are those of ``select``. Raises InputError for what it refuses whatever the budget is.
    """

    def __init__(
        self,
        relevance: RelevanceScores,
        granularity: str | Sequence[str] = "column",
        *,
        criterion: str | None = None,
        spread: str = "global",
        target_modules: Sequence[str] = (),
        exclude_modules: Sequence[str] = (),
    ) -> None:
        self._again = partial(
            units_to_choose, relevance, granularity, criterion, spread, target_modules, exclude_modules=exclude_modules
        )
        self.kinds, self.criterion, self.candidates, self.elements = self._again()
        self.inventory, self.spread = relevance.inventory, spread
        self._looked_up = len(self.kinds) == 1 and self.kinds[0] in ONE_MODULE
        self._without: frozenset[str] | None = None
        if self._looked_up and spread == "global" and self.elements:
            many = sum(scores.numel() for scores in self.elements.values()) > FEW
            self._counts = Counts(self.elements) if many else None
        elif self._looked_up and spread == "global":
            worth, price = self.candidates.worth, self.candidates.price
            order = np.argsort(-(worth / price), kind="stable")
            order = order[~(worth[order] < 0)]
            self._price, self._place = price[order], self.candidates.place[order].astype(np.int32)
        elif self._looked_up:
            self._counted = self._count()

    @property
    def modules(self) -> list[str]:
        """The modules that units may be chosen of, in the model's order."""
        found = {name for _, name in self.candidates.places} | {*self.elements}
        inside = [info.name for info in self.inventory.modules if info.name in found]
        whole = {"layer", "head"} & {*self.kinds}
        return [info.name for info in self.inventory.modules if info.in_block] if whole else inside

    def _count(self) -> dict[str, tuple[int, int]]:
        """By module, what a unit costs and how many there are that are not harmful."""
        found = {name: (1, int((scores >= 0).sum())) for name, scores in self.elements.items()}
        good = np.bincount(self.candidates.place[self.candidates.worth >= 0], minlength=len(self.candidates.places))
        for i, (_, name) in enumerate(self.candidates.places):
            found[name] = (int(self.candidates.price[np.searchsorted(self.candidates.place, i)]), int(good[i]))
        return found

    def at(self, limit: int, without: Collection[str] = ()) -> dict[str, Chosen]:
        """What is chosen of each module with ``limit`` trainable parameters, in the model's order; nothing of the modules ``without``.

        Empty where not even the smallest unit fits. Raises InputError where the analysis kept too few directions.
        """
        if not self._looked_up:
            return self._chosen_anew(limit, frozenset(without))
        if self.spread != "global":
            counts = self._evenly(limit, without)
        elif self.elements:
            counts = self._largest(limit, without)
        else:
            counts = self._best(limit, frozenset(without))
        kind = self.kinds[0]
        return {
            info.name: _chosen(info, kind, counts[info.name])
            for info in self.inventory.modules
            if counts.get(info.name)
        }

    def _best(self, limit: int, without: frozenset[str]) -> dict[str, int]:
        """The best units of the whole model: those up to a place in the order, and what fits behind it."""
        if without != self._without:
            price, place = self._price, self._place
            if without:
                kept = np.array([name not in without for _, name in self.candidates.places])[place]
                price, place = price[kept], place[kept]
            self._without, self._kept_price, self._kept_place = without, price, place
            self._spent = np.cumsum(price)
            self._by_price = {int(one): np.flatnonzero(price == one) for one in np.unique(price)}
        count = int(np.searchsorted(self._spent, limit, "right"))
        taken = np.bincount(self._kept_place[:count], minlength=len(self.candidates.places))
        left, behind = limit - (int(self._spent[count - 1]) if count else 0), count
        while True:  # a unit that no longer fits is passed over
            next_places = [
                int(places[at])
                for one, places in self._by_price.items()
                if one <= left and (at := int(np.searchsorted(places, behind))) < len(places)
            ]
            if not next_places:
                break
            behind = min(next_places) + 1
            left -= int(self._kept_price[behind - 1])
            taken[self._kept_place[behind - 1]] += 1
        return {name: int(taken[i]) for i, (_, name) in enumerate(self.candidates.places) if taken[i]}

    def _largest(self, limit: int, without: Collection[str]) -> dict[str, int]:
        """The best single weights of the whole model."""
        if self._counts is not None:
            return self._counts.at(limit, without)
        some = {name: scores for name, scores in self.elements.items() if name not in without}
        return {name: len(index) for name, index in largest(some, limit).items()} if some else {}

    def _evenly(self, limit: int, without: Collection[str]) -> dict[str, int]:
        """Each module's share of the budget."""
        counted = {name: found for name, found in self._counted.items() if name not in without}
        over_columns = self.spread == "columns"
        sizes = {
            name: self.inventory[name].weight_parameters
            if over_columns
            else share_size(self.inventory[name], self.kinds)
            for name in counted
        }
        total = sum(sizes.values())
        if not total or (self.elements and limit < len(counted)):
            return {}
        if self.kinds == [ALONE]:
            check_kept(self.inventory, self.kinds, self.candidates, limit // total)
        return {name: min(good, limit * sizes[name] // total // price) for name, (price, good) in counted.items()}

    def _chosen_anew(self, limit: int, without: frozenset[str]) -> dict[str, Chosen]:
        candidates, elements = self.candidates, self.elements
        if without:
            excluded = [*self._again.keywords["exclude_modules"], *sorted(without)]
            _, _, candidates, elements = self._again(exclude_modules=excluded)
        chosen = SPREAD_OUT[self.spread](self.inventory, self.kinds, candidates, elements, limit)
        return {info.name: counted(chosen[info.name]) for info in self.inventory.modules if info.name in chosen}


def _chosen(info: ModuleInfo, kind: str, count: int) -> Chosen:
    if kind in WHOLE:
        return Chosen(weight=True, bias=info.bias)
    if kind == "bias":
        return Chosen(bias=True)
    column, row, element, direction = (count if kind == one else 0 for one in ("column", "row", "element", "direction"))
    return Chosen(column, row, element, direction)


def counted(module: ModulePlan) -> Chosen:
    """How many units a plan takes of a module."""
    parts = (len(module.columns), len(module.rows), len(module.elements), len(module.directions))
    return Chosen(*parts, weight=module.weight, bias=module.bias)


def parameters_of(info: ModuleInfo, chosen: Chosen) -> int:
    """Trainable numbers, as ``ModulePlan.parameters`` counts them."""
    if chosen.weight:
        return info.weight_parameters + (info.bias_parameters if chosen.bias else 0)
    parts = chosen.elements + chosen.directions * info.rows
    if not info.is_vector:
        parts += chosen.columns * info.column_parameters + chosen.rows * info.row_parameters
    return parts + (info.bias_parameters if chosen.bias else 0)
