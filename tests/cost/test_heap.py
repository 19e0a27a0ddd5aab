"""The heap that is gone through by glibc's rules beside glibc's own, in processes of their own."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from reltune.cost.heap import Heap, holes

# Does what stdin says with glibc, and prints by how much the heap has grown. Ends of blocks do not go to the caches of small blocks: those are full
# or off.
PROGRAM = """
import ctypes, json, sys
libc = ctypes.CDLL(None)
libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
assert libc.mallopt(-3, 32 << 20) and libc.mallopt(-1, 1 << 30) and libc.mallopt(1, 0)
steps = json.load(sys.stdin)
blocks, small = {}, [libc.malloc(ctypes.c_size_t(size)) for size in (24, 40, 56, 72, 88, 104) for _ in range(7)]
for place in small:
    libc.free(ctypes.c_void_p(place))
before = libc.sbrk(0)
for name, size in steps:
    if size:
        place = blocks[name] = ctypes.c_void_p()
        assert not libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(64), ctypes.c_size_t(size))
    else:
        libc.free(blocks.pop(name))
print(libc.sbrk(0) - before)
"""


def mixed() -> Iterator[tuple[int, int]]:
    """Blocks of a few sizes, as a model has them, that are made and freed in no order; 0 for freeing."""
    generator, there = random.Random(0), []
    for name in range(600):
        if len(there) > 40:
            yield there.pop(generator.randrange(len(there))), 0
        there.append(name)
        yield name, generator.choice((200_000, 786_432, 1_000_000, 3_145_728))


def passing() -> Iterator[tuple[int, int]]:
    """One block after another of one size, of which every third is kept."""
    for name in range(90):
        yield name, 1 << 20
        if name % 3:
            yield name, 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("steps", [mixed, passing])
def test_the_heap_grows_as_glibcs_does(steps: Any) -> None:
    words = json.dumps(list(steps()))
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=words, capture_output=True, text=True, check=True)
    found = Heap()
    for name, size in steps():
        if size:
            found.ask(name, size, 0.0)
        else:
            found.free(name)
    assert found.most == pytest.approx(int(done.stdout), rel=0.08)


def test_holes_are_what_the_tensors_of_a_step_do_not_hold() -> None:
    kept = [(name, 1 << 20, True) for name in range(8)]
    assert holes(kept, [], 0.0) < 8 * 200
    passing = [(number, size, True) for number, size in ((0, 1 << 20), (0, -1), (1, 1 << 20), (1, -1), (2, 1 << 20))]
    assert holes(passing, [], 0.0) < 1000
    assert holes(passing, [], 1.0) > 1 << 20
    assert holes([(0, 40 << 20, True), (0, -1, True), (1, 40 << 20, True)], [], 1.0) < 10_000  # are the system's own
