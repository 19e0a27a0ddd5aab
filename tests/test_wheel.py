"""The wheel: what is in it, and the four steps from it in an environment of its own, outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import reltune
from command_line import review_rows, write_csv
from tiny_models import save_tiny_bert

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    call([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", place, ROOT])
    (found,) = place.glob("*.whl")
    return found


def call(words: list[str | Path], directory: Path | None = None, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=directory, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "src"
    wanted = {
        str(path.relative_to(package)): path.read_bytes()
        for path in (package / "reltune").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        (commands,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    assert held == wanted
    assert {"reltune/py.typed", "reltune/report/page.html", "reltune/ops/kernels/sampled_groups.cu"} <= held.keys()
    assert f"\nVersion: {reltune.__version__}\n" in metadata and "\nRequires-Dist: torch" in metadata
    assert "reltune = reltune.__main__:main" in commands


@pytest.mark.slow
def test_the_four_steps_run_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are those of this environment, read through its path; reltune is the wheel's."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    call([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel])
    (packages,) = environment.glob("lib/*/site-packages")
    # A path file that is found in a directory named here is not followed, so an editable reltune is not seen.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    place = tmp_path / "elsewhere"
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(40))

    def run(*words: str | Path) -> str:
        return call([*words], place, PYTHONPATH="", HF_HUB_OFFLINE="1", PYTHONSAFEPATH="1")

    assert Path(run(python, "-c", "import reltune; print(reltune.__file__)").strip()).is_relative_to(packages)
    program = environment / "bin" / "reltune"
    assert run(program, "--version").strip() == reltune.__version__
    files = ("--model_name_or_path", "model", "--train_file", "train.csv", "--output_dir", "run")
    run(program, "analyze", *files, "--criteria", "fisher")
    run(program, "select", "run", "--granularity", "column", "--budget", "5%")
    run(program, "tune", "run", "--max_steps", "2")
    assert "accuracy" in run(program, "evaluate", "run")
    run(program, "report", "run")
    assert (place / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "<html" in (place / "run" / "report.html").read_text(encoding="utf-8")
