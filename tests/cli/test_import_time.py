"""`reltune --help` must answer at once, so neither the package nor the command line loads a heavy library."""

import subprocess
import sys

import pytest

HEAVY = {
    "accelerate",
    "datasets",
    "pandas",
    "peft",
    "plotly",
    "scipy",
    "sentence_transformers",
    "sklearn",
    "torch",
    "transformers",
}


def loaded_after(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` of a new interpreter that ran the statement."""
    code = f"{statement}\nimport sys\nprint('loaded:', *{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("loaded:")[2].split())


@pytest.mark.parametrize("module", ["reltune", "reltune.config.run_config", "reltune.cli.commands"])
def test_import_loads_nothing_heavy(module: str) -> None:
    loaded = loaded_after(f"import {module}")
    assert "reltune" in loaded
    assert loaded & HEAVY == set()


def test_heavy_imports_would_be_seen() -> None:
    assert {"sklearn", "scipy"} <= loaded_after("import sklearn")


def test_python_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "reltune", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("reltune: error: No such command 'nonsense'"), done.stderr
