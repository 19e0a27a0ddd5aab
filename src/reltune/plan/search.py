"""The most relevance within limits of parameters, memory and time, where the cost of a unit depends on the depth of the others.

The first unit chosen in a low block pays for the backward pass through all blocks above it. So there is a knapsack for each cut-off
depth, below which nothing is trained: what the frozen model takes down to there is paid first, and what is left of the limits is
spent on units by relevance per cost. The best cut-off wins (``best``).

Units of one group (the columns of one module) cost the same, so that of each group the most relevant ones are taken, and a
choice is a count for each group. Few choices (``FEW``) are tried one after another, the most relevant first, until one keeps the
limits: the exact optimum. Of many, the Lagrangian dual is solved: each group takes the units that are worth more than their cost at a
price for parameters, for memory and for time, and the prices are the lowest at which the limits are kept (Everett 1963). What then is
left of the limits is filled in the order of relevance per price. That is within the worth of the first unit that no longer fits of
the optimum where one limit is reached. Nothing loops over units: 3 million of them are two searches in sorted arrays.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from reltune.cost.profile import Chosen, PlanCost, Profile

FEW = 4096  # choices that are tried one by one
ROUNDS = 12  # of finding prices, where several limits are reached; and of fitting what adds up to what is held at most
NEAR = 0.002  # a part of a limit that may be left


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a plan may take: numbers trained, bytes that tensors hold at most, and seconds of a step, as ``Profile`` counts them."""

    parameters: int
    memory: float = math.inf
    seconds: float = math.inf

    @property
    def is_parameters_alone(self) -> bool:
        return math.isinf(self.memory) and math.isinf(self.seconds)

    def allow(self, cost: PlanCost) -> bool:
        # a time that is not known is not limited either
        in_time = math.isinf(self.seconds) or cost.seconds <= self.seconds
        return cost.trained <= self.parameters and cost.memory <= self.memory and in_time


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that cost the same.

    Attributes:
        one: what one of them takes of each module.
        worth: the relevance of each.
    """

    one: Mapping[str, Chosen]
    worth: np.ndarray


@dataclasses.dataclass(frozen=True)
class Choice:
    """How many units of each group are taken, the most relevant ones, with what they take and are worth together."""

    counts: tuple[int, ...]
    worth: float
    cost: PlanCost


class Search:
    """Groups of units with their costs, for as many limits as are wanted."""

    def __init__(self, groups: Sequence[Group], profile: Profile) -> None:
        self.groups, self.profile = groups, profile
        self.depth = max(1, len(profile.blocks))
        ones = [[profile.units(name, chosen) for name, chosen in group.one.items()] for group in groups]
        self.place = np.array([min(unit.place for unit in units) for units in ones], dtype=int)
        # Worth of each group's units in order, without those below zero, and what the first n of them are worth.
        self.sorted = [np.sort(group.worth[group.worth >= 0])[::-1] for group in groups]
        self.most = np.array([len(worth) for worth in self.sorted], dtype=int)
        self.up_to = [np.concatenate([[0.0], np.cumsum(worth)]) for worth in self.sorted]
        self.each = np.array([self._each(i, units) for i, units in enumerate(ones)]).reshape(-1, 3)
        self.fixed = np.array([self._fixed(i, units) for i, units in enumerate(ones)]).reshape(-1, 3)
        # To count a group's units above a price in two searches: all worths in order, and the ranks that each group's have there.
        rising = np.concatenate([np.empty(0), *(worth[::-1] for worth in self.sorted)])
        order = np.argsort(rising, kind="stable")
        self._all = rising[order]
        self._ranks = np.empty(len(order), dtype=np.int64)
        self._ranks[order] = np.arange(len(order))
        self._stride = len(order) + 1
        self._ranks += np.repeat(np.arange(len(groups)), self.most) * self._stride
        self._starts = np.cumsum(self.most) - self.most
        self._sums = np.concatenate([np.empty(0), *self.up_to])
        self._sums_at = self._starts + np.arange(len(groups))

    def _each(self, i: int, units: Sequence) -> tuple[float, float, float]:
        """What each further unit adds to numbers, bytes and seconds: on average, since many are quicker than as many single ones."""
        memory = sum(unit.held + unit.kept + unit.gradient for unit in units)
        seconds = self._unit_seconds(i, max(1, int(self.most[i]))) / max(1, int(self.most[i]))
        return float(sum(unit.numbers for unit in units)), float(memory), seconds

    def _fixed(self, i: int, units: Sequence) -> tuple[float, float, float]:
        """What is paid once for a group: its module's input, if it has to be kept whole, and the tuner's operators."""
        seconds = len(units) * self.profile.once
        return 0.0, float(sum({unit.source: unit.source_bytes for unit in units}.values())), seconds

    def _unit_seconds(self, i: int, count: int) -> float:
        if self.profile.calibration is None:
            return 0.0
        return sum(self.profile.units(name, one * count).seconds for name, one in self.groups[i].one.items())

    def plan(self, counts: Sequence[int]) -> dict[str, Chosen]:
        """How many units of each module a choice takes."""
        plan: dict[str, Chosen] = {}
        for group, count in zip(self.groups, counts, strict=True):
            for name, one in group.one.items() if count else ():
                plan[name] = plan.get(name, Chosen()) + one * int(count)
        return plan

    def choice(self, counts: Sequence[int]) -> Choice:
        worth = sum(float(sums[count]) for sums, count in zip(self.up_to, counts, strict=True))
        return Choice(tuple(map(int, counts)), worth, self.profile.cost(self.plan(counts)))

    def at_cut_off(self, lowest: int, limits: Limits) -> Choice | None:
        """The most relevance with nothing trained below the block ``lowest``; None where no unit fits."""
        open_ = np.where(self.place >= lowest, self.most, 0)
        if not open_.any():
            return None
        if math.prod(int(count) + 1 for count in open_) <= FEW:
            return next((found for found in self._by_worth(open_) if limits.allow(found.cost)), None)
        return self._fitted(lowest, open_, limits)

    def smallest(self) -> tuple[Choice, int]:
        """The cheapest choice and its cut-off: one unit in the highest blocks, of the fewest numbers."""
        least = min(np.flatnonzero(self.most), key=lambda i: (-self.place[i], self.each[i][0]))
        counts = np.zeros(len(self.most), dtype=int)
        counts[least] = 1
        return self.choice(counts.tolist()), int(self.place[least])

    def _by_worth(self, open_: np.ndarray) -> Iterator[Choice]:
        """All choices that take anything, the most relevant first; of equal ones that with the fewest units."""
        counts = [counts for counts in itertools.product(*(range(int(most) + 1) for most in open_)) if any(counts)]
        worths = [math.fsum(float(sums[n]) for sums, n in zip(self.up_to, each, strict=True)) for each in counts]
        for i in sorted(range(len(counts)), key=lambda i: (-worths[i], sum(counts[i]))):
            yield self.choice(counts[i])

    def _fitted(self, lowest: int, open_: np.ndarray, limits: Limits) -> Choice | None:
        """By prices. What units add to the peak is not more than the sum that the prices are for, so that some of a limit may be left:
        the limit of the sum is then raised as far as the peak allows."""
        frozen = np.array([0.0, self.profile.frozen_memory(lowest), self.profile.seconds(lowest)])
        wanted = np.array([limits.parameters, limits.memory, limits.seconds], dtype=float)
        frozen[np.isinf(wanted)] = 0.0
        room = wanted - frozen
        limited = ~np.isinf(wanted)
        best: Choice | None = None
        weights: np.ndarray | None = None
        for _ in range(ROUNDS):
            if (room <= 0).any():
                break
            counts, weights = self._priced(open_, room, weights)
            if not counts.any():
                break
            found = self.choice(counts.tolist())
            if limits.allow(found.cost) and (best is None or found.worth > best.worth):
                best = found
            left = np.where(limited, wanted - [found.cost.trained, found.cost.memory, found.cost.seconds], 0.0)
            left[0] = 0.0  # parameters are what they are
            reached = self._used(counts) > 0.99 * room
            if not (left < 0).any() and not (reached & (left > NEAR * (wanted - frozen)))[limited].any():
                break
            room = room + np.where(left < 0, 1.02 * left, np.where(reached, left, 0.0))
        return best

    def _used(self, counts: np.ndarray) -> np.ndarray:
        return counts @ self.each + (counts > 0) @ self.fixed

    def _priced(self, open_: np.ndarray, room: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Counts whose costs add up to no more than the room, and the proportions of prices that they were found at, beginning with
        ``weights``, if there are any from before."""
        limited = ~np.isinf(room)
        each = np.where(limited, self.each / np.where(limited, room, 1.0), 0.0)
        fixed = np.where(limited, self.fixed / np.where(limited, room, 1.0), 0.0)
        alone = [np.eye(3)[i] for i in range(3) if limited[i]] if weights is None else [weights]
        best, most, best_weights = np.zeros(len(open_), dtype=int), -math.inf, alone[0]
        idle = 0
        for turn in range(len(alone) + (ROUNDS if limited.sum() > 1 else 0)):
            if turn < len(alone):
                weights = alone[turn]
            elif turn == len(alone) and len(alone) > 1:
                weights = limited / limited.sum()
            assert weights is not None
            counts = self._at_prices(open_, each, fixed, weights)
            used = counts @ each + (counts > 0) @ fixed
            counts = self._filled(open_, each, fixed, weights, counts)
            worth = float(self._sums[self._sums_at + counts].sum())
            idle = 0 if worth > most * (1 + NEAR) else idle + 1
            if worth > most:
                best, most, best_weights = counts, worth, weights
            if weights.max() == 1.0 and used[weights.argmax()] > 1 - NEAR:
                break  # the others would be kept without a price
            if turn >= len(alone) and idle > 2:
                break
            weights = weights * np.exp(used - used.max()) + 1e-6 * limited  # what is not used up becomes cheaper
            weights = weights / weights.sum()
        return best, best_weights

    def _at_prices(self, open_: np.ndarray, each: np.ndarray, fixed: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """What groups take at the lowest prices in these proportions at which all limits are kept."""
        mine = np.flatnonzero(open_)
        price, once, open_ = each[mine] @ weights, fixed[mine] @ weights, open_[mine]
        each, fixed = each[mine], fixed[mine]
        starts, most, sums_at = self._starts[mine], self.most[mine], self._sums_at[mine]

        def counts_at(level: float) -> np.ndarray:
            rank = np.searchsorted(self._all, level * price, side="right")
            counts = np.minimum(most - np.searchsorted(self._ranks, mine * self._stride + rank) + starts, open_)
            gain = self._sums[sums_at + counts] - level * (counts * price + once)
            return np.where(gain > 0, counts, 0)

        def kept(counts: np.ndarray) -> bool:
            return bool((counts @ each + (counts > 0) @ fixed <= 1.0).all())

        low, high = 0.0, 1.0
        found = counts_at(low)
        if not kept(found):
            first = self._sums[sums_at + 1]
            high = 2 * float(np.max(first / np.maximum(price, 1e-300), initial=0.0, where=price > 0)) + 1e-300
            low = high * 1e-12
            found = counts_at(high)
            while high > low * (1 + 1e-9):
                middle = math.sqrt(low * high)
                tried = counts_at(middle)
                if kept(tried):
                    high, found = middle, tried
                else:
                    low = middle
        counts = np.zeros(len(self.most), dtype=int)
        counts[mine] = found
        return counts

    def _filled(
        self, open_: np.ndarray, each: np.ndarray, fixed: np.ndarray, weights: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """The counts with what else fits, in the order of relevance per price."""
        counts = counts.copy()
        price, once = each @ weights, fixed @ weights
        left = 1.0 - (counts @ each + (counts > 0) @ fixed)
        going = np.flatnonzero(counts < open_).tolist()
        density = {i: self.sorted[i][counts[i]] / max(price[i] + (0 if counts[i] else once[i]), 1e-300) for i in going}
        for i in sorted(going, key=lambda i: (-density[i], i)):
            room = left if counts[i] else left - fixed[i]
            costs = each[i] > 0
            fit = int(min([*(room[costs] / each[i][costs] + 1e-9), open_[i] - counts[i]])) if (room >= 0).all() else 0
            if fit:
                left = room - fit * each[i]
                counts[i] += fit
        return counts


def best(choices: Sequence[Choice | None]) -> int | None:
    """The cut-off whose choice is worth most; of equal ones the highest, which is the quickest. None where nothing fits."""
    there = [i for i, found in enumerate(choices) if found is not None]
    return max(there, key=lambda i: (choices[i].worth, i), default=None)  # type: ignore[union-attr]
