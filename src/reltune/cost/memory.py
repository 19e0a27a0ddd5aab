"""From what tensors hold to what a device, or a process on a CPU, is asked for."""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Protocol

from reltune.cost.devices import LIBRARIES


class Counted(Protocol):
    """A step that was counted: exactly (``StepCount``), or as a sum (``PlanCost``)."""

    @property
    def bytes(self) -> int:
        """The most that tensors hold at a time."""


MIB = 1 << 20
M_MMAP_THRESHOLD = -3  # of malloc.h
MAPPED = 256 << 10
# cuBLAS keeps one workspace for products of the forward pass and one for the thread of the backward pass. On an H200
# all 5 peaks of benchmarks/results/cost_records.json lie this much above the tensors.
WORKSPACE = 64 * MIB
# Of a process on a CUDA device, outside of the allocator: 749 to 771 MiB on H200s (cost_sweep.json, hard_cap.json).
CONTEXT = 770 * MIB
# Of what is handed out: room in the allocator's segments that fits nothing; 0.2% to 14% in cost_sweep.json.
SLACK = 0.03


def allocated(count: Counted) -> int:
    """What ``torch.cuda.max_memory_allocated`` will say, in bytes."""
    return count.bytes + WORKSPACE


def reserved(count: Counted) -> int:
    """What ``torch.cuda.max_memory_reserved`` will say, in bytes."""
    return int(allocated(count) * (1 + SLACK)) + 20 * MIB


def on_card(count: Counted) -> int:
    """What the card has to have free, in bytes."""
    return reserved(count) + CONTEXT


def resident_on_cpu(count: Counted) -> int:
    """By how much a process on a CPU grows, in bytes, where malloc gives back what is freed (``give_back_what_is_freed``)."""
    return count.bytes + LIBRARIES


def gives_back(under_a_budget: bool) -> bool:
    """Whether malloc gives back what a training on a CPU frees: under a budget of memory, where the environment says so, or is not glibc's,
    of which nothing else is known."""
    return under_a_budget or "MALLOC_MMAP_THRESHOLD_" in os.environ or platform.libc_ver()[0] != "glibc"


def give_back_what_is_freed() -> None:
    """Have glibc's malloc give blocks from ``MAPPED`` bytes on back to the system when they are freed, in this process from now on.

    By itself it keeps freed blocks of less than 32 MiB in a heap with holes, and a process then holds much more than its tensors. The same
    as ``MALLOC_MMAP_THRESHOLD_`` in the environment. Elsewhere than on glibc nothing is changed.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED)


def tensors_within(limit: float, cuda: bool) -> int:
    """How much tensors may hold so that a card, or a process on a CPU that grows, needs no more than so many bytes."""
    if not cuda:
        return int(limit) - LIBRARIES
    return int((limit - CONTEXT - 20 * MIB) / (1 + SLACK)) - WORKSPACE
