"""A process that shares the machine with others: what it does first, before anything heavy is imported, and then piece by piece."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import sys
from typing import Any

_workshop: Any = None


def begin(workshop: bytes, threads: int, parent: int) -> None:
    """End with the parent, leave the terminal to it, and take over what there is to work with, as ``pickle`` hands it between the two."""
    global _workshop
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # bars of several processes would overwrite one another
        os.dup2(nowhere, stream)
    import torch

    torch.set_num_threads(threads)
    _workshop = pickle.loads(workshop)


def do(piece: Any) -> None:
    from reltune.runs.comparison.work import cheap_collections

    with cheap_collections():
        _workshop.do(piece)
