"""Tensors on the meta device that stand for tensors on a CUDA device: shapes are computed, and no number is.

What a training step will take is counted on them (cost/). Operators that have a kernel of their own ask ``on_accelerator``,
and in the place of the kernel call ``kernel``, which is one operation there as the kernel is on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_standing: list[tuple[bool, torch.dtype | None]] = []  # for a CUDA device; the type of products under autocast

_repeats = [1]

_library = torch.library.Library("reltune", "DEF")
for _name in ("kernel", "expert"):
    _library.define(f"{_name}(Tensor[] reads, Tensor[] like, int flops=0) -> Tensor[]")
    _library.impl(_name, lambda reads, like, flops=0: [torch.empty_like(x) for x in like], "Meta")


@contextmanager
def standing_for_cuda(on: bool = True, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Take tensors on the meta device for ones on a CUDA device until the context ends, or for ones on a CPU if not ``on``.

    ``autocast``: the type of products under mixed precision.
    """
    _standing.append((on, autocast))
    try:
        yield
    finally:
        _standing.pop()


def autocast_dtype() -> torch.dtype | None:
    """The type of products where they stand for tensors under mixed precision."""
    return _standing[-1][1] if _standing else None


def standing() -> bool:
    """Whether tensors on the meta device stand for others."""
    return bool(_standing)


def on_accelerator(x: Tensor) -> bool:
    """Whether x is on a CUDA device, or stands for a tensor there."""
    return x.is_cuda or (x.is_meta and bool(_standing) and _standing[-1][0])


@contextmanager
def repeated(times: int) -> Iterator[None]:
    """What is called inside stands for as many calls of the same shapes, one after the other."""
    _repeats.append(_repeats[-1] * times)
    try:
        yield
    finally:
        _repeats.pop()


def repeats() -> int:
    """How many calls each call stands for."""
    return _repeats[-1]


def kernel(reads: Sequence[Tensor], like: Sequence[Tensor], flops: int = 0) -> list[Tensor]:
    """New tensors like these, from one kernel that reads ``reads``; on the meta device alone.

    ``flops``: as many multiplications and additions of a matrix product take as long as the kernel's own.
    """
    results: list[Tensor] = torch.ops.reltune.kernel(list(reads), list(like), flops)
    return results


def expert(reads: Sequence[Tensor], flops: int) -> None:
    """The product of one expert's tokens, into a tensor that is there, of whose number the host has to be told first; on the meta device alone."""
    torch.ops.reltune.expert(list(reads), [], flops)
