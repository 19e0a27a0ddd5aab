"""What can be read of a relevance directory without torch: the same as with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from measured_models import tiny_bert
from relevance_cases import data_for, measure
from reltune.errors import InputError
from reltune.relevance.artefact import PARTIAL, interrupted_in, read_overview
from reltune.relevance.scores import RelevanceScores


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The relevance of a tiny BERT by a criterion that adds up and one that does not."""
    directory = tmp_path_factory.mktemp("relevance")
    model = tiny_bert()
    measure(model, [data_for(model)], None, ["fisher", "gradient_snr", "depth"]).save(directory)
    return directory


def edited(directory: Path, copy: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(directory, copy)
    values = json.loads((copy / "scores.json").read_text())
    edit(values)
    (copy / "scores.json").write_text(json.dumps(values))
    return copy


def test_the_overview_is_that_of_the_scores(directory: Path) -> None:
    scores, found = RelevanceScores.load(directory), read_overview(directory)
    assert found == scores.overview()
    assert found.criteria == ["fisher", "gradient_snr", "depth"] and found.depth_sentence == scores.depth_sentence()
    assert found.heatmaps == [scores.heatmap(criterion) for criterion in found.criteria]
    assert found.layers == {info.name: info.layer for info in scores.inventory.modules}
    assert found.left_out == scores.inventory.left_out and found.provenance == scores.provenance


def test_it_is_read_from_the_json_file_alone(directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "scores.json", tmp_path)
    assert read_overview(tmp_path) == read_overview(directory)


def test_scores_of_older_versions_have_to_be_loaded_for_one(directory: Path, tmp_path: Path) -> None:
    old = edited(directory, tmp_path / "old", lambda values: values.pop("overview"))
    assert read_overview(old) is None
    assert RelevanceScores.load(old).overview() == read_overview(directory)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda values: values.update(format="reltune-relevance-0"), "has format 'reltune-relevance-0'"),
        (lambda values: values.pop("provenance"), "do not fit together"),
        (lambda values: values["overview"].pop("heatmaps"), "do not fit together"),
        (lambda values: values["overview"]["heatmaps"][0].update(colour="red"), "do not fit together"),
        (lambda values: values.update(modules=[{"name": "a"}]), "do not fit together"),
    ],
)
def test_damaged_files(directory: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        read_overview(edited(directory, tmp_path / "copy", edit))
    with pytest.raises(InputError, match="run `reltune analyze` first"):
        read_overview(tmp_path / "nowhere")
    (tmp_path / "copy" / "scores.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_overview(tmp_path / "copy")


def test_interrupted_analyses(tmp_path: Path) -> None:
    assert not interrupted_in(tmp_path) and not interrupted_in(tmp_path / "nowhere")
    (tmp_path / f"correlation.{PARTIAL}").touch()
    assert interrupted_in(tmp_path)
    (tmp_path / f"correlation.{PARTIAL}").rename(tmp_path / PARTIAL)
    assert interrupted_in(tmp_path)
