"""The frozen norms of a model by the fused kernel of ops/rms_norm.py."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reltune.layers.norm import NormType

NORM = NormType()

# Classes, and forwards in the place of theirs, that were tried: do they compute what the kernel does?
_alike: dict[tuple[type, Any], bool] = {}


def fuse_norms(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Let every bfloat16 RMSNorm among them, on an accelerator, whose class computes what Llama's does, be computed by the kernel.

    Whether a class does is tried out, on numbers of many sizes: Gemma's gain is 1 + weight, and others cast at another
    place. Liger's kernel, which computes the gain's gradient for nobody, gives way too; what has hooks or another forward
    of its own stays as it is. Gives the modules, for ``restore_norms``.
    """
    if importlib.util.find_spec("triton") is None:
        return []
    fused: list[nn.Module] = []
    for module in modules:
        if not _may_be(module):
            continue
        own = module.__dict__.get("forward")
        kind = type(module), getattr(own, "__func__", None)
        if kind not in _alike:
            _alike[kind] = _computes_the_same(module)
        if _alike[kind]:
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
    """The same for as long as a context lasts."""
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
    from reltune.ops.kernels.rms_norm import LARGEST

    spread = hasattr(x, "to_local")  # over processes: such a norm stays as it is
    return x.is_cuda and x.dtype == torch.bfloat16 and x.shape[-1] <= LARGEST and not spread


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
