"""What the fuzzer of the loaders (benchmarks/fuzz_loaders.py) has found, and a short run of it."""

from __future__ import annotations

import io
import json
import os
import signal
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

LOADERS = {loader.name: loader for group in fuzz_loaders.GROUPS for loader in group()}


@pytest.mark.parametrize("name", LOADERS)
def test_a_short_run(name: str, tmp_path: Path) -> None:
    inputs = 20 if name == "data .parquet" else 60
    record = fuzz_loaders.fuzz(LOADERS[name], inputs, 7)
    assert record["inputs"] == inputs and not record["unexpected"], record["unexpected"]


def test_the_record_has_every_loader_and_nothing_unexpected() -> None:
    root = Path(fuzz_loaders.__file__).parents[1]
    loaders = json.loads((root / "benchmarks" / "results" / "fuzz_loaders.json").read_text())["loaders"]
    assert {name for name in loaders if not name.endswith(", by coverage")} == LOADERS.keys()
    for name, record in loaders.items():
        assert not record["unexpected"] and record["slowest_cpu_seconds"] < fuzz_loaders.LONGEST, name
        assert record["most_memory_bytes"] <= 2 * record["largest_file_bytes"] + fuzz_loaders.MEMORY, name
    inputs = [record["inputs"] for record in loaders.values()]
    page = (root / "docs" / "files.md").read_text(encoding="utf-8")
    assert f"{sum(inputs):,} inputs so far, {min(inputs):,} at least of each loader" in page


def test_what_goes_wrong_is_a_finding_and_the_record_is_added_to(tmp_path: Path) -> None:
    """Against the inputs themselves, made a second time."""

    def read(folder: Path) -> None:
        data = (folder / "a.json").read_bytes()
        if data.startswith(b"["):
            raise InputError("no mapping")
        if len(data) % 5 == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        if len(data) % 5 == 1:
            bytes(b"x" * (70 << 20))
        if len(data) % 5 == 2:
            int(data)

    loader, out = fuzz_loaders.Loader("mine", {"a.json": b'{"a": [1, 2]}'}, read), tmp_path / "record.json"
    first = fuzz_loaders.go_on(loader, 15, 3, out=out, findings=tmp_path / "found")
    record = fuzz_loaders.go_on(loader, 40, 3, out=out, findings=tmp_path / "found")
    assert first["inputs"] == 15 and record["inputs"] == 40
    assert json.loads(out.read_text())["loaders"]["mine"] == record
    made = [fuzz_loaders.input_of(loader, f"3/mine/{number}")["a.json"] for number in range(40)]
    rest = [data for data in made if not data.startswith(b"[")]
    wanted = [sum(len(data) % 5 == kind for data in rest) for kind in range(3)]
    assert all(wanted) and record["errors"] == {"elsewhere": len(made) - len(rest)}
    counts = {kind.split(" in ")[0]: found["count"] for kind, found in record["unexpected"].items()}
    memory = "an input that takes more memory than twice its size and 64 MiB"
    assert counts == {"the process ends by signal 11": wanted[0], memory: wanted[1], "ValueError": wanted[2]}
    assert record["accepted"] == len(rest) - wanted[0] - wanted[2]
    seed = record["unexpected"]["the process ends by signal 11"]["seed"]
    assert len(fuzz_loaders.input_of(loader, seed)["a.json"]) % 5 == 0
    with pytest.raises(SystemExit, match="--seed 3"):
        fuzz_loaders.go_on(loader, 50, 4, out=out)


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


def test_single_weights_of_a_matrix_that_is_wider_than_their_type_holds() -> None:
    ModulePlan((6, 2**31), elements=[0, 7]).check("a")
    with pytest.raises(InputError, match="element 7 of a lies in one of its chosen columns"):
        ModulePlan((6, 2**31), columns=[7], elements=[0, 7]).check("a")


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
