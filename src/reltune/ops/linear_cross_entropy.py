"""Cross entropy of the logits x Wᵀ + b of a frozen output map, in nats, without holding all logits at a time.

With 4 × 2048 tokens and 128,256 classes the logits are 2 GiB in bfloat16, and written out in PyTorch operations the loss makes
two copies of them in float32, 4 GiB each. Here a block of tokens goes through at a time. As W needs no gradient, that of x,
(softmax(x Wᵀ + b) − onehot) W, is made in the forward pass while the block's logits are there: two products with W as before.
It is kept instead of x and has x's size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reltune.ops import kernels, stand_in

# Of the logits of a block: 256 MiB in bfloat16 on an accelerator, 32 MiB in float32 on a CPU.
NUMBERS = (1 << 27, 1 << 23)


class OfTokens(NamedTuple):
    """What a frozen output map makes of N tokens. Only the losses have a gradient."""

    losses: Tensor  # (N,) −log softmax(logits)[label], in float32 at least
    entropies: Tensor  # (N,) of the softmax, in the losses' dtype
    guessed: Tensor  # (N,) bool: whether no class is likelier than the label


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> OfTokens:
    """x (N, in), weight (classes, in), bias (classes,) or None, labels (N,) int64, each a class.

    Raises ValueError where weight or bias require a gradient, which is not made.
    """
    return OfTokens(*LinearCrossEntropy.apply(x, weight, bias, labels))


class LinearCrossEntropy(torch.autograd.Function):
    """x (N, in), weight (classes, in), bias (classes,) or None, labels (N,) -> the three of ``OfTokens``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> OfTokens:
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            raise ValueError("the output map must be frozen; no gradient of its weight or bias is made.")
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(x) if wanted else None
        found = []
        on_cpu = x.device.type == "cpu" or (x.is_meta and not stand_in.on_accelerator(x))
        step = max(1, NUMBERS[on_cpu] // max(1, weight.shape[0]))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            *of_part, to_logits = cross_entropy(F.linear(x[part], weight, bias), labels[part], wanted)
            found.append(of_part)
            if gradient is not None:
                gradient[part] = to_logits @ weight
        if found:
            tokens = OfTokens(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            tokens = OfTokens(*(x.new_empty(0, dtype=dtype) for dtype in (wide, wide, torch.bool)))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(tokens.entropies, tokens.guessed)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * g[:, None]).to(gradient.dtype), None, None, None


def cross_entropy(logits: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``OfTokens`` of logits (N, classes), and the logits' gradient in their dtype. They may be overwritten by it."""
    if logits.is_meta and stand_in.on_accelerator(logits):
        losses, entropies = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        stand_in.kernel([logits, logits], [])
        return losses, entropies, losses.new_empty(len(logits), dtype=torch.bool), logits
    known = logits.is_cuda and logits.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if known and kernels.can_be_imported():
        from reltune.ops.kernels.cross_entropy import cross_entropy as by_kernel

        return by_kernel(logits, labels, with_gradient)
    return cross_entropy_reference(logits, labels, with_gradient)


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = labels[:, None]
    log_sum = wide.logsumexp(-1, keepdim=True)
    chosen = wide.gather(-1, index)
    shares = (wide - log_sum).exp_()
    entropies = torch.special.entr(shares).sum(-1)
    guessed = (chosen >= wide.amax(-1, keepdim=True)).squeeze(-1)
    if with_gradient:
        shares.scatter_add_(-1, index, -torch.ones_like(chosen))
    return (log_sum - chosen).squeeze(-1), entropies, guessed, shares.to(logits.dtype)
