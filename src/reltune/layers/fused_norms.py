"""Lets the fused kernel of ops/kernels/rms_norm.py compute the frozen norms of a model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reltune.layers.norm import NormType
from reltune.ops import kernels

NORM = NormType()

# Classes, with forwards that stood in the place of theirs, and whether they compute what the kernel does.
_alike: dict[tuple[type, Any], bool] = {}


def fuse_norms(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Let the kernel compute every bfloat16 RMSNorm on an accelerator whose class computes what Llama's does.

    Whether a class does is tried out, on numbers of many sizes: Gemma's gain is 1 + weight, and others cast at another
    place. The kernel also takes the place of Liger's, which computes a gradient of the gain that is not needed here. A
    norm with any other forward of its own keeps it. Gives the modules that were changed.
    """
    if not kernels.can_be_imported():
        return []
    fused: list[nn.Module] = []
    for module in modules:
        if not _may_be(module):
            continue
        own = module.__dict__.get("forward")
        computation = type(module), getattr(own, "__func__", None)
        if computation not in _alike:
            _alike[computation] = _computes_the_same(module)
        if _alike[computation]:
            module.forward = functools.partial(_forward, module, own)
            fused.append(module)
    return fused


def restore_norms(model: nn.Module) -> None:
    """Undo ``fuse_norms``, in every module of the model."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "func", None) is _forward:
            _restore(module)


def _restore(module: nn.Module) -> None:
    own = module.__dict__.pop("forward").args[1]
    if own is not None:
        module.forward = own


@contextlib.contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """``fuse_norms`` for all modules of a model, until the context ends."""
    fused = fuse_norms(model.modules())
    try:
        yield
    finally:
        for module in fused:
            _restore(module)


def _may_be(module: nn.Module) -> bool:
    return (
        getattr(module.__dict__.get("forward"), "__module__", "liger_kernel").startswith("liger_kernel")
        and NORM.matches(module)
        and type(module) is not nn.LayerNorm
        and isinstance(_epsilon(module), float)
        and _has_kernel(module.weight)
    )


def _has_kernel(x: Any) -> bool:
    spread = hasattr(x, "to_local")  # over processes: such a norm stays as it is
    if spread or not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    from reltune.ops.kernels.rms_norm import LARGEST

    return x.shape[-1] <= LARGEST


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


def _forward(module: nn.Module, own: Any, x: Tensor) -> Tensor:
    """``own``: a forward that stood in the place of the class's, or None."""
    from reltune.ops.kernels.rms_norm import RMSNorm

    gain: Any = module.weight
    # The kernel gives the gain no gradient, and compilers make kernels of their own.
    trained = gain.requires_grad and torch.is_grad_enabled()
    if trained or not _has_kernel(x) or gain.dtype != x.dtype or torch.compiler.is_compiling():
        return type(module).forward(module, x) if own is None else own(x)
    return RMSNorm.apply(x, gain, _epsilon(module))


def _computes_the_same(module: nn.Module) -> bool:
    """Equal but for a rounding in the last place, which the order of additions decides."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(16, weight.numel(), generator=generator, device=weight.device)
    x = (x * torch.logspace(-4, 3, 16, device=weight.device)[:, None]).to(weight.dtype)
    with torch.no_grad():
        found, wanted = _forward(module, None, x).float(), module.forward(x).float()
    close = (found - wanted).abs() <= 2**-7 * wanted.abs()
    return bool(close.all()) and float((found == wanted).float().mean()) > 0.99
