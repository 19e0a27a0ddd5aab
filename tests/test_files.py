"""Files that appear whole or not at all, and directories that are checked before anything is written."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from safetensors import SafetensorError

from reltune.errors import InputError, StorageError
from reltune.files import (
    check_destination,
    check_writable,
    discard,
    disk_bytes,
    make_directory,
    read_json,
    storage_error,
    whole_directory,
    whole_file,
    write_json,
    write_text,
)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "words.txt"
    write_text(path, "好")
    assert path.read_bytes() == "好".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half a surrogate pair: \ud83d")
    assert path.read_bytes() == "好".encode(), "what was there before is kept"
    write_text(path, "again")
    assert path.read_text() == "again" and os.listdir(path.parent) == ["words.txt"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tmp_path / "adapter"
    for content in ("old", "new"):
        with whole_directory(adapter) as partial:
            (partial / "deep").mkdir()
            (partial / "deep" / "values").write_text(content)
            assert not adapter.exists() or (adapter / "deep" / "values").read_text() == "old"
        assert (adapter / "deep" / "values").read_text() == content and os.listdir(tmp_path) == ["adapter"]
    with pytest.raises(ZeroDivisionError), whole_directory(adapter) as partial:
        (partial / "values").touch()
        raise ZeroDivisionError
    assert (adapter / "deep" / "values").read_text() == "new" and os.listdir(tmp_path) == ["adapter"]
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mounted)  # nothing can be renamed to it
    with whole_directory(mounted) as partial:
        assert partial.parent == mounted and check_destination(mounted) == mounted, "a killed process would leave this"
        (partial / "values").touch()
    assert os.listdir(mounted) == ["values"]
    discard(adapter)
    discard(mounted / "values")
    discard(mounted / "values")
    assert os.listdir(tmp_path) == ["mounted"] and not os.listdir(mounted)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "full"), "no space left on device.*; free some space"),
        (OSError(errno.EROFS, "locked"), "read-only file system.*; make it writable"),
        (OSError(errno.EIO, "broken"), "input/output error.*; look after the disk"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "free some"),
        (RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file"), "free"),
    ],
)
def test_what_a_disk_refuses_is_said_with_the_mend(tmp_path: Path, error: Exception, words: str) -> None:
    write_text(tmp_path / "file", "before")
    with (
        pytest.raises(StorageError, match=f"file could not be written .*{words}.*same command again"),
        whole_file(tmp_path / "file") as partial,
    ):
        partial.write_text("half")
        raise error
    assert (tmp_path / "file").read_text() == "before" and os.listdir(tmp_path) == ["file"]
    other = OSError(errno.ENOENT, "gone")
    assert storage_error(other) is None and storage_error(ValueError("wrong")) is None


def test_json_is_readable_and_comes_back(tmp_path: Path) -> None:
    values = {"word": "好", "numbers": [1, 2.5, None]}
    write_json(tmp_path / "values.json", values)
    text = (tmp_path / "values.json").read_text(encoding="utf-8")
    assert '\n  "word": "好",\n' in text and text.endswith("}\n")
    assert read_json(tmp_path / "values.json") == values
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "values.json").write_bytes(content)
        with pytest.raises(InputError, match=r"values\.json cannot be read .*; run the stage"):
            read_json(tmp_path / "values.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path / "missing.json")


def test_bytes_on_disk_are_those_of_the_files_named(tmp_path: Path) -> None:
    for name, size in (("a", 3), ("b", 5), ("c", 7)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert disk_bytes(tmp_path, ["a", "c"]) == 10


def test_a_directory_that_can_be_made_is_not_made_yet(tmp_path: Path) -> None:
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    assert check_destination(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert not list(tmp_path.iterdir())
    make_directory(tmp_path / "new" / "folder")
    make_directory(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()


def test_directories_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; name a directory"):
        check_writable(tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot be (made, because|written \().*file"):
        check_writable(tmp_path / "file" / "folder")
    with pytest.raises(InputError, match=r"cannot be written .*; name another one"):
        make_directory(tmp_path / "file" / "folder")
    with pytest.raises(InputError, match=r"cannot be written .*; name another one"):
        check_writable(tmp_path / ("n" * 300))
    for missing in (os.W_OK, os.X_OK):  # the superuser, whom nothing stops, runs tests too
        monkeypatch.setattr(os, "access", lambda path, mode, missing=missing: not mode & missing)
        with pytest.raises(InputError, match=f"because {re.escape(str(tmp_path))} does not allow it"):
            check_writable(tmp_path / "new" / "folder")


def test_an_export_goes_to_an_empty_directory(tmp_path: Path) -> None:
    assert check_destination(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="already holds files"):
        check_destination(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        check_destination(tmp_path / "file")
