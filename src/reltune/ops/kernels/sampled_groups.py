"""Chosen numbers of a product aᵀ b from vectors in shared memory: the sampled dense-dense product, as a CUDA kernel.

Of a and b, the one with fewer features is held: at most HELD of its features at a time. The places are cut into groups, each
a run of the other's features, so that both sides of a group fit shared memory for 8 vectors at a time. A block of threads
takes a group and a share of the vectors, keeps its sums in registers, and reads both numbers of a place from shared memory,
where a feature's 8 vectors lie in one piece. a and b are read once per group from memory, in their own order, without a copy.

Shared memory answers 8 threads at a time, if their features lie in different banks: the places of a group are put into an
order in which they mostly do. Sums are in float32, and the shares are added up in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from reltune.ops.kernels.cuda import compiled

# As sampled_groups.cu is compiled: threads of a block, sets of places that each of its warps works on, octets of features
# in shared memory.
THREADS, SETS, OCTETS = 512, 16, 896
SET = 64  # places that a warp works on together, in UNITS of 16
UNITS = 4
PLACES = THREADS // 32 * SETS * SET  # of a group
VECTORS = 8  # of a feature in one piece
OCTET = 8  # features that are read together
HELD = 4096
BANKS = 8  # pieces of 16 bytes that are read at a time
# The features with their vectors in one piece, the same as they come, and a barrier.
SHARED_BYTES = 16 * (OCTETS * OCTET + (OCTETS + 1) * VECTORS + 4)
DTYPES = {torch.bfloat16: (), torch.float16: ("-DHALF",)}


@dataclasses.dataclass
class Groups:
    """Places (n,) of a (rows, columns) matrix, cut into groups, each filled up to whole sets."""

    table: Tensor  # (groups, 6) int32: first set, sets; first octet of held features, octets; the same of streamed ones
    slots: (
        Tensor  # (sets, 32, UNITS) int16: the feature in shared memory that each thread of a warp names for each unit
    )
    order: Tensor  # (sets · SET,) int32: which place of the list it is, -1 for none
    places: int
    rows_held: bool


def suits(shape: tuple[int, int], dtype: torch.dtype, device: int) -> bool:
    """Whether the kernel takes factors of so many features, of this type, on this CUDA device."""
    return dtype in DTYPES and not (shape[0] | shape[1]) % OCTET and _kernels(device, DTYPES[dtype]) is not None


def fits(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel takes these factors as they lie in memory."""
    return len(a) > 0 and all(
        x.stride(1) == 1 and not x.stride(0) % OCTET and not x.data_ptr() % 16 and x.dtype in DTYPES for x in (a, b)
    )


@functools.lru_cache
def _kernels(device: int, options: tuple[str, ...]) -> dict[str, Any] | None:
    """The compiled kernels; None on a device without what they need: one before Hopper, or with less shared memory."""
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 9 or getattr(properties, "shared_memory_per_block_optin", 0) < SHARED_BYTES:
        return None
    given = (f"-DTHREADS={THREADS}", f"-DSETS={SETS}", f"-DOCTETS={OCTETS}", *options)
    kernels = compiled("sampled_groups.cu", ("sampled_sums", "add_parts"), device, given)
    if kernels is not None:
        with torch.cuda.device(device):
            kernels["sampled_sums"].set_shared_memory_config(SHARED_BYTES)
    return kernels


