"""Linear maps: nn.Linear, and Transformers' Conv1D, which stores its weight as (in, out)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from reltune.ops.attach import AttachColumns, AttachRows
from reltune.ops.join_inputs import joined_linear, joins
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.written_weight import Originals


class ReltuneLinear(ReltuneLayer):
    """nn.Linear."""

    def _base_product(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        # Nothing of the module's own, such as hooks, is to be passed over.
        plain = type(base) is nn.Linear and "forward" not in base.__dict__ and not base._forward_hooks
        plain = plain and not (base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        if plain and not args and not kwargs and not self.sharded and joins(x, base.weight, base.bias):
            return joined_linear(x, base.weight, base.bias)
        return super()._base_product(x, *args, **kwargs)

    def attach_columns(self, y: Tensor, x: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None) -> Tensor:
        return AttachColumns.apply(y, x, columns, idx, row_idx)

    def attach_rows(self, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor) -> Tensor:
        return AttachRows.apply(y, x, rows, idx)

    def change_of_output(self, x: Tensor, kept: Originals, columns: Tensor | None, rows: Tensor | None) -> Tensor:
        total = None if columns is None else F.linear(x.index_select(-1, kept.column_idx), columns)
        if rows is None:
            assert total is not None
            return total
        part = F.linear(x, rows)
        if total is None:
            total = part.new_zeros(*part.shape[:-1], self.out_features)
        return total.index_add(-1, kept.row_idx, part)


class ReltuneLinearConv1D(ReltuneLinear):
    """Transformers' Conv1D. PEFT's "all-linear" knows wrapped linear maps by the word in the name of the class."""

    column_dim, row_dim = 0, 1

    def attach_columns(self, y: Tensor, x: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None) -> Tensor:
        return super().attach_columns(y, x, columns.mT, idx, row_idx)

    def attach_rows(self, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor) -> Tensor:
        return super().attach_rows(y, x, rows.mT, idx)

    def change_of_output(self, x: Tensor, kept: Originals, columns: Tensor | None, rows: Tensor | None) -> Tensor:
        columns, rows = (None if part is None else part.mT for part in (columns, rows))
        return super().change_of_output(x, kept, columns, rows)
