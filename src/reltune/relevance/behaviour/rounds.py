"""Examples in rounds: a small stratified sample first, and more of them for as long as they are needed.

Examples are ordered by label and, within a label, by their loss, and then taken in the order of a van der Corput sequence
from a place drawn by seed: the first n of them, whatever n, lie evenly over labels and losses (systematic sampling). So a mean
over them is that of a stratified sample, and its standard error at most about that of a simple random sample of n out of N,
√((1 − n/N) s²/n), which is what is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reltune.relevance.batches import batch_size, form, joined, picked


@dataclasses.dataclass(frozen=True)
class Round:
    """Batches, and of each the places (n,) of its examples in the order in which examples are taken. With this round the
    first ``examples`` of all are seen."""

    batches: list[Any]
    places: list[Tensor]
    examples: int


def one_round(batches: Sequence[Any]) -> list[Round]:
    """All examples at once, in their own batches and order."""
    ends = torch.tensor([batch_size(batch) for batch in batches]).cumsum(0).tolist()
    places = [torch.arange(end - batch_size(batch), end) for batch, end in zip(batches, ends, strict=True)]
    return [Round(list(batches), places, ends[-1])]


def is_one_round(examples: int, first: int) -> bool:
    """Whether so many examples are not worth more than one round, of which the first would have ``first``."""
    return 2 * examples <= 3 * first


def stratified_order(labels: Tensor | None, losses: Tensor, seed: int) -> Tensor:
    """The examples (N,) in the order in which they are taken, from labels (N,), if there is one each, and losses (N,)."""
    by_stratum = losses.argsort(stable=True)
    if labels is not None:
        by_stratum = by_stratum[labels[by_stratum].argsort(stable=True)]
    examples = len(losses)
    bits = max(1, (examples - 1).bit_length())
    steps = torch.arange(2**bits)
    reversed_bits = sum(((steps >> bit) & 1) << (bits - 1 - bit) for bit in range(bits))
    steps = reversed_bits[reversed_bits < examples]  # type: ignore[index]
    start = int(torch.randint(examples, (), generator=torch.Generator().manual_seed(seed)))
    return by_stratum[(steps + start) % examples]


def rounds_of(batches: Sequence[Any], order: Tensor, first: int) -> list[Round]:
    """Rounds that end with the first ``first`` examples, one and a half times as many, and so on, and with all. Examples of batches of one form come together, in
    batches no larger than the largest that there is."""
    total, ends = len(order), [first]
    while ends[-1] < total:
        ends.append(ends[-1] * 3 // 2 if 2 * ends[-1] <= total else total)  # no small rest
    place = torch.empty_like(order)
    place[order] = torch.arange(total)
    largest = max(map(batch_size, batches))
    rounds = []
    for start, end in zip([0, *ends], ends, strict=False):
        parts: dict[Any, list[tuple[Any, Tensor]]] = {}
        offset = 0
        for number, batch in enumerate(batches):
            places = place[offset : offset + batch_size(batch)]
            offset += batch_size(batch)
            rows = ((places >= start) & (places < end)).nonzero()[:, 0].tolist()
            if rows:
                parts.setdefault(form(batch) or number, []).append((picked(batch, rows), places[rows]))
        found = [pair for of in parts.values() for pair in _filled(of, largest)]
        rounds.append(Round([batch for batch, _ in found], [places for _, places in found], end))
    return rounds


def _filled(parts: list[tuple[Any, Tensor]], largest: int) -> list[tuple[Any, Tensor]]:
    """The same examples in as few batches of ``largest`` as there can be; a part that stands alone as it is."""
    if len(parts) == 1:
        return parts
    batch, places = joined([batch for batch, _ in parts]), torch.cat([places for _, places in parts])
    cuts = torch.arange(len(places)).split(largest)
    return [(picked(batch, cut.tolist()), places[cut]) for cut in cuts]


def labels_of(batches: Sequence[Any]) -> Tensor | None:
    """The examples' labels (N,) where each example has one that is a whole number."""
    found: list[Tensor] = []
    for batch in batches:
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch[-1]
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            return None
        found.append(labels.cpu())
    return torch.cat(found)
