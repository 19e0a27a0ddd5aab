"""The largest of very many numbers, module by module: neither sorted nor joined, with no copy of more than a block.

The bit pattern of a number that is not negative, read as an integer, has the number's order. So the n-th largest is found
digit by digit, 16 bits at a time (radix selection): count the numbers by their highest digit, then, of those with the
digit that the n-th largest has, by the next. Two passes over float32, four over float64, and one more to collect. Exact;
ties go to the earlier module and the lower index.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 22  # numbers at a time
DIGIT = 16  # bits


def largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Flat indices, ascending, of the ``count`` largest numbers of all tensors together that are not negative.

    Modules of which nothing is taken are left out. Where there are fewer numbers than ``count``, all of them are taken.
    """
    wide = torch.float64 if any(numbers.dtype == torch.float64 for numbers in scores.values()) else torch.float32
    threshold, ties = _nth(scores, count, wide)
    indices = {}
    for name, numbers in scores.items():
        parts = []
        for start, keys in _keys(numbers, wide):
            taken = keys > threshold
            if ties:
                equal = (keys == threshold).nonzero().flatten()[:ties]
                taken[equal] = True
                ties -= len(equal)
            parts.append(taken.nonzero().flatten() + start)
        index = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        if len(index):
            indices[name] = index
    return indices


class Counts:
    """How many numbers of each tensor are among the largest of all that are not negative, for any count, after one pass over them.

    They are counted by their highest digit: the exponent and 7 bits of the mantissa, steps of 0.8% at most. Of the step that the last
    one lies in, each tensor gives in proportion, so that the sum is exact and what a tensor gives is off by a part of one step.
    Memory: 256 KiB a tensor.
    """

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        steps = 1 << (DIGIT - 1)  # without the sign
        self.names = list(scores)
        self._from_top = np.zeros((len(scores), steps), dtype=np.int64)
        for own, numbers in zip(self._from_top, scores.values(), strict=True):
            for _, keys in _keys(numbers, torch.float32):
                own += torch.bincount((keys >> DIGIT) + 1, minlength=1 + steps)[1:].flip(0).numpy()  # below zero: 0
        np.cumsum(self._from_top, axis=1, out=self._from_top)

    def at(self, count: int, without: Collection[str] = ()) -> dict[str, int]:
        """Of each tensor but those ``without``; tensors of which nothing is taken are left out."""
        names = [name for name in self.names if name not in without]
        kept = [place for place, name in enumerate(self.names) if name not in without]

        def down_to(step: int) -> np.ndarray:
            return self._from_top[kept, step] if step >= 0 else np.zeros(len(kept), dtype=np.int64)

        last = self._from_top.shape[1] - 1
        taken = down_to(last)
        if taken.sum() > count:
            step = bisect_left(range(last), count, key=lambda step: int(down_to(step).sum()))
            taken = down_to(step - 1)
            inside, left = down_to(step) - taken, count - int(taken.sum())
            shares = left * inside
            parts, rests = np.divmod(shares, inside.sum())
            parts[np.argsort(-rests, kind="stable")[: left - int(parts.sum())]] += 1
            taken = taken + parts
        return {name: int(number) for name, number in zip(names, taken, strict=True) if number}


def best_of_columns(scores: Tensor, count: int) -> Tensor:
    """Flat indices, ascending, of ``count`` numbers (rows, columns) that are not negative: the largest of each column before the second
    largest of any, and of the last round the largest. Ties go to the lower index. All, where there are fewer than ``count``."""
    columns = scores.shape[1]
    order, best = [], []
    rounds = min(len(scores), -(-count // columns) if bool((scores >= 0).all()) else len(scores))
    for block in scores.detach().split(max(1, BLOCK // len(scores)), dim=1):
        found = torch.where(block >= 0, block, -1).mT.contiguous().sort(dim=1, descending=True, stable=True)
        best.append(found.values[:, :rounds].mT)
        order.append(found.indices[:, :rounds].mT)
    values, rows = torch.cat(best, 1), torch.cat(order, 1)
    chosen = []
    for value, row in zip(values, rows, strict=True):
        at = row * columns + torch.arange(columns)
        at, value = at[value >= 0], value[value >= 0]
        if len(at) > count:
            by_index = at.argsort()
            at, value = at[by_index], value[by_index]
            at = at[value.argsort(descending=True, stable=True)[:count]]
        chosen.append(at)
        count -= len(at)
        if not count or not len(at):
            break
    return torch.cat(chosen).sort().values if chosen else torch.empty(0, dtype=torch.int64)


def above(scores: Mapping[str, Tensor], thresholds: Tensor, equal: bool) -> Tensor:
    """How many numbers lie above each threshold (or ``equal`` it); thresholds in float64, ascending."""
    counts = torch.zeros(len(thresholds) + 1, dtype=torch.int64)
    for numbers in scores.values():
        for _, block in _blocks(numbers):
            counts += torch.bincount(
                torch.bucketize(block.double(), thresholds, right=equal), minlength=len(thresholds) + 1
            )
    return counts.flip(0).cumsum(0).flip(0)[1:]


def _nth(scores: Mapping[str, Tensor], count: int, wide: torch.dtype) -> tuple[int, int]:
    """The key of the ``count``-th largest number, and how many of those that equal it are among the largest."""
    prefix = 0
    highest = torch.finfo(wide).bits - DIGIT
    for shift in range(highest, -1, -DIGIT):
        histogram = torch.zeros(1 << DIGIT, dtype=torch.int64)
        for numbers in scores.values():
            for _, keys in _keys(numbers, wide):
                if shift < highest:
                    keys = keys[keys >> (shift + DIGIT) == prefix] & (1 << DIGIT) - 1 << shift
                digits = (keys >> shift) + 1  # below zero: 0
                histogram += torch.bincount(digits, minlength=1 + (1 << DIGIT))[1:]
        from_top = histogram.flip(0).cumsum(0)
        if from_top[-1] < count:
            return 0, int(from_top[-1])  # all of them
        place = int(torch.searchsorted(from_top, count))
        count -= int(from_top[place - 1]) if place else 0
        prefix = prefix << DIGIT | (1 << DIGIT) - 1 - place
    return prefix, count


def _keys(scores: Tensor, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Integers in the order of the numbers; −1 or less for those below zero."""
    as_integer = torch.int64 if wide == torch.float64 else torch.int32
    for start, block in _blocks(scores):
        # + 0 turns −0 into 0; comparisons with nan are false, so that it is never taken
        keys = (block.to(wide) + 0).view(as_integer)
        yield start, torch.where(block >= 0, keys, -1)


def _blocks(scores: Tensor) -> Iterator[tuple[int, Tensor]]:
    flat = scores.detach().reshape(-1)
    for start in range(0, len(flat), BLOCK):
        yield start, flat[start : start + BLOCK]
