"""Which lines and branches of the core its own tests run: benchmarks/results/coverage.json.

    pip install coverage
    PYTHONPATH=src python benchmarks/core_coverage.py --keep DIR            # about an hour; --piece tests/plan for one folder's tests
    PYTHONPATH=src python benchmarks/core_coverage.py --keep DIR --report   # the record, from the pieces in DIR

The core is the packages of CORE, and its tests are those of the folders of the same names and the two files on budgets and costs, the
slow ones too where --slow is given. Each of PIECES is run by itself, so that one can be done anew. Left out of the figures are the files of LEFT_OUT and the bodies of
conditions that ask for a CUDA device (ON_CUDA), and what NO_CODE matches: it is never run, by construction.

DIR also holds which test runs which line, which benchmarks/mutation.py reads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECORD = HERE / "results" / "coverage.json"
CORE = ("ops", "layers", "cost", "relevance", "plan", "tuner")
PIECES = [*(f"tests/{name}" for name in CORE), "tests/runs/test_budgets.py", "tests/runs/test_estimate.py"]
LEFT_OUT = {"ops/kernels": "kernels in Triton and CUDA C++: a GPU or Triton's interpreter runs them, not Python"}
ON_CUDA = r'^\s*if (?!not ).*(\.is_cuda\b|\.type == "cuda"|cuda\.is_available\(\)).*:$'  # and what is indented below it
NO_CODE = [r"if TYPE_CHECKING:", r"^\s*\.\.\.$", r":\s*\.\.\.$", r"raise NotImplementedError$", r"raise AssertionError"]

SETTINGS = """
[run]
branch = true
parallel = true
source_pkgs = {packages}
data_file = {folder}/data/coverage
context = ${{RELTUNE_TEST-}}
disable_warnings = no-data-collected,module-not-measured,module-not-imported
[report]
exclude_also =
    {no_code}
"""
STARTED = (
    "import os\nif os.environ.get('COVERAGE_PROCESS_START'):\n    import coverage\n    coverage.process_startup()\n"
)


# As a plugin of pytest (-p core_coverage)

_seconds: dict[str, float] = {}
_failed: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What runs from here on, in this process and in those that it starts, is run by this test."""
    import coverage

    os.environ["RELTUNE_TEST"] = item.nodeid
    current = coverage.Coverage.current()
    assert current is not None, "started by sitecustomize"
    current.switch_context(item.nodeid)
    before = sum(os.times()[:4])  # of the processor, by this process and those that it has waited for
    try:
        return (yield)
    finally:
        _seconds[item.nodeid] = round(sum(os.times()[:4]) - before, 3)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not report.passed:
        _failed.add(report.nodeid)


def pytest_sessionfinish() -> None:
    """For mutation.py: how long each test took that passed, and the modules of other packages that they need."""
    modules = sorted(
        name for name in sys.modules if name.partition(".")[0] not in ("reltune", "tests", "core_coverage")
    )
    passed = {test: seconds for test, seconds in _seconds.items() if test not in _failed}
    Path(os.environ["RELTUNE_PIECE"]).write_text(json.dumps({"seconds": passed, "modules": modules}), encoding="utf-8")


# As a script


def settings(folder: Path) -> Path:
    """The settings of coverage.py in the folder, and what starts it in every process that Python begins."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "started").mkdir(exist_ok=True)
    (folder / "started" / "sitecustomize.py").write_text(STARTED, encoding="utf-8")
    path = folder / "coverage.ini"
    packages = ",".join(f"reltune.{name}" for name in CORE)
    path.write_text(
        SETTINGS.format(packages=packages, folder=folder, no_code="\n    ".join([*NO_CODE, ON_CUDA])), encoding="utf-8"
    )
    return path


def run_piece(folder: Path, piece: str, which: str) -> int:
    """Run the tests of a path, or of several with commas between, under coverage, and keep how long each took."""
    path = [str(folder / "started"), str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "COVERAGE_PROCESS_START": str(settings(folder)),
        "RELTUNE_PIECE": str(folder / f"{piece.replace('/', '-').replace(',', '+')[:200]}.json"),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "core_coverage",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
        *piece.split(","),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def figures(file: dict[str, Any], text: str) -> dict[str, Any]:
    summary = file["summary"]
    return {
        "lines": summary["num_statements"],
        "lines_run": summary["covered_lines"],
        "branches": summary["num_branches"],
        "branches_taken": summary["covered_branches"],
        "missing_lines": file["missing_lines"],
        "missing_branches": file["missing_branches"],
        "on_cuda": [number for number, line in enumerate(text.splitlines(), 1) if re.search(ON_CUDA, line)],
    }


def report(folder: Path, commit: str, slow: bool) -> None:
    import coverage

    measured = coverage.Coverage(str(folder / "all"), data_suffix=False, config_file=str(settings(folder)))
    measured.combine([str(path) for path in (folder / "data").iterdir()], keep=True)
    measured.save()
    written = folder / "coverage.json"
    measured.json_report(outfile=str(written), omit=[f"*/reltune/{name}/*" for name in LEFT_OUT])
    files = json.loads(written.read_text(encoding="utf-8"))["files"]
    record = {
        "commit": commit,
        "python": platform.python_version(),
        "coverage": metadata.version("coverage"),
        "torch": metadata.version("torch"),
        "tests": PIECES,
        "slow_tests": slow,
        "left_out": {
            f"{name}/{path.name}": why
            for name, why in LEFT_OUT.items()
            for path in sorted((ROOT / "src" / "reltune" / name).glob("*.py"))
        },
        "no_code": NO_CODE,
        "on_cuda": ON_CUDA,
        "files": {
            (own := name.split("reltune/", 1)[1]): figures(
                file, (ROOT / "src/reltune" / own).read_text(encoding="utf-8")
            )
            for name, file in sorted(files.items())
        },
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, metavar="DIR")
    parser.add_argument("--piece", nargs="*", default=PIECES)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    folder = arguments.keep.resolve()
    if arguments.report:
        report(folder, arguments.commit, arguments.slow)
        return 0
    which = "not browser" if arguments.slow else "not slow and not browser"
    return max(run_piece(folder, piece, which) for piece in arguments.piece)


if __name__ == "__main__":
    sys.exit(main())
