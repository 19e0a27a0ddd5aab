"""A sign probe by the definition: a copy of the model, plain autograd, and the weights written after every step.

Imports nothing of reltune.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def steps_by_rule(model: nn.Module, rate: float) -> dict[str, float]:
    """η of every parameter: ``rate`` times its root mean square; a bias has its module's weight's."""
    sizes = {name: float(p.detach().double().square().mean().sqrt()) for name, p in model.named_parameters()}
    for name in sizes:
        sibling = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name.removesuffix("_bias")
        sizes[name] = sizes.get(sibling, sizes[name])
    return {name: rate * size for name, size in sizes.items()}


def sign_probe(
    model: nn.Module,
    batches: Sequence[Any],
    mean_loss: Callable[[nn.Module, Any], Tensor],
    steps: dict[str, float],
    count: int,
    moving: Collection[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Votes V of every parameter that moves, and its gradient in the last step, both in its own shape.

    ``mean_loss`` is of a batch; each batch is a step. Without ``moving`` all parameters move.
    """
    model = copy.deepcopy(model)
    own = {n: p.requires_grad_() for n, p in model.named_parameters() if moving is None or n in moving}
    before = {name: p.detach().clone() for name, p in own.items()}
    votes = {name: torch.zeros_like(p, requires_grad=False) for name, p in own.items()}
    gradients: dict[str, Tensor] = {}
    for step in range(count):
        loss = mean_loss(model, batches[step % len(batches)])
        found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        gradients = {n: torch.zeros_like(own[n]) if g is None else g for n, g in zip(own, found, strict=True)}
        with torch.no_grad():
            for name, gradient in gradients.items():
                votes[name] += gradient.sign()
                own[name].copy_(before[name] - steps[name] * votes[name])
    return {name: vote.detach() for name, vote in votes.items()}, gradients
