"""Mean gradient: the absolute value of the gradient averaged over the examples, summed over the unit's weights.

R(u) = Σ_{w ∈ u} |1/N Σ_s ∂ℓ_s/∂w|. Averaged with sign, then made positive: weights whose gradients disagree between
examples count little. The score of GPS (Zhang et al., CVPR 2024), per unit. Scales with the loss. Memory: one
float32 number per weight of every measured module; cost: one forward pass, one input-gradient backward pass and
one weight-gradient product.
"""

from __future__ import annotations

from torch import Tensor, nn

from reltune.layers.inventory import ModuleInfo

NEEDS = "summed_gradients"


def scores(info: ModuleInfo, module: nn.Module, sums: dict[str, Tensor], examples: int, seed: int) -> dict[str, Tensor]:
    return by_unit(info, {part: (total / examples).abs() for part, total in sums.items()})


def by_unit(info: ModuleInfo, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum one number per weight over each unit: columns, rows, the matrix and the bias, or the norm."""
    if info.kind == "norm":
        return {"norm": sum((part.sum() for part in weights.values()), start=weights["weight"].new_zeros(()))}
    matrix = weights["weight"]
    result = {"column": matrix.sum(0), "row": matrix.sum(1), "weight": matrix.sum()}
    if "bias" in weights:
        result["bias"] = weights["bias"].sum()
    return result
