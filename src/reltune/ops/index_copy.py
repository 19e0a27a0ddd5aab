"""Write columns or rows into many weights at once: ``weight.index_copy_(dim, idx, values)`` in one kernel for all.

An adapter of an 8B model stands in 224 weights. One by one, with a cast each, that is 448 launches per optimizer step
and per switch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Copy(NamedTuple):
    """weight[:, idx] = values (dim 1) or weight[idx] = values (dim 0), for weights of two dimensions.

    One of one dimension (single weights, in a flat view) is written by itself: with so much to write, a launch is little.
    """

    weight: Tensor
    dim: int
    idx: Tensor
    values: Tensor

    def suits_kernel(self) -> bool:
        weight, _, idx, values = self
        return (
            weight.ndim == 2
            and idx.dtype == torch.int64
            and values.device == weight.device
            and values.is_contiguous()
            and weight.is_contiguous()
        )

    def alone(self) -> None:
        self.weight.index_copy_(self.dim, self.idx.long(), self.values.to(self.weight.dtype))


@torch.no_grad()
def index_copy(copies: Iterable[Copy]) -> None:
    """Do all the copies; those into one weight must not overlap. The weights' versions count up."""
    together: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Copy]] = {}
    triton = importlib.util.find_spec("triton") is not None
    for copy in copies:
        if triton and copy.weight.is_cuda and copy.suits_kernel():
            together.setdefault((copy.weight.device, copy.weight.dtype, copy.values.dtype), []).append(copy)
        else:
            copy.alone()
    for group in together.values():
        if len(group) == 1:
            group[0].alone()
        else:
            from reltune.ops.index_copy_kernel import copy_all

            copy_all(group)
            for copy in group:
                torch.autograd.graph.increment_version(copy.weight)
