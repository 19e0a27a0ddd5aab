"""Finds the module where a number that is not finite first appears, once the loss has shown that there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reltune.relevance.batches import forward


def where_not_finite(model: nn.Module, batch: Any) -> str:
    """A phrase for the place. Runs the model once more and looks at the output of every module."""
    named = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    for key, value in named:
        if not _finite(value):
            return f"its {key if isinstance(key, str) else ('inputs', 'labels')[min(key, 1)]} are not finite"
    not_finite: list[str] = []

    def look_at(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if not not_finite and not all(map(_finite, _tensors(output))):
                not_finite.append(name)  # a module inside another one ends before it

        return hook

    handles = [module.register_forward_hook(look_at(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not_finite:
        return f"the output of {not_finite[0]} is the first that is not finite"
    return "the outputs of all modules are finite, so the loss itself makes the number that is not"


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def _tensors(output: Any) -> Iterator[Any]:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if not isinstance(output, list | tuple):
        yield output
        return
    for value in output:
        yield from _tensors(value)
