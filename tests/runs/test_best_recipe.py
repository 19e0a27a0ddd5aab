"""The best recipe by default: a run without flags, and what follows from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from command_line import Answer, assert_refused, reltune, review_rows, write_csv
from reltune.config import recipes
from reltune.config.recipes import DIRECTIONS_RATE
from reltune.config.run_config import RunConfig
from reltune.notes import note
from reltune.plan.plan import Plan
from reltune.relevance.scores import RelevanceScores
from reltune.runs import demo, flow
from tiny_models import save_tiny_bert


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(60))
    return place


def new_run(place: Path, name: str, *words: object, command: str = "run") -> Answer:
    files = ["--model_name_or_path", place / "model", "--train_file", place / "train.csv"]
    return reltune(command, *files, "--output_dir", place / name, *words)


@pytest.fixture(scope="module")
def plain(place: Path) -> Path:
    """A run without further flags. Tests read it and leave it as it is."""
    answer = new_run(place, "plain")
    assert answer.code == 0, answer.err
    return place / "plain"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_single_weights_by_movement_at_their_rate(plain: Path) -> None:
    config, plan = RunConfig.load(plain / "config.yaml"), Plan.load(plain / "plan")
    assert (config.criteria, config.granularity) == (["movement"], ["element"])
    assert (config.budget, config.spread, config.probe_steps) == ("0.12%", "even", 100)
    assert (plan.criterion, plan.granularity, plan.spread) == ("movement", ["element"], "even")
    # 25 of 20,864 weights; every matrix of the two layers has its share, rounded down
    assert plan.budget_parameters == 25 and 0 < plan.parameters <= 25
    share = {shape: 25 * shape[0] * shape[1] // 16384 for shape in ((32, 32), (64, 32), (32, 64))}
    assert all(len(module.elements) == share[tuple(module.shape)] for module in plan.modules.values())
    trained = {name.rpartition(".")[2] for name in load_file(plain / "adapter" / "adapter_model.safetensors")}
    assert trained == {"reltune_elements", "reltune_element_indices", "weight", "bias"}  # the last two are the head's
    rate = read(plain / "training_cost.json")["learning_rate"]
    assert rate == pytest.approx(5e-4 / (plan.parameters / 16384) ** 0.5)  # for classes of texts


def test_everything_moves_in_training_mode_by_steps_of_one_size(plain: Path) -> None:
    facts = RelevanceScores.load(plain / "relevance").provenance["movement"]
    wanted = {"steps": 100, "update": "sign", "step_size": 1e-4, "relative": False, "move": "all", "training": True}
    assert facts.items() >= wanted.items() and facts["steps_taken"] == 100
    assert facts["weights_moved"] == 20864 + 66


def test_few_weights_for_many_examples_are_spoken_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "TOY", 0)
    fields = {
        "few": {},
        "enough": {"budget": "2%"},
        "columns": {"granularity": ["column"]},
        "memory": {"budget": "memory=1GiB"},
    }
    files = {"model_name_or_path": str(place / "model"), "train_file": str(place / "train.csv")}
    said = {}
    for name, own in fields.items():
        with pytest.warns() as notes:
            flow.start(RunConfig(output_dir=str(place / name), **files, **own))
            note("the end")
        said[name] = [str(one.message) for one in notes if "weights are few" in str(one.message)]
    assert said.pop("few") == [
        "25 weights are few for 42 training examples: in studies some 50 for each did best, and 2% of the model was the most that was "
        "tried (docs/config.md). Consider --budget 2%."
    ]
    assert not any(said.values())


def test_what_goes_on_is_not_told_again_that_its_weights_are_few(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "TOY", 0)
    config = {"model_name_or_path": str(place / "model"), "train_file": str(place / "train.csv")}
    said = []
    for _ in range(2):
        with pytest.warns() as notes:
            started = flow.start(RunConfig(output_dir=str(place / "stopped"), **config))
            note("the end")
        said.append([str(one.message) for one in notes if "weights are few" in str(one.message)])
        if not started.going_on:
            flow.measure_and_choose(started)
    assert started.going_on and [len(one) for one in said] == [1, 0]


def test_another_granularity_of_the_same_relevance(place: Path, plain: Path) -> None:
    run = shutil.copytree(plain, place / "again")
    answer = reltune("select", run, "--granularity", "module", "--budget", "20%", "--overwrite_output_dir")
    assert answer.code == 0, answer.err
    plan = Plan.load(run / "plan")
    assert (plan.criterion, plan.spread) == ("movement", "global")
    assert all(module.weight for module in plan.modules.values())


def test_no_lora_file_of_single_weights(place: Path, plain: Path) -> None:
    answer = reltune("export", plain, "--to", "lora", "--output_dir", place / "lora")
    assert_refused(answer, "single weights", "--to merged", "--granularity direction")
    assert not (place / "lora").exists()
    assert reltune("export", plain, "--to", "merged", "--output_dir", place / "merged").code == 0


def test_directions_of_the_same_relevance_become_a_lora_file(place: Path, plain: Path) -> None:
    run = shutil.copytree(plain, place / "along")
    assert reltune("select", run, "--granularity", "direction", "--budget", "5%", "--overwrite_output_dir").code == 0
    plan = Plan.load(run / "plan")
    assert (plan.criterion, plan.spread, plan.budget_parameters) == ("movement", "even", 1043)
    assert {name: len(module.directions) for name, module in plan.modules.items()} == dict.fromkeys(plan.modules, 2)
    assert len(plan.modules) == 12 and plan.parameters == 2 * 2 * (5 * 32 + 64)
    assert reltune("tune", run, "--max_steps", 3).code == 0
    assert read(run / "training_cost.json")["learning_rate"] == DIRECTIONS_RATE
    held = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in held} == {
        "reltune_directions",
        "reltune_direction_vectors",
        "weight",
        "bias",
    }
    assert sum(t.numel() for t in held.values()) * 4 == plan.adapter_bytes()
    answer = reltune("evaluate", run)
    assert answer.code == 0 and read(run / "all_results.json")["trainable_parameters"] == plan.parameters
    assert "direction" in (run / "adapter" / "README.md").read_text()
    assert reltune("report", run).code == 0 and "input directions" in (run / "report.html").read_text()
    assert reltune("export", run, "--to", "lora", "--output_dir", place / "along_lora").code == 0
    config = read(place / "along_lora" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], set(config["rank_pattern"].values())) == (2, 2, {2})


def test_a_run_of_directions_takes_their_recipe(place: Path) -> None:
    words = ("--granularity", "direction", "--probe_steps", 3, "--probe_directions", 5, "--max_steps", 2)
    answer = new_run(place, "directions", *words, "--budget", "3%")
    assert answer.code == 0, answer.err
    config, plan = RunConfig.load(place / "directions" / "config.yaml"), Plan.load(place / "directions" / "plan")
    assert (config.criteria, config.granularity, config.spread) == (["movement"], ["direction"], "even")
    assert {len(module.directions) for module in plan.modules.values()} == {1}
    assert {len(module.vectors) for module in plan.modules.values()} == {5}
    found = RelevanceScores.load(place / "directions" / "relevance")
    assert "element" not in next(iter(found.parts["movement"].values())) and not found.by("element")


def test_directions_that_cannot_be_are_refused_before_anything_is_measured(place: Path) -> None:
    for words, *told in (
        (("--criteria", "fisher"), "fisher scores no direction"),
        (("--granularity", "direction,bias"), "direction cannot compete with bias"),
        (("--budget", "1"), "the smallest direction has 32"),
        (("--budget", "100"), "spread evenly allows less than one direction in each of 12 modules"),
        (("--budget", "50%", "--probe_directions", 4), "directions of every module", "--probe_directions"),
        (("--probe_directions", 0), "probe_directions is 0"),
        (("--target_modules", "LayerNorm"), "unit of granularity direction"),
        (("--spread", "columns"), "spread columns is for granularity element alone"),
    ):
        given = words if "--granularity" in words else ("--granularity", "direction", *words)
        assert_refused(new_run(place, "refused", *given), *told)
        assert not (place / "refused").exists()


def test_single_weights_over_columns(place: Path, plain: Path) -> None:
    run = shutil.copytree(plain, place / "over_columns")
    answer = reltune("select", run, "--budget", "2%", "--spread", "columns", "--overwrite_output_dir")
    assert answer.code == 0, answer.err
    plan = Plan.load(run / "plan")
    for module in plan.modules.values():
        columns = [index % module.shape[1] for index in module.elements]
        assert len(set(columns)) == min(len(columns), module.shape[1])


def test_analyze_measures_for_the_default_choice(place: Path) -> None:
    answer = new_run(place, "analyzed", "--probe_steps", 2, command="analyze")
    assert answer.code == 0 and f"reltune select {place / 'analyzed'} --budget 0.12%" in answer.out, answer
    assert reltune("select", place / "analyzed").code == 0
    assert Plan.load(place / "analyzed" / "plan").granularity == ["element"]


def test_a_probe_that_ends_when_the_choice_has_settled(place: Path) -> None:
    answer = new_run(place, "settled", "--probe_steps", "auto", command="analyze")
    assert answer.code == 0, answer.err
    assert RunConfig.load(place / "settled" / "config.yaml").probe_steps == "auto"
    facts = RelevanceScores.load(place / "settled" / "relevance").provenance["movement"]
    assert 10 < facts["steps_taken"] <= 120


def test_where_no_single_weight_can_be_trained(place: Path) -> None:
    answer = new_run(place, "norms", "--target_modules", "LayerNorm")
    assert_refused(answer, "no module that may be chosen has single weights", "--granularity")
    assert not (place / "norms").exists()


def test_the_demo_takes_the_recipe_that_its_flags_ask_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own config names none of the four, so that its flags are those of a new run."""
    found: list[RunConfig] = []

    def start(config: RunConfig, *_: object) -> None:
        found.append(config)
        raise KeyboardInterrupt

    fields = {"model_name_or_path": str(place / "model"), "train_file": str(place / "train.csv")}
    monkeypatch.setattr(demo, "demo_config", lambda output_dir, seed: RunConfig(output_dir=output_dir, **fields))
    monkeypatch.setattr(flow, "start", start)
    for words in ([], ["--granularity", "column"], ["--criteria", "gradient"]):
        assert reltune("demo", "--output_dir", place / "demo", *words).code == 130
    choices = [(c.criteria, c.granularity, c.budget, c.spread) for c in found]
    assert choices == [
        (["movement"], ["element"], "0.12%", "even"),
        (["fisher"], ["column"], "0.5%", "global"),
        (["gradient"], ["column"], "0.5%", "global"),
    ]
