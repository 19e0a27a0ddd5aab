"""Correlation between a unit's being perturbed and the task metric, over many trials in which random units are perturbed.

In trial t each unit u of a kind is perturbed with probability ``share``, independently (z_tu ∈ {0, 1}), all of them at once,
and the task metric m_t is recorded, the mean over all examples (losses.py; higher is better, minus the loss for a
loss without a metric). R(u) = −corr_t(z_tu, m_t), Pearson's coefficient, which is point-biserial here. Signed, from −1 to 1:
positive matters; a layer's is no sum of its modules', since each kind has trials of its own. Unlike ``ablation`` it counts
what a unit does when others are perturbed too: in expectation, the metric's drop times √(share (1 − share)), averaged over
what else is perturbed, over the metric's standard deviation. Sampled perturbations with correlation or regression on them:
Ribeiro, Singh and Guestrin (KDD 2016) and RISE (Petsiuk, Das and Saenko, BMVC 2018), there for inputs.

Perturbed means moved towards what stands for the unit when it is taken out (neutral.py): y + strength · (neutral − y).
Taking a quarter of a model out would leave nothing to measure, so "auto" halves the strength from 1 on until the mean
metric of PILOT trials is no nearer to that with all units out than to the model's own.

Interval: 95%, by Fisher's z with standard error 1/√(trials − 3), for each unit by itself and not for all at once. Rests on
the number of perturbed trials of each unit, hence no share below 0.1. Coverage is simulated in tests/test_correlation.py.
Where the metric never moves or a unit was never perturbed, R = 0 with the interval from −1 to 1: nothing is known.

Trials end when the ranking is stable: at CHECKS checks in a row, every EVERY trials from ``min_trials`` on, Spearman's rank
correlation ρ between the relevance by even and by odd trials, stepped up to their whole number by 2ρ / (1 + ρ) (Spearman 1910,
Brown 1910), is at least ``agreement``; or at ``max_trials``, with a warning. A trial depends on the seed and its number alone.

Examples are taken in rounds (behaviour/rounds.py): all trials on a stratified sample of ``sample`` of them first. More
follow, the same trials on them too, until the ranking by those seen is expected to agree with that by all (behaviour/trials.py) to
``agreement``, or as far as the trials themselves settle it; or until all are seen. Where n of N examples are seen, the square of the
standard error of z is 1/(trials − 3) plus (1 − n/N) times its jackknife variance over examples.

Scores layers, modules and heads; columns would need a number of trials that grows with theirs. Cost: one forward pass of
the untouched model over all examples, one over each round, one of the examples seen per trial, from the first perturbed unit on
(behaviour/kept_outputs.py), and up to 1 + 5 · PILOT over the first round for the strength. Memory: that of a forward pass, all
batches in host memory, what is kept.

Options: ``kinds`` (of layer, module, head), ``share``, ``strength`` (a number up to 1, or "auto"), ``replace_by`` (neutral.py),
``min_trials``, ``max_trials``, ``agreement``, ``sample``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Any

import torch
from torch import Tensor

from reltune.errors import InputError
from reltune.relevance.behaviour.experiment import Experiment, known_words, whole_number
from reltune.relevance.behaviour.neutral import REMOVABLE, REPLACEMENTS, Neutral, Unit, warn_of
from reltune.relevance.behaviour.trials import Trials, predicted_agreement
from reltune.relevance.criteria.contract import ScoresByName
from reltune.relevance.rank_correlation import spearman

SCORES = REMOVABLE
LEVEL = 0.95
STRENGTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)
PILOT = 8  # trials for each strength that is tried
CHECKS, EVERY = 3, 10
GROUPS = 8  # of examples, which the jackknife leaves out one at a time


@dataclasses.dataclass(frozen=True)
class Options:
    kinds: Sequence[str] = REMOVABLE
    share: float = 0.25
    strength: float | str = "auto"
    replace_by: str = "zero"
    min_trials: int = 50
    max_trials: int = 200
    agreement: float = 0.9
    sample: int = 32

    def __post_init__(self) -> None:
        known_words("kinds", self.kinds, REMOVABLE)
        known_words("replace_by", [self.replace_by], REPLACEMENTS)
        whole_number("min_trials", self.min_trials, 4)
        whole_number("max_trials", self.max_trials, 4)
        whole_number("sample", self.sample, 8)
        if not 0.1 <= self.share <= 0.9:
            raise InputError(f"share is {self.share}; it must be from 0.1 to 0.9, or the intervals would not hold.")
        if self.strength != "auto" and (isinstance(self.strength, str) or not 0 < self.strength <= 1):
            raise InputError(f"strength is {self.strength!r}; it must be above 0 and at most 1, or 'auto'.")
        if not 0 < self.agreement < 1:
            raise InputError(f"agreement is {self.agreement}; it must be between 0 and 1.")


def measure(experiment: Experiment) -> tuple[ScoresByName, dict[str, Any]]:
    options: Options = experiment.options
    neutral = Neutral(experiment, options.kinds, options.replace_by, options.sample)
    warn_of(neutral, experiment.criterion)
    parts: ScoresByName = {}
    facts: dict[str, Any] = {"metric": experiment.metric_name, "of_the_model": neutral.baseline, "level": LEVEL}
    for kind, units in neutral.units.items():
        if units:
            facts[kind] = _measure(experiment, neutral, kind, units, parts)
    return parts, facts


def _measure(
    experiment: Experiment, neutral: Neutral, kind: str, units: Sequence[Unit], parts: ScoresByName
) -> dict[str, Any]:
    """Enter the scores of one kind of unit into ``parts``. Gives how the trials went."""
    options: Options = experiment.options
    total = len(neutral.base)
    strength = _strength(experiment, neutral, kind, units)

    def perturbed(trial: int) -> list[Unit]:
        which = drawn(experiment.seed, kind, trial, len(units), options.share)
        return [unit for unit, taken in zip(units, which.tolist(), strict=True) if taken]

    def design(trials: int) -> Tensor:
        return torch.stack([drawn(experiment.seed, kind, t, len(units), options.share) for t in range(trials)])

    most = options.max_trials
    count = min(options.min_trials, most)
    rounds = 1
    with Trials(experiment, neutral, kind, perturbed, most, strength) as trials:
        while True:
            metrics = trials.measured(count, rounds)
            settled = stable(design, metrics.mean(1).tolist(), options)
            if not settled and count < most:
                count = min(count + EVERY, most)
                continue
            by_some = functools.partial(_relevance, design(count), metrics)
            of_examples = predicted_agreement(by_some, metrics.shape[1], total, experiment.seed)
            # Examples need not settle the ranking further than the trials do.
            agreement = reliability(design(count), metrics.mean(1))
            if rounds == len(neutral.rounds) or not of_examples < min(options.agreement, agreement):
                break
            rounds += 1
    means = metrics.mean(1)
    scores = correlations(design(count), means, _variance(design(count), metrics, total))
    for part, score in zip((kind, f"{kind}_low", f"{kind}_high"), scores, strict=True):
        neutral.enter(parts, kind, part, score)
    if not settled:
        warnings.warn(
            f"the ranking of {kind}s by {experiment.criterion} is not stable after {count} trials (agreement of "
            f"halves {agreement:.2f}); look at the intervals, or raise max_trials.",
            RuntimeWarning,
            stacklevel=5,
        )
    return {
        "trials": count,
        "strength": strength,
        "agreement": agreement,
        "stable": settled,
        "examples": metrics.shape[1],
        "agreement_of_examples": of_examples,
    }


def drawn(seed: int, purpose: str, trial: int, units: int, share: float) -> Tensor:
    """Which units a trial perturbs (units,): a function of its arguments alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{trial}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(units, generator=generator, dtype=torch.float64) < share


