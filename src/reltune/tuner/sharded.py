"""Weights that FSDP2 (``fully_shard``) has spread over processes.

Each process holds a slice of a weight along its first dimension. All of it is there only while its module runs, forward
and again backward, in a buffer that is filled from the slices each time: what is written into it is lost. So nothing
is written, and the trained columns and rows are added beside the product, y = x W₀ᵀ + x[:, idx] (D − W₀[:, idx])ᵀ, in the
forward and so in the backward pass, as for quantised weights. W₀[:, idx] is read from the gathered weight, and no copy of
it is kept. Single weights are put into a copy of the gathered weight, for each product anew (ops/unpacked_product.py). D is a
parameter like any other, which FSDP2 spreads, gathers and hands its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from reltune.errors import InputError

# FSDP2 leaves this on every module that has a parameter of its care; the gathered parameters themselves bear no mark.
_MANAGER = "torch.distributed.fsdp._fully_shard._fsdp_param"


def is_managed(module: nn.Module | None) -> bool:
    """Whether FSDP2 spreads a parameter of the module itself, also while it is gathered."""
    hooks: Any = getattr(module, "_load_state_dict_post_hooks", None)
    return bool(hooks) and any(hook.__module__ == _MANAGER for hook in hooks.values())


def is_shard(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process may hold only a part."""
    return hasattr(tensor, "to_local")


def check_gathered(module: nn.Module) -> None:
    """Raise InputError for a module that runs without its whole weight as a parameter of its own."""
    weight: Any = module._parameters.get("weight")
    if weight is None:
        raise InputError(
            f"a {type(module).__name__} to train runs with a weight that is not a parameter of its own, as under FSDP1 and "
            "parametrizations; use FSDP2 (fsdp_version: 2)."
        )
    if hasattr(weight, "ds_id"):
        raise InputError(
            "DeepSpeed's ZeRO-3 has spread the weights to train over processes, which reltune can train under FSDP2 only; use that."
        )
    if is_shard(weight):
        raise InputError(
            f"a {type(module).__name__} to train runs while its weight is spread over processes; reltune trains under DDP and "
            "FSDP2, not with tensor parallelism, and FSDP2 gathers weights in calls of the sharded model only."
        )


def refuse_sharded(what: str, mend: str) -> NoReturn:
    """Raise InputError: ``what`` cannot be done to such weights."""
    raise InputError(f"{what} weights that are spread over processes; {mend}.")


@torch.no_grad()
def put_in_shard(weight: Any, put: Callable[[Tensor], None]) -> None:
    """Let ``put`` write into the weight, of which only this process's slice is kept."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    local = weight.to_local()
    own = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    whole = local.new_empty(weight.shape)
    whole[own] = local
    put(whole)
    local.copy_(whole[own])
