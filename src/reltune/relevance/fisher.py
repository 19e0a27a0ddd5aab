"""Empirical Fisher information: mean over examples of the squared gradient, summed over the unit's weights.

F(u) = 1/N Σ_s Σ_{w ∈ u} (∂ℓ_s/∂w)². Squared per example, then averaged; never negative. The diagonal of the
empirical Fisher matrix as in FISH Mask (Sung, Nair, Raffel, NeurIPS 2021, eq. 3, with the observed labels).
Scales with the square of the loss. Memory: O(in + out) numbers per linear map; cost: one forward and one
input-gradient backward pass, and the sums of ops/squared_gradient.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from reltune.layers.inventory import ModuleInfo

NEEDS = "squared_gradients"


def scores(info: ModuleInfo, module: nn.Module, sums: dict[str, Tensor], examples: int, seed: int) -> dict[str, Tensor]:
    means = {part: total / examples for part, total in sums.items()}
    if info.kind == "norm":
        return {"norm": sum((mean.sum() for mean in means.values()), start=means["weight"].new_zeros(()))}
    result = {"column": means["column"], "row": means["row"], "weight": means["row"].sum()}
    if "bias" in means:
        result["bias"] = means["bias"].sum()
    return result
