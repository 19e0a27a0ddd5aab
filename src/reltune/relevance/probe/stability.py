"""Whether the choice of a probe has settled, told from a sample of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from reltune.relevance.probe.moving_weights import MovingWeight

SAMPLE = 1 << 20  # weights that are watched, drawn evenly over all that move
SHARE = 0.01  # of the sample: the chosen ones
EVERY = 10  # steps between two checks


class WatchedSample:
    """The sums of the sample's gradients, which order equal votes, and what was chosen of it at the last check."""

    def __init__(self, weights: Sequence[MovingWeight], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        total = sum(weight.votes.numel() for weight in weights)
        self.places: dict[MovingWeight, Tensor] = {}
        self.sums: dict[MovingWeight, Tensor] = {}
        for weight in weights:
            own = weight.votes.numel()
            drawn = torch.arange(own)
            if total > SAMPLE:
                count = max(1, round(SAMPLE * own / total))
                drawn = torch.randint(own, (count,), generator=generator).unique()
            self.places[weight] = drawn.to(weight.votes.device)
            self.sums[weight] = torch.zeros(len(drawn), dtype=torch.float32, device=weight.votes.device)
        self.start()

    def start(self) -> None:
        self.chosen: Tensor | None = None
        self.agreement = 0.0
        for total in self.sums.values():
            total.zero_()

    def note(self, weight: MovingWeight, gradient: Tensor) -> None:
        """Add a step's gradient."""
        self.sums[weight] += gradient.reshape(-1)[self.places[weight]]

    def check(self) -> float:
        """The share that the choice now and the choice at the last check have in common; 0 at the first check."""
        votes = torch.cat([weight.votes.view(-1)[at].abs().cpu() for weight, at in self.places.items()])
        sums = torch.cat([total.abs().cpu() for total in self.sums.values()])
        order = sums.argsort(descending=True, stable=True)
        order = order[votes[order].argsort(descending=True, stable=True)]
        chosen = order[: max(1, round(SHARE * len(order)))].sort().values
        before, self.chosen = self.chosen, chosen
        self.agreement = 0.0 if before is None else float(torch.isin(chosen, before).float().mean())
        return self.agreement

    # -- interruptions ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What ``load`` needs to go on from here."""
        tensors = {f"sample/{weight.name}": total for weight, total in self.sums.items()}
        return tensors if self.chosen is None else {**tensors, "chosen": self.chosen}

    def load(self, tensors: Mapping[str, Tensor], agreement: float) -> None:
        for weight, total in self.sums.items():
            total.copy_(tensors[f"sample/{weight.name}"])
        self.chosen, self.agreement = tensors.get("chosen"), agreement
