"""What most layer types have in common: a module owns one weight, is called with one input and gives one output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reltune.layers.padding import without_padding
from reltune.layers.protocol import Handle, HeadLayout, LayerType, Observer, Use
from reltune.layers.units import ModuleInfo


class SingleWeight(LayerType):
    """A layer type whose modules own one weight, ``weight``, and perhaps a ``bias``.

    A subclass says at least ``name``, ``covers`` and ``trains``, and has ``matches``, ``statistics`` and
    ``squared_inputs``. The methods here are those of modules whose input and output are vectors of features.
    """

    packed = False
    head_layout: HeadLayout = ""
    unseen = ""

    def why_not(self, module: nn.Module) -> str:
        return ""

    def infos(self, name: str, module: nn.Module, layer: str, depth: int) -> list[ModuleInfo]:
        bias = getattr(module, "bias", None) is not None
        groups = getattr(module, "groups", 1)
        return [ModuleInfo(name, self.name, layer, depth, self.shape(module), bias, groups)]

    def holder(self, name: str) -> str | None:
        return None

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """The canonical shape of the weight."""
        return tuple(module._parameters["weight"].shape)  # type: ignore[union-attr]

    def weights(self, info: ModuleInfo, module: nn.Module) -> Mapping[str, Tensor]:
        held = module._parameters
        return self.laid_out(info, module, {key: value.detach() for key, value in held.items() if value is not None})

    def laid_out(self, info: ModuleInfo, module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: values[key] for key in ("weight", "bias") if key in values}

    def parameters(self, info: ModuleInfo, module: nn.Module) -> tuple[str, ...]:
        return tuple(key for key in ("weight", "bias") if module._parameters.get(key) is not None)

    def observe(self, module: nn.Module, infos: Sequence[ModuleInfo], observer: Observer) -> list[Handle]:
        (info,) = infos
        seeing = False

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
            nonlocal seeing
            if seeing:
                return None
            if not isinstance(output, Tensor):
                observer.refuse(info.name, f"its output is a {type(output).__name__}")
                return None
            seeing = True
            try:
                return observer.see(info.name, args[0] if args else next(iter(kwargs.values())), output, None)
            finally:
                seeing = False

        return [module.register_forward_hook(hook, prepend=observer.first, with_kwargs=True)]

    def by_example(self, module: nn.Module, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """Input (B, T, in) and output gradient (B, T, out) of one use; T positions belong to each example.

        Rows of one matrix (B·T, in) are taken example by example. Raises ValueError, saying what the input is, where
        positions cannot be told apart by example.
        """
        if x.shape[0] % examples or (x.shape[0] != examples and x.ndim != 2):
            raise ValueError(f"its input has shape {tuple(x.shape)}")
        return x.reshape(examples, -1, x.shape[-1]), g.reshape(examples, -1, g.shape[-1])

    def gathered(
        self, module: nn.Module, uses: Sequence[Use], examples: int, rows_per_example: int
    ) -> tuple[Tensor, Tensor]:
        inputs, gradients = [], []
        for use in uses:
            x, g = self.by_example(module, use.input, use.gradient, examples * rows_per_example)
            if rows_per_example > 1:  # the positions of an example's rows are positions of one example
                x, g = (tensor.unflatten(0, (examples, rows_per_example)).flatten(1, 2) for tensor in (x, g))
            inputs.append(x)
            gradients.append(g)
        if len(uses) == 1:
            return inputs[0], gradients[0]
        return torch.cat(inputs, 1), torch.cat(gradients, 1)

    def reaches_others(self, x: Tensor, g: Tensor) -> bool:
        return bool(g[1:].any())

    def input_size(self, info: ModuleInfo) -> int:
        return info.shape[0] if info.is_vector else info.groups * info.weight_parameters // info.rows

    def input_weighted(
        self, info: ModuleInfo, weights: Mapping[str, Tensor], squares: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """A weight's input is the feature that its last index counts, and that of a bias is 1."""
        result = {"weight": weights["weight"].abs() * squares["weight"].sqrt()}
        if info.bias:
            result["bias"] = weights["bias"].abs() * squares["bias"].sqrt()
        return result

    def own(self, info: ModuleInfo, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stacked)

    def is_used(self, info: ModuleInfo, route: Any) -> bool:
        return True

    def output_rows(self, info: ModuleInfo, y: Tensor, mask: Tensor | None, examples: int, route: Any) -> Tensor:
        return without_padding(y, mask, examples)

    def neutral(
        self, info: ModuleInfo, module: nn.Module, x: Tensor, y: Tensor, mean: Tensor | None, route: Any
    ) -> Tensor:
        return torch.zeros_like(y) if mean is None else mean.to(y.dtype).expand_as(y)
