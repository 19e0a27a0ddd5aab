"""One process at a time writes into a run's directory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from reltune.errors import InputError
from reltune.files import make_directory, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
_held: set[Path] = set()  # by this process


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Keep other processes from writing into a run's directory meanwhile. What a killed process left half-written is removed.

    ``run.lock`` says which process is at work, on which host. The system holds the lock on that file for as long as the process
    lives, so that the file of a process that was killed stops nobody. Where a file system knows no such locks, the process
    is looked for by its number. A directory that does not exist is made, and removed again if nothing enters it.

    Raises InputError where another process is at work.
    """
    path = Path(directory).absolute()
    if path in _held:
        yield
        return
    made = [place for place in (path, *path.parents) if not place.exists()]
    make_directory(path)
    file = None
    try:
        file = _taken(path)
        _held.add(path)
        remove_leftovers(path)
        yield
    finally:
        if file is not None:
            _held.discard(path)
            with contextlib.suppress(OSError):  # a disk that has become read-only
                (path / LOCK).unlink(missing_ok=True)
            file.close()
        for place in made:
            try:
                place.rmdir()
            except OSError:  # it holds something
                break


def _taken(path: Path) -> IO[str]:
    """The lock's file, open; closing it gives the lock back."""
    lock = path / LOCK
    while True:
        try:
            file = lock.open("a+", encoding="utf-8")
        except OSError as error:
            raise InputError(f"output_dir {path} cannot be written ({error.strerror}); name another one.") from error
        if not _lock(file):
            message = _in_use(path, file)
            file.close()
            raise InputError(message)
        if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            break
        file.close()  # its holder ended, and removed it, meanwhile
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}, file)
    file.flush()
    return file


def _lock(file: IO[str]) -> bool:
    """Whether this process has the lock on an open file now."""
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # the file system knows no locks
            pass
    return not _alive(_read(file))


def _read(file: IO[str]) -> dict[str, object]:
    file.seek(0)
    try:
        holder = json.load(file)
    except ValueError:  # empty: its process was killed before it wrote, or writes at this moment
        return {}
    return holder if isinstance(holder, dict) else {}


def _alive(holder: dict[str, object]) -> bool:
    """Whether the process that a lock's file names may be at work still. Of another host nobody can tell."""
    if not holder or holder.get("host") != socket.gethostname():
        return bool(holder)
    started = _started(int(str(holder.get("pid"))))
    return started is not None and started == holder.get("started")


def _started(pid: int) -> float | None:
    """When a process began, by which it is told from a later one of the same number; None if there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _in_use(path: Path, file: IO[str]) -> str:
    holder = _read(file)
    who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
    mend = "wait for its end, or name another directory"
    if holder and holder.get("host") != socket.gethostname():
        mend += f"; if it is gone, remove {path / LOCK}"
    return f"{path} is in use by {who}; {mend}."
