"""Linear maps whose frozen weight is held in float8 (layers/float8.py), with columns and single weights in full precision.

The current values D of the columns stand in for the rounded ones, so that an adapter means the same here and on the
base model in full precision. They start from the columns as they were before rounding, where these are still there: with
the first adapter, which is put in before the weight is rounded. So do single weights. A map that trains some is
multiplied unpacked, with the values written into the copy: beside a product in float8, the sparse product of 0.1% of the
weights would take what that product saves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reltune.errors import InputError
from reltune.layers.float8 import Float8Linear
from reltune.plan.plan import ModulePlan
from reltune.tuner.quantised import ReltuneQuantisedLinear


class ReltuneFloat8Linear(ReltuneQuantisedLinear):
    """Float8Linear. ``unrounded`` (out, in) is its weight before rounding, which the first adapter's values start from."""

    def __init__(self, base_layer: nn.Module, unrounded: Tensor | None = None) -> None:
        super().__init__(base_layer)
        self._unrounded = None if unrounded is None else unrounded.detach()

    @property
    def _base(self) -> Float8Linear:
        base = self.get_base_layer()
        assert isinstance(base, Float8Linear)
        return base

    def update_layer(self, adapter_name: str, units: ModulePlan, *args: Any, **kwargs: Any) -> None:
        try:
            super().update_layer(adapter_name, units, *args, **kwargs)
        finally:
            self._unrounded = None

    def _pristine_weight(self) -> Tensor:
        return self._base.dequantised() if self._unrounded is None else self._unrounded

    def why_no_lora(self, adapter_name: str) -> str:
        if adapter_name not in self.originals:
            return super().why_no_lora(adapter_name)
        return (
            "belongs to a weight that is held in float8, so that changes from the base's own columns are not known; load the base "
            "anew and the adapter with PeftModel.from_pretrained, and export that"
        )

    def _remember(self, adapter_name: str, pristine: Tensor) -> None:
        super()._remember(adapter_name, self._base.dequantised())

    def _product(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        partial = [name for name in names if name in self.originals]
        alone = len(partial) == 1 and not any(name in self.reltune_bias for name in names)
        if not alone or self.originals[partial[0]].columns is None or len(self._trained(partial[0])) > 1:
            return super()._product(x, names, *args, **kwargs)
        self._check_loaded(partial)
        kept = self.originals[partial[0]]
        return self.base_layer(x, self._get("reltune_columns", partial[0]), kept.column_idx, kept.columns)

    def _unpacking(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        return functools.partial(self._base.dequantised, dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise InputError(
            "an adapter cannot be merged into a weight held in float8, which would round what was trained; load the base "
            "model anew and the adapter with PeftModel.from_pretrained, and merge there."
        )
