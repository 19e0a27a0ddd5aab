"""A matrix a few rows at a time in a wider number format, so that no wide copy of all of it is ever made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Per block: 256 KiB in float32. Larger ones left holes in the heap that results of a few KiB then kept open (20 MB per layer
# of ten), and took twice as long, out of the cache.
NUMBERS = 1 << 16
# Of a block that goes into a product: 32 MiB in float64, which malloc gives back to the system when it is freed.
PRODUCT_NUMBERS = 1 << 22


def row_blocks(matrix: Tensor, dtype: torch.dtype, numbers: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Give the matrix block by block: the slice of rows, and these rows in ``dtype`` (views, if it has that type already)."""
    rows, columns = matrix.shape
    step = max(1, (numbers or NUMBERS) // max(1, columns))
    for start in range(0, rows, step):
        at = slice(start, min(start + step, rows))
        yield at, matrix[at].to(dtype)
