"""Relevance: one number per unit, how much the unit matters for the task. One file per criterion."""

from types import ModuleType

from reltune.relevance import depth, fisher, gradient, magnitude, random

# Criterion -> its file. Each has NEEDS (which statistics of the data pass it uses: "squared_gradients",
# "summed_gradients" or None) and scores(info, module, sums, examples, seed), which gives one module's relevance:
# column (in,), row (out,), weight () and bias () of a linear map, norm () of a norm; all in the model's parameters,
# so that a module's relevance is the sum of its parts and a layer's the sum of its modules.
CRITERIA: dict[str, ModuleType] = {
    "fisher": fisher,
    "gradient": gradient,
    "magnitude": magnitude,
    "random": random,
    "depth": depth,
}
