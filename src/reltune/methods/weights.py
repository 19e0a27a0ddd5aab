"""Single weights chosen by relevance; or other units, where --granularity names them."""

from reltune.methods.planned import Planned


class Weights(Planned):
    """docs/selection.md: 1e-2 is best where 1% of the matrices' weights are trained, 2e-2 at 0.25% and below."""

    name = "weights"
    rates = "weights"
    rate = 1e-3  # over the root of the share
    most = 2e-2
