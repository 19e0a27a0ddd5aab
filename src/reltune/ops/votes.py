"""Votes of a probe: one signed byte per weight, which adds up the signs of its gradients.

A weight that has moved by sign updates is W₀ − η V. So W₀ is never written, and the moved weight is computed where it is
read. The result is rounded once, from float32 (from float64 for weights in float64), so that steps below the resolution
of bfloat16 are not lost: they add up in V.

On a GPU both operators are one pass over the memory by a Triton kernel (ops/kernels/votes.py). On a CPU they go block by
block, so that what lies between two steps of the computation stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reltune.ops import kernels

BLOCK = 1 << 17  # numbers that are gone through at a time on a CPU
LOWEST, HIGHEST = -150.0, 130.0  # float32 and bfloat16 have no size with a logarithm to base 2 outside this range


@torch.no_grad()
def moved(weight: Tensor, votes: Tensor, step: float) -> Tensor:
    """W₀ − step · V, contiguous, in the weight's type. ``votes`` is of the weight's shape, int8 or int16."""
    if _has_kernel(weight, votes):
        from reltune.ops.kernels.votes import moved as by_kernel

        return by_kernel(weight, votes, step)
    return moved_reference(weight, votes, step)


def moved_reference(weight: Tensor, votes: Tensor, step: float) -> Tensor:
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    source, cast, into = weight.reshape(-1), votes.reshape(-1), out.view(-1)
    for start in range(0, len(into), _block(weight)):
        part = slice(start, start + _block(weight))
        if wide == weight.dtype:
            torch.add(source[part], cast[part].to(wide), alpha=-step, out=into[part])
        else:
            into[part] = cast[part].to(wide).mul_(-step).add_(source[part])
    return out


@torch.no_grad()
def vote(votes: Tensor, gradient: Tensor) -> Tensor:
    """V ← V + sign(gradient), in place. Gives the gradient's sum (), which is finite if all of it is."""
    if _has_kernel(gradient, votes):
        from reltune.ops.kernels.votes import vote as by_kernel

        return by_kernel(votes, gradient)
    return vote_reference(votes, gradient)


def vote_reference(votes: Tensor, gradient: Tensor) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    source, into = gradient.reshape(-1), votes.view(-1)
    total = gradient.new_zeros((), dtype=wide)
    for start in range(0, len(into), _block(gradient)):
        part = slice(start, start + _block(gradient))
        total += source[part].sum(dtype=wide)
        into[part] += source[part].sign().to(votes.dtype)
    return total


@torch.no_grad()
def score(votes: Tensor, gradient: Tensor | None) -> Tensor:
    """|V| plus a fraction below 1 that grows with the size of the gradient, on the host, in float32.

    The fraction orders weights with equal votes, and no others. It is the size's logarithm to base 2 between LOWEST and
    HIGHEST, so that float32 tells sizes apart that differ by a thousandth. It is 0 where the gradient is.
    """
    out = torch.empty(votes.shape, dtype=torch.float32)
    cast, into = votes.reshape(-1), out.view(-1)
    sizes = None if gradient is None else gradient.reshape(-1)
    wide = torch.float32 if gradient is None else torch.promote_types(gradient.dtype, torch.float32)
    block = 1 << 22 if votes.is_cuda else BLOCK
    for start in range(0, len(into), block):
        part = slice(start, start + block)
        scores = cast[part].abs().float()
        if sizes is not None:
            level = sizes[part].abs().to(wide).log2_().sub_(LOWEST).div_(HIGHEST - LOWEST)
            scores += level.clamp_(0, 1 - 2**-16)
        into[part] = scores
    return out


def _block(tensor: Tensor) -> int:
    return BLOCK if tensor.device.type == "cpu" else max(tensor.numel(), 1)


def _has_kernel(tensor: Tensor, votes: Tensor) -> bool:
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and tensor.is_contiguous()
        and votes.is_contiguous()
        and kernels.can_be_imported()
    )
