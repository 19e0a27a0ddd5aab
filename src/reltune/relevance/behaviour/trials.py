"""Trials of one kind of unit: in each some units are changed, and the metric of every example of the open rounds is noted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from reltune.relevance.behaviour.experiment import Experiment
from reltune.relevance.behaviour.neutral import Neutral, Unit
from reltune.relevance.rank_correlation import spearman

HALVINGS = 16  # of the examples, whose agreement is averaged


class Trials:
    """The metric of every trial and example, in a context at the end of which it is kept for a call that goes on.

    Args:
        units: gives the units that a trial takes out or perturbs; none of them leaves the model as it is.
        most: how many trials there may be.
        strength: how far units are moved towards what stands for them.

    Attributes:
        metrics: (most, N), examples in the order in which they are taken; nan where nothing was measured.
    """

    def __init__(
        self,
        experiment: Experiment,
        neutral: Neutral,
        kind: str,
        units: Callable[[int], Sequence[Unit]],
        most: int,
        strength: float = 1.0,
    ) -> None:
        self.experiment, self.neutral, self.units, self.strength = experiment, neutral, units, strength
        self.name = f"{kind} metrics"
        self.metrics = experiment.table(self.name, most, len(neutral.base))
        self.bar = tqdm(
            total=most,
            initial=int((~self.metrics.isnan()).any(1).sum()),
            desc=f"{experiment.criterion} {kind}",
            unit="pass",
            disable=not experiment.progress,
        )
        self.opened = 1

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.experiment.save()

    def measured(self, trials: int, rounds: int) -> Tensor:
        """The metrics (trials, n) of the first trials, for the n examples of the first rounds.

        A pass cut short leaves nothing: it is made whole the next time.
        """
        if rounds > self.opened:
            self.bar.total = self.bar.n + trials
            self.opened = rounds
        for opened in self.neutral.rounds[:rounds]:
            self._fill(trials, opened.batches, opened.places)
        return self.metrics[:trials, : self.neutral.rounds[rounds - 1].examples]

    def _fill(self, trials: int, batches: Sequence[Any], places: Sequence[Tensor]) -> None:
        """Measure what is missing, batches in groups as large as what is kept of the unchanged model may be."""
        group: list[int] = []
        for number, batch in enumerate(batches):
            if not self.metrics[:trials, places[number]].isnan().any():
                continue
            if not self.neutral.kept.holds(batch) and self.neutral.kept.is_full():
                self._run(trials, [batches[n] for n in group], [places[n] for n in group])
                self.neutral.kept.clear()
                group.clear()
            self.neutral.keep([batch])
            group.append(number)
        self._run(trials, [batches[n] for n in group], [places[n] for n in group])

    def _run(self, trials: int, batches: list[Any], places: list[Tensor]) -> None:
        if not batches:
            return
        here, where = dataclasses.replace(self.experiment, batches=batches), torch.cat(places)
        for trial in range(trials):
            if not self.metrics[trial, where].isnan().any():
                continue
            self.metrics[trial, where] = self._metrics(trial, here, where)
            self.bar.update()
            self.experiment.save_if_due()

    def _metrics(self, trial: int, experiment: Experiment, places: Tensor) -> Tensor:
        units = self.units(trial)
        if not units:
            return self.neutral.base[places]
        with self.neutral.without(units, self.strength):
            others = f" and {len(units) - 1} more units" if len(units) > 1 else ""
            what = f"{units[0]}{others} changed"
            return experiment.metric(what).of_examples


def predicted_agreement(scores_of: Callable[[Tensor], Tensor], examples: int, total: int, seed: int) -> float:
    """How far the ranking of units by these examples would agree with that by all: Spearman's ρ, expected with some caution.

    ``scores_of`` gives the units' scores by some of the examples, of which it is given the places. ρ½ is the mean rank
    correlation between random halves of the n examples, less its standard error between U units, (1 − ρ½²) / √(U − 1). Taken as
    that of noisy measurements of the same thing, it gives the variance between units over that between examples,
    λ = 2ρ½ / (n (1 − ρ½)), and the correlation with the mean over all N examples, these n among them, √((λ + 1/N) / (λ + 1/n)).
    """
    if examples == total:
        return 1.0
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(HALVINGS):
        shuffled = torch.randperm(examples, generator=generator)
        first, second = (scores_of(half) for half in (shuffled[: examples // 2], shuffled[examples // 2 :]))
        if len(first) < 2:
            return 1.0  # one unit has one ranking
        found.append(spearman(first, second))
    half = float(torch.tensor(found).nan_to_num(0).mean())
    half = max(0.0, half - (1 - half**2) / (len(first) - 1) ** 0.5)
    if half >= 1:
        return 1.0
    ratio = 2 * half / (examples * (1 - half))
    return float(((ratio + 1 / total) / (ratio + 1 / examples)) ** 0.5)
