"""Models with a unit taken out by hand: weights overwritten in a copy, blocks replaced, one example at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class HandsItsInputOn(nn.Module):
    """In the place of a block: gives its input, plus a constant, in the form that the block gives its output."""

    def __init__(self, block: nn.Module, added: Tensor | float = 0.0) -> None:
        super().__init__()
        self.added = added
        for name, value in vars(block).items():  # what the model around it asks a block for
            if not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, value)
        self.as_tuple = False

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        y = hidden_states + self.added
        return (y,) if self.as_tuple else y


def without_layer(model: nn.Module, name: str, added: Tensor | float = 0.0) -> nn.Module:
    model = copy.deepcopy(model)
    parent, _, last = name.rpartition(".")
    blocks = model.get_submodule(parent)
    setattr(blocks, last, HandsItsInputOn(getattr(blocks, last), added))
    return model


@torch.no_grad()
def without_module(model: nn.Module, name: str, mean: Tensor | None = None) -> nn.Module:
    """Its weights and bias zero (the bias the mean), or a norm's gain one and bias zero."""
    model = copy.deepcopy(model)
    module = model.get_submodule(name)
    weight, bias = module.weight, getattr(module, "bias", None)
    if weight.ndim == 1:
        weight.fill_(1)
    else:
        weight.zero_()
    if bias is not None:
        bias.zero_()
    if mean is not None:
        module.register_forward_hook(lambda module, args, output: output + mean)
    return model


@torch.no_grad()
def without_head(model: nn.Module, output: str, columns: Iterable[int], mean: Tensor | None = None) -> nn.Module:
    """The output projection's columns of the head zero; with a mean (in,) what they give is added to the bias."""
    model = copy.deepcopy(model)
    projection = model.get_submodule(output)
    stored_turned = type(projection).__name__ == "Conv1D"
    weight = projection.weight.mT if stored_turned else projection.weight
    columns = list(columns)
    given = None if mean is None else weight[:, columns] @ mean[columns]
    weight[:, columns] = 0
    if given is not None:
        projection.register_forward_hook(lambda module, args, output: output + given)
    return model


@torch.no_grad()
def mean_metric(model: nn.Module, examples: Iterable[Any], metric_of: Callable[[Any, Any], Tensor]) -> float:
    model.eval()
    found = []
    for example in examples:
        if isinstance(example, dict):
            outputs = model(**{key: value for key, value in example.items() if key != "labels"})
        else:
            outputs = model(example[0])
        found.append(float(metric_of(outputs, example)))
    return sum(found) / len(found)


@torch.no_grad()
def means(model: nn.Module, names: Iterable[str], examples: Iterable[Any], what: Callable[..., Tensor]) -> dict:
    """The mean over all positions of ``what(args, kwargs, output)`` at each module, examples without padding."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, kwargs, output, name=name: rows[name].append(
                what(args, kwargs, output).reshape(-1, what(args, kwargs, output).shape[-1])
            ),
            with_kwargs=True,
        )
        for name in rows
    ]
    mean_metric(model, examples, lambda outputs, example: torch.zeros(()))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(of).mean(0) for name, of in rows.items()}
