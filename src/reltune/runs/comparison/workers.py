"""Many small runs on one machine: pieces of work in this process, or in several that share it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from reltune.runs.comparison import process
from reltune.runs.comparison.work import Piece, Workshop
from reltune.runs.materials import Materials

Done = Callable[[Piece], None]
BYTES_PER_PARAMETER = 16  # of full fine-tuning in float32 with AdamW: weight, gradient, two moments
BESIDE = 2 << 30  # bytes of a process for activations, kernels and the like; a guess


def default_jobs(materials: Materials) -> int:
    """One on a CPU, which a run uses whole; on an accelerator as many full trainings as should fit in its memory, at most 4."""
    if not torch.cuda.is_available():
        return 1
    free, _ = torch.cuda.mem_get_info()
    parameters = sum(p.numel() for p in materials.base.look().parameters())
    fit = int(0.9 * free / (parameters * BYTES_PER_PARAMETER + BESIDE))
    return max(1, min(4, fit, (os.cpu_count() or 1) // 2))


class Alone:
    """Does pieces of work one after another in this process."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    def do(self, pieces: Sequence[Piece], words: Callable[[Piece], str], done: Done) -> None:
        for piece in pieces:
            self.workshop.do(piece, words(piece))
            done(piece)

    def leave(self, at_once: bool) -> None:
        """It has no processes to end."""


class Shared:
    """Does pieces of work in several processes. A piece that ends its process (the system's memory ran out, say) is a failed one."""

    def __init__(self, workshop: Workshop, jobs: int) -> None:
        self.workshop, self.jobs = workshop, jobs
        self.pool: ProcessPoolExecutor | None = None
        try:
            self.handed = pickle.dumps(workshop.without_model())
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ValueError(f"the data cannot be handed to other processes ({error})") from error

    def do(self, pieces: Sequence[Piece], words: Callable[[Piece], str], done: Done) -> None:
        for piece in self._together(
            list(pieces), done
        ):  # a process ended: which piece ended it shows when each is alone
            if self._together([piece], done):
                self.workshop.fail(piece, "its process ended, as when the machine's memory runs out.")
                done(piece)

    def _together(self, pieces: list[Piece], done: Done) -> list[Piece]:
        """The pieces that were not done because a process ended."""
        if self.pool is None:
            threads = max(1, torch.get_num_threads() // self.jobs)
            begin = (self.handed, threads, os.getpid())
            self.pool = ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), process.begin, begin)
        left = list(pieces)
        futures = {self.pool.submit(process.do, piece): piece for piece in pieces}
        for future in as_completed(futures):
            with contextlib.suppress(BrokenProcessPool):
                future.result()
                left.remove(futures[future])
                done(futures[future])
        if left:
            self.leave(at_once=True)
        return left

    def leave(self, at_once: bool) -> None:
        """End its processes; ``at_once`` those too that are at work."""
        if self.pool is None:
            return
        children = list((getattr(self.pool, "_processes", None) or {}).values()) if at_once else []
        self.pool.shutdown(wait=not at_once, cancel_futures=True)
        for child in children:
            with contextlib.suppress(OSError, ValueError):
                child.kill()
        self.pool = None
