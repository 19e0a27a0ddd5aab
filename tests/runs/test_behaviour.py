"""Criteria measured from behaviour, by the command line: analyzed, interrupted, selected by, reported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from command_line import Answer, reltune, review_rows, write_csv
from reltune.plan.plan import Plan
from reltune.relevance.criteria import ablation, movement
from reltune.relevance.scores import RelevanceScores
from reltune.runs.summary import behaviour_notes
from tiny_models import save_tiny_bert

BEHAVIOUR = ("ablation", "correlation", "movement")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(80))
    return place


def words(place: Path, name: str, *more: object) -> tuple[object, ...]:
    run = ("--model_name_or_path", place / "model", "--train_file", place / "train.csv", "--output_dir", place / name)
    return *run, "--analysis_examples", 24, "--max_trials", 12, "--probe_steps", 3, *more


@pytest.fixture(scope="module")
def answer(place: Path) -> Answer:
    criteria = ",".join([*BEHAVIOUR, "fisher"])
    training = ("--num_train_epochs", 1, "--learning_rate", 1e-3)
    return reltune(
        "run", *words(place, "done", "--criteria", criteria, "--granularity", "layer", "--budget", "60%", *training)
    )


def test_the_whole_flow(place: Path, answer: Answer) -> None:
    assert answer.code == 0, answer.err
    run = place / "done"
    for bar in ("ablation layer", "ablation module", "ablation head", "correlation head", "movement", "analyze"):
        assert bar in answer.err
    scores = RelevanceScores.load(run / "relevance")
    assert scores.criteria == [*BEHAVIOUR, "fisher"]
    assert scores.provenance["ablation"]["metric"] == "accuracy"
    assert scores.provenance["correlation"]["max_trials"] == 12 and scores.provenance["movement"]["steps"] == 3
    assert scores.provenance["examples"] == 24
    plan = Plan.load(run / "plan")
    assert plan.criterion == "ablation" and len({name.split(".")[2] for name in plan.modules}) == 1
    page = (run / "report.html").read_text()
    assert all(f"<h3>{name}</h3>" in page for name in BEHAVIOUR)
    assert "the sum of absolute values" in page and "ablation is measured by the accuracy, " in page
    assert "12 trials of heads, ranking not yet stable" in page


def test_selecting_by_each_of_them(place: Path, answer: Answer) -> None:
    for criterion, granularity in (("correlation", "module"), ("ablation", "head"), ("movement", "column")):
        given = ("--criteria", criterion, "--granularity", granularity, "--budget", "20%", "--overwrite_output_dir")
        found = reltune("select", place / "done", *given)
        assert found.code == 0, found.err
        assert Plan.load(place / "done" / "plan").criterion == criterion


def test_a_granularity_that_is_not_scored_is_refused_before_anything_is_made(place: Path) -> None:
    found = reltune("run", *words(place, "refused", "--criteria", "ablation", "--budget", "5%"))
    assert found.code == 2 and not (place / "refused").exists()
    assert "ablation scores no column, only layer, module, head" in found.err and found.err.count("\n") <= 2
    for flag, value in (("max_trials", 3), ("probe_steps", 0), ("analysis_examples", 0)):
        found = reltune("analyze", *words(place, "refused", f"--{flag}", value))
        assert found.code == 2 and flag in found.err and not (place / "refused").exists()


def test_the_same_command_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = words(place, "cut", "--criteria", "ablation")
    assert reltune("analyze", *words(place, "whole", "--criteria", "ablation")).code == 0
    real, passes = ablation.Experiment.metric, []

    def metric(self: object, what: str = "") -> float:
        passes.append(what)
        if len(passes) == 9:
            raise KeyboardInterrupt
        return real(self, what)

    monkeypatch.setattr(ablation.Experiment, "metric", metric)
    assert reltune("analyze", *given).code == 130
    after = len(passes)
    found = reltune("analyze", *given)
    assert found.code == 0 and "Going on with the interrupted analysis." in found.out
    a, b = (RelevanceScores.load(place / name / "relevance") for name in ("whole", "cut"))
    for kind in ("layer", "module", "head"):
        assert all(torch.equal(value, b.by(kind)[name]) for name, value in a.by(kind).items())
    units = sum(value.numel() for kind in ("layer", "module", "head") for value in a.by(kind).values())
    assert len(passes) - after == units - 8
    assert not list((place / "cut" / "relevance").glob("*partial*"))


def test_the_same_command_begins_again_where_nothing_was_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = words(place, "early", "--criteria", "movement")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(movement, "measure", stop)
        assert reltune("analyze", *given).code == 130
    answer = reltune("analyze", *given)
    assert answer.code == 0, answer.err
    assert reltune("analyze", *given).code == 2  # finished


def test_warnings_are_sentences(answer: Answer) -> None:
    assert "\nreltune: warning: the ranking of heads by correlation is not stable after 12 trials" in answer.err
    assert "RuntimeWarning" not in answer.err and "run.py" not in answer.err


def test_the_report_says_how_many_examples_were_seen() -> None:
    facts = {"metric": "accuracy", "of_the_model": 0.9, "layer": {"examples": 128}, "module": {"examples": 300}}
    relevance = SimpleNamespace(criteria=["ablation"], provenance={"ablation": facts, "examples": 300})
    wanted = "ablation is measured by the accuracy, 0.9 for the untouched model; layers on 128 of 300 examples."
    assert behaviour_notes(relevance) == [wanted]  # type: ignore[arg-type]
