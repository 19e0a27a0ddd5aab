"""What torch.autocast says of a product, for operators that cast by themselves and compute with autocast off."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which nn.Linear would compute with this input: autocast's, or x's own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """A context without autocast. Entering its own context takes longer than launching a product, so only where it is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