def correlations(perturbed: Tensor, metrics: Tensor, variance: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Relevance and the ends of its interval (units,), from trials (T, units) and their metrics (T,). ``variance`` of
    Fisher's z (units,) comes from the choice of examples."""
    z = perturbed.to(metrics.dtype)
    z, m = z - z.mean(0), metrics - metrics.mean()
    scale = z.norm(dim=0) * m.norm()
    # A constant metric has deviations of rounding errors, not of zeros.
    known = (scale > 0) & (m.abs().max() > 1e-12 * metrics.abs().max())
    relevance = torch.where(known, -(m @ z) / torch.where(known, scale, 1), 0).clamp(-1, 1)
    of_trials = 1 / (len(metrics) - 3) if len(metrics) > 3 else math.inf
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) * torch.as_tensor(variance + of_trials, dtype=torch.float64).sqrt()
    low, high = (torch.tanh(torch.atanh(relevance) + side * half) for side in (-1, 1))
    return relevance, torch.where(known, low, -1), torch.where(known, high, 1)


def reliability(perturbed: Tensor, metrics: Tensor) -> float:
    """How far the ranking of so many trials would agree with that of as many others; nan where a half ranks nothing."""
    if perturbed.shape[1] < 2:
        return 1.0  # one unit has one ranking
    even, odd = (correlations(perturbed[start::2], metrics[start::2])[0] for start in (0, 1))
    rho = spearman(even, odd)
    return 2 * rho / (1 + rho) if rho > -1 else -1.0


