"""Lets fused operators compute a model's norms, gated MLPs and rotary position embeddings, which then keep less and take less time.

An RMSNorm keeps its input alone (ops/rms_norm.py), a gated MLP keeps gate and up (ops/gated_product.py), a rotation nothing of
queries and keys (ops/rotation.py). What the linear maps behind the first two read is made again in the backward pass where it
is needed (ops/recompute.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from reltune.layers.norm import NormType
from reltune.ops import kernels, recompute, rotation
from reltune.ops.gated_product import ACTIVATIONS, GatedProduct
from reltune.ops.rms_norm import LARGEST, RMSNorm
from reltune.ops.stand_in import on_accelerator

NORM = NormType()

# What computes a module's output -> whether a fused operator computes the same; of a gated MLP, its activation or None.
_alike: dict[Any, bool] = {}
_activations: dict[Any, str | None] = {}
# An attention's class, and the rotation that its file has now -> its forward with a fused one; None where that is another, or none.
_rotating: dict[tuple[type, Any], Callable[..., Any] | None] = {}


def fuse(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Let fused operators compute what their classes compute, on an accelerator. Gives the modules that were changed.

    Whether they compute the same is tried out on numbers: Gemma's gain is 1 + weight, and others cast at another place. Of
    an RMSNorm it is asked in bfloat16 alone. A fused operator also takes the place of Liger's, so that what it keeps is
    known here. A module with any other forward of its own keeps it.
    """
    fused: list[nn.Module] = []
    for module in modules:
        own = module.__dict__.get("forward")
        if not getattr(own, "__module__", "liger_kernel").startswith("liger_kernel"):
            continue
        if _may_be_norm(module):
            computation = type(module), getattr(own, "__func__", None), module.weight.dtype
            if computation not in _alike:
                _alike[computation] = _computes_the_same(module)
            if _alike[computation]:
                module.forward = functools.partial(_norm, module, own)
                fused.append(module)
        elif _may_be_gated(module):
            act: Any = getattr(module, "act_fn", None)
            described = (type(act), repr(act)) if isinstance(act, nn.Module) else act
            if (type(module), described) not in _activations:
                _activations[type(module), described] = _activation(module)
            if (activation := _activations[type(module), described]) is not None:
                module.forward = functools.partial(_gated_mlp, module, own, activation)
                fused.append(module)
        elif own is None and _rotates(module) and _may_rotate(module):
            module.forward = functools.partial(_rotated_attention, module, own)
            fused.append(module)
    return fused


def can_be_fused(module: nn.Module) -> bool:
    """Whether it is of a kind that ``fuse`` looks at: so that it need not walk through a whole model every time."""
    return NORM.matches(module) or _is_gated(module) or _rotates(module)


def restore(model: nn.Module) -> None:
    """Undo ``fuse``, in every module of the model."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "func", None) in (_norm, _gated_mlp, _rotated_attention):
            _restore(module)


def _restore(module: nn.Module) -> None:
    own = module.__dict__.pop("forward").args[1]
    if own is not None:
        module.forward = own


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """``fuse`` for all modules of a model, until the context ends."""
    changed = fuse(model.modules())
    try:
        yield
    finally:
        for module in changed:
            _restore(module)


def _original(module: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
    """``own``: a forward that stood in the place of the class's, or None."""
    return type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)


def _can_compute(x: Any) -> bool:
    spread = hasattr(x, "to_local")  # over processes: such a module stays as it is
    return not spread and (kernels.can_be_imported() if x.is_cuda else recompute.is_wanted(x))


# -- norms -------------------------------------------------------------------------------------------------------------


def _may_be_norm(module: nn.Module) -> bool:
    return (
        NORM.matches(module)
        and type(module) is not nn.LayerNorm
        and isinstance(_epsilon(module), float)
        and _suits(module.weight)
    )


def _suits(x: Any) -> bool:
    return _can_compute(x) and x.shape[-1] <= LARGEST and (x.dtype == torch.bfloat16 or not on_accelerator(x))


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


def _norm(module: nn.Module, own: Any, x: Tensor) -> Tensor:
    gain: Any = module.weight
    # Compilers make kernels of their own.
    if not _suits(x) or gain.dtype != x.dtype or torch.compiler.is_compiling():
        return _original(module, own, x)
    return RMSNorm.apply(x, gain, _epsilon(module))


def _computes_the_same(module: nn.Module) -> bool:
    """Equal but for a rounding in the last place, which the order of additions decides."""
    if module.weight.is_meta:
        with _with_numbers(module):
            return _computes_the_same(module)
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(16, weight.numel(), generator=generator, device=weight.device)
    x = (x * torch.logspace(-4, 3, 16, device=weight.device)[:, None]).to(weight.dtype)
    with torch.no_grad():
        fused, wanted = _norm(module, None, x).float(), module.forward(x).float()
    close = (fused - wanted).abs() <= 2**-7 * wanted.abs()
    return bool(close.all()) and float((fused == wanted).float().mean()) > 0.99


@contextlib.contextmanager
def _with_numbers(module: nn.Module) -> Iterator[None]:
    """Give a norm on the meta device a weight on the CPU, to compute with as on an accelerator."""
    weight: Any = module.weight
    module._parameters["weight"] = nn.Parameter(torch.linspace(0.5, 1.5, weight.numel()).to(weight.dtype))
    try:
        with recompute.force(True):
            yield
    finally:
        module._parameters["weight"] = weight


