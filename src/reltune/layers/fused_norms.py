"""The frozen norms of a model by the fused kernel of ops/rms_norm.py."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reltune.layers import norm

_alike: dict[type, bool] = {}  # classes that were tried: does theirs compute what the kernel does?


def fuse_norms(model: nn.Module) -> list[nn.Module]:
    """Let every bfloat16 RMSNorm on an accelerator, whose class computes what Llama's does, be computed by the kernel.

    Whether a class does is tried out, on numbers of many sizes: Gemma's gain is 1 + weight, and others cast at another
    place. What has hooks or a forward of its own stays as it is. Gives the modules, for ``restore_norms``.
    """
    if importlib.util.find_spec("triton") is None:
        return []
    fused: list[nn.Module] = []
    for module in model.modules():
        if not _may_be(module):
            continue
        if type(module) not in _alike:
            _alike[type(module)] = _computes_the_same(module)
        if _alike[type(module)]:
            module.forward = functools.partial(_forward, module)
            fused.append(module)
    return fused


def restore_norms(model: nn.Module) -> None:
    """Undo ``fuse_norms``, in every module of the model."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "func", None) is _forward:
            del module.forward


@contextlib.contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """The same for as long as a context lasts."""
    fused = fuse_norms(model)
    try:
        yield
    finally:
        for module in fused:
            del module.forward


def _may_be(module: nn.Module) -> bool:
    return (
        norm.matches(module)
        and type(module) is not nn.LayerNorm
        and isinstance(_epsilon(module), float)
        and "forward" not in module.__dict__
        and _has_kernel(module.weight)
    )


def _has_kernel(x: Any) -> bool:
    from reltune.ops.rms_norm import LARGEST

    spread = hasattr(x, "to_local")  # over processes: such a norm stays as it is
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[-1] <= LARGEST and not spread


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    from reltune.ops.rms_norm import RMSNorm

    gain: Any = module.weight
    # The kernel gives the gain no gradient, and compilers make kernels of their own.
    trained = gain.requires_grad and torch.is_grad_enabled()
    if trained or not _has_kernel(x) or gain.dtype != x.dtype or torch.compiler.is_compiling():
        return type(module).forward(module, x)
    return RMSNorm.apply(x, gain, _epsilon(module))


def _computes_the_same(module: nn.Module) -> bool:
    """Equal but for a rounding in the last place, which the order of additions decides."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(16, weight.numel(), generator=generator, device=weight.device)
    x = (x * torch.logspace(-4, 3, 16, device=weight.device)[:, None]).to(weight.dtype)
    with torch.no_grad():
        found, wanted = _forward(module, x).float(), type(module).forward(module, x).float()
    close = (found - wanted).abs() <= 2**-7 * wanted.abs()
    return bool(close.all()) and float((found == wanted).float().mean()) > 0.99
