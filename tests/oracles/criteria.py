"""Every criterion by its formula, from one gradient per example and one number per weight. Imports nothing of reltune."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Elements = dict[str, Tensor]  # weight and bias of one module, in the shape (out, in, …)


def units_of(module: nn.Module) -> dict[str, Callable[[Elements], Tensor]]:
    """What each part of a module adds up: column, row, weight, bias, or norm."""
    if next(module.parameters()).ndim == 1:
        return {"norm": lambda e: sum(value.sum() for value in e.values())}
    units = {
        "column": lambda e: _columns(module, e["weight"]),
        "row": lambda e: e["weight"].flatten(1).sum(1),
        "weight": lambda e: e["weight"].sum(),
    }
    if getattr(module, "bias", None) is not None:
        units["bias"] = lambda e: e["bias"].sum()
    return units


def _columns(module: nn.Module, weight: Tensor) -> Tensor:
    if not isinstance(module, nn.Conv2d):
        return weight.sum(0)
    by_channel = torch.zeros(module.in_channels, dtype=weight.dtype)
    per_group, out_per_group = weight.shape[1], weight.shape[0] // module.groups
    for filter_, channel in torch.cartesian_prod(torch.arange(weight.shape[0]), torch.arange(per_group)).tolist():
        by_channel[filter_ // out_per_group * per_group + channel] += weight[filter_, channel].sum()
    return by_channel


def expected(name: str, module: nn.Module, gradients: list[Elements], weights: Elements) -> dict[str, Tensor]:
    """One criterion's parts of a module; ``gradients`` has one entry per example."""
    units = units_of(module)
    count = len(gradients)
    mean = {key: torch.stack([g[key] for g in gradients]).mean(0) for key in weights}
    square = {key: torch.stack([g[key].square() for g in gradients]).mean(0) for key in weights}

    def added(of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        return {part: unit({key: of(key) for key in weights}) for part, unit in units.items()}

    if name == "fisher":
        return added(lambda key: square[key])
    if name == "gradient":
        return added(lambda key: mean[key].abs())
    if name == "taylor":
        parts = [{p: unit({k: g[k] * weights[k] for k in weights}) for p, unit in units.items()} for g in gradients]
        return {part: torch.stack([one[part] for one in parts]).abs().mean(0) for part in units}
    if name == "relative_gradient":
        above, below = added(lambda key: mean[key].square()), added(lambda key: weights[key].square())
        return {part: torch.where(below[part] > 0, above[part] / below[part], 0).sqrt() for part in units}
    if name == "gradient_snr":
        variance = {key: torch.stack([g[key] for g in gradients]).var(0) for key in weights}
        above, below = added(lambda key: mean[key].square()), added(lambda key: variance[key])
        return {part: torch.where(above[part] > 0, above[part] / below[part], 0) for part in units}
    if name == "magnitude":
        return added(lambda key: weights[key].square())
    raise ValueError((name, count))