# -- gated MLPs --------------------------------------------------------------------------------------------------------


def _is_gated(module: nn.Module) -> bool:
    """Liger's classes have the activation in their kernels."""
    has_activation = hasattr(module, "act_fn") or type(module).__module__.startswith("liger_kernel")
    return has_activation and all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down"))


def _may_be_gated(module: nn.Module) -> bool:
    parameter = next(module.parameters(), None) if _is_gated(module) else None
    return parameter is not None and _can_compute(parameter)


def _gated_mlp(module: Any, own: Any, activation: str, *args: Any, **kwargs: Any) -> Any:
    act = getattr(module, "act_fn", ACTIVATIONS[activation][0])
    if len(args) != 1 or kwargs or _is_hooked(act) or torch.compiler.is_compiling():
        return _original(module, own, *args, **kwargs)
    (x,) = args
    gate, up = module.gate_proj(x), module.up_proj(x)
    if _can_compute(gate) and gate.shape == up.shape and gate.dtype == up.dtype:
        return module.down_proj(GatedProduct.apply(gate, up, activation))
    return module.down_proj(act(gate) * up)


def _is_hooked(act: Any) -> bool:
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(getattr(act, name, None) for name in hooks)


def _activation(module: Any) -> str | None:
    """Which one, if the class's forward is down(act(gate(x)) · up(x)): tried out with simple maps in place of the three."""
    device = next(module.parameters()).device
    z = torch.linspace(-9, 9, 96, device="cpu" if device.type == "meta" else device).reshape(1, 4, 24)
    maps = SimpleNamespace(
        gate_proj=lambda x: 0.9 * x + 0.1,
        up_proj=lambda x: 2 - x,
        down_proj=lambda x: 3 * x + 1,
        act_fn=getattr(module, "act_fn", None),
    )
    try:
        with torch.no_grad():
            computed = type(module).forward(maps, z)
    except Exception:  # it needs more of itself, so it is another computation
        return None
    for name, (act, _) in ACTIVATIONS.items():
        wanted = maps.down_proj(act(maps.gate_proj(z)) * maps.up_proj(z))
        if (
            isinstance(computed, Tensor)
            and computed.shape == z.shape
            and torch.allclose(computed, wanted, rtol=1e-5, atol=1e-5)
        ):
            return name
    return None


# -- rotary position embeddings ----------------------------------------------------------------------------------------

ROTATE = "apply_rotary_pos_emb"  # what modelling files of Transformers call it


def _rotates(module: nn.Module) -> bool:
    """Whether the class's forward calls a function of its own file that rotates queries and keys as ``Rotation`` does."""
    return _rotating_forward(type(module)) is not None


def _rotating_forward(kind: type[nn.Module]) -> Callable[..., Any] | None:
    forward = kind.forward
    of_file: Any = getattr(forward, "__globals__", {}).get(ROTATE)  # Liger puts its own there
    if (kind, of_file) not in _rotating:
        calls = type(forward) is FunctionType and ROTATE in forward.__code__.co_names and of_file is not None
        _rotating[kind, of_file] = _with_rotation(forward, of_file) if calls and _rotates_the_same(of_file) else None
    return _rotating[kind, of_file]


def _may_rotate(module: nn.Module) -> bool:
    parameter = next(module.parameters(), None)
    return parameter is not None and _can_compute(parameter)


def _with_rotation(forward: Any, of_file: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, in which the name means ``_rotate``. The file's own stays as it is for all other models."""
    names = {**forward.__globals__, ROTATE: functools.partial(_rotate, of_file)}
    again = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    again.__kwdefaults__ = forward.__kwdefaults__
    return again


def _rotate(of_file: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if len(args) == 4 and not kwargs and _can_rotate(*args):
        return rotation.Rotation.apply(*args)
    return of_file(*args, **kwargs)


def _can_rotate(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    return (
        all(_can_compute(x) and x.dtype == q.dtype and x.shape[-1] == q.shape[-1] for x in (q, k, cos, sin))
        and q.ndim == k.ndim == 4
        and cos.ndim == sin.ndim == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1] == q.shape[2] == k.shape[2]
        and not (cos.requires_grad or sin.requires_grad)
        and (not q.is_cuda or q.dtype in (torch.bfloat16, torch.float16, torch.float32))
        and q.shape[-1] % 2 == 0
        and q.shape[-1] <= rotation.LARGEST
    )


def _rotates_the_same(of_file: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(2, *size, 8, generator=generator, dtype=torch.float64) for size in ((3, 5), (1, 5), (5,), (5,))
    )
    try:
        found = of_file(q, k, cos, sin)
        return all(
            torch.allclose(x, rotation.rotated_reference(own, cos, sin)) for x, own in zip(found, (q, k), strict=True)
        )
    except Exception:  # it takes something else, so it is another computation
        return False


def _rotated_attention(module: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
    forward = _rotating_forward(type(module))
    if forward is None or torch.compiler.is_compiling():
        return _original(module, own, *args, **kwargs)
    return forward(module, *args, **kwargs)
