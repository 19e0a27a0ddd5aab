"""The Triton kernels behind ops/votes.py: one pass over the memory each, since nothing else limits them."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

BLOCK = 4096  # numbers of one program


@triton.jit
def moved_kernel(weight, votes, out, step, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(votes + at, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, (w - step * v).to(out.dtype.element_ty), mask=inside)


@triton.jit
def vote_kernel(votes, gradient, sums, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program's sum of the gradient goes into ``sums``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(votes + at, mask=inside, other=0).to(tl.int32)
    sign = (g > 0).to(tl.int32) - (g < 0).to(tl.int32)
    tl.store(votes + at, (v + sign).to(votes.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0), tl.sum(g, 0))


def moved(weight: Tensor, votes: Tensor, step: float) -> Tensor:
    """W₀ − step · V; all contiguous and of one shape."""
    out = torch.empty_like(weight)
    count = weight.numel()
    if count:
        with torch.cuda.device_of(weight):
            moved_kernel[(triton.cdiv(count, BLOCK),)](weight, votes, out, step, count, BLOCK=BLOCK)
    return out


def vote(votes: Tensor, gradient: Tensor) -> Tensor:
    """V ← V + sign(gradient) in place; gives the gradient's sum ()."""
    count = gradient.numel()
    programs = triton.cdiv(count, BLOCK)
    sums = torch.empty(programs, dtype=torch.float32, device=gradient.device)
    if count:
        with torch.cuda.device_of(gradient):
            vote_kernel[(programs,)](votes, gradient, sums, count, BLOCK=BLOCK)
    return sums.sum()
