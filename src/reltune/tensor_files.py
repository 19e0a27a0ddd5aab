"""Tensors in safetensors files: read when their header is one that fits the file (reading.py), and read back when written."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from reltune.errors import StorageError
from reltune.reading import BITS, Damaged, read_header

if TYPE_CHECKING:
    import numpy as np
    import torch


def load_tensors(path: str | os.PathLike, dtypes: Collection[str] = tuple(BITS)) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises OSError and what ``read_header`` raises."""
    from safetensors.torch import load_file

    return _loaded(path, dtypes, load_file)


def load_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The same as arrays, of the types that numpy knows."""
    from safetensors.numpy import load_file

    return _loaded(path, [dtype for dtype in BITS if dtype[:2] not in ("F8", "BF")], load_file)


def _loaded(path: str | os.PathLike, dtypes: Collection[str], load: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    read_header(path, dtypes)
    try:
        return load(path)
    except SafetensorError as error:
        raise Damaged(f"cannot be loaded ({error})") from None


def check_saved(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise StorageError unless the file that was just written holds these tensors to the bit, and nothing else."""

    import torch

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    try:
        if set(read_header(path).tensors) != set(tensors):
            raise Damaged("has other tensors than were written")
        with safe_open(path, "pt") as file:
            for name, written in tensors.items():
                held = file.get_tensor(name)
                same = held.dtype == written.dtype and held.shape == written.shape
                if not same or not torch.equal(bits(held), bits(written)):
                    raise Damaged(f"has other numbers in {name!r} than were written")
    except (OSError, Damaged, SafetensorError) as error:
        raise StorageError(
            f"{path} was written and cannot be read back ({error}); look after the disk, and give the same command again."
        ) from error
