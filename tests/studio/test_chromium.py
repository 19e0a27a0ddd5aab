"""``make chromium``: what is found is taken, what is missing is installed where that can be, and else said."""

from __future__ import annotations

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


def test_root_installs_it_with_apt_get(tmp_path: Path) -> None:
    program(tmp_path, "id", "echo 0")
    program(
        tmp_path,
        "apt-get",
        f'echo "$@" >> {tmp_path}/called; case "$*" in install*chromium) {shutil.which("ln")} -s /bin/true {tmp_path}/chromium;; esac',
    )
    assert made(tmp_path).returncode == 0
    called = (tmp_path / "called").read_text().splitlines()
    assert called == ["update", "install -y --no-install-recommends chromium"]


@pytest.mark.parametrize("user, apt", [("1000", "exit 0"), ("0", None), ("0", "exit 100")])
def test_where_it_cannot_be_had_the_mend_is_named(tmp_path: Path, user: str, apt: str | None) -> None:
    program(tmp_path, "id", f"echo {user}")
    if apt is not None:
        program(tmp_path, "apt-get", apt)
    answer = made(tmp_path)
    assert answer.returncode
    assert "apt-get install chromium" in answer.stderr and "CHROMIUM=/path/to/chrome" in answer.stderr
