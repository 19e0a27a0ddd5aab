"""Commands that run beside the studio: each has a directory with what it was started with, its output and how it ended.

A job is a process of its own and goes on when the studio ends; another studio finds it by its files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from reltune.errors import InputError
from reltune.files import read_json, write_json
from reltune.studio.command_lines import shown, started
from reltune.studio.places import DAMAGE, OWN, Place

LINES = 40  # of the output, that are shown
BYTES = 64_000  # of its end, in which they are looked for
ENDS = {0: "done", 130: "stopped", 143: "stopped", -signal.SIGTERM: "stopped", -signal.SIGKILL: "killed"}


@dataclasses.dataclass(frozen=True)
class Job:
    """``state``: running, done, failed, stopped, killed, or ended where nobody was there to see how."""

    name: str
    words: list[str]
    target: str  # the run's name
    began: float
    state: str
    code: int | None

    @property
    def command(self) -> str:
        return shown(self.words)


class Jobs:
    """The jobs of a directory of runs."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.path = place.inside(f"{OWN}/jobs")

    def start(self, words: Sequence[str], target: str) -> str:
        """Start a command on a run; the job's name."""
        self.path.mkdir(parents=True, exist_ok=True)
        begin = time.strftime(f"%Y%m%d-%H%M%S-{words[0]}")
        for count in range(1, 1000):
            folder = self.path / (begin if count == 1 else f"{begin}-{count}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
        with (folder / "output.log").open("wb") as output:
            process = subprocess.Popen(
                started(words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        record = {"words": list(words), "target": target, "pid": process.pid, "began": time.time()}
        with contextlib.suppress(psutil.Error):  # it may have ended already
            record["created"] = psutil.Process(process.pid).create_time()
        write_json(folder / "job.json", record)
        threading.Thread(target=self._wait, args=(process, folder), daemon=True).start()
        return folder.name

    @staticmethod
    def _wait(process: subprocess.Popen, folder: Path) -> None:
        code = process.wait()
        with contextlib.suppress(OSError):  # the directory was removed meanwhile
            write_json(folder / "end.json", {"code": code})

    def all(self) -> list[Job]:
        """The newest first. What was half-written is left out."""
        if not self.path.is_dir():
            return []
        jobs = []
        for folder in self.path.iterdir():
            with contextlib.suppress(*DAMAGE):
                jobs.append(self._read(folder))
        return sorted(jobs, key=lambda job: (-job.began, job.name))

    def get(self, name: str) -> Job:
        try:
            return self._read(self._folder(name))
        except DAMAGE as error:
            raise InputError(f"there is no job {name!r}; choose one of the list.") from error

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        if folder.parent != self.path or not (folder / "job.json").is_file():
            raise InputError(f"there is no job {name!r}; choose one of the list.")
        return folder

    def _read(self, folder: Path) -> Job:
        record, end = read_json(folder / "job.json"), folder / "end.json"
        code = int(read_json(end)["code"]) if end.is_file() else None
        state = ENDS.get(code, "failed") if code is not None else "running" if _process(record) else "ended"
        return Job(
            folder.name, list(map(str, record["words"])), str(record["target"]), float(record["began"]), state, code
        )

    def output(self, name: str) -> str:
        """The last lines of what the job has printed; of a progress bar what it shows now."""
        path = self._folder(name) / "output.log"
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - BYTES))
            text = file.read().decode("utf-8", errors="replace")
        lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        return "\n".join([line for line in lines if line][-LINES:])

    def stop(self, name: str) -> None:
        """Ask the job to end, as Ctrl-C would: what was done is kept, and the same command goes on from there."""
        process = _process(read_json(self._folder(name) / "job.json"))
        if process is None:
            raise InputError(f"the job {name} is not running; there is nothing to stop.")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _process(record: dict) -> psutil.Process | None:
    """The job's process, if it is alive: not another one that has its number now."""
    try:
        process = psutil.Process(int(record["pid"]))
        same = process.create_time() == record.get("created")
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None
