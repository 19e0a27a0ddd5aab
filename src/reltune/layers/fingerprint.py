"""A short identity of a base model, so that scores, plans and adapters are never applied to another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from reltune.layers.quantised import is_quantised

SAMPLES = 256  # numbers read per parameter


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> str:
    """Hash of all parameters' names and shapes and of evenly spaced samples of their values.

    Values are rounded to bfloat16 first, so that a model loaded in float32 and in bfloat16 is the same model. New
    heads (``without``) are random and left out. Reads a few numbers per parameter: instant at any size, but a change
    between the samples goes unseen. ``without`` names modules. Empty when the weights are not there to be read (meta
    device) or quantised.
    """
    skip = tuple(f"{module}." for module in without)
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if skip and name.startswith(skip):
            continue
        if parameter.device.type == "meta" or is_quantised(parameter):
            return ""
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        at = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].to(torch.bfloat16).view(torch.int16)
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
