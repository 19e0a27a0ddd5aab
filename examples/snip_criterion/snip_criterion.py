"""Connection sensitivity: how much the mean loss would change with each weight's presence, summed over the unit.

S(u) = Σ_{w ∈ u} |w · ḡ_w| with ḡ_w = 1/N Σ_s ∂ℓ_s/∂w: the derivative of the mean loss with respect to a gate c = 1 on
each weight (SNIP: Lee, Ajanthan, Torr, ICLR 2019, eq. 4 and 5, without eq. 5's division by the sum over the whole
network, which changes no ranking). Averaged with sign, then made positive per weight; never negative; scales with the
loss. A layer's is the sum over its weights. Memory: one float32 number per weight on the host; cost: one forward and one
backward pass with weight gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts, by_unit
from reltune.relevance.criteria.context import Context

NEEDS = ("sums",)  # Σ_s ∂ℓ_s/∂w per weight; reltune/layers/per_example.py lists what there is
ELEMENT_NEEDS = NEEDS


def quantities(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]], context: Context
) -> tuple[Parts]:
    """One number per column, row, matrix, bias or norm of the module."""
    return (by_unit(info, elements(info, weights, sums, context)),)


def elements(
    info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]], context: Context
) -> Parts:
    """One number per weight, under ``weight`` and ``bias``."""
    return {name: (weights[name].to(total) * (total / context.examples)).abs() for name, total in sums["sums"].items()}