def grouped(index: Tensor, shape: tuple[int, int]) -> Groups:
    """The groups of flat places in a matrix whose sides are multiples of OCTET. Waits for the device once."""
    index = index.long()
    rows, columns = index // shape[1], index % shape[1]
    rows_held = shape[0] <= shape[1]
    held, streamed = (rows, columns) if rows_held else (columns, rows)
    of_held, of_streamed = (side // OCTET for side in sorted(shape))
    of_block = -(-of_held // -(-of_held * OCTET // HELD))
    # One block of held features after the other, and in each all octets of streamed ones.
    at = held // (of_block * OCTET) * of_streamed + streamed // OCTET
    counts = torch.bincount(at, minlength=-(-of_held // of_block) * of_streamed)
    cuts, starts = _cut(counts.view(-1, of_streamed).cpu(), of_block, of_held)
    table, starts = cuts.to(index.device), starts.to(index.device)
    group = torch.searchsorted(starts, at, right=True) - 1
    if len(starts) > len(starts.unique()):  # groups of the same features, the first of which is full
        group = torch.searchsorted(starts, starts[group])
        group += _turn(group, len(table)) // PLACES
    low = held - table[group, 2] * OCTET
    high = streamed - (table[group, 4] - table[group, 3]) * OCTET
    order, sets = _spread(group, low % BANKS, high % BANKS), int(cuts[:, 1].sum())
    # Where a place stands when every group is filled up to whole sets.
    counts = torch.bincount(group, minlength=len(table))
    at = torch.arange(len(index), device=index.device) + (table[:, 0] * SET - (counts.cumsum(0) - counts))[group[order]]
    filled = torch.full((sets * SET,), -1, device=index.device)
    filled[at] = order
    pairs = torch.zeros(sets * SET, 2, dtype=torch.int16, device=index.device)
    pairs[at] = torch.stack([low, high], 1)[order].to(torch.int16)
    return Groups(table.int(), _named(pairs.view(-1, UNITS, 16, 2)), filled.int(), len(index), rows_held)


def _named(pairs: Tensor) -> Tensor:
    """Slots (sets, 32, UNITS) for slots of places (sets, UNITS, 16, 2): of 16 places one factor, then the other.

    A unit multiplies 8 features by 8, of which the products of a place's own are wanted: those on a diagonal. Each unit of
    a set has its second factors turned by two more, so that the diagonals lie in different threads.
    """
    unit, row = torch.arange(UNITS)[:, None], torch.arange(16)[None, :]
    turned = (row // 8 * 8 + (row - 2 * unit) % 8).to(pairs.device)
    first, second = pairs.unbind(-1)
    second = second.gather(2, turned.expand(len(second), -1, -1))
    return torch.cat([first, second], 2).mT.contiguous()


def _cut(counts: Tensor, of_block: int, of_held: int) -> tuple[Tensor, Tensor]:
    """Table of groups, and the first octet of each, for the counts of places (blocks, octets).

    As many groups as capacity asks for, and about as many places in each.
    """
    blocks, octets = counts.shape
    rows, starts, sets = [], [], 0
    for number in range(blocks):
        held = min(of_block, of_held - number * of_block)
        before = torch.cat([counts.new_zeros(1), counts[number].cumsum(0)])
        edges = _edges(before, OCTETS - held, PLACES)
        for most in range(-(-int(before[-1]) // (len(edges) - 1)), PLACES, PLACES // 64):
            even = _edges(before, OCTETS - held, most)
            if len(even) == len(edges):
                edges = even
                break
        for start, end in itertools.pairwise(edges):
            left = int(before[end] - before[start])
            while True:  # more than once only for an octet that is nearly full
                of_group = -(-min(left, PLACES) // SET)
                rows.append((sets, of_group, number * of_block, held, start, end - start))
                starts.append(number * octets + start)
                sets, left = sets + of_group, left - PLACES
                if left <= 0:
                    break
    return torch.tensor(rows), torch.tensor(starts)


def _edges(before: Tensor, span: int, most: int) -> list[int]:
    """Where groups of at most ``span`` octets and ``most`` places (one octet at least) begin, and the end."""
    edges, last = [0], len(before) - 1
    while edges[-1] < last:
        start = edges[-1]
        fitting = int(torch.searchsorted(before, before[start] + most, right=True)) - 1
        edges.append(min(max(fitting, start + 1), start + span, last))
    return edges


def _spread(group: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Order of the places by group, and within it so that 8 in a row lie in different banks on both sides.

    Places of one diagonal, high - low, are taken in turns of ``low``. Where some bank has no more, the rest follow by turn.
    """
    diagonal = (high - low) % BANKS
    kind = (group * BANKS + diagonal) * BANKS + low
    kinds = (int(group.max()) + 1) * BANKS * BANKS
    turn, counts = _turn(kind, kinds), torch.bincount(kind, minlength=kinds)
    whole = counts.view(-1, BANKS).amin(1)[kind // BANKS]  # turns in which every bank has a place
    rest = turn >= whole
    key = (group * 2 + rest) * BANKS + torch.where(rest, 0, diagonal)
    return ((key * (PLACES + 1) + turn) * BANKS + low).argsort(stable=True)


def _turn(kind: Tensor, kinds: int) -> Tensor:
    """How many of the same kind come before each."""
    counts, order = torch.bincount(kind, minlength=kinds), kind.argsort(stable=True)
    turn = torch.empty_like(kind)
    turn[order] = torch.arange(len(kind), device=kind.device) - (counts.cumsum(0) - counts)[kind[order]]
    return turn


def sampled_product(a: Tensor, b: Tensor, groups: Groups) -> Tensor:
    """(aᵀ b) at the places, in the order of their list, in float32, for a (T, rows) and b (T, columns) that fit."""
    held, streamed = (a, b) if groups.rows_held else (b, a)
    device, count, places, vectors = a.get_device(), len(groups.table), len(groups.order), len(a)
    kernels = _kernels(device, DTYPES[a.dtype])
    assert kernels is not None
    share, parts = _shares(vectors, count, torch.cuda.get_device_properties(device).multi_processor_count)
    found = torch.empty(parts, places, device=a.device)
    sums = torch.empty(groups.places, device=a.device)
    strides = held.stride(0), streamed.stride(0)
    of_groups = held, streamed, *strides, groups.table, groups.slots, found, vectors, share, places, count
    with torch.cuda.device(device):
        kernels["sampled_sums"]((count * parts, 1, 1), (THREADS, 1, 1), list(of_groups), shared_mem=SHARED_BYTES)
        kernels["add_parts"]((-(-places // 256), 1, 1), (256, 1, 1), [found, groups.order, sums, places, parts])
    return sums


def _shares(vectors: int, groups: int, processors: int) -> tuple[int, int]:
    """Vectors of a share and shares: the fewest steps of VECTORS for the processor that has most to do."""
    steps = max(1, -(-vectors // VECTORS))
    best = (float("inf"), 0, 0)
    for waves in range(1, 9):
        parts = min(max(1, waves * processors // groups), steps)
        of_part = -(-steps // parts)
        # a block also begins and ends: about as long as 4 steps
        cost = -(-parts * groups // processors) * (of_part + 4)
        best = min(best, (cost, of_part, -(-steps // of_part)))
    return best[1] * VECTORS, best[2]
