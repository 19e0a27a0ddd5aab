"""Intermediate results of an analysis, kept on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reltune.files import whole_file
from reltune.reading import Damaged, parse_json, read_header
from reltune.relevance.artefact import PARTIAL
from reltune.tensor_files import load_tensors

EVERY = 300.0  # seconds between two saves; a kill that leaves no time to save costs no more than this


class Partial:
    """The file that keeps intermediate results.

    ``key`` says what is measured, and on which model; results that were saved under another key are not used. ``criterion``
    names a behaviour criterion, whose results have a file of their own.
    """

    def __init__(self, directory: Path, key: str, criterion: str = "") -> None:
        self.path = directory / (f"{criterion}.{PARTIAL}" if criterion else PARTIAL)
        self.key, self.saved = key, time.monotonic()

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The state and the tensors that were saved; None where nothing was saved under this key."""
        try:
            state = parse_json(read_header(self.path).metadata["state"])
            return None if state["key"] != self.key else (state, load_tensors(self.path))
        except (OSError, KeyError, TypeError, Damaged):
            return None

    def of_something_else(self) -> bool:
        """Whether the file is there and of another key."""
        try:
            return bool(parse_json(read_header(self.path).metadata["state"])["key"] != self.key)
        except (OSError, KeyError, TypeError, Damaged):
            return False

    def due(self) -> bool:
        return time.monotonic() - self.saved >= EVERY

    def save(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write state and tensors into one file, whole or not at all: one without the other would count batches twice."""
        on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with whole_file(self.path) as partial:
            save_file(on_host, partial, metadata={"state": json.dumps({**state, "key": self.key})})
        self.saved = time.monotonic()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def flat(sums: dict[str, dict[str, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Sums by module, statistic and part as tensors by one name each: statistic/part/module."""
    return {
        f"{need}/{part}/{module}": value
        for module, needs in sums.items()
        for need, parts in needs.items()
        for part, value in parts.items()
    }


def nested(
    tensors: dict[str, Tensor], device: torch.device, on_host: set[str]
) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The reverse of ``flat``. Statistics named in ``on_host`` stay on the host, the others are moved to the device."""
    sums: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, value in tensors.items():
        need, part, module = key.split("/", 2)
        place = value if need in on_host else value.to(device)
        sums.setdefault(module, {}).setdefault(need, {})[part] = place
    return sums


@contextlib.contextmanager
def deferred_signals(wanted: bool) -> Iterator[list[int]]:
    """Hold back Ctrl-C and termination, so that a batch is measured whole: gives the list in which they wait. The caller
    raises them.

    A second signal takes effect at once. Only the main thread may set handlers; elsewhere signals stay as they are.
    """
    waiting: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield waiting
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        waiting.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield waiting
    finally:
        restore()
