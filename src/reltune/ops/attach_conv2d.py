"""Give selected columns (input channels) or rows (filters) of a 2-D convolution their gradient, at no cost in forward.

As ops/attach.py: the frozen convolution has already happened with the current values in W (out, in/groups, h, w). The
gradient is a convolution of the chosen channels alone: columns keep x[:, idx], rows keep a reference to x.

With groups, column j lies in group j // (in/groups) and is (out/groups, h, w); row o lies in group o // (out/groups).
The chosen channels are laid out group by group, as many places in each as the fullest one needs, so that one grouped
convolution over the groups that have any does all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight


class Convolution(NamedTuple):
    """What a convolution is beside its weight. ``padding`` is as F.pad takes it, and ``mode`` F.pad's."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: list[int]
    mode: str

    @classmethod
    def of(cls, module: nn.Conv2d) -> Convolution:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return cls(module.stride, module.dilation, module.groups, module._reversed_padding_repeated_twice, mode)

    def weight_gradient(self, x: Tensor, g: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
        """∂W of a weight of that shape, for x (B, in, H, W) and g (B, out, H', W')."""
        x = F.pad(x.to(g.dtype), self.padding, mode=self.mode)
        return conv2d_weight(x, shape, g, self.stride, 0, self.dilation, groups)


class AttachConvColumns(torch.autograd.Function):
    """(y (B, out, H', W'), x (B, in, H, W), columns (out/groups, c, h, w), idx (c,), row_idx (r,) or None, conv) -> y.

    Cells that also lie in a trainable row belong to the row: their gradient here is zero.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None, conv: Convolution
    ) -> Tensor:
        ctx.save_for_backward(x.index_select(-3, idx).to(y.dtype), idx, row_idx)
        ctx.conv, ctx.shape, ctx.dtype, ctx.channels = conv, columns.shape, columns.dtype, x.shape[-3]
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        selected, idx, row_idx = ctx.saved_tensors
        conv: Convolution = ctx.conv
        out, _, *kernel = ctx.shape
        x, g_used = _batched(selected), _batched(g)
        if conv.groups == 1:
            gradient = conv.weight_gradient(x, g_used, ctx.shape, 1)
        else:
            touched, slots, slot = _by_group(idx, ctx.channels // conv.groups)
            x = x.new_zeros(x.shape[0], len(touched) * slots, *x.shape[2:]).index_copy_(1, slot, x)
            g_used = _groups(g_used, conv.groups, touched)
            every = conv.weight_gradient(x, g_used, (len(touched) * out, slots, *kernel), len(touched))
            gradient = every.unflatten(0, (-1, out)).transpose(0, 1).flatten(1, 2).index_select(1, slot)
        if row_idx is not None:
            gradient = outside_rows(gradient, idx, row_idx, conv.groups, ctx.channels // conv.groups)
        return g, None, gradient.to(ctx.dtype), None, None, None


class AttachConvRows(torch.autograd.Function):
    """(y (B, out, H', W'), x (B, in, H, W), rows (r, in/groups, h, w), idx (r,), conv) -> y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor, conv: Convolution) -> Tensor:
        ctx.save_for_backward(x, idx)
        ctx.conv, ctx.shape, ctx.dtype = conv, rows.shape, rows.dtype
        return y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, idx = ctx.saved_tensors
        conv: Convolution = ctx.conv
        batch = _batched(x)
        selected = _batched(g.index_select(-3, idx))
        if conv.groups == 1:
            gradient = conv.weight_gradient(batch, selected, ctx.shape, 1)
        else:
            touched, slots, slot = _by_group(idx, g.shape[-3] // conv.groups)
            size = selected.shape[0], len(touched) * slots, *selected.shape[2:]
            g_used = selected.new_zeros(size).index_copy_(1, slot, selected)
            used = _groups(batch, conv.groups, touched)
            every = conv.weight_gradient(used, g_used, (len(touched) * slots, *ctx.shape[1:]), len(touched))
            gradient = every.index_select(0, slot)
        return g, None, gradient.to(ctx.dtype), None, None


def _batched(x: Tensor) -> Tensor:
    return x if x.ndim == 4 else x[None]


def _groups(channels: Tensor, groups: int, touched: Tensor) -> Tensor:
    """(B, all channels, …) -> the channels of the touched groups only."""
    return channels.unflatten(1, (groups, -1)).index_select(1, touched).flatten(1, 2)


def _by_group(idx: Tensor, per_group: int) -> tuple[Tensor, int, Tensor]:
    """The groups that hold an index, the places each gets, and the place (c,) of each index in that order."""
    touched, group = torch.unique(idx // per_group, return_inverse=True)
    counts = torch.bincount(group)
    order = group.argsort(stable=True)
    rank = torch.empty_like(idx)
    rank[order] = torch.arange(len(idx), device=idx.device) - (counts.cumsum(0) - counts)[group[order]]
    slots = int(counts.max())
    return touched, slots, group * slots + rank


def columns_of(weight: Tensor, idx: Tensor, groups: int) -> Tensor:
    """The columns (out/groups, c, h, w) of a weight (out, in/groups, h, w)."""
    if groups == 1:
        return weight.index_select(1, idx)
    per_group = weight.shape[1]
    return weight.unflatten(0, (groups, -1))[idx // per_group, :, idx % per_group].transpose(0, 1).contiguous()


def put_columns(weight: Tensor, idx: Tensor, columns: Tensor, groups: int) -> None:
    """Write columns (out/groups, c, h, w) into a weight (out, in/groups, h, w)."""
    if groups == 1:
        weight.index_copy_(1, idx, columns)
    else:
        per_group = weight.shape[1]
        weight.unflatten(0, (groups, -1))[idx // per_group, :, idx % per_group] = columns.transpose(0, 1)


def outside_rows(columns: Tensor, idx: Tensor, row_idx: Tensor, groups: int, in_per_group: int) -> Tensor:
    """Columns (out/groups, c, h, w) with zeros where they cross the rows."""
    if groups == 1:
        return columns.index_fill(0, row_idx, 0)
    out_per_group = columns.shape[0]
    row, column = ((row_idx // out_per_group)[:, None] == (idx // in_per_group)).nonzero(as_tuple=True)
    columns = columns.clone()
    columns[row_idx[row] % out_per_group, column] = 0
    return columns


def selected_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Convolution,
    columns: Tensor | None = None,
    column_idx: Tensor | None = None,
    rows: Tensor | None = None,
    row_idx: Tensor | None = None,
) -> Tensor:
    """The same map by plain autograd: the trained parts are put into a copy of W, rows over columns."""
    weight = weight.clone()
    if columns is not None and column_idx is not None:
        for place, column in enumerate(column_idx.tolist()):
            group, inside = divmod(column, weight.shape[1])
            out = weight.shape[0] // conv.groups
            weight[group * out : (group + 1) * out, inside] = columns[:, place].to(weight.dtype)
    if rows is not None and row_idx is not None:
        weight = weight.index_copy(0, row_idx, rows.to(weight.dtype))
    padded = F.pad(x, conv.padding, mode=conv.mode)
    return F.conv2d(padded, weight, bias, conv.stride, 0, conv.dilation, conv.groups)
