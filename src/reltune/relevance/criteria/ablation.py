"""Ablation: how much the task metric falls when a unit is taken out of the model.

A(u) = m(model) − m(model without u), m being the mean over the examples of the task metric (losses.py: accuracy for
classes, higher is better; minus the loss for a loss that has no metric). Signed: positive matters, negative means that
the model does better without. Not the sum of its parts: a layer, a module and a head are each taken out by themselves,
and what taking out means for each is in neutral.py. For heads Michel, Levy and Neubig (NeurIPS 2019, section 3.2); for
whole layers Men et al. (2024, arXiv:2403.03853) and, with weights for the unit, the leave-one-out of Li, Monroe and
Jurafsky (2016, arXiv:1612.08220).

Scores layers, modules and heads, no columns, rows or single weights: one forward pass over all data per unit, and one for
the untouched model, is what it costs. Memory: that of a forward pass, and all batches in host memory. Draws nothing. An
accuracy over N examples moves in steps of 1/N: with few examples many units tie.

Options: ``kinds`` (of layer, module, head), ``replace_by``: "zero" or "mean" (neutral.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from reltune.relevance.behaviour.experiment import Experiment, known_words
from reltune.relevance.behaviour.neutral import REMOVABLE, REPLACEMENTS, Neutral, warn_of
from reltune.relevance.criteria.contract import ScoresByName

SCORES = REMOVABLE


@dataclasses.dataclass(frozen=True)
class Options:
    kinds: Sequence[str] = REMOVABLE
    replace_by: str = "zero"

    def __post_init__(self) -> None:
        known_words("kinds", self.kinds, REMOVABLE)
        known_words("replace_by", [self.replace_by], REPLACEMENTS)


def measure(experiment: Experiment) -> tuple[ScoresByName, dict[str, Any]]:
    options: Options = experiment.options
    neutral = Neutral(experiment, options.kinds, options.replace_by)
    warn_of(neutral, experiment.criterion)
    parts: ScoresByName = {}
    for kind, units in neutral.units.items():

        def perform(index: int, units: Sequence[Any] = units) -> float:
            with neutral.without([units[index]]):
                return experiment.metric(f"{units[index]} taken out")

        values = experiment.passes(kind, len(units), perform)
        neutral.enter(parts, kind, kind, neutral.baseline - torch.tensor(values, dtype=torch.float64))
    return parts, {"metric": experiment.metric_name, "of_the_model": neutral.baseline}
