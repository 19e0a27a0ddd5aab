"""Processes that train together, under DDP or FSDP2, train the same units of the same base model.

DDP makes all parameters the first process's, and FSDP2 puts a weight together from every process's own slice. Neither
compares what a layer keeps beside its parameters: where the trained units lie, and what the base holds there.
"""

from __future__ import annotations

import hashlib
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reltune.layers.fingerprint import samples
from reltune.processes import Processes
from reltune.tuner.written_weight import WrittenWeight

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.compiler.disable
def check_agreement(model: nn.Module) -> None:
    """Raise InputError, on all processes, if they differ; in the first training pass inside DDP's wrapper or FSDP2."""
    if not dist.is_available() or not dist.is_initialized():
        return
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None and dist.get_world_size(wrapper.process_group) < dist.get_world_size():
        return  # the others may be doing something else
    if wrapper in _checked or model in _checked:
        return
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, WrittenWeight)]
    if wrapper is None and not any(layer.sharded for _, layer in layers):
        return
    _checked.add(model if wrapper is None else wrapper)
    digest = hashlib.sha256()
    for name, layer in layers:
        for adapter, kept in layer.originals.items():
            digest.update(f"{name} {adapter}".encode())
            for idx in kept.index:
                digest.update(idx.cpu().numpy().tobytes())
            for value in kept.values if wrapper is not None else ():
                digest.update(b"" if value is None else samples(value))
        for adapter, vectors in getattr(layer, "reltune_direction_vectors", {}).items():
            digest.update(f"{name} {adapter} directions".encode() + samples(vectors))
    Processes.joined().agree_on(
        digest.hexdigest(),
        "the processes train different units or different base models; give all of them the same plan and model, and seed "
        "each alike before weights are drawn at random.",
    )
