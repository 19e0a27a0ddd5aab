"""Gradients of several processes, added up one weight at a time while the backward pass goes on.

All processes take the weights in one order, or their sums would be of different weights: that in which the backward
pass finishes them, as far as the forward pass tells. A gradient that is ready too early waits for its turn, and what has
none counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reltune.processes import Processes
from reltune.relevance.probe.moving_weights import MovingWeight


class GradientsInOrder:
    """Hands each weight's gradient to ``use``, added up over the processes; of one process as it comes."""

    def __init__(self, processes: Processes, use: Callable[[MovingWeight, Tensor], None]) -> None:
        self.processes, self.use = processes, use
        self.waiting: list[MovingWeight] = []
        self.ready: dict[MovingWeight, Tensor] = {}

    def begin(self, order: Sequence[MovingWeight]) -> None:
        """The weights of the coming backward pass, the same on all processes."""
        self.waiting, self.ready = list(reversed(order)) if self.processes.count > 1 else [], {}

    def add(self, weight: MovingWeight, gradient: Tensor) -> None:
        if self.processes.count == 1:
            self.use(weight, gradient)
            return
        self.ready[weight] = gradient
        while self.waiting and self.waiting[-1] in self.ready:
            self._next()

    def finish(self, use: bool = True) -> None:
        """Take those that still wait. Without ``use`` after a failure, when the others must not be left waiting."""
        while self.waiting:
            self._next(use)

    def _next(self, use: bool = True) -> None:
        weight = self.waiting.pop()
        gradient = self.ready.pop(weight, None)
        if gradient is None:
            gradient = torch.zeros(weight.votes.shape, dtype=weight.dtype, device=weight.votes.device)
        self.processes.add_up_in_place(gradient)
        if use:
            self.use(weight, gradient)


def shared_order(reads: Sequence[Sequence[int]], weights: Sequence[MovingWeight]) -> list[MovingWeight]:
    """What the processes read, from ``reads`` in the order of the first process's forward pass, backwards."""
    known = dict.fromkeys(number for read in reads for number in read)
    return [weights[number] for number in reversed(known)]
