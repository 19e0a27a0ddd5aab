"""Files that appear whole or not at all, and checks of files and directories before anything is read or written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reltune.errors import InputError


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file whole or not at all: into a neighbour first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); run the stage that writes it again.") from error


def disk_bytes(directory: Path, names: Sequence[str]) -> int:
    return sum((directory / name).stat().st_size for name in names)


def check_writable(path: Path) -> None:
    """Raise InputError if the directory cannot be made or written, as far as that shows without trying."""
    try:
        if path.exists() and not path.is_dir():
            raise InputError(f"output_dir {path} is a file; name a directory.")
        place = path
        while not place.exists():
            place = place.parent
    except OSError as error:
        raise _unwritable(path, error) from error
    if not place.is_dir():
        raise InputError(f"output_dir {path} cannot be made, because {place} is a file; name another directory.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {path} cannot be written, because {place} does not allow it; name another one.")


def make_directory(path: Path) -> None:
    """Make the directory and what leads to it. Raises InputError when the file system refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def model_directory_problem(name: str) -> str | None:
    """Why a name or path cannot be a pretrained model's, as far as the files show; None where a library must try to load it."""
    gguf = name.lower().endswith(".gguf")
    if os.path.isfile(name):
        if gguf and not name.endswith(".gguf"):
            return f"{name} is not told by transformers to be in llama.cpp's format; rename it so that its name ends in .gguf."
        return None if gguf else f"{name} is a file; name the model's directory."
    if os.path.isdir(name):
        if (Path(name) / "config.json").is_file():
            if not (Path(name) / "adapter_config.json").is_file():
                return None
            return (
                f"{name} holds a model and an adapter for one (adapter_config.json), so that it is not clear what to train; merge the "
                "two and name the merged model, or take the adapter's files away."
            )
        if (Path(name) / "adapter_config.json").is_file():
            return f"{name} is an adapter, not a model; name the base model it was trained on."
        if files := sorted(path.name for path in Path(name).iterdir() if path.suffix.lower() == ".gguf"):
            return f"{name} has no config.json; name the model's file itself, such as {Path(name) / files[0]}."
        return f"{name} has no config.json, so it is no model; name a directory that save_pretrained wrote."
    if gguf:
        return f"The model file {name} does not exist; check the path."
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):  # the form of ids on the Hub
        return f"The model directory {name} does not exist; check the path."
    return None


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"output_dir {path} cannot be written ({error.strerror}); name another one.")


def check_destination(output_dir: str | os.PathLike) -> Path:
    """The export directory; it must be new or empty."""
    path = Path(output_dir)
    check_writable(path)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"output_dir {path} already holds files; choose a new or empty directory.")
    return path
