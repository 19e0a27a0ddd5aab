"""What runs on a device in the place of what PyTorch would do on the meta device: fused attention, autocast, Liger's kernels.

On the meta device PyTorch writes attention out, with all its scores; knows no autocast; and cannot call Triton.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from reltune.cost.ledger import COUNTED
from reltune.layers.norm import NormType
from reltune.ops.rms_norm import RMSNorm
from reltune.ops.stand_in import expert, kernel

aten = torch.ops.aten
LARGEST_HEAD = 256  # features of an attention head that flash attention takes


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """With a byte for each number that says whether it stays; elsewhere PyTorch keeps factors."""
    return aten.native_dropout(x, p, True)[0] if training and p else x


def _written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float, scale: float | None) -> Tensor:
    """PyTorch's attention without a kernel of its own, which computes narrow numbers in float32, with a device's dropout."""
    half = (scale or q.shape[-1] ** -0.5) ** 0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * half) @ (k.to(wide) * half).mT
    weights = torch.softmax(scores.add_(mask.to(wide)), -1)
    return (_dropout(weights, p) @ v.to(wide)).to(q.dtype)


class _GroupedProduct(torch.autograd.Function):
    """x (tokens, in) with the matrix of each token's expert, of weight (experts, in, out): on CUDA a product for each expert, unless in
    bfloat16 (PyTorch's _grouped_mm_fallback). As many tokens for each. The tokens are kept for the gradient of the weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cuda: bool) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        ctx.cuda, ctx.shapes = cuda, (x.shape, weight.shape)
        return _by_expert(x, weight, x.new_empty(len(x), weight.shape[2]), cuda, 2 * x.numel() * weight.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (tokens, inputs), shape = ctx.shapes
        flops = 2 * tokens * inputs * shape[2]
        to_x, to_weight, _ = ctx.needs_input_grad
        return (
            _by_expert(g, weight, g.new_empty(tokens, inputs), ctx.cuda, flops) if to_x else None,
            _by_expert(g, x, g.new_empty(shape), ctx.cuda, flops, shape[0]) if to_weight else None,
            None,
        )


def _by_expert(a: Tensor, b: Tensor, result: Tensor, cuda: bool, flops: int, experts: int = 0) -> Tensor:
    """``result`` of a and b, of which each is of tokens or of ``experts`` matrices, as many as b has if not given."""
    count = experts or len(b)
    if not cuda:
        kernel([a, b, result], [], flops)
        return result
    for _ in range(count):
        parts = [t[0] if t.ndim == 3 else t[: -(-len(t) // count)] for t in (a, b, result)]
        expert(parts, flops // count)
    return result


class Kernels(TorchFunctionMode):
    """Calls the kernels that are chosen on the device: of attention, of dropout and of experts' products.

    Args:
        output: the weight of the output layer, and ``at_output`` what to call before it is used.
    """

    def __init__(self, cuda: bool, output: Tensor | None = None, at_output: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.cuda, self.output, self.at_output = cuda, output, at_output

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and self.at_output is not None and args[1] is self.output:
            self.at_output()
        if function is F.scaled_dot_product_attention and args and args[0].is_meta:
            return self._attention(*args, **kwargs)
        if function in (F.dropout, torch.dropout) and self.cuda and args[0].is_meta:
            return _dropout(*args, **kwargs)
        if function in (F.grouped_mm, torch._grouped_mm) and args[0].is_meta and args[0].dtype != torch.bfloat16:
            return _GroupedProduct.apply(
                args[0], args[1], self.cuda
            )  # on the meta device it is known of bfloat16 alone
        return function(*args, **kwargs)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # each call makes numbers of it
            attn_mask = torch.empty(attn_mask.shape, dtype=q.dtype, device=q.device)
        if self.cuda:
            fits = q.shape[-1] <= LARGEST_HEAD and q.shape[-1] == v.shape[-1]
            if attn_mask is not None:  # PyTorch writes attention out where a mask lies otherwise, as T5's positions do
                fits = fits and attn_mask.stride(-1) == 1
            if fits and q.dtype in (torch.bfloat16, torch.float16) and attn_mask is None:
                return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
            if fits and not grouped:
                bias = None if attn_mask is None else attn_mask.expand(*q.shape[:-1], k.shape[-2])
                return aten._scaled_dot_product_efficient_attention(
                    q, k, v, bias, True, dropout_p, is_causal, scale=scale
                )[0]
            if attn_mask is not None and dropout_p and not grouped:
                return _written_out(q, k, v, attn_mask, dropout_p, scale)
        elif not dropout_p and not (attn_mask is not None and attn_mask.requires_grad):
            return aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )


# What autocast computes in the narrow type, and what in float32 (PyTorch's lists, as far as models call them from Python).
_NARROW = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.addmm,
    torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm,
}  # fmt: skip
_WIDE = {
    F.softmax, F.log_softmax, F.layer_norm, F.group_norm, F.cross_entropy, F.nll_loss, F.mse_loss, torch.softmax,
    torch.layer_norm, torch.pow, Tensor.pow, Tensor.softmax, torch.rsqrt, Tensor.rsqrt, torch.exp, torch.log, torch.cumsum,
    Tensor.sum, torch.sum, Tensor.prod,
}  # fmt: skip
_WIDE_ON_CPU = {F.cross_entropy, F.nll_loss, F.mse_loss, Tensor.prod}


class Autocast(TorchFunctionMode):
    """Mixed precision: products in a narrow type, what needs a wide one in float32. Weights that train are cast once."""

    def __init__(self, dtype: torch.dtype, cuda: bool = True) -> None:
        super().__init__()
        self.dtype = dtype
        self.wide = _WIDE if cuda else _WIDE_ON_CPU
        self._casts: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _NARROW:
            args = [self._narrow(x) for x in args]
            kwargs = {name: self._narrow(x) for name, x in kwargs.items()}
        elif function in self.wide:
            args = [self._widened(x) for x in args]
        return function(*args, **kwargs)

    def _narrow(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad) or x._is_view():  # a view made without gradients is a leaf as well
            return x.to(self.dtype)
        if id(x) not in self._casts:
            self._casts[id(x)] = x.to(self.dtype)
        return self._casts[id(x)]

    @staticmethod
    def _widened(x: Any) -> Any:
        narrow = isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)
        return x.float() if narrow else x


# -- weights in few bits -----------------------------------------------------------------------------------------------

BYTES_IN_BITS = {4: 0.5 + 4 / 64, 8: 1.0}  # of a weight; nf4 has a float32 scale for 64 of them


class _Unpacked(torch.autograd.Function):
    """x Wᵀ with W unpacked for the product alone, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return x @ kernel([weight], [weight])[0].to(x.dtype).mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ kernel([ctx.weight], [ctx.weight])[0].to(g.dtype), None


def hold_in_few_bits(model: nn.Module, bits: int, whole: Collection[str]) -> None:
    """Let the linear maps of a model on the meta device be held and computed as bitsandbytes does, except in ``whole`` modules."""
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or any(name == w or name.startswith(f"{w}.") for w in whole):
            continue
        module.weight.requires_grad_(False)
        scales = 4 * module.out_features if bits == 8 else 0
        setattr(module.weight, COUNTED, int(module.weight.numel() * BYTES_IN_BITS[bits]) + scales)
        module.forward = functools.partial(_few_bits, module)  # type: ignore[method-assign]


def _few_bits(module: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = _Unpacked.apply(x, module.weight)
    return y if module.bias is None else y + module.bias


# -- Liger's kernels ---------------------------------------------------------------------------------------------------


class _LigerGated(torch.autograd.Function):
    """silu(gate) · up; the gradients take the place of what was kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernel([gate, up], [gate])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        kernel([g, gate, up, gate, up], [])
        return gate.detach(), up.detach()


class _LigerRope(torch.autograd.Function):
    """Rotates queries and keys where they are, and their gradients too."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        kernel([q, q, k, k], [])
        return q.detach(), k.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_q: Tensor, to_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kernel([to_q, to_q, to_k, to_k], [])
        return to_q, to_k, None, None


class _LigerLoss(torch.autograd.Function):
    """Cross-entropy of x Wᵀ in chunks of tokens, whose gradients are computed on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        tokens, hidden = x.shape
        chunks = -(-weight.shape[0] // hidden)
        size = min(tokens, 1 << (-(-tokens // chunks) - 1).bit_length())
        to_x = torch.zeros_like(x)
        to_weight = torch.zeros_like(weight) if weight.requires_grad else None
        for start in range(0, tokens, size):
            part = x[start : start + size]
            logits = part @ weight.t()
            kernel([logits, logits], [])
            to_x[start : start + size] = logits @ weight
            if to_weight is not None:
                to_weight.addmm_(logits.t().to(to_weight.dtype), part)
        ctx.save_for_backward(to_x, to_weight)
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None]:
        to_x, to_weight = ctx.saved_tensors
        kernel([to_x, to_x], [])
        return to_x.detach(), None if to_weight is None else to_weight.detach()


@contextlib.contextmanager
def liger(model: nn.Module) -> Iterator[None]:
    """Let a decoder on the meta device run as it does with Liger's kernels: norms, gated MLPs, rotation and loss."""
    changed: list[tuple[nn.Module, Any]] = []

    def become(module: nn.Module, forward: Any) -> None:
        if "forward" not in module.__dict__:
            changed.append((module, None))
            module.forward = forward

    with contextlib.ExitStack() as stack:
        norm = NormType()
        for module in model.modules():
            rotates = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
            if norm.matches(module) and not isinstance(module, nn.LayerNorm):
                become(module, _norm_of(module))
            elif all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down")):
                become(module, _gated_of(module))
            if (
                rotates is not None
                and not isinstance(rotates, mock.Mock)
                and type(module).__name__.endswith("Attention")
            ):
                place = f"{type(module).__module__}.apply_rotary_pos_emb"
                if getattr(rotates, "__name__", "") != "_rotated":
                    stack.enter_context(mock.patch(place, _rotated))
            if module is model and hasattr(module, "lm_head"):
                become(module, _loss_of(module))
        try:
            yield
        finally:
            for module, _ in changed:
                module.__dict__.pop("forward", None)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> Any:
    return _LigerRope.apply(q, k, cos, sin)


def _norm_of(module: Any) -> Any:
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", 1e-6)
    forward = lambda x: RMSNorm.apply(x, module.weight, epsilon)  # noqa: E731
    return _marked(forward)


def _gated_of(module: Any) -> Any:
    return _marked(lambda x: module.down_proj(_LigerGated.apply(module.gate_proj(x), module.up_proj(x))))


def _loss_of(module: Any) -> Any:
    def forward(*args: Any, labels: Any = None, **kwargs: Any) -> Any:
        hidden = module.model(*args, **kwargs)[0]
        return SimpleNamespace(loss=_LigerLoss.apply(hidden.flatten(0, -2), module.lm_head.weight))

    return _marked(forward)


def _marked(forward: Any) -> Any:
    """As if Liger had defined it: reltune's own fused operators take the place of Liger's (layers/fused.py)."""
    forward.__module__ = "liger_kernel.stand_in"
    return forward
