"""Models with several units moved part of the way out by hand: weights overwritten in a copy, blocks wrapped; and the metric
of one whole pass per trial over single examples, whatever the trials have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AddsLess(nn.Module):
    """A block that adds only ``1 - strength`` of what it adds to its input."""

    def __init__(self, block: nn.Module, strength: float) -> None:
        super().__init__()
        self.block, self.strength = block, strength

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.block(hidden_states, *args, **kwargs)
        y = output[0] if isinstance(output, tuple) else output
        y = hidden_states * self.strength + y * (1 - self.strength)
        return (y, *output[1:]) if isinstance(output, tuple) else y


@torch.no_grad()
def with_perturbed(model: nn.Module, kind: str, names: Iterable[str], strength: float) -> nn.Module:
    """Linear maps and embeddings give ``1 - strength`` of their output, norms move as far towards gain 1 and bias 0."""
    model = copy.deepcopy(model)
    for name in names:
        if kind == "layer":
            parent, _, last = name.rpartition(".")
            blocks = model.get_submodule(parent)
            setattr(blocks, last, AddsLess(getattr(blocks, last), strength))
            continue
        module = model.get_submodule(name)
        norm = module.weight.ndim == 1
        module.weight.mul_(1 - strength).add_(strength if norm else 0.0)
        if getattr(module, "bias", None) is not None:
            module.bias.mul_(1 - strength)
    return model


@torch.no_grad()
def metrics_one_by_one(
    model: nn.Module, examples: Sequence[Any], metric_of: Callable[[Any, Any], Tensor]
) -> list[float]:
    model.eval()
    found = []
    for example in examples:
        if isinstance(example, dict):
            outputs = model(**{key: value for key, value in example.items() if key != "labels"})
        else:
            outputs = model(example[0])
        found.append(float(metric_of(outputs, example)))
    return found
