"""Relevance: one number per unit, how much the unit matters for the task. One file per criterion."""

from types import ModuleType

from reltune.relevance.criteria import (
    ablation,
    activation,
    correlation,
    depth,
    fisher,
    fisher_true,
    gradient,
    gradient_snr,
    magnitude,
    movement,
    principal,
    random,
    relative_gradient,
    spectral_snr,
    taylor,
)

# Criterion -> its file. Each has
# - NEEDS: statistics of the data pass (layers/per_example.py, "inputs", or sampled: with labels drawn from the model);
# - quantities(info, weights, sums, context): one or several numbers per unit of a module (layers/units.py), each of
#   which adds up over units: columns to matrices, modules to layers;
# - combine(*quantities), only where the relevance is no plain sum: applied after adding up;
# - ELEMENT_NEEDS and elements(info, weights, sums, context): one number per weight; without `elements` single weights
#   cannot be scored.
#
# A criterion that watches or moves the model, in place of statistics of one pass, has instead of all these
# - SCORES: the kinds of unit that it scores, if not all of them;
# - Options, if it has any: a frozen dataclass with a default for each, which raises InputError for values that cannot be;
# - measure(experiment): passes of its own over experiment.batches (experiment.py), with the model in evaluation mode and
#   frozen; gives the scores, name -> part -> tensor as in RelevanceScores.parts, and facts to keep in the provenance. A score
#   may have an interval, in the parts named after its own with _low and _high. Whatever it does to the model is undone when
#   it returns or raises.
CRITERIA: dict[str, ModuleType] = {
    "fisher": fisher,
    "fisher_true": fisher_true,
    "gradient": gradient,
    "taylor": taylor,
    "relative_gradient": relative_gradient,
    "gradient_snr": gradient_snr,
    "activation": activation,
    "magnitude": magnitude,
    "spectral_snr": spectral_snr,
    "principal": principal,
    "ablation": ablation,
    "correlation": correlation,
    "movement": movement,
    "random": random,
    "depth": depth,
}
