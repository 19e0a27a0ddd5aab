"""Linear maps: nn.Linear, and Transformers' Conv1D, which stores its weight as (in, out)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reltune.ops import autocast
from reltune.ops.attach import AttachColumns, AttachRows
from reltune.ops.join_inputs import joined_linear, joins
from reltune.ops.unpacked_product import Chosen, UnpackedProduct
from reltune.tuner.layer import ReltuneLayer, combined, in_place
from reltune.tuner.written_weight import Originals


class ReltuneLinear(ReltuneLayer):
    """nn.Linear."""

    def _product(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        # One that brings its weight here from elsewhere (accelerate) has a forward of its own: then all is beside the product.
        if "forward" in vars(base) or not self._copies_weight(names):
            return super()._product(x, names, *args, **kwargs)
        partial = [name for name in names if name in self.originals]
        self._check_loaded(partial)
        with in_place(base, {"forward": functools.partial(self._product_of_copy, names)}):
            y = self.base_layer(x)  # with its hooks
        for name in partial:
            columns, rows, _ = self._values_of(name)
            if columns is not None or rows is not None:
                y = y + self._correction(x, name, (columns, rows, None))
        return y

    def _copies_weight(self, names: list[str]) -> bool:
        """Whether single weights of these adapters are put into a copy of the weight, which itself cannot be written into."""
        whole = any(name in self.reltune_weight for name in names)
        chosen = any(name in self.reltune_elements for name in names)
        return chosen and not whole and self.sharded and self._written is None

    def _product_of_copy(self, names: list[str], x: Tensor) -> Tensor:
        """The base layer's output with the single weights, and the bias, of these adapters."""
        dtype, of_output = self._product_dtypes(x)
        adapters = [name for name in names if name in self.reltune_elements]
        chosen = [self._chosen(name) for name in adapters]
        bias = self._base_bias()
        if bias is not None:
            bias = combined(bias, self.reltune_bias, [name for name in names if name in self.reltune_bias])
        values = [self.reltune_elements[name] for name in adapters]
        transposed = self._stored_transposed
        y: Tensor = UnpackedProduct.apply(x, bias, self._unpacking(dtype), transposed, dtype, chosen, *values)
        return y.to(of_output)

    def _chosen(self, adapter_name: str) -> Chosen:
        base = self._base_values(adapter_name)[2]
        assert base is not None
        return Chosen(self.originals[adapter_name].places, base)

    def _product_dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """The type in which x (…, in) is multiplied, and that of the output."""
        return (autocast.product_dtype(x),) * 2

    def _unpacking(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        """What gives the base's own weight as it is stored, a contiguous copy in ``dtype``."""
        return lambda: self.weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)

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
