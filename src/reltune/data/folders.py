"""What a directory of data holds, told by its names, before a library that reads it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from reltune.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def kind_of_folder(path: Path) -> Literal["saved", "images", "parquet"]:
    """Whether a directory is one that ``save_to_disk`` wrote, or holds images or Parquet files. Raises InputError for another."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return "saved"
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        return "images"
    if any(path.rglob("*.parquet")):  # a data set of the Hub as it is downloaded: its splits are in the files' names
        return "parquet"
    raise InputError(
        f"{path} is a directory with neither a data set that datasets saved nor images; name one file in it, or save "
        "the data set with save_to_disk."
    )
