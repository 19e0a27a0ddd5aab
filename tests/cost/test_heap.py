"""The heap that is gone through by glibc's rules beside glibc's own, in processes of their own."""

from __future__ import annotations

import json
import platform
import random
import statistics
import subprocess
import sys

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
small = [libc.malloc(ctypes.c_size_t(size)) for size in (24, 40, 56, 72, 88, 104) for _ in range(7)]
for place in small:
    libc.free(ctypes.c_void_p(place))
libc.posix_memalign.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
libc.free.argtypes = (ctypes.c_void_p,)
top = libc.malloc(ctypes.c_size_t(1_000_000)) - 16 + 1_000_016
libc.malloc(ctypes.c_size_t(1_000_000 + (int(sys.argv[1]) - top - 1_000_016) % 64))  # what is free begins there now, of 64
blocks = (ctypes.c_void_p * 1000)()  # Python asks for nothing meanwhile
first = ctypes.addressof(blocks)
before = libc.sbrk(0)
for name, size in steps:
    if size:
        assert not libc.posix_memalign(first + name * ctypes.sizeof(ctypes.c_void_p), 64, size)
    else:
        libc.free(blocks[name])
print(libc.sbrk(0) - before)
"""


def mixed(seed: int) -> list[tuple[int, int]]:
    """Blocks of a few sizes, as a model has them, that are made and freed in no order; 0 for freeing."""
    generator, there, steps = random.Random(seed), [], []
    for name in range(600):
        if len(there) > 40:
            steps.append((there.pop(generator.randrange(len(there))), 0))
        there.append(name)
        steps.append((name, generator.choice((200_000, 786_432, 1_000_000, 3_145_728))))
    return steps


def passing() -> list[tuple[int, int]]:
    """One block after another of one size, of which every third is kept."""
    return [step for name in range(90) for step in ((name, 1 << 20), (name, 0))[: 2 if name % 3 else 1]]


def share(steps: list[tuple[int, int]], start: int) -> float:
    """By how much the heap that is gone through grows, over glibc's, whose free part begins at a multiple of 64 and so much."""
    line = [sys.executable, "-c", PROGRAM, str(start)]
    done = subprocess.run(line, input=json.dumps(steps), capture_output=True, text=True, check=True)
    found = Heap()
    for name, size in steps:
        if size:
            found.ask(name, size, 0.0)
        else:
            found.free(name)
    return found.most / int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("sequences", [[passing()], [mixed(seed) for seed in range(4)]], ids=["passing", "mixed"])
def test_the_heap_grows_as_glibcs_does(sequences: list[list[tuple[int, int]]]) -> None:
    """Over all places where glibc's may begin: of blocks in no order it grows by a tenth more from one of them than from another."""
    shares = [share(steps, start) for steps in sequences for start in (0, 16, 32, 48)]
    assert statistics.mean(shares) == pytest.approx(1, rel=0.08)


def test_holes_are_what_the_tensors_of_a_step_do_not_hold() -> None:
    kept = [(name, 1 << 20, True) for name in range(8)]
    assert holes(kept, [], 0.0) < 8 * 200
    passing = [(number, size, True) for number, size in ((0, 1 << 20), (0, -1), (1, 1 << 20), (1, -1), (2, 1 << 20))]
    assert holes(passing, [], 0.0) < 1000
    assert holes(passing, [], 1.0) > 1 << 20
    assert holes([(0, 40 << 20, True), (0, -1, True), (1, 40 << 20, True)], [], 1.0) < 10_000  # are the system's own
