"""2-D convolutions: a linear map of patches. Columns are input channels, rows are filters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reltune.layers import linear, per_example
from reltune.layers.padding import without_padding
from reltune.layers.per_example import Shared, Statistics
from reltune.layers.single_weight import SingleWeight
from reltune.layers.units import ModuleInfo
from reltune.ops.squared_gradient import accumulator_dtype

BLOCK_NUMBERS = 1 << 26  # of gradients at a time


class Conv2dType(SingleWeight):
    name = "conv2d"
    covers = "nn.Conv2d"
    trains = frozenset({"column", "row", "weight", "bias"})

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Conv2d and "weight" in module._parameters

    def by_example(self, module: nn.Module, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """Patches (B, T, in·height·width) and output gradients (B, T, out), T the output's positions."""
        if x.ndim != 4 or x.shape[0] != examples:
            raise ValueError(f"its input has shape {tuple(x.shape)}")
        return _patches(module, x), g.flatten(2).mT

    def statistics(
        self,
        info: ModuleInfo,
        module: nn.Module,
        x: Tensor,
        g: Tensor,
        wanted: Collection[str],
        shared: Shared | None = None,
    ) -> Statistics:
        """From patches x (B, T, in·h·w) and output gradients g (B, T, out), by way of each example's gradient."""
        dtype, weights = accumulator_dtype(x), self.weights(info, module)
        numbers = (x.shape[2] // info.groups) * g.shape[2]
        sums: Statistics = {}
        step = max(1, BLOCK_NUMBERS // numbers)
        for start in range(0, len(x), step):
            xs = x[start : start + step].to(dtype).unflatten(2, (info.groups, -1))
            gs = g[start : start + step].to(dtype).unflatten(2, (info.groups, -1))
            gradients = {"weight": torch.einsum("btgo,btgi->bgoi", gs, xs).reshape(len(xs), *info.shape)}
            if info.bias:
                gradients["bias"] = gs.sum(1).flatten(1)
            per_example.add(sums, per_example.statistics(info, weights, gradients, wanted))
        return sums

    def squared_inputs(self, module: nn.Module, x: Tensor, mask: Tensor | None, route: Any) -> dict[str, Tensor]:
        """The weight has Σ x² of each place in the patch over all patches (in·h·w,), the bias the number of patches."""
        return linear.squared_inputs(_patches(module, x), None)

    def input_weighted(
        self, info: ModuleInfo, weights: Mapping[str, Tensor], squares: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        norms = squares["weight"].sqrt().reshape(info.groups, 1, *info.shape[1:])
        weight = weights["weight"].abs().unflatten(0, (info.groups, -1)) * norms
        result = {"weight": weight.flatten(0, 1)}
        if info.bias:
            result["bias"] = weights["bias"].abs() * squares["bias"].sqrt()
        return result

    def output_rows(self, info: ModuleInfo, y: Tensor, mask: Tensor | None, examples: int, route: Any) -> Tensor:
        return without_padding(y.movedim(1, -1), mask, examples)

    def neutral(
        self, info: ModuleInfo, module: nn.Module, x: Tensor, y: Tensor, mean: Tensor | None, route: Any
    ) -> Tensor:
        return super().neutral(info, module, x, y, None if mean is None else mean[:, None, None], route)


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    # nn.Conv2d keeps the padding it hands to F.pad, last dimension first; with the mode "zeros" it is zeros.
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride).mT
