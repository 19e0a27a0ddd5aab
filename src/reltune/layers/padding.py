"""Which positions of a batch are not padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mask_of(positions: Sequence[int], mask: Tensor | None) -> Tensor | None:
    """The attention mask in the shape of these positions, or None where it is not a mask of them."""
    if mask is None:
        return None
    return next((form for form in (mask, mask.flatten()) if form.shape == torch.Size(positions)), None)


def without_padding(values: Tensor, mask: Tensor | None, examples: int) -> Tensor:
    """Rows (n, features) in float64 of values (…, features), without padding where the mask is one of their positions."""
    wide = in_float64(values)
    if wide.ndim > 2 and len(wide) == 1:  # looked up once for all examples
        wide = wide.expand(examples, *wide.shape[1:])
    real = mask_of(wide.shape[:-1], mask)
    return wide.reshape(-1, wide.shape[-1]) if real is None else wide[real.bool()]


def in_float64(values: Tensor) -> Tensor:
    """A copy in float64, or in float32 on a device that has no wider type."""
    return values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)
