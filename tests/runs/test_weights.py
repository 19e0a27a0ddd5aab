"""`reltune analyze` without data: criteria that look at weights alone, no model in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from transformers import AutoModel, PreTrainedModel

from command_line import assert_refused, contents, reltune, review_rows, write_csv
from relevance_cases import measure
from reltune.config.run_config import RunConfig
from reltune.names import WITHOUT_DATA
from reltune.plan.plan import Plan
from reltune.relevance.scores import RelevanceScores
from tiny_models import save_tiny_bert


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(60))
    return place


@pytest.fixture(scope="module")
def analyzed(place: Path) -> Path:
    """Analyzed without loading a model. Tests read it and leave it as it is."""
    with mock.patch.object(PreTrainedModel, "from_pretrained", side_effect=AssertionError("the model was loaded")):
        answer = analyze(place, "analyzed", "--criteria", ",".join(WITHOUT_DATA))
    assert answer.code == 0, answer
    assert "By magnitude" in answer.out and f"reltune select {place / 'analyzed'}" in answer.out
    return place / "analyzed"


def analyze(place: Path, name: str, *words: object):
    return reltune("analyze", "--model_name_or_path", place / "model", "--output_dir", place / name, *words)


def test_scores_are_those_of_the_loaded_model(place: Path, analyzed: Path) -> None:
    found = RelevanceScores.load(analyzed / "relevance")
    wanted = measure(AutoModel.from_pretrained(place / "model"), criteria=WITHOUT_DATA)
    assert found.criteria == list(WITHOUT_DATA)
    assert found.fingerprint == wanted.fingerprint and found.always_trained == []
    for criterion in wanted.parts:
        for name, parts in wanted.parts[criterion].items():
            assert all(torch.equal(found.parts[criterion][name][part], value) for part, value in parts.items())
    assert RunConfig.load(analyzed / "config.yaml").train_file is None
    assert sorted(path.name for path in analyzed.iterdir()) == ["commands.json", "config.yaml", "relevance"]


def test_select_and_report_follow(place: Path, analyzed: Path) -> None:
    run = shutil.copytree(analyzed, place / "selected")
    answer = reltune("select", run, "--budget", "5%")
    assert answer.code == 0 and "by magnitude" in answer.out and "ReltuneConfig" in answer.out, answer
    plan = Plan.load(run / "plan")
    assert plan.modules and plan.task_type is None and plan.always_trained == []
    again = ["--budget", "20%", "--overwrite_output_dir"]
    answer = reltune("select", run, "--criteria", "spectral_snr", "--granularity", "module", *again)
    assert answer.code == 0 and "by spectral_snr" in answer.out, answer
    answer = reltune("report", run)
    assert answer.code == 0 and (run / "report.html").is_file(), answer
    assert "None" not in (run / "report.html").read_text(encoding="utf-8").split("</title>")[0]


def test_single_weights(place: Path) -> None:
    assert analyze(place, "elements", "--criteria", "magnitude", "--elements").code == 0
    parts = RelevanceScores.load(place / "elements" / "relevance").parts["magnitude"]
    weight = AutoModel.from_pretrained(place / "model").encoder.layer[0].attention.self.query.weight
    assert torch.equal(parts["encoder.layer.0.attention.self.query"]["element"], weight.detach().square())
    assert yaml.safe_load((place / "elements" / "config.yaml").read_text())["elements"] is True
    answer = analyze(
        place, "elements_with_data", "--criteria", "fisher", "--elements", "--train_file", place / "train.csv"
    )
    assert answer.code == 0, answer
    parts = RelevanceScores.load(place / "elements_with_data" / "relevance").parts["fisher"]
    assert parts["bert.encoder.layer.0.attention.self.query"]["element"].shape == weight.shape


def test_refused(place: Path, analyzed: Path) -> None:
    before = contents(place)
    for words in (
        [],  # movement
        ["--criteria", "magnitude,fisher"],
        ["--criteria", "magnitude", "--test_file", place / "train.csv"],
    ):
        assert_refused(analyze(place, "new", *words), "train_file", "dataset_name")
    assert_refused(analyze(place, "new", "--criteria", "spectral_snr", "--elements"), "spectral_snr", "elements")
    with_data = ("--criteria", "fisher,spectral_snr", "--elements", "--train_file", place / "train.csv")
    assert_refused(analyze(place, "new", *with_data), "spectral_snr", "elements")
    assert_refused(analyze(place, "new", "--criteria", "magnitude", "--target_modules", "absent"), "'absent'")
    assert_refused(analyze(place, "analyzed", "--criteria", "magnitude"), "already holds a run")
    assert_refused(analyze(place, "model", "--criteria", "magnitude"), "no run of reltune")
    words = ["--model_name_or_path", place / "absent", "--output_dir", place / "new"]
    assert_refused(reltune("analyze", "--criteria", "magnitude", *words), "absent", "does not exist")
    # stages that need data
    words = ["--model_name_or_path", place / "model", "--output_dir", place / "new", "--criteria", "magnitude"]
    assert_refused(reltune("run", *words), "train_file")
    assert_refused(reltune("tune", analyzed), "without data", "--train_file")
    assert_refused(reltune("evaluate", analyzed), "no adapter")
    assert_refused(reltune("select", analyzed, "--granularity", "bias", "--criteria", "spectral_snr"), "bias")
    assert_refused(reltune("select", analyzed, "--criteria", "fisher"), "train_file")
    assert contents(place) == before


def test_damaged_files(place: Path) -> None:
    broken = shutil.copytree(place / "model", place / "broken")
    (broken / "model.safetensors").write_bytes(b"\0" * 50)
    words = ["--model_name_or_path", broken, "--output_dir", place / "new", "--criteria", "magnitude"]
    assert_refused(reltune("analyze", *words), "model.safetensors", "cannot be read")
    save_tiny_bert(broken, hidden=48)
    config = json.loads((place / "model" / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config))
    assert_refused(reltune("analyze", *words), "config.json")
    assert not (place / "new").exists()
    shutil.rmtree(broken)


def test_overwriting(place: Path, analyzed: Path) -> None:
    run = shutil.copytree(analyzed, place / "again")
    assert analyze(place, "again", "--criteria", "depth", "--overwrite_output_dir").code == 0
    assert RelevanceScores.load(run / "relevance").criteria == ["depth"]


def test_help_names_the_criteria() -> None:
    text = " ".join(reltune("analyze", "--help").out.split())
    assert "--elements" in text and "magnitude, spectral_snr, principal" in text
