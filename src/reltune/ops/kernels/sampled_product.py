"""Chosen numbers of a product aᵀ b, without the rest of it: the sampled dense-dense product (SDDMM), as a Triton kernel.

A place's number is the sum over T vectors of a[t, row] · b[t, column], in float32 (float64 for float64). Read in place, every
number would be a memory access of its own; read from transposed copies, a place costs 2·T numbers from the level-2 cache.
So a program goes through a share of the vectors, CHUNK of them at a time, and reads from transposed copies of its own that
stay in the caches (the places are cut into tiles for that, see ops/attach_elements.py's `Tiles`):

- Of the side with fewer features it copies as many as the level-1 cache holds, and keeps them for the chunk.
- Of the other side it copies one tile's part after the other, and for each place of the tile adds up CHUNK products and
  adds the sum to the place's. The places are in the order of this side, which so passes by once.

a and b are read in the layout that they have, and from memory once where one side fits. The shares of the vectors have sums
of their own, which are added up at the end, always in one order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

if TYPE_CHECKING:
    from reltune.ops.attach_elements import Tiles


class Launch(NamedTuple):
    """``chunk``: bytes of each feature at a time, a sector of the cache. ``step``: bytes that a thread loads at once, so that
    it has a place of its own. ``programs``: per multiprocessor, which share its level-1 cache. ``places``, ``copied``:
    places and features that a program works on at once."""

    chunk: int = 32
    step: int = 16
    programs: int = 1
    warps: int = 32
    places: int = 2048
    copied: int = 1024


LAUNCH = Launch()
FEWEST_PROGRAMS = 8  # on a device that does not say how many multiprocessors it has


@triton.jit
def copy_transposed(  # type: ignore[no-untyped-def]
    x,
    copy,
    first,
    start,
    vectors,
    features,
    width,
    stride,
    feature_stride,
    i,
    CHUNK: tl.constexpr,
    COPIED: tl.constexpr,
):
    """copy[f, t] = x[start + t, first + f] for COPIED of ``width`` features from the i-th; 0 beyond the last vector."""
    t = start + tl.arange(0, CHUNK)
    f = i + tl.arange(0, COPIED)
    inside = (t[:, None] < vectors) & (f[None, :] < width) & (first + f[None, :] < features)
    part = tl.load(
        x + t[:, None].to(tl.int64) * stride + (first + f[None, :]).to(tl.int64) * feature_stride,
        mask=inside,
        other=0.0,
    )
    to = copy + f[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    tl.store(to, tl.trans(part), mask=f[:, None] < width)


@triton.jit
def dot(row, column, wide: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of the products of CHUNK numbers from each pair of pointers, STEP of them at a time."""
    if row.dtype.element_ty == tl.bfloat16:
        # Two numbers in 32 bits: each is the upper half of a float32, one instruction away instead of one and a half.
        row, column = row.to(tl.pointer_type(tl.int32)), column.to(tl.pointer_type(tl.int32))
        total = tl.zeros([row.shape[0], STEP // 2], dtype=wide)
        for first in tl.static_range(0, CHUNK // 2, STEP // 2):
            t = first + tl.arange(0, STEP // 2)[None, :]
            a, b = tl.load(row + t), tl.load(column + t)
            total += (a << 16).to(tl.float32, bitcast=True) * (b << 16).to(tl.float32, bitcast=True)
            total += (a & -65536).to(tl.float32, bitcast=True) * (b & -65536).to(tl.float32, bitcast=True)
    else:
        total = tl.zeros([row.shape[0], STEP], dtype=wide)
        for first in tl.static_range(0, CHUNK, STEP):
            t = first + tl.arange(0, STEP)[None, :]
            total += tl.load(row + t).to(wide) * tl.load(column + t).to(wide)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["vectors", "places", "tiles"])  # or maps of one shape would be compiled twice
def sampled_kernel(  # type: ignore[no-untyped-def]
    passing,
    kept,
    codes,
    starts,
    workspace,
    sums,
    vectors,
    passing_features,
    kept_features,
    passing_stride,
    passing_feature_stride,
    kept_stride,
    kept_feature_stride,
    places,
    tile_passing,
    tile_kept,
    tiles,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    KEPT_BITS: tl.constexpr,
    PLACES: tl.constexpr,
    COPIED: tl.constexpr,
):
    """sums[share, place] for the ``program_id(0)``-th part of the kept side and the share ``program_id(1)`` of the vectors."""
    part, share, shares = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    number = (share * tl.num_programs(0) + part).to(tl.int64)
    right = workspace + number * (tile_passing + tile_kept) * CHUNK
    left = right + tile_kept * CHUNK
    own = sums + share.to(tl.int64) * places
    for chunk in range(share, tl.cdiv(vectors, CHUNK), shares):
        start = chunk * CHUNK
        tl.debug_barrier()  # the copy is read no more
        for i in range(0, tile_kept, COPIED):
            copy_transposed(
                kept,
                right,
                part * tile_kept,
                start,
                vectors,
                kept_features,
                tile_kept,
                kept_stride,
                kept_feature_stride,
                i,
                CHUNK,
                COPIED,
            )
        for tile in range(0, tiles):
            begin, end = tl.load(starts + part * tiles + tile), tl.load(starts + part * tiles + tile + 1)
            tl.debug_barrier()
            for i in range(0, tl.where(begin < end, tile_passing, 0), COPIED):
                copy_transposed(
                    passing,
                    left,
                    tile * tile_passing,
                    start,
                    vectors,
                    passing_features,
                    tile_passing,
                    passing_stride,
                    passing_feature_stride,
                    i,
                    CHUNK,
                    COPIED,
                )
            tl.debug_barrier()  # the copies are complete
            for at in range(begin, end, PLACES):
                place = at + tl.arange(0, PLACES)
                inside = place < end
                total = tl.load(own + place, mask=inside & (chunk > share), other=0.0)
                code = tl.load(codes + place, mask=inside, other=0)
                one = left + ((code >> KEPT_BITS) * CHUNK)[:, None]
                other = right + ((code & ((1 << KEPT_BITS) - 1)) * CHUNK)[:, None]
                total += dot(one, other, sums.dtype.element_ty, CHUNK, STEP)
                tl.store(own + place, total, mask=inside)


def sampled_product(a: Tensor, b: Tensor, tiles: Tiles, launch: Launch | None = None) -> Tensor:
    """(aᵀ b) at the places, in float32 (float64 for float64), for a (T, rows), b (T, columns) and the tiles' places (n,).

    The reference is ops/attach_elements.py's `sampled_product_reference`.
    """
    launch = launch or LAUNCH
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    places = len(tiles.codes)
    if not places or not len(a):
        return torch.zeros(places, device=a.device, dtype=wide)
    passing, kept = (b, a) if tiles.keeps_rows else (a, b)
    chunk, step = launch.chunk // a.element_size(), launch.step // a.element_size()
    shares = max(1, min(triton.cdiv(len(a), chunk), launch.programs * _multiprocessors(a.device) // tiles.parts))
    workspace = torch.empty(shares * tiles.parts * (tiles.passing + tiles.kept) * chunk, device=a.device, dtype=a.dtype)
    sums = torch.empty(shares, places, device=a.device, dtype=wide)
    with torch.cuda.device_of(a):
        sampled_kernel[(tiles.parts, shares)](
            passing,
            kept,
            tiles.codes,
            tiles.starts,
            workspace,
            sums,
            len(a),
            passing.shape[1],
            kept.shape[1],
            passing.stride(0),
            passing.stride(1),
            kept.stride(0),
            kept.stride(1),
            places,
            tiles.passing,
            tiles.kept,
            (len(tiles.starts) - 1) // tiles.parts,
            CHUNK=chunk,
            STEP=step,
            KEPT_BITS=tiles.KEPT_BITS,
            PLACES=launch.places,
            COPIED=launch.copied,
            num_warps=launch.warps,
            num_stages=1,  # what a loop reads must not be read before the barrier
        )
    total = sums.sum(0)
    return total if tiles.order is None else total.index_select(0, tiles.order)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return FEWEST_PROGRAMS
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
