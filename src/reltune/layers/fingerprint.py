"""A short identity of a base model, so that scores, plans and adapters are never applied to another one."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from reltune.errors import InputError
from reltune.layers.quantised import is_quantised, numel

SAMPLES = 256  # numbers read per parameter
CHUNK = 2**20  # numbers that are rounded at a time
_forced: contextvars.ContextVar[bool] = contextvars.ContextVar("forced", default=False)


@contextlib.contextmanager
def any_base(allowed: bool = True) -> Iterator[None]:
    """Let plans and adapters be used with another base model than the one that they record, where that is ``allowed``."""
    before = _forced.set(allowed)
    try:
        yield
    finally:
        _forced.reset(before)


def is_forced() -> bool:
    """Whether ``any_base`` allows another base model."""
    return _forced.get()


@dataclasses.dataclass(frozen=True)
class Base:
    """What a plan or an adapter records of its base model. What is empty or 0 is not known, and not compared.

    Attributes:
        fingerprint: ``fingerprint`` of the model.
        architecture: the name of its class.
        parameters: how many it has, without new heads.
        weights: ``digest`` of the model.
    """

    fingerprint: str = ""
    architecture: str = ""
    parameters: int = 0
    weights: str = ""

    @classmethod
    def of(cls, model: nn.Module, without: Iterable[str] = (), weights: bool = True) -> Base:
        without = list(without)
        parameters = dict(model.named_parameters())
        count = sum(numel(parameters[name]) for name in outside(parameters, without))
        found = digest(model, without) if weights else ""
        return cls(fingerprint(model, without), type(model).__name__, count, found)

    def check(self, model: Base, what: str, name: str = "") -> None:
        """Raise InputError, saying what differs, where this record is not of the model; unless ``any_base`` is allowed.

        ``what`` was made for the record's model: "the plan"; ``name`` is the model's name there.
        """
        known = bool(self.fingerprint and model.fingerprint)
        same = self.fingerprint == model.fingerprint and self.weights in ("", model.weights or self.weights)
        if not known or same or _forced.get():
            return
        if self.architecture and model.architecture not in ("", self.architecture):
            differs = f"it was made for a {self.architecture}, and this is a {model.architecture}"
        elif self.parameters and model.parameters not in (0, self.parameters):
            differs = f"its base has {self.parameters:,} parameters, and this model {model.parameters:,}"
        elif self.architecture and model.architecture:
            differs = "the weights differ and nothing else that is known"
        else:
            differs = f"its fingerprint is {self.fingerprint[:8]}…, and this one's {model.fingerprint[:8]}…"
        made_for = f" than {name}" if name else ""
        raise InputError(
            f"{what} was made for another base model{made_for}: {differs}; load the model it was made for, analyze and select again, or "
            "pass --force (force=True in the library) to use it nevertheless."
        )


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


def digest(model: nn.Module, without: Iterable[str] = ()) -> str:
    """Checksums of all numbers of all parameters, rounded to bfloat16: what changes between the samples of ``fingerprint``
    is seen here. Meant against mistakes; some 0.5 s per GB. ``without`` and where it is empty: as in ``fingerprint``.
    """
    parameters = dict(model.named_parameters())
    values = {name: parameters[name].detach() for name in outside(parameters, without)}
    if any(v.device.type == "meta" or is_quantised(parameters[name]) for name, v in values.items()):
        return ""
    total = hashlib.sha256()
    for name, value in sorted(values.items()):
        check = 0
        for part in value.reshape(-1).split(CHUNK):
            check = zlib.crc32(part.to(torch.bfloat16).view(torch.int16).cpu().numpy().data, check)
        total.update(f"{name}{tuple(value.shape)}{check}".encode())
    return total.hexdigest()[:32]


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
