"""Ablation: how much the task metric falls when a unit is taken out of the model.

A(u) = m(model) − m(model without u), m being the mean over the examples of the task metric (losses.py: accuracy for
classes, higher is better; minus the loss for a loss that has no metric). Signed: positive matters, negative means that
the model does better without. Not the sum of its parts: a layer, a module and a head are each taken out by themselves,
and what taking out means for each is in neutral.py. For heads Michel, Levy and Neubig (NeurIPS 2019, section 3.2); for
whole layers Men et al. (2024, arXiv:2403.03853) and, with weights for the unit, the leave-one-out of Li, Monroe and
Jurafsky (2016, arXiv:1612.08220).

Scores layers, modules and heads, no columns, rows or single weights. Draws nothing but which examples come first. An accuracy
over n examples moves in steps of 1/n: with few examples many units tie.

Examples are taken in rounds (behaviour/rounds.py): a stratified sample of ``sample`` first, then half as many more, and so on.
They end when the ranking of a kind of unit by those seen is expected to have a rank correlation of ``agreement`` or more with that
by all (behaviour/trials.py); or with all of them, which ``agreement`` 1 asks for. Where they end early, A(u) is the mean over the n
examples seen of N, and has a 95% interval for the mean over all: ± 1.96 √((1 − n/N) s²/n), s² being the variance of the
examples' own drops, two more added to them of plus and minus the largest seen (after Agresti and Caffo 2000: no drop in a
sample is not none at all).

Cost: one forward pass of the untouched model over all examples, one over those seen, and one per unit over those seen, from the
unit on: what lies below it is kept (behaviour/kept_outputs.py). Memory: that of a forward pass, all batches in host memory, what is
kept.

Options: ``kinds`` (of layer, module, head), ``replace_by``: "zero" or "mean" (neutral.py), ``sample``, ``agreement``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from reltune.errors import InputError
from reltune.relevance.behaviour.experiment import Experiment, known_words, whole_number
from reltune.relevance.behaviour.neutral import REMOVABLE, REPLACEMENTS, Neutral, Unit, warn_of
from reltune.relevance.behaviour.trials import Trials, predicted_agreement
from reltune.relevance.criteria.contract import ScoresByName

SCORES = REMOVABLE
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Options:
    kinds: Sequence[str] = REMOVABLE
    replace_by: str = "zero"
    sample: int = 128
    agreement: float = 0.9

    def __post_init__(self) -> None:
        known_words("kinds", self.kinds, REMOVABLE)
        known_words("replace_by", [self.replace_by], REPLACEMENTS)
        whole_number("sample", self.sample, 8)
        if not 0 < self.agreement <= 1:
            raise InputError(f"agreement is {self.agreement}; it must be above 0 and at most 1.")


def measure(experiment: Experiment) -> tuple[ScoresByName, dict[str, Any]]:
    options: Options = experiment.options
    neutral = Neutral(experiment, options.kinds, options.replace_by, options.sample)
    warn_of(neutral, experiment.criterion)
    parts: ScoresByName = {}
    facts: dict[str, Any] = {"metric": experiment.metric_name, "of_the_model": neutral.baseline, "level": LEVEL}
    total = len(neutral.base)
    for kind, units in neutral.units.items():
        if not units:
            continue
        with Trials(experiment, neutral, kind, functools.partial(_alone, units), len(units)) as trials:
            for count, opened in enumerate(neutral.rounds, 1):
                metrics = trials.measured(len(units), count)
                drops = neutral.base[: opened.examples] - metrics
                by_some = functools.partial(_mean_drops, drops)
                agreement = predicted_agreement(by_some, opened.examples, total, experiment.seed)
                if agreement >= options.agreement and options.agreement < 1:
                    break
        neutral.enter(parts, kind, kind, drops.mean(1))
        if opened.examples < total:
            half = half_width(drops, total)
            neutral.enter(parts, kind, f"{kind}_low", drops.mean(1) - half)
            neutral.enter(parts, kind, f"{kind}_high", drops.mean(1) + half)
        facts[kind] = {"examples": opened.examples, "agreement": agreement}
    return parts, facts


def _alone(units: Sequence[Unit], trial: int) -> list[Unit]:
    return [units[trial]]


def _mean_drops(drops: Tensor, some: Tensor) -> Tensor:
    return drops[:, some].mean(1)


def half_width(drops: Tensor, total: int) -> Tensor:
    """Half the width of the interval (units,) for the mean drop over all ``total`` examples, from those (units, n) seen."""
    seen = drops.shape[1]
    largest = drops.abs().amax(1, keepdim=True)
    largest = largest.where(largest > 0, drops.abs().amax())
    more = torch.cat([drops, largest, -largest], 1)
    deviation = NormalDist().inv_cdf((1 + LEVEL) / 2) * ((1 - seen / total) / seen) ** 0.5
    return deviation * more.std(1)
