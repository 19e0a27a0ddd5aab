"""``make chromium``, and CI which calls it: what is found is taken, what is missing is installed where that can be, and else said."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def program(place: Path, name: str, script: str = "") -> Path:
    path = place / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def made(place: Path, **variables: str) -> subprocess.CompletedProcess:
    """``make chromium`` with no other programs than those of a folder."""
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, "--no-print-directory", "-C", str(ROOT), "chromium"],
        env={"PATH": str(place), **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", ["chromium", "google-chrome"])
def test_what_is_on_the_path_is_taken(tmp_path: Path, name: str) -> None:
    program(tmp_path, name)
    program(tmp_path, "id", "echo 0")
    program(tmp_path, "apt-get", "exit 9")
    answer = made(tmp_path)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_what_is_named_is_taken_and_nothing_else(tmp_path: Path) -> None:
    other = program(tmp_path, "other")
    assert made(tmp_path, CHROMIUM=str(other)).returncode == 0
    program(tmp_path, "chromium")
    answer = made(tmp_path, CHROMIUM=f"{tmp_path}/absent")
    assert answer.returncode and f"CHROMIUM is {tmp_path}/absent" in answer.stderr


@pytest.mark.parametrize("updated", [0, 100])  # other sources than Debian's may be out of reach
def test_root_installs_it_with_apt_get(tmp_path: Path, updated: int) -> None:
    program(tmp_path, "id", "echo 0")
    program(
        tmp_path,
        "apt-get",
        f'case "$*" in *update) exit {updated};; '
        f'*"install -y --no-install-recommends chromium") {shutil.which("ln")} -s /bin/true {tmp_path}/chromium;; esac',
    )
    assert made(tmp_path).returncode == 0


@pytest.mark.parametrize("user, apt", [("1000", "exit 0"), ("0", None), ("0", "exit 100")])
def test_where_it_cannot_be_had_the_mend_is_named(tmp_path: Path, user: str, apt: str | None) -> None:
    program(tmp_path, "id", f"echo {user}")
    if apt is not None:
        program(tmp_path, "apt-get", apt)
    answer = made(tmp_path)
    assert answer.returncode
    assert "apt-get install chromium" in answer.stderr and "CHROMIUM=/path/to/chrome" in answer.stderr


@pytest.mark.parametrize(
    "fails, said",
    [
        ("", ""),
        ("chromium", "there is no Chromium"),
        ("test-browser", "in Chromium failed"),
        ("test", ""),
        ("test-notebooks", ""),
    ],
)
def test_ci_ends_with_a_word_where_there_is_no_browser(tmp_path: Path, fails: str, said: str) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    program(
        tmp_path,
        "make",
        f'echo "$@" >> {tmp_path}/called; for what in "$@"; do [ "$what" = "{fails}" ] && exit 2; done; exit 0',
    )
    answer = subprocess.run(
        [tmp_path / ".ci" / "run"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert (answer.returncode == 0) == (not fails) and said in answer.stderr
    if said:
        assert answer.returncode == 1
    calls = ["test test-minimal docs", "chromium", "test-browser", "test-notebooks"]
    last = next((place for place, call in enumerate(calls) if fails in call.split()), len(calls) - 1)
    assert (tmp_path / "called").read_text().splitlines() == calls[: last + 1]
