"""What the fuzzer of the loaders (benchmarks/fuzz_loaders.py) has found, and a short run of it."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

import fuzz_loaders
from reltune.data import packages
from reltune.errors import InputError
from reltune.plan.plan import ModulePlan
from reltune.runs.directory import RunDirectory
from reltune.runs.summary import read_lm_eval

LOADERS = {loader.name: loader for group in fuzz_loaders.GROUPS[:-1] for loader in group()}  # Parquet takes longer


@pytest.mark.parametrize("name", LOADERS)
def test_a_short_run(name: str, tmp_path: Path) -> None:
    record = fuzz_loaders.fuzz(LOADERS[name], 60, 60.0, 7, None)
    assert record["inputs"] == 60 and not record["unexpected"], record["unexpected"]


@pytest.mark.parametrize(
    "record", [3, [], {}, {"scores": [{}]}, {"scores": 1}, {"lm_eval_version": "1", "limit": None, "batch_size": "1"}]
)
def test_records_of_another_form(record: object, tmp_path: Path) -> None:
    (tmp_path / "lm_eval.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="no record of this kind"):
        read_lm_eval(RunDirectory(tmp_path))


def test_a_repeated_index_behind_many_is_found_at_once() -> None:
    with pytest.raises(InputError, match="name 299999 twice"):
        ModulePlan((4, 300_000), columns=[*range(300_000), 299_999]).check("a")


@pytest.mark.parametrize("form", [".zip", ".tar.gz"])
def test_archives_that_unpack_to_too_much(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "UNPACKED", 2**20)
    name, zeros = "tweets_GroundTruth.txt", bytes(2**21)
    path = tmp_path / f"bomb{form}"
    if form == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, zeros)
    else:
        with tarfile.open(path, "w:gz") as tar:
            about = tarfile.TarInfo("other")
            about.size = len(zeros)
            tar.addfile(about, io.BytesIO(zeros))
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="more than 1,048,576 bytes when unpacked"):
        packages.CORPORA["tweets"].read(None, str(path))


def test_archives_inside_archives(tmp_path: Path) -> None:
    data = b""
    for _ in range(packages.ARCHIVES_INSIDE + 1):
        held = io.BytesIO()
        with zipfile.ZipFile(held, "w") as archive:
            archive.writestr("inner.zip", data)
        data = held.getvalue()
    (tmp_path / "deep.zip").write_bytes(data)
    with pytest.raises(InputError, match="archives inside archives"):
        packages.CORPORA["tweets"].read(None, str(tmp_path / "deep.zip"))
