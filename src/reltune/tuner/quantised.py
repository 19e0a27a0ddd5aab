"""Linear maps whose weight is held in 4 or 8 bits: nothing can be written into it that would survive.

The trained columns and rows are added beside the product, y = x Ŵᵀ + x[:, idx] (D − Ŵ[:, idx])ᵀ, in the forward and so in
the backward pass, with Ŵ the dequantised weight. This equals a product with the columns of Ŵ set to zero and x[:, idx] Dᵀ
added, and leaves the packed numbers as they are: adapters are switched and disabled at no cost, and the base is always
its own. Ŵ is made once, to take the columns from.

Single weights are written into the copy that a product unpacks anyhow (ops/unpacked_product.py). Of bitsandbytes' 8 bits that copy
takes the place of the integer product, which on a GPU rounds its input in the forward pass, though not in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from reltune.errors import InputError
from reltune.layers.quantised import dequantised, product_dtypes
from reltune.tuner.linear import ReltuneLinear

MERGED_IS_ROUNDED = (
    "an adapter cannot be merged into a quantised weight, which would round what was trained; load the base model "
    "without quantisation and merge there, or run the adapter unmerged."
)


class ReltuneQuantisedLinear(ReltuneLinear):
    """bitsandbytes' Linear4bit and Linear8bitLt, and nn.Linear with a weight-only torchao tensor."""

    sharded = False  # nothing is written into it anyhow

    def _shape(self) -> tuple[int, ...]:
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        return base.out_features, base.in_features

    def _pristine_weight(self) -> Tensor:
        return dequantised(self.get_base_layer())

    def _settle(self, base_only: bool = False) -> None:
        if self.originals:
            self._refresh()

    def _base_loaded(self, beneath: Tensor) -> None:
        with torch.no_grad():
            weight = self._pristine_weight()
            for name in self.originals:
                self._check_indices(name)
                self._remember(name, weight)
                self._awaited.discard(name)

    def _base_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self.base_layer(x)
        own = self._base_bias()
        return y if bias is None or own is None or bias is own else y + (bias - own).to(y.dtype)

    def _change_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def _copies_weight(self, names: list[str]) -> bool:
        return any(name in self.reltune_elements for name in names)

    def _product_dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        return product_dtypes(self.get_base_layer(), x)

    def _unpacking(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        return functools.partial(dequantised, self.get_base_layer(), dtype)

    def train(self, mode: bool = True) -> ReltuneQuantisedLinear:
        super().train(mode)
        if self.weight.device.type == "cpu":
            self.base_layer.training = True  # bitsandbytes' 8-bit product in evaluation mode rounds its input
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise InputError(MERGED_IS_ROUNDED)
