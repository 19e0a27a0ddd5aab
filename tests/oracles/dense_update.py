"""Full fine-tuning with the gradient of every weight that was not selected set to zero: what a tuner must reproduce.

Selected is, per module, any of ``columns``, ``rows`` and ``elements`` (lists; elements of a linear map's weight, counted
row by row), ``weight`` and ``bias`` (True for the whole tensor). Columns are input features, a convolution's input channels
or an embedding's features; rows are output features, filters or tokens.
Use an optimizer without weight decay, or unselected weights shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Selection = Mapping[str, Mapping[str, Any]]


def masks(model: nn.Module, selection: Selection) -> dict[str, Tensor]:
    """For every parameter a boolean tensor of its shape: True where it is trained."""
    result = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for module, units in selection.items():
        weight = result[f"{module}.weight"]
        owner = model.get_submodule(module)
        by_row = weight.mT if isinstance(owner, Conv1D) else weight
        if isinstance(owner, nn.Conv2d):
            filters = torch.arange(len(weight)).unflatten(0, (owner.groups, -1))
            for channel in units.get("columns", ()):
                group, inside = divmod(channel, weight.shape[1])
                weight[filters[group], inside] = True
        else:
            by_row[..., list(units.get("columns", ()))] = True
        by_row[list(units.get("rows", ()))] = True
        for element in units.get("elements", ()):
            by_row[divmod(element, by_row.shape[1])] = True
        if units.get("weight"):
            weight[...] = True
        if units.get("bias"):
            result[f"{module}.bias"][...] = True
    return result


def mask_gradients(model: nn.Module, where: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.grad[~where[name]] = 0


def gradients(model: nn.Module, selection: Selection, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """The masked gradient of every parameter; parameters that the loss does not reach have zeros."""
    model.zero_grad()
    loss(model).backward()
    mask_gradients(model, masks(model, selection))
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return {name: torch.zeros_like(p) if found[name] is None else found[name] for name, p in model.named_parameters()}


def train(
    model: nn.Module,
    selection: Selection,
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    steps: Iterable[list[Callable[[nn.Module], Tensor]]],
    max_norm: float | None = None,
) -> list[float]:
    """Train in place and return the loss of every step. A step adds up the gradients of all its losses."""
    where = masks(model, selection)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = make_optimizer(model.parameters())
    history = []
    for losses in steps:
        optimizer.zero_grad()
        values = [loss(model) for loss in losses]
        for value in values:
            value.backward()
        mask_gradients(model, where)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        history.append(sum(value.item() for value in values))
    return history
