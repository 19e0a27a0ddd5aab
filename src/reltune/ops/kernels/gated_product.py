"""act(gate) · up and its gradients, each in one pass over memory: Triton kernels of ops/gated_product.py.

Computed in float32, and rounded to the operands' type after the activation, after g · up and at the end, as PyTorch's
operations do one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

BLOCK = 2048  # numbers of a program


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """act(z) and act'(z) in float32."""
    if ACTIVATION == "silu":
        share = 1.0 / (1.0 + tl.exp(-z))
        value, slope = z * share, share * (1.0 + z * (1.0 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value, slope = z * share, share + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:  # gelu by a tanh, which is 2/(1 + exp(−2u)) − 1
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        share = 1.0 / (1.0 + tl.exp(-2.0 * u))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
        value, slope = z * share, share + 2.0 * z * share * (1.0 - share) * inner
    return value, slope


@triton.jit
def forward_kernel(gate, up, out, numbers, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    value, _ = activated(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    value = value.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + at, value * tl.load(up + at, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def backward_kernel(g, gate, up, to_gate, to_up, numbers, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    value, slope = activated(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    value = value.to(to_up.dtype.element_ty).to(tl.float32)
    own = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    product = own * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(to_gate + at, product.to(to_gate.dtype.element_ty).to(tl.float32) * slope, mask=inside)
    tl.store(to_up + at, own * value, mask=inside)


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _launch(forward_kernel, gate, up, out, activation=activation)
    return out


def gated_product_gradients(g: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    g, gate, up = g.contiguous(), gate.contiguous(), up.contiguous()
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    _launch(backward_kernel, g, gate, up, to_gate, to_up, activation=activation)
    return to_gate, to_up


def _launch(kernel: Any, *tensors: Tensor, activation: str) -> None:
    numbers = tensors[0].numel()
    if numbers:
        with torch.cuda.device_of(tensors[0]):
            kernel[(triton.cdiv(numbers, BLOCK),)](*tensors, numbers, ACTIVATION=activation, BLOCK=BLOCK, num_warps=8)
