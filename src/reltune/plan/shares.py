"""The same as search.py where every module has its share, or where all units cost alike: then a choice is a number of parameters.

Single weights cost the same wherever they are, but for the depth; and where a budget is spread evenly, the spread says what each
module gets. So for each cut-off the largest number of parameters is found that keeps the limits, and what they are worth is read off
each module's scores in order, of which a sample is taken where there are very many.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from reltune.cost.profile import Chosen, Profile
from reltune.plan.search import Choice, Group, Limits

SAMPLED = 1 << 22  # scores that are looked at, of all modules together


class Shares:
    """Units whose number in each module follows from the number of parameters.

    ``together``: the best of all modules are taken, and not each module's best.
    """

    def __init__(self, groups: Sequence[Group], sizes: Sequence[int], profile: Profile, together: bool) -> None:
        self.groups, self.profile, self.together = groups, profile, together
        ones = [next(iter(group.one.items())) for group in groups]
        self.place = np.array([profile.units(name, one).place for name, one in ones])
        self.price = np.array([profile.units(name, one).numbers for name, one in ones])
        self.sizes = np.array(sizes)
        self.most = np.array([int((group.worth >= 0).sum()) for group in groups])
        each = max(1, SAMPLED // max(1, len(groups)))
        self.steps = np.array(
            [max(1, -(-len(group.worth) // each)) for group in groups]
        )  # every how manieth is looked at
        looked_at = [group.worth[::step] for group, step in zip(groups, self.steps, strict=True)]
        self.sorted = [np.sort(worth[worth >= 0].astype(float))[::-1] for worth in looked_at]
        self.up_to = [np.concatenate([[0.0], np.cumsum(worth)]) for worth in self.sorted]

    def _open(self, lowest: int) -> np.ndarray:
        return self.place >= lowest

    def names(self, lowest: int) -> set[str]:
        """The modules that may be chosen from."""
        return {name for group, yes in zip(self.groups, self._open(lowest), strict=True) if yes for name in group.one}

    def limit(self, choice: Choice) -> int:
        """The number of parameters of a choice, which is the last of its counts."""
        return choice.counts[-1]

    def plan(self, counts: Sequence[int]) -> dict[str, Chosen]:
        plan: dict[str, Chosen] = {}
        for group, count in zip(self.groups, counts, strict=False):
            for name, one in group.one.items() if count else ():
                plan[name] = plan.get(name, Chosen()) + one * int(count)
        return plan

    def _counts(self, lowest: int, parameters: int) -> np.ndarray:
        open_ = self._open(lowest)
        # several granularities of a module share what the module gets
        of_module: dict[str, int] = {}
        for group, size, yes in zip(self.groups, self.sizes, open_, strict=True):
            if yes:
                of_module[next(iter(group.one))] = int(size)
        total = sum(of_module.values())
        kinds = Counter(next(iter(group.one)) for group in self.groups)
        own = np.array(
            [
                parameters * int(size) // total // kinds[next(iter(group.one))] if yes else 0
                for group, size, yes in zip(self.groups, self.sizes, open_, strict=True)
            ]
        )
        return np.minimum(own // self.price, np.where(open_, self.most, 0))

    def _choice(self, lowest: int, parameters: int) -> Choice | None:
        counts = self._counts(lowest, parameters)
        if not counts.any():
            return None
        cost = self.profile.cost(self.plan(counts.tolist()))
        return Choice((*map(int, counts), parameters), self._worth(lowest, counts, parameters), cost)

    def _worth(self, lowest: int, counts: np.ndarray, parameters: int) -> float:
        if not self.together:
            return math.fsum(
                step * float(np.interp(count / step, np.arange(len(sums)), sums))
                for count, step, sums in zip(counts, self.steps, self.up_to, strict=True)
            )
        open_ = np.flatnonzero(self._open(lowest))
        worth = np.concatenate([self.sorted[i] for i in open_])
        stands_for = np.concatenate([np.full(len(self.sorted[i]), self.steps[i]) for i in open_])
        order = np.argsort(-worth, kind="stable")
        number = np.concatenate([[0], np.cumsum(stands_for[order])])
        return float(np.interp(parameters, number, np.concatenate([[0.0], np.cumsum((worth * stands_for)[order])])))

    def at_cut_off(self, lowest: int, limits: Limits) -> Choice | None:
        """The choice of the most parameters within the limits, with nothing trained below the block ``lowest``; None where none fits."""
        if not self._open(lowest).any():
            return None
        low, high = 0, limits.parameters
        found = self._choice(lowest, high)
        if found is not None and limits.allow(found.cost):
            return found
        found = None
        while high - low > max(1, low // 1000):
            middle = (low + high) // 2
            tried = self._choice(lowest, middle)
            if tried is not None and not limits.allow(tried.cost):
                high = middle
            else:  # too few parameters for a single unit cost nothing
                low, found = middle, tried or found
        return found

    def smallest(self) -> tuple[Choice, int]:
        """The cheapest choice and its cut-off: the fewest parameters in the highest blocks."""
        lowest = int(self.place[self.most > 0].max())
        low, high = 0, int(self.sizes.sum()) * int(self.price.max()) * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._counts(lowest, middle).any() else (middle, high)
        choice = self._choice(lowest, max(high, int(self._open(lowest).sum())))  # one in each module at least
        assert choice is not None
        return choice, lowest
