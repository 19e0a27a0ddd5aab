"""Write columns or rows into many weights at once: ``weight.index_copy_(dim, idx, values)`` in one kernel for all.

An adapter of an 8B model is written into 224 weights. One by one, with a cast each, that takes 448 launches per optimizer step
and per switch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from reltune.ops import kernels


class Copy(NamedTuple):
    """weight[:, idx] = values (dim 1) or weight[idx] = values (dim 0), for weights of two dimensions.

    A weight of one dimension (single weights, in a flat view) is written by itself: beside so much to write, a launch
    costs little.
    """

    weight: Tensor
    dim: int
    idx: Tensor
    values: Tensor

    def alone(self) -> None:
        self.weight.index_copy_(self.dim, self.idx.long(), self.values.to(self.weight.dtype))


@torch.no_grad()
def index_copy(copies: Iterable[Copy]) -> None:
    """Do all the copies; those into one weight must not overlap. The weights' versions count up."""
    together: dict[tuple[int, torch.dtype, torch.dtype], list[Copy]] = {}
    triton = torch.cuda.is_available() and kernels.can_be_imported()
    for copy in copies:
        weight, _, idx, values = copy
        device = weight.get_device() if triton else -1  # cheaper than the object: a switch comes here 448 times
        if (
            device >= 0
            and weight.ndim == 2
            and values.get_device() == device
            and idx.dtype is torch.int64
            and values.is_contiguous()
            and weight.is_contiguous()
        ):
            together.setdefault((device, weight.dtype, values.dtype), []).append(copy)
        else:
            copy.alone()
    for group in together.values():
        if len(group) == 1:
            group[0].alone()
        else:
            from reltune.ops.kernels.index_copy import copy_all

            copy_all(group)
            torch.autograd.graph.increment_version([copy.weight for copy in group])
