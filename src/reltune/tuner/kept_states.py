"""Hidden states of examples in a file, without their padding.

The file is written at its end and read through a memory map, so that it may be larger than memory. What it holds of which example
is in an index beside it, which is written when ``save`` is called: after a crash, what the index names is whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reltune.files import FULL, whole_file

KEY_BYTES = 16


class KeptStates:
    """Rows of ``width`` numbers for each example, under its key of ``KEY_BYTES`` bytes.

    Args:
        path: without a suffix. What is there is used if it has the same ``origin``, and else written over.
        limit: of the file, in bytes. What does not fit is not kept.
        origin: what the states were made from, in a word.

    Attributes:
        full: why nothing more is kept, once that is so: "limit" or "disk".
    """

    def __init__(self, path: Path, width: int, dtype: torch.dtype, limit: int, origin: str) -> None:
        self.index_file, self.file = path.with_suffix(".index"), path.with_suffix(".states")
        self.width, self.dtype, self.origin = width, dtype, f"{origin} {width} {dtype}"
        self.row = width * dtype.itemsize
        self.limit = limit - limit % self.row
        self.full = ""
        self.places: dict[bytes, tuple[int, int]] = {}  # key -> first row, rows
        self.rows = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._take_up()
        self._opened = os.open(self.file, os.O_RDWR | os.O_CREAT)
        # A file with a hole: it takes the space of what was written.
        os.truncate(self.file, self.limit)
        self._mapped = torch.empty(0, dtype=torch.uint8)
        if self.limit:
            self._mapped = torch.from_file(str(self.file), shared=True, size=self.limit, dtype=torch.uint8)

    def _take_up(self) -> None:
        """Read the index of an interrupted training, if it is of the same origin and its file is there."""
        try:
            with safe_open(self.index_file, "pt") as index:
                if (index.metadata() or {}).get("origin") != self.origin or not self.file.is_file():
                    return
                keys, places = index.get_tensor("keys").numpy(), index.get_tensor("places").tolist()
        except (OSError, SafetensorError):
            return
        for key, (first, count) in zip(keys, places, strict=True):
            if (first + count) * self.row <= self.limit:
                self.places[key.tobytes()] = first, count
                self.rows = max(self.rows, first + count)

    def __contains__(self, key: bytes) -> bool:
        return key in self.places

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return self.rows * self.row

    def put(self, keys: Sequence[bytes], counts: Sequence[int], states: Tensor) -> None:
        """Keep the states (sum of counts, width), on any device, of examples in this order, as far as there is room."""
        if states.dtype != self.dtype:
            raise TypeError(f"the states are {states.dtype}, and those that are kept {self.dtype}.")
        taken: list[slice] = []
        places: dict[bytes, tuple[int, int]] = {}
        start, end = 0, self.rows
        for key, count in zip(keys, counts, strict=True):
            if (end + count) * self.row > self.limit:
                self.full = self.full or "limit"
            elif not self.full and key not in self.places and key not in places:
                places[key] = end, count
                taken.append(slice(start, start + count))
                end += count
            start += count
        if not places:
            return
        states = states if len(taken) == len(keys) else torch.cat([states[part] for part in taken])
        try:
            self._write(states.detach().to("cpu").contiguous())
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.full = "disk"
            return
        self.places |= places
        self.rows = end

    def _write(self, states: Tensor) -> None:
        numbers: Any = states.reshape(-1).view(torch.uint8).numpy()
        left = memoryview(numbers)
        place = self.size
        while left:
            written = os.pwrite(self._opened, left, place)
            left, place = left[written:], place + written

    def get(self, keys: Sequence[bytes], pinned: bool = False) -> Tensor:
        """The states of these examples, one after another (sum of counts, width), in memory."""
        kept = self._mapped.view(self.dtype).view(-1, self.width)
        places = [self.places[key] for key in keys]
        out = torch.empty(sum(count for _, count in places), self.width, dtype=self.dtype, pin_memory=pinned)
        return torch.cat([kept[first : first + count] for first, count in places], out=out)

    def save(self) -> None:
        """Have what is kept reach the disk, and then the index of it."""
        os.fsync(self._opened)
        keys = torch.frombuffer(bytearray(b"".join(self.places)), dtype=torch.uint8) if self.places else torch.empty(0)
        places = torch.tensor(list(self.places.values()), dtype=torch.int64).reshape(-1, 2)
        tensors = {"keys": keys.to(torch.uint8).reshape(-1, KEY_BYTES), "places": places}
        with whole_file(self.index_file) as partial:
            save_file(tensors, partial, metadata={"origin": self.origin})

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._mapped = torch.empty(0, dtype=torch.uint8)
        os.close(self._opened)
