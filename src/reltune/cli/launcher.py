"""What a launcher (torchrun, accelerate launch) says of this process in its environment, read without torch."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reltune.runs.directory import RunDirectory


def several() -> bool:
    """Whether a launcher started several of this process."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def first() -> bool:
    """Whether this process is the only one, or the one of several that prints."""
    return not several() or os.environ.get("RANK", "0") == "0"


def note_command(directory: RunDirectory, name: str) -> None:
    """Write the command line of this command, which has begun or gone on with a run, into the run's directory."""
    if first():
        directory.record_command(name, ["reltune", *sys.argv[1:]])


@contextlib.contextmanager
def alone(directory: str) -> Iterator[None]:
    """Keep everybody else from writing into a run's directory meanwhile: the first process does, and a refusal ends all."""
    from reltune.runs.lock import locked

    with contextlib.ExitStack() as stack:
        with together():
            if first():
                stack.enter_context(locked(directory))
        yield


@contextlib.contextmanager
def together() -> Iterator[None]:
    """If what runs inside fails in one process of a launcher, it fails in all of them."""
    if not several():
        yield
        return
    from reltune.processes import Processes

    with Processes.joined().together():
        yield
