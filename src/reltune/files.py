"""Files that appear whole or not at all, and checks of files and directories before anything is read or written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reltune import reading
from reltune.errors import InputError, StorageError

PARTIAL, REMOVED = ".partial", ".removed"  # ends of the names, begun by a dot, of what is being written or removed
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)


SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int:
    """Bytes that are meant by a size such as 500MB or 20GiB; 0 needs no unit. Raises ValueError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)?", text.strip(), re.IGNORECASE)
    if not match or (match[2] is None and float(match[1])):
        raise ValueError(f"{text!r} is no size, such as 500MB or 20GiB")
    return int(float(match[1]) * SIZES[match[2].upper()]) if match[2] else 0


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside the file's to write to. What is there at the end reaches the disk and takes the file's name; where an
    error comes it is removed, and the file is as it was.

    Raises StorageError where the disk is full or the directory cannot be written.
    """
    path = Path(path)
    partial = _hidden(path, PARTIAL)
    with stored(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _reach_disk(partial)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _reach_disk(path.parent)


@contextlib.contextmanager
def whole_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A new directory to write to, which takes the place of ``path`` at the end, as with ``whole_file``.

    It is made beside ``path``, or inside where ``path`` exists and nothing can be made beside it (a volume that is mounted
    there, say); its files are then moved one by one.
    """
    path = Path(path)
    inside = path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK))
    partial = _hidden(path / path.name if inside else path, PARTIAL)
    with stored(path):
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise error if error.errno in FULL else _unwritable(path, error) from error
        try:
            yield partial
            if inside:
                _tree_reaches_disk(partial)
                for child in sorted(partial.iterdir()):
                    child.replace(path / child.name)
                partial.rmdir()
            else:
                put_in_place(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def put_in_place(written: Path, path: Path) -> None:
    """Rename a directory, in place of another if there is one, when everything in it has reached the disk."""
    _tree_reaches_disk(written)
    if path.is_dir():
        discard(path)
    written.replace(path)
    _reach_disk(path.parent)


def discard(path: Path) -> None:
    """Remove a file or a directory, if it is there. A directory is renamed first, so that a part of it is never taken for all."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    removed = _hidden(path, REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    path.replace(removed)
    shutil.rmtree(removed)


def remove_leftovers(directory: Path) -> None:
    """Remove what a process was writing or removing in the directory when it was killed."""
    for place, names, files in os.walk(directory):
        for name in [*names, *files]:
            if name.startswith(".") and name.endswith((PARTIAL, REMOVED)):
                path = Path(place, name)
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        names[:] = [name for name in names if Path(place, name).is_dir()]


@contextlib.contextmanager
def stored(path: Path) -> Iterator[None]:
    """Raise StorageError, with what to do about it, where what runs inside fails because ``path`` cannot be written."""
    try:
        yield
    except Exception as error:
        if (known := storage_error(error, path)) is None or known is error:
            raise
        raise known from error


def storage_error(error: Exception, path: Path | None = None) -> StorageError | None:
    """An error as a sentence with its mend, where it says that a file (``path``) cannot be written; None for other errors."""
    if isinstance(error, StorageError):
        return error
    number = _why_not_stored(error)
    if number is None or (path is None and number not in (*FULL, errno.EROFS)):
        return None
    name = path or getattr(error, "filename", None) or "a file"
    mend = "free some space" if number in FULL else "make it writable" if number in LOCKED else "look after the disk"
    return StorageError(
        f"{name} could not be written ({os.strerror(number).lower()}); {mend}, and give the same command again, which goes on from "
        "what is there."
    )


def _why_not_stored(error: Exception) -> int | None:
    """The system's number for why something could not be written; None for errors of other kinds.

    safetensors has the number in its message; torch.save only says that its writer failed.
    """
    if isinstance(error, OSError):
        return error.errno if error.errno in (*FULL, *LOCKED, errno.EIO) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    return errno.ENOSPC if re.search(r"PytorchStreamWriter failed|inline_container", str(error)) else None


def _hidden(path: Path, end: str) -> Path:
    return path.with_name(f".{path.name}{end}")


def _tree_reaches_disk(directory: Path) -> None:
    for place, _, names in os.walk(directory):
        for path in (*(Path(place, name) for name in names), Path(place)):
            _reach_disk(path)


def _reach_disk(path: Path) -> None:
    """Have the system write what it still holds in memory of a file, or of the names in a directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return reading.read_json(path)
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


def model_directory(name: str) -> str:
    """A model's directory, given itself or its config.json; another name as it is."""
    path = Path(name)
    return str(path.parent) if path.name == "config.json" and path.is_file() else name


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
    if path.is_dir() and any(not child.name.endswith(PARTIAL) for child in path.iterdir()):
        raise InputError(f"output_dir {path} already holds files; choose a new or empty directory.")
    return path
