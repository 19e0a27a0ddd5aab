"""What benchmarks/mutation.py says of mutants of a small package; in a process of its own, which has not loaded reltune."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mutation

CODE = "NAMES = ['one', 'two']\n\n\ndef total(a, b):\n    return a + b\n"
TESTS = """
import pytest
from reltune.sums import NAMES, total

def test_total(): assert total(1, 2) == 3
@pytest.mark.parametrize("name", NAMES)
def test_name(name): assert name
"""
SCRIPT = """
import json, sys, types
from pathlib import Path
import _hypothesis_pytestplugin, pytest
import mutation

root = Path(sys.argv[1])
mutation.ROOT, mutation.SOURCE = root, root / "src"
child = mutation.Child(root / "scratch")
mutant = mutation.Mutant("sums.py", "of the test", 0, 5, 0)

def said(code, names):
    mutation.mutated = lambda _: (code, "")
    tests = types.SimpleNamespace(of=lambda _: names, seconds=dict.fromkeys(names, 0.1))
    try:
        found = mutation.one(child, mutant, tests, set(), 8.0)
    except SystemExit as error:
        return str(error)
    return [found["outcome"], found["by"], found["tests"]]

def checked(names):
    try:
        child.check(names)
    except SystemExit as error:
        return str(error)

asked = json.loads(sys.argv[2])
print(json.dumps([said(*words) for words in asked["mutants"]] + [checked(names) for names in asked["checked"]]))
"""


def test_only_a_test_that_failed_or_code_that_does_not_load_is_a_kill(tmp_path: Path) -> None:
    for name, text in {
        "src/reltune/__init__.py": "",
        "src/reltune/sums.py": CODE,
        "tests/test_sums.py": TESTS,
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = ["-q", "--import-mode=importlib"]\n',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        os.utime(
            tmp_path / name, (1e9, 1e9)
        )  # as old as code that is under test: a mutant may be as long, and is newer
    names = [f"tests/test_sums.py::test_{name}" for name in ("total", "name[one]", "name[two]")]
    asked = {
        "mutants": [
            (CODE, names),
            (CODE.replace("+", "-"), names),
            (CODE.replace("]", ""), names),
            (CODE.replace("'two'", "'2'"), names),
            (CODE, ["tests/test_no_more.py::test_total"]),
            (CODE.replace("return", "import os; os._exit(3); return"), names),
        ],
        "checked": [names, [*names, "tests/test_sums.py::test_no_more"]],
    }
    environment = {"PYTHONPATH": str(Path(mutation.__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "_hypothesis_pytestplugin",
    }  # the rest takes long
    words = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(asked)]
    answer = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert not answer.returncode, answer.stderr
    same, killed, not_loaded, renamed, gone, stopped, there, missing = json.loads(answer.stdout)
    assert (
        same == ["survived", None, 3] and killed == ["killed", names[0], 3] and not_loaded == ["killed", "loading", 3]
    )
    assert renamed == ["survived", None, 1]  # without test_name
    assert "no test ran" in gone and "pytest ended with 3" in stopped
    assert (
        there is None and "1 tests are gone, such as tests/test_sums.py::test_no_more; run core_coverage.py" in missing
    )
