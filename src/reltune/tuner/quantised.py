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
from typing import Any

import torch
from torch import Tensor, nn

from reltune.errors import InputError
from reltune.layers.quantised import dequantised, product_dtypes
from reltune.ops.unpacked_product import Chosen, UnpackedProduct
from reltune.tuner.layer import combined, in_place
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

    def _product(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        # One that brings its weight here from elsewhere (accelerate) has a forward of its own: then all is beside the product.
        if "forward" in vars(base) or not any(name in self.reltune_elements for name in names):
            return super()._product(x, names, *args, **kwargs)
        partial = [name for name in names if name in self.originals]
        self._check_loaded(partial)
        with in_place(base, {"forward": functools.partial(self._unpacked_product, names)}):
            y = self.base_layer(x)  # with its hooks
        for name in partial:
            columns, rows, _ = self._values_of(name)
            if columns is not None or rows is not None:
                y = y + self._correction(x, name, (columns, rows, None))
        return y

    def _unpacked_product(self, names: list[str], x: Tensor) -> Tensor:
        """The base layer's output with the single weights, and the bias, of these adapters."""
        dtype, of_output = product_dtypes(self.get_base_layer(), x)
        adapters = [name for name in names if name in self.reltune_elements]
        chosen = [Chosen(self.originals[name].places, self.originals[name].elements) for name in adapters]
        bias = self._base_bias()
        if bias is not None:
            bias = combined(bias, self.reltune_bias, [name for name in names if name in self.reltune_bias])
        values = [self.reltune_elements[name] for name in adapters]
        y: Tensor = UnpackedProduct.apply(x, bias, self._unpacking(dtype), dtype, chosen, *values)
        return y.to(of_output)

    def _unpacking(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        """What gives the base's own weight, a contiguous copy in ``dtype``."""
        return functools.partial(dequantised, self.get_base_layer(), dtype)

    def train(self, mode: bool = True) -> ReltuneQuantisedLinear:
        super().train(mode)
        if self.weight.device.type == "cpu":
            self.base_layer.training = True  # bitsandbytes' 8-bit product in evaluation mode rounds its input
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise InputError(MERGED_IS_ROUNDED)
