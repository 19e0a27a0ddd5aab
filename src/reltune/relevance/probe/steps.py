"""Which examples each step of a probe takes, in pieces that fit in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Piece:
    """Examples ``start`` to ``stop`` of a batch."""

    batch: int
    start: int
    stop: int

    @property
    def examples(self) -> int:
        return self.stop - self.start


def steps_of(sizes: Sequence[int], examples: int | None = None) -> list[list[Piece]]:
    """The steps of one pass over batches of these sizes: a batch each, or ``examples`` each, in the data's order.

    The last step takes what is left.
    """
    if examples is None:
        return [[Piece(batch, 0, size)] for batch, size in enumerate(sizes) if size]
    steps: list[list[Piece]] = []
    room = 0
    for batch, size in enumerate(sizes):
        start = 0
        while start < size:
            if room == 0:
                steps.append([])
                room = examples
            stop = min(size, start + room)
            steps[-1].append(Piece(batch, start, stop))
            room -= stop - start
            start = stop
    return steps


def share_of(pieces: Sequence[Piece], rank: int, count: int) -> list[Piece]:
    """The part of a step's examples that process ``rank`` of ``count`` takes: equally many, as far as they divide."""
    total = sum(piece.examples for piece in pieces)
    first, last = rank * total // count, (rank + 1) * total // count
    own, before = [], 0
    for piece in pieces:
        start = max(piece.start, piece.start + first - before)
        stop = min(piece.stop, piece.start + last - before)
        if start < stop:
            own.append(Piece(piece.batch, start, stop))
        before += piece.examples
    return own


def no_larger(pieces: Sequence[Piece], most: int | None) -> list[Piece]:
    """The same examples in pieces of at most ``most``."""
    if most is None:
        return list(pieces)
    return [
        Piece(piece.batch, start, min(piece.stop, start + most))
        for piece in pieces
        for start in range(piece.start, piece.stop, most)
    ]
