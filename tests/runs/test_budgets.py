"""Budgets of memory and time: what is chosen keeps them, as counted and under a hard limit, and what cannot be kept is refused."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reltune
from command_line import reltune as call
from command_line import review_rows, write_csv
from reltune import InputError
from reltune.config.run_config import RunConfig
from reltune.methods.registry import METHODS
from reltune.relevance.scores import RelevanceScores
from reltune.runs import flow, stages
from reltune.runs.estimate import HOLES
from reltune.runs.forecast import Forecast, forecast
from reltune.runs.summary import predicted_and_measured
from tiny_models import save_tiny_bert

MIB = 1 << 20
SHORT = ("--max_steps", 2, "--max_length", 64, "--per_device_train_batch_size", 64, "--use_cpu", "--head_epochs", 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, rows, and a run that was analyzed."""
    place = tmp_path_factory.mktemp("budgets")
    save_tiny_bert(place / "model", num_layers=4, hidden=128, intermediate=512, labels=("neg", "pos"))
    save_tiny_bert(place / "small", num_layers=1, hidden=8, intermediate=8, labels=("neg", "pos"))
    with (place / "train.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(" ".join([text] * 9), label) for text, label in review_rows(160)]
        csv.writer(file).writerows([("text", "label"), *rows])
    answer = call("analyze", *_new(place, "run"))
    assert answer.code in (None, 0), answer.err
    return place


def _new(place: Path, name: str, model: str = "model") -> list[Any]:
    return [
        *("--model_name_or_path", place / model, "--train_file", place / "train.csv", "--output_dir", place / name),
        *("--criteria", "magnitude", *SHORT),
    ]


@pytest.fixture(scope="module")
def relevance(place: Path) -> RelevanceScores:
    return reltune.analyze_checkpoint(place / "model", ["magnitude"], elements=True)


def foretold(place: Path, budget: str, relevance: RelevanceScores | None = None, **fields: Any) -> Forecast:
    training = {"per_device_train_batch_size": 64, **fields.pop("training", {})}
    device = fields.pop("device", "cpu")
    given = {"task": "sequence_classification", "max_length": 64, "budget": budget, "training": training, **fields}
    if "method" not in given:
        given = {"granularity": ["column"], "criteria": ["magnitude"], **given}
    return forecast(
        RunConfig(str(place / "model"), ".", **given), relevance=relevance, device=device, with_others=False
    )


def without_holes(plain: Forecast) -> int:
    """Bytes that training takes where malloc gives back what is freed, as under a budget of memory."""
    row = plain.estimate.rows[0]
    return row.total - row.memory[HOLES]


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_memory_costs_no_quality_first(place: Path, relevance: RelevanceScores) -> None:
    plain = foretold(place, "5%", relevance)
    wanted = without_holes(plain) // 2
    half = foretold(place, f"5% memory={wanted // MIB}MiB", relevance)
    assert half.estimate.rows[0].total <= wanted and half.plan is not None and plain.plan is not None
    assert half.plan.modules == plain.plan.modules
    parts = half.settings.training
    assert parts["per_device_train_batch_size"] * parts["gradient_accumulation_steps"] == 64
    assert any("accumulated" in line for line in half.describe())
    checked = foretold(place, f"5% memory={wanted // MIB}MiB", relevance, fixed=["per_device_train_batch_size"])
    assert checked.settings.training == {"gradient_checkpointing": True}


@pytest.mark.parametrize("granularity", ["column", "element", "layer"])
def test_what_is_fixed_stays_and_fewer_units_are_trained_higher_up(
    place: Path, relevance: RelevanceScores, granularity: str
) -> None:
    fields: dict[str, Any] = {
        "granularity": [granularity],
        "spread": "even" if granularity == "element" else "global",
        "fixed": ["per_device_train_batch_size", "gradient_checkpointing"],
    }
    plain = foretold(place, "70%", relevance, **fields)
    wanted = without_holes(plain) * 7 // 10
    less = foretold(place, f"70% memory={wanted // MIB}MiB", relevance, **fields)
    assert less.estimate.rows[0].total <= wanted and not less.settings.training
    assert less.plan is not None and plain.plan is not None and 0 < less.plan.parameters < plain.plan.parameters
    assert not [name for name in less.plan.modules if ".layer.0." in name]


def test_a_step_takes_no_longer_than_the_share_of_full_fine_tuning(place: Path, relevance: RelevanceScores) -> None:
    half = foretold(place, "5% time=0.7", relevance, device="t4-16gb")
    full = foretold(place, "time=1", method="full", device="t4-16gb")
    assert half.estimate.rows[0].seconds <= 0.7 * full.estimate.rows[0].seconds
    hours = foretold(place, "hours=1", method="lora", device="t4-16gb", training={"max_steps": 10})
    assert hours.estimate.rows[0].hours <= 1
    with pytest.raises(InputError, match=r"needs hours=[\d.e-]+; write that, or more"):
        foretold(place, "hours=0.000001", method="lora", device="t4-16gb", training={"max_steps": 10})
    with pytest.raises(InputError, match="how many steps there are is not known"):
        foretold(place, "hours=1", method="lora")
    with pytest.raises(InputError, match="a size of memory says nothing of speed"):
        foretold(place, "time=0.5", method="lora", device="16GiB")


def test_the_frontier_shows_what_each_depth_costs_and_keeps(place: Path, relevance: RelevanceScores) -> None:
    found = foretold(place, "5%", relevance)
    rows = found.frontier
    assert [row.lowest for row in rows] == list(range(4))
    assert rows[0].share == pytest.approx(1.0, abs=0.01)
    for lower, higher in itertools.pairwise(rows):
        assert lower.share >= higher.share and lower.seconds > higher.seconds and lower.memory > higher.memory


@pytest.mark.parametrize(("method", "field"), [("lora", "lora_r"), ("layers", "target_modules")])
def test_methods_with_a_size_take_the_largest_within_the_budget(place: Path, method: str, field: str) -> None:
    found = foretold(place, "55%", method=method)
    allowed = 0.55 * found.estimate.parameters
    assert allowed / 2 < found.estimate.rows[0].trained <= allowed
    assert list(found.settings.fields) == [field]


def test_a_smaller_size_is_found_without_going_through_all_numbers(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, asked = METHODS["lora"], []
    nearest = lora.nearest
    monkeypatch.setattr(lora, "nearest", lambda base, count: asked.append(count) or nearest(base, count))
    with pytest.raises(InputError, match=r"lora can train here with lora_r 1 needs time="):
        foretold(place, "time=0.01", method="lora", device="t4-16gb")
    assert len(asked) < 100  # of 13,000 numbers that a rank has


def test_what_depends_on_numbers_cannot_be_foretold(place: Path) -> None:
    with pytest.raises(InputError, match="depends on numbers"):
        foretold(place, "30%", method="shira")


def test_a_budget_of_parameters_leaves_one_size_no_choice(place: Path) -> None:
    for fields, why in (
        ({"method": "full"}, "the method full does not use it"),
        ({"method": "lora", "lora_r": 4}, "lora_r is given, and budget says how many parameters"),
    ):
        config = RunConfig(str(place / "model"), ".", train_file="train.csv", budget="1%", **fields)
        with pytest.raises(InputError, match=why):
            config.check_method()
    RunConfig(str(place / "model"), ".", train_file="train.csv", budget="memory=1GiB", method="full").check_method()


def test_dry_runs_write_nothing(place: Path) -> None:
    before = snapshot(place)
    words = ("--granularity", "column", "--budget", "5%", "memory=64MiB", "--dry_run")
    values = json.loads(call("select", place / "run", *words, "--format", "json").out)
    assert values["budget"] == "5% memory=64MiB" and not values["evenly_spread"]
    assert values["estimate"]["rows"][0]["total"] <= 64 * MIB and values["settings"]["gradient_accumulation_steps"] > 1
    assert [row["method"] for row in values["estimate"]["rows"]] == ["weights", "lora", "full"]
    assert sum(values["parameters_by_layer"].values()) == values["estimate"]["rows"][0]["trained"]
    assert len(values["frontier"]) == 4
    assert "does not tell how much quality it costs" in " ".join(call("select", place / "run", *words).out.split())
    answer = call("run", *_new(place, "new"), *words)
    assert answer.code in (None, 0), answer.err
    for said in ("Nothing is measured yet", "the backward pass ends at", "the largest batch that fits is", "A dry run"):
        assert said in answer.out
    assert snapshot(place) == before and not (place / "new").exists()


@pytest.mark.parametrize("own", [None, ("neg", "pos"), ("a", "b", "c", "d", "e"), ("v", "w", "x", "y", "z")])
def test_a_dry_run_counts_the_head_that_the_data_want(tmp_path: Path, own: tuple[str, ...] | None) -> None:
    """A new one of five classes, or none where the model's own head is for them already."""
    save_tiny_bert(tmp_path / "model", labels=own)
    rows = [(text, "abcde"[index % 5]) for index, (text, _) in enumerate(review_rows(100))]
    words: list[Any] = [
        *("--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "run", "--method", "lora"),
        *("--train_file", write_csv(tmp_path / "train.csv", rows), "--max_steps", 1, "--use_cpu"),
    ]
    said = json.loads(call("run", *words, "--dry_run", "--format", "json").out)["estimate"]
    answer = call("run", *words)
    assert answer.code in (None, 0), answer.err
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    lora, full = said["rows"]
    assert lora["head"] == full["head"] == results["head_parameters"] == (0 if own == tuple("abcde") else 32 * 5 + 5)
    assert lora["trained"] == results["trainable_parameters"]
    saved = load_file(tmp_path / "model" / "model.safetensors")
    kept = [values for name, values in saved.items() if not (results["head_parameters"] and "classifier" in name)]
    assert full["trained"] == said["parameters"] == sum(map(torch.Tensor.numel, kept))


def test_what_cannot_be_kept_is_refused_with_what_can(place: Path) -> None:
    answer = call("select", place / "run", "--granularity", "column", "--budget", "5%", "memory=16MiB", "--dry_run")
    assert answer.code == 2
    (least,) = re.findall(r"needs memory=([\d.]+)MiB; write that", answer.err)
    answer = call("run", *_new(place, "new"), "--granularity", "column", "--budget", "memory=16MiB")
    assert answer.code == 2 and "needs memory=" in answer.err and not (place / "new").exists()
    words = ("select", place / "run", "--granularity", "column", "--dry_run", "--budget")
    answer = call(*words, f"5% memory={least}MiB")
    assert answer.code in (None, 0), answer.err
    assert int(answer.out.split(" columns in ")[0].split()[-1]) > 1
    answer = call(*words, f"5% memory={float(least) / 1.02:.2f}MiB")
    assert answer.code == 2


def test_a_plan_trains_under_a_hard_limit_of_its_memory(place: Path) -> None:
    codes = {}
    for budget in ("5%", "5% memory=64MiB"):
        run = shutil.copytree(place / "run", place / f"capped {len(budget)}")
        assert call("select", run, "--granularity", "column", "--budget", budget).code in (None, 0)
        told = (run / "prediction.json").read_text() if "memory" in budget else ""
        warm_up = [*_new(place, f"warm {len(budget)}", "small"), "--granularity", "column", "--budget", "5%"]
        done = subprocess.run(
            [
                *(sys.executable, Path(__file__).parents[1] / "capped_worker.py", "64"),
                *(json.dumps([str(word) for word in words]) for words in (["run", *warm_up], ["tune", run])),
            ],
            env={name: value for name, value in os.environ.items() if name != "MALLOC_MMAP_THRESHOLD_"},
            capture_output=True,
            text=True,
        )
        codes[budget] = done.returncode
        if done.returncode:
            said = done.stdout + done.stderr
            assert "allocate memory" in said or "MemoryError" in said  # torch's words, or Python's
    assert codes == {"5%": 1, "5% memory=64MiB": 0}
    assert (run / "prediction.json").read_text() == told  # the texts are as long to `tune` as to `select`
    predicted = predicted_and_measured(
        json.loads((run / "prediction.json").read_text()), json.loads((run / "training_cost.json").read_text())
    )
    assert [one.name for one in predicted] == [
        "peak memory, batches of 64 tokens",
        "seconds per step, batches of 64 tokens",
    ]
    assert abs(predicted[0].difference) < 0.1
    config = RunConfig.load(run / "config.yaml")
    assert config.training["per_device_train_batch_size"] == 64  # what was asked for
    assert config.budget == "5% memory=64MiB"


def test_the_library_selects_under_a_budget_of_memory_with_a_profile(place: Path, relevance: RelevanceScores) -> None:
    profile = reltune.profile(
        str(place / "model"),
        device="cpu",
        task="sequence_classification",
        max_length=64,
        per_device_train_batch_size=64,
    )
    plan = reltune.select(relevance, "50% memory=90MiB", profile=profile)
    assert plan.parameters < 0.5 * relevance.inventory.base_parameters
    with pytest.raises(InputError, match=r"pass profile=reltune\.profile"):
        reltune.select(relevance, "50% memory=90MiB")
    with pytest.raises(InputError, match="no unit fits; the cheapest choice takes"):
        reltune.select(relevance, "50% memory=20MiB", profile=profile)
    with pytest.raises(InputError, match="takes one granularity, or column, row and bias"):
        reltune.select(relevance, "50% memory=90MiB", ["module", "column"], profile=profile)


@pytest.mark.parametrize(("budget", "times"), [("5% memory=64MiB", 1), ("5%", 0)])
def test_malloc_gives_back_from_the_start_under_a_budget_of_memory(
    budget: str, times: int, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks would go into the holes that an analysis leaves in the heap."""
    done: list[str] = []

    def stop(*_: object) -> None:
        raise InputError("nothing is loaded yet")

    monkeypatch.setattr(stages, "give_back_what_is_freed", lambda: done.append("set"))
    monkeypatch.setattr(flow, "prepare", stop)
    files = {"model_name_or_path": str(place / "model"), "train_file": str(place / "train.csv")}
    with pytest.raises(InputError, match="nothing is loaded yet"):
        flow.start(RunConfig(output_dir=str(place / "never"), budget=budget, **files))
    assert len(done) == times
