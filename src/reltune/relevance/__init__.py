"""Relevance: one number per unit, how much the unit matters for the task. One file per criterion."""

from types import ModuleType

from reltune.relevance import (
    activation,
    depth,
    fisher,
    fisher_true,
    gradient,
    gradient_snr,
    magnitude,
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
    "random": random,
    "depth": depth,
}
