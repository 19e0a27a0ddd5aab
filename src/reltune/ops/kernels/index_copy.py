"""The Triton kernel behind ops/index_copy.py. Addresses and strides are in a table on the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

FIELDS = 9
LONG, SELECTED = 64, 32  # numbers along the weight's other dimension, and along the selected one, in one step


@triton.jit
def copy_kernel(  # type: ignore[no-untyped-def]
    table, weight, values, FIELDS: tl.constexpr, LONG: tl.constexpr, SELECTED: tl.constexpr
):
    """``weight`` and ``values`` are given for their types alone; the table says where to read and write."""
    entry = table + tl.program_id(0) * FIELDS
    long = tl.load(entry + 3)
    i = tl.program_id(1) * LONG + tl.arange(0, LONG).to(tl.int64)
    if tl.program_id(1) * LONG < long:
        into = tl.load(entry).to(tl.pointer_type(weight.dtype.element_ty))
        source = tl.load(entry + 1).to(tl.pointer_type(values.dtype.element_ty))
        idx = tl.load(entry + 2).to(tl.pointer_type(tl.int64))
        count = tl.load(entry + 4)
        for start in range(0, count, SELECTED):
            j = start + tl.arange(0, SELECTED).to(tl.int64)
            inside = (i[:, None] < long) & (j[None, :] < count)
            at = tl.load(idx + j, mask=j < count, other=0)
            value = tl.load(
                source + i[:, None] * tl.load(entry + 7) + j[None, :] * tl.load(entry + 8), mask=inside, other=0.0
            )
            tl.store(
                into + i[:, None] * tl.load(entry + 5) + at[None, :] * tl.load(entry + 6),
                value.to(weight.dtype.element_ty),
                mask=inside,
            )


def copy_all(copies: Sequence[Any]) -> None:
    """``copies`` are of one device, one dtype of weights and one of values, all tensors contiguous and indices in int64."""
    rows = []
    for weight, dim, idx, values in copies:
        # By hand from the shapes: asking the tensors for their strides would take most of a switch's time.
        features = weight.shape[1]
        count = values.shape[dim]
        place = (weight.data_ptr(), values.data_ptr(), idx.data_ptr())
        if dim:
            rows.append((*place, weight.shape[0], count, features, 1, count, 1))
        else:
            rows.append((*place, features, count, 1, features, 1, features))
    first = copies[0]
    stream = torch.cuda.current_stream(first.weight.device).cuda_stream if first.weight.is_cuda else 0
    table = _on_device(tuple(rows), first.weight.device, stream)
    longest = max(row[3] for row in rows)
    with torch.cuda.device_of(first.weight):
        copy_kernel[(len(rows), triton.cdiv(longest, LONG))](
            table, first.weight, first.values, FIELDS=FIELDS, LONG=LONG, SELECTED=SELECTED
        )


@functools.lru_cache(maxsize=256)  # the same layers are written after every step
def _on_device(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """The table; one per stream, which has its copy in order with its kernels."""
    # From pinned memory, or the host would wait here for all that the device has been given before.
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
