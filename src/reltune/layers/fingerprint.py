"""A short identity of a base model, so that scores, plans and adapters are never applied to another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from reltune.layers.quantised import is_quantised

SAMPLES = 256  # numbers read per parameter


def fingerprint(model: nn.Module, without: Iterable[str] = (), as_held: bool = False) -> str:
    """Hash of all parameters' names and shapes and of evenly spaced samples of their values.

    Values are rounded to bfloat16 first, so that a model loaded in float32 and in bfloat16 is the same model. New
    heads (``without``) are random and left out. Reads a few numbers per parameter: instant at any size, but a change
    between the samples goes unseen. ``without`` names modules. Empty when the weights are not there to be read (meta
    device) or quantised; unless ``as_held``, where the numbers that stand for quantised weights are read, by which only models
    that are held alike can be compared.
    """
    parameters = dict(model.named_parameters())
    kept = outside(parameters, without)
    values = {name: parameters[name].detach() for name in kept}
    if any(value.device.type == "meta" for value in values.values()):
        return ""
    if any(is_quantised(parameters[name]) for name in kept):
        if not as_held:
            return ""
        values = {name: _numbers(parameters[name]) for name in kept}
    return fingerprint_of({name: (tuple(value.shape), samples(value)) for name, value in values.items()})


def _numbers(parameter: Tensor) -> Tensor:
    """The parameter's own numbers, packed or not; of torchao's, which are several tensors, what they stand for."""
    held = parameter.data
    return held if type(held) is Tensor else held.dequantize()


def fingerprint_of(read: Mapping[str, tuple[tuple[int, ...], bytes]]) -> str:
    """``fingerprint`` from each parameter's shape and ``samples``."""
    digest = hashlib.sha256()
    for name, (shape, values) in sorted(read.items()):
        digest.update(f"{name}{shape}".encode())
        digest.update(values)
    return digest.hexdigest()[:32]


def samples(parameter: Tensor) -> bytes:
    """Up to ``SAMPLES`` evenly spaced values in bfloat16."""
    flat = parameter.detach().reshape(-1)
    at = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[at.to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


def outside(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The parameters that do not lie in any of the modules."""
    inside = tuple(f"{module}." for module in modules)
    return [name for name in names if not (inside and name.startswith(inside))]
