"""2-D convolutions: columns are input channels, rows are filters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reltune.ops.attach_conv2d import (
    AttachConvColumns,
    AttachConvRows,
    Convolution,
    columns_of,
    outside_rows,
    put_columns,
)
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.written_weight import Originals


class ReltuneConv2d(ReltuneLayer):
    """nn.Conv2d. With groups a column belongs to one group and its tensor is (out/groups, c, h, w)."""

    copies_by_index = False  # columns lie in every group

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features *= self._conv.groups

    @property
    def _conv(self) -> nn.Conv2d:
        base = self.get_base_layer()
        assert isinstance(base, nn.Conv2d)
        return base

    def why_no_lora(self, adapter_name: str) -> str:
        conv = self._conv
        if conv.groups > 1 or set(conv.dilation) != {1} or conv.padding_mode != "zeros":
            return (
                "belongs to a convolution with groups, dilation or a padding mode of its own, which a LoRA adapter cannot "
                "carry; use --to merged"
            )
        return super().why_no_lora(adapter_name)

    def _columns_of(self, weight: Tensor, idx: Tensor) -> Tensor:
        return columns_of(weight, idx, self._conv.groups)

    def _put_columns(self, weight: Tensor, idx: Tensor, columns: Tensor) -> None:
        put_columns(weight, idx, columns, self._conv.groups)

    def _outside_rows(self, columns: Tensor, kept: Originals) -> Tensor:
        if kept.row_idx is None:
            return columns
        return outside_rows(columns, kept.column_idx, kept.row_idx, self._conv.groups, self.weight.shape[1])

    def attach_columns(self, y: Tensor, x: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None) -> Tensor:
        return AttachConvColumns.apply(y, x, columns, idx, row_idx, Convolution.of(self._conv))

    def attach_rows(self, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor) -> Tensor:
        return AttachConvRows.apply(y, x, rows, idx, Convolution.of(self._conv))

    def change_of_output(self, x: Tensor, kept: Originals, columns: Tensor | None, rows: Tensor | None) -> Tensor:
        convolve = self._conv._conv_forward
        if self._conv.groups > 1:  # one more convolution of the full size
            change = torch.zeros_like(self.weight)
            if columns is not None:
                change = change.index_put(self._cells(kept.column_idx), columns.transpose(0, 1))
            if rows is not None:
                change = change.index_add(0, kept.row_idx, rows)
            return convolve(x, change, None)
        total = None if columns is None else convolve(x.index_select(-3, kept.column_idx), columns, None)
        if rows is None:
            assert total is not None
            return total
        part = convolve(x, rows, None)
        if total is None:
            shape = list(part.shape)
            shape[-3] = self.out_features
            total = part.new_zeros(shape)
        return total.index_add(-3, kept.row_idx, part)

    def _cells(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Where columns lie in the weight: filters (c, out/groups), and the channel (c, 1) inside their group."""
        per_group, out = self.weight.shape[1], self.out_features // self._conv.groups
        filters = (idx // per_group)[:, None] * out + torch.arange(out, device=idx.device)
        return filters, (idx % per_group)[:, None]
