"""The report of a run, from its artefacts: drawn without torch, the same for runs of older versions."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reltune.relevance.scores import RelevanceScores
from reltune.runs.directory import RunDirectory
from reltune.runs.summary import read_record

OLD = Path(__file__).parents[1] / "artefacts" / "v0_1" / "columns"
HEAVY = {"accelerate", "datasets", "pandas", "peft", "scipy", "sklearn", "torch", "transformers"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An old run with its scores saved anew: torch need not read them any more."""
    run = shutil.copytree(OLD, tmp_path_factory.mktemp("runs") / "run")
    RelevanceScores.load(run / "relevance").save(run / "relevance")
    return run


@pytest.mark.parametrize(("scores", "heavy"), [("new", set()), ("old", {"torch"})])
def test_the_report_needs_neither_torch_nor_transformers(run: Path, tmp_path: Path, scores: str, heavy: set) -> None:
    """But for scores of an older version, which are read with torch."""
    copy = shutil.copytree(run if scores == "new" else OLD, tmp_path / "copy")
    code = (
        "import sys\nfrom reltune.cli.commands import main\nsys.argv = ['reltune', 'report', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print('ended:', end.code)\n"
        "print('loaded:', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True)
    out, _, loaded = done.stdout.partition("loaded:")
    assert out.endswith("ended: 0\n") and done.stderr == "", done
    assert HEAVY & set(loaded.split()) >= heavy if heavy else not HEAVY & set(loaded.split())
    assert (copy / "report.html").is_file() and "fisher relevance: share of the total, %" in out


def test_old_and_new_scores_give_the_same_record(run: Path) -> None:
    records = [read_record(RunDirectory.open(path)[1], RunDirectory(path)) for path in (run, OLD)]
    for record in records:
        record.config.pop("output_dir")
    assert dataclasses.asdict(records[0]) == dataclasses.asdict(records[1])
    assert records[0].heatmaps == RelevanceScores.load(OLD / "relevance").overview().heatmaps


def test_the_machine_is_the_one_that_trained(run: Path, tmp_path: Path) -> None:
    """A report that is drawn elsewhere, or again years later, says where the run was trained."""
    copy = RunDirectory(shutil.copytree(run, tmp_path / "copy"))
    config = RunDirectory.open(copy.path)[1]
    versions = RelevanceScores.load(copy.relevance).provenance["versions"]
    assert any(
        note == f"Analyzed with python {versions['python']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}."
        for note in read_record(config, copy).notes
    )
    cost = json.loads((copy.path / "training_cost.json").read_text())
    (copy.path / "training_cost.json").write_text(json.dumps({**cost, "machine": "an abacus; wood 1.0"}))
    assert "Run on an abacus; wood 1.0." in read_record(config, copy).notes
