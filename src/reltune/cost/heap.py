"""How much of a process's heap is holes: what a step asks of malloc, gone through by glibc's rules.

PyTorch asks for each tensor on a CPU by ``posix_memalign``. glibc (malloc.c, ``_int_memalign``) looks for a free block of 96 bytes more than the tensor
takes, cuts out what is aligned to 64 bytes and gives the ends back. Small objects of the same pass, such as autograd's nodes, then take the
ends, so that the place of a freed tensor is too small for the next one of its size until they are gone. With plain ``malloc`` in the place of
``posix_memalign`` the holes are not there.

Of blocks that are made and freed in no order glibc's is 1% to 11% larger, by where it begins (tests/cost/test_heap.py), which makes no difference here.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Hashable, Iterable

HEADER, GRAIN, PLACE = 8, 16, 16  # bytes that a block is larger by; sizes are multiples; where in it the tensor begins
ALIGNED = 64
LEAST = 32  # bytes of the smallest block
MORE = ALIGNED + LEAST  # than a block takes is looked for
MAPPED_FROM = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX, to which its threshold grows while a model is loaded
PAGE = 4096
# Of the ends, how many small objects take in a forward pass. Chosen by seven trainings (MiniLM with all weights and LoRA, a small Llama with LoRA);
# benchmarks/results/cpu_heap.json has peaks predicted with it and measured.
TAKEN = 0.6


class Heap:
    """glibc's main heap: best fit, neighbours that are free become one block, and what is at the top is given back.

    Attributes:
        most: bytes from its bottom to its top, and of blocks of their own beside it, when they were most.
    """

    def __init__(self) -> None:
        self.top = self.mapped = self.most = 0
        self._sizes: dict[int, int] = {}  # of what is free, by where it begins
        self._begins: dict[int, int] = {}  # and where it begins, by where it ends
        self._by_size: list[tuple[int, int]] = []
        self._blocks: dict[Hashable, tuple[int, int]] = {}  # -1 for the place of a block of its own
        self._taken: list[tuple[int, int]] = []
        self._random = random.Random(0)

    def ask(self, name: Hashable, size: int, taken: float) -> None:
        """Have ``posix_memalign`` give a block of so many bytes, of whose ends small objects take a share."""
        size = -(-(size + HEADER) // GRAIN) * GRAIN
        at = bisect.bisect_left(self._by_size, (size + MORE, 0))
        if at < len(self._by_size):
            begin = self._by_size[at][1]
            end = begin + self._remove(begin)
        elif size >= MAPPED_FROM:
            size = -(-size // PAGE) * PAGE
            self.mapped += size
            self._blocks[name] = -1, size
            self.most = max(self.most, self.top + self.mapped)
            return
        else:
            begin, end = self.top, self.top + size + MORE
            self.top = end
            self.most = max(self.most, self.top + self.mapped)
        before = -(begin + PLACE) % ALIGNED
        before += ALIGNED if 0 < before < LEAST else 0
        behind = MORE - before
        if behind <= LEAST:
            size, behind = size + behind, 0
        place = begin + before
        self._blocks[name] = place, size
        ends = [(begin, before), (place + size, behind)]
        for piece in ends:
            if piece[1] and self._random.random() < taken:
                self._taken.append(piece)
            else:
                self._give(*piece)
        rest = place + size + behind
        self._give(rest, end - rest)

    def free(self, name: Hashable) -> None:
        place, size = self._blocks.pop(name)
        if place < 0:
            self.mapped -= size
        else:
            self._give(place, size)

    def free_small(self) -> None:
        """Give back what small objects took."""
        for piece in self._taken:
            self._give(*piece)
        self._taken = []

    def _give(self, begin: int, size: int) -> None:
        if not size:
            return
        if begin + size in self._sizes:
            size += self._remove(begin + size)
        if begin in self._begins:
            begin, size = self._begins[begin], size + self._remove(self._begins[begin])
        if begin + size == self.top:
            self.top = begin
            return
        self._sizes[begin], self._begins[begin + size] = size, begin
        bisect.insort(self._by_size, (size, begin))

    def _remove(self, begin: int) -> int:
        size = self._sizes.pop(begin)
        del self._begins[begin + size]
        self._by_size.pop(bisect.bisect_left(self._by_size, (size, begin)))
        return size


def holes(step: Iterable[tuple[Hashable, int, bool]], states: Iterable[int], taken: float = TAKEN) -> int:
    """Bytes of the heap that no tensor holds when a training has grown most: in its first step, or in the second with the optimizer's states.

    Args:
        step: a name, the bytes that it is for or less than zero where it is freed, and whether it is in the forward pass. What is not freed
            is freed after the optimizer's step.
        states: bytes of each state that the optimizer makes in its first step.
    """
    heap, step, live, most = Heap(), list(step), 0, 0
    for turn in range(2):
        there: dict[Hashable, int] = {}
        for name, size, forward in step:
            if size > 0:
                heap.ask(name, size, taken if forward else 0.0)
                there[name] = size
                live += size
                most = max(most, live)
            else:
                heap.free(name)
                live -= there.pop(name)
        heap.free_small()
        if turn == 0:
            for number, size in enumerate(states):
                heap.ask(("state", number), size, 0.0)
                live += size
            most = max(most, live)
        for name, size in there.items():
            heap.free(name)
            live -= size
    return max(0, heap.most - most)
