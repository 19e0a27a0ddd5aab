"""One process at a time writes into a run's directory; one that was killed stops nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from command_line import held
from reltune.errors import InputError
from reltune.runs import lock
from reltune.runs.lock import LOCK, locked


def test_a_directory_is_made_and_removed_if_nothing_enters_it(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "run"):
        holder = json.loads((tmp_path / "new" / "run" / LOCK).read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        with locked(tmp_path / "new" / "run"):  # the same process may
            pass
        assert (tmp_path / "new" / "run" / LOCK).is_file()
    assert not (tmp_path / "new").exists()
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "run") == ["config.yaml"]


def test_another_process_is_named_and_a_killed_one_stops_nobody(tmp_path: Path) -> None:
    with held(tmp_path / "run") as process:
        with (
            pytest.raises(InputError, match=rf"in use by process {process.pid} on .*; wait for its end"),
            locked(tmp_path / "run"),
        ):
            pass
        (tmp_path / "run" / ".plan.yaml.partial").touch()
        (tmp_path / "run" / ".adapter.removed").mkdir()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "run" / LOCK).is_file()
        with locked(tmp_path / "run"):  # what was half-written is gone
            assert os.listdir(tmp_path / "run") == [LOCK]


def test_where_the_file_system_knows_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    own = {"pid": os.getpid(), "host": socket.gethostname(), "started": lock._started(os.getpid())}
    for holder, refused in (
        (own, "in use by process"),
        ({**own, "started": 1.0}, ""),  # another process has the number now
        ({**own, "pid": 2**22 + 1}, ""),
        ({**own, "host": "elsewhere"}, r"on elsewhere; wait .*; if it is gone, remove .*run\.lock"),
    ):
        (tmp_path / LOCK).write_text(json.dumps(holder))
        if refused:
            with pytest.raises(InputError, match=refused), locked(tmp_path):
                pass
        else:
            with locked(tmp_path):
                pass
    (tmp_path / LOCK).write_text("")  # its process was killed before it wrote
    with locked(tmp_path):
        pass
