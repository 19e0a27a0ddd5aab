"""A linear map trained along fixed directions, with its weight written out in full. Imports nothing of reltune."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D


class Along(nn.Module):
    """W₀ + B A, with B the trained parameter; of a weight that is stored as (in, out), its transpose."""

    def __init__(self, weight: Tensor, vectors: Tensor, transposed: bool) -> None:
        super().__init__()
        out = weight.shape[1 if transposed else 0]
        self.register_buffer("vectors", vectors)
        self.change = nn.Parameter(weight.new_zeros(out, len(vectors)))
        self.transposed = transposed

    def forward(self, weight: Tensor) -> Tensor:
        change = self.change @ self.vectors.to(self.change)
        return weight + (change.mT if self.transposed else change)


def along(model: nn.Module, vectors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Freeze the model but for what is trained along these directions (r, in) of the named modules: B (out, r) of each."""
    model.requires_grad_(False)
    for name, own in vectors.items():
        module, transposed = model.get_submodule(name), isinstance(model.get_submodule(name), Conv1D)
        parametrize.register_parametrization(module, "weight", Along(module.weight, own, transposed), unsafe=True)
    return {name: model.get_submodule(name).parametrizations.weight[0].change for name in vectors}


def finished(model: nn.Module) -> nn.Module:
    """The model with plain weights again, as they are now."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model


def train(
    model: nn.Module,
    trained: Iterable[nn.Parameter],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    steps: Iterable[list[Callable[[nn.Module], Tensor]]],
    max_norm: float | None = None,
) -> list[float]:
    """Train in place; the loss of every step, which adds up the gradients of all its losses."""
    trained = list(trained)
    optimizer, history = make_optimizer(trained), []
    for losses in steps:
        optimizer.zero_grad()
        values = [loss(model) for loss in losses]
        for value in values:
            value.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        history.append(sum(value.item() for value in values))
    return history
