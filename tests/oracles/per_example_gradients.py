"""Per-example gradients by plain autograd: one example at a time, without its padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]


def gradient_sums(
    model: nn.Module, batches: Iterable[Any], loss_of: Callable[[Any, Any], Tensor]
) -> tuple[Gradients, Gradients, int]:
    """Σ_s G_s² and Σ_s G_s of every parameter, in float64, and the number of examples s.

    ``loss_of(outputs, example)`` is one example's loss (). The model runs in evaluation mode and is left with the
    modes and ``requires_grad`` that it had. Parameters that the loss never reaches have zeros.
    """
    squares = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    sums = {name: total.clone() for name, total in squares.items()}
    count = 0
    with _trainable_in_eval(model):
        for example in (one for batch in batches for one in examples(batch)):
            if isinstance(example, Mapping):
                outputs = model(**{key: value for key, value in example.items() if key != "labels"})
            else:
                outputs = model(example[0])
            loss = loss_of(outputs, example)
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            for name, gradient in zip(squares, gradients, strict=True):
                if gradient is not None:
                    squares[name] += gradient.double().square()
                    sums[name] += gradient.double()
            count += 1
    return squares, sums, count


def examples(batch: Any) -> Iterator[Any]:
    """The examples of a batch as batches of one; of a mapping, without the positions that attention_mask leaves out."""
    if not isinstance(batch, Mapping):
        for inputs, label in zip(*batch, strict=True):
            yield inputs[None], label[None]
        return
    mask = batch.get("attention_mask")
    for s in range(len(next(iter(batch.values())))):
        one = {}
        for key, value in batch.items():
            has_positions = mask is not None and value.shape[:2] == mask.shape
            one[key] = (value[s][mask[s].bool()] if has_positions else value[s])[None]
        yield one


@contextlib.contextmanager
def _trainable_in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(True)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, needs in required:
            parameter.requires_grad = needs
