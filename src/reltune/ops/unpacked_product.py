"""A linear map with single weights trained at their own values, whose weight cannot be written into: it is held in few bits, or spread
over processes.

    y = x Wᵀ + b,   W = Ŵ but for the chosen places, where it is the trained values

The product takes a copy of the weight, Ŵ, unpacked or gathered, that is dropped afterwards, once in the forward pass and once in the
backward pass for ∂x = g W. The values are written into that copy each time, at the cost of writing n numbers; the weight
itself is never written to. ∂values = (gᵀ x) at the places (ops/attach_elements.py), for which x is kept by reference, or made again (ops/recompute.py). The
values are kept as they were written, so that the backward pass is right whatever an optimizer or an adapter that is switched
does to them in the meantime.

Of several adapters the first one's values are written, and the changes of the others added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reltune.ops import recompute
from reltune.ops.attach_elements import Form, Places, gradient_at, is_sampled
from reltune.ops.autocast import without_autocast


class Chosen(NamedTuple):
    """One adapter's places in the weight as it is stored, and what Ŵ holds there (n,); the trained values (n,) go beside."""

    places: Places
    base: Tensor


class UnpackedProduct(torch.autograd.Function):
    """(x (…, in), bias (out,) or None, unpack, transposed, dtype, chosen, values (n,) for each of ``chosen``) -> y (…, out) in
    ``dtype``.

    ``unpack()`` gives Ŵ in ``dtype``, a contiguous copy that may be written to: (out, in), or where ``transposed`` (in, out).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        unpack: Callable[[], Tensor],
        transposed: bool,
        dtype: torch.dtype,
        chosen: Sequence[Chosen],
        *values: Tensor,
    ) -> Tensor:
        with without_autocast(x.device.type):
            # copies, since a parameter of this dtype would be changed by the optimizer
            written = [
                (own - each.base if number else own).to(dtype, copy=True)
                for number, (own, each) in enumerate(zip(values, chosen, strict=True))
            ]
            weight = _with_values(unpack(), transposed, chosen, written)
            y = F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
        ctx.trains = any(ctx.needs_input_grad[6:])
        written = written if ctx.needs_input_grad[0] else []
        if ctx.trains:
            recompute.keep(ctx, x, *written)
        else:
            ctx.save_for_backward(None, *written)
        ctx.unpack, ctx.transposed, ctx.chosen = unpack, transposed, chosen
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype, [own.dtype for own in values]
        # here, not there: the backward pass may run in another thread
        ctx.forms = ["sampled" if is_sampled(each.places, y) else "dense" for each in chosen]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *written = recompute.kept(ctx) if ctx.trains else ctx.saved_tensors
        of_x, of_bias, of_values = ctx.dtypes
        forms: list[Form] = ctx.forms
        to_x = to_bias = None
        with without_autocast(g.device.type):
            if ctx.needs_input_grad[0]:
                to_x = (g @ _with_values(ctx.unpack(), ctx.transposed, ctx.chosen, written)).to(of_x)
            if ctx.needs_input_grad[1]:
                to_bias = g.reshape(-1, g.shape[-1]).sum(0).to(of_bias)
            to_values = [
                gradient_at(g, x, each.places, ctx.transposed, form).to(dtype) if needed else None
                for each, form, dtype, needed in zip(
                    ctx.chosen, forms, of_values, ctx.needs_input_grad[6:], strict=True
                )
            ]
        return to_x, to_bias, None, None, None, None, *to_values


def _with_values(weight: Tensor, transposed: bool, chosen: Sequence[Chosen], written: Sequence[Tensor]) -> Tensor:
    """The copy of the weight, written to: the first adapter's values and the others' changes. Gives it as (out, in)."""
    flat = weight.view(-1)
    for number, (each, values) in enumerate(zip(chosen, written, strict=True)):
        index = each.places.index.long()
        if number:
            flat.index_add_(0, index, values)
        else:
            flat.index_copy_(0, index, values)
    return weight.mT if transposed else weight


def unpacked_product_reference(
    x: Tensor,
    bias: Tensor | None,
    unpacked: Tensor,
    transposed: bool,
    chosen: Sequence[Chosen],
    values: Sequence[Tensor],
) -> Tensor:
    """The same map by plain autograd, through a materialised weight."""
    flat = unpacked.flatten()
    for number, (each, own) in enumerate(zip(chosen, values, strict=True)):
        index = each.places.index.long()
        if number:
            flat = flat.index_add(0, index, (own - each.base).to(flat.dtype))
        else:
            flat = flat.index_copy(0, index, own.to(flat.dtype))
    weight = flat.view(unpacked.shape)
    return F.linear(x, weight.mT if transposed else weight, bias)
