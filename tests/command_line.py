"""The command line without a new process for every call, and files to call it with."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from reltune.cli.commands import main

GOOD, BAD, OTHER = ("good", "great", "fine"), ("bad", "poor", "dull"), ("film", "book", "very", "not")


@dataclass(frozen=True)
class Answer:
    """What a call of ``reltune`` ended with."""

    code: object
    out: str
    err: str


def reltune(*words: object) -> Answer:
    """Call ``reltune`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", ["reltune", *map(str, words)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    return Answer(code, out.getvalue(), err.getvalue())


def review_rows(count: int, labels: Sequence[str] = ("neg", "pos"), seed: int = 0) -> list[tuple[str, str]]:
    """Reviews of two classes that can be told apart by their words."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        telling = (BAD, GOOD)[i % 2]
        words = [*draw.choices(telling, k=3), *draw.choices(OTHER, k=draw.randint(2, 6))]
        draw.shuffle(words)
        rows.append((" ".join(words), labels[i % 2]))
    return rows


def write_csv(
    path: Path,
    rows: Iterable[tuple[str, str]],
    header: Sequence[str] = ("text", "label"),
    encoding: str = "utf-8",
) -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def contents(folder: Path) -> dict[str, str]:
    """Everything under the folder: a hash of each file, and the names of empty directories."""
    found = {}
    for place, directories, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        if not directories and not files:
            found[str(Path(place).relative_to(folder))] = "empty directory"
    return found


def assert_refused(answer: Answer, *named: str) -> None:
    assert answer.code == 2, answer
    assert answer.out == ""
    message = answer.err.removeprefix("reltune: error: ")
    assert message != answer.err, answer.err
    assert message.count("\n") == 1 and message.endswith("\n"), answer.err
    # paths aside, it can be read at a glance
    assert len(re.sub(r"/\S*/", "", message)) < 400, message
    assert len(re.findall(r"[.?!](?= [A-Z]|\n)", message)) <= 2, message
    for part in named:
        assert part in message, message


HOLDS = """
import sys
from reltune.runs.lock import locked
with locked(sys.argv[1]):
    print("holds", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(directory: Path) -> Iterator[subprocess.Popen]:
    """Another process that has the lock of a run's directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "holds\n"
        yield process
    finally:
        process.kill()
        process.communicate()