def stable(design: Any, values: Sequence[float], options: Options) -> bool:
    """Whether trials may end; ``design(trials)`` gives which units they perturbed."""
    checks = [len(values) - EVERY * back for back in range(CHECKS)]
    if checks[-1] < options.min_trials or (len(values) - options.min_trials) % EVERY:
        return False
    perturbed, metrics = design(len(values)), torch.tensor(values, dtype=torch.float64)
    return all(reliability(perturbed[:count], metrics[:count]) >= options.agreement for count in checks)


def _relevance(perturbed: Tensor, metrics: Tensor, some: Tensor) -> Tensor:
    """The relevance (units,) by some of the examples of metrics (T, n)."""
    return correlations(perturbed, metrics[:, some].mean(1))[0]


def _variance(perturbed: Tensor, metrics: Tensor, total: int) -> Tensor | float:
    """The variance of Fisher's z (units,) that comes from having seen some of the examples, metrics (T, n) of ``total``.

    By the jackknife over GROUPS groups of examples (Efron and Stein 1981), which like all of them are spread over the strata.
    """
    seen = metrics.shape[1]
    if seen == total:
        return 0.0
    group = torch.arange(seen) * GROUPS // seen
    without = [_relevance(perturbed, metrics, group != g) for g in range(GROUPS)]
    z = torch.atanh(torch.stack(without).clamp(-1 + 1e-9, 1 - 1e-9))
    return (1 - seen / total) * (GROUPS - 1) * z.var(0, unbiased=False)


def _strength(experiment: Experiment, neutral: Neutral, kind: str, units: Sequence[Unit]) -> float:
    options: Options = experiment.options
    if not isinstance(options.strength, str):
        return float(options.strength)
    first = neutral.rounds[0]
    here = dataclasses.replace(experiment, batches=first.batches)
    baseline = float(neutral.base[: first.examples].mean())

    def found(values: Sequence[float]) -> float | None:
        """The strength that the values of the pilot trials speak for; None while more are needed."""
        if values and values[0] >= baseline:
            return STRENGTHS[0]  # nothing to lose
        for tried, strength in enumerate(STRENGTHS):
            trials = values[1 + tried * PILOT : 1 + (tried + 1) * PILOT]
            if len(trials) == PILOT and fmean(trials) >= (baseline + values[0]) / 2:
                return strength
            if len(trials) < PILOT:
                return None
        return STRENGTHS[-1]

    def perform(index: int) -> float:
        if index == 0:
            which, moved = torch.ones(len(units), dtype=torch.bool), 1.0
        else:
            which = drawn(experiment.seed, f"pilot {kind}", index, len(units), options.share)
            moved = STRENGTHS[(index - 1) // PILOT]
        chosen = [unit for unit, taken in zip(units, which.tolist(), strict=True) if taken]
        if not chosen:
            return baseline
        with neutral.without(chosen, moved):
            return float(here.metric(f"{len(chosen)} units perturbed, {chosen[0]} among them"))

    most = 1 + PILOT * len(STRENGTHS)
    neutral.keep(first.batches)
    values = experiment.passes(f"{kind} strength", most, perform, lambda values: found(values) is not None)
    strength = found(values)
    assert strength is not None, "the last one tried is taken"
    return strength
