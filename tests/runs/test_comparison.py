"""Ways to train side by side: equal footing, the best rate of each, what an interruption leaves, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from command_line import Answer, assert_refused, contents, reltune, review_rows, write_csv
from method_cases import task_place
from reltune.config.comparison import ComparisonConfig, comparison_config
from reltune.config.run_config import RunConfig
from reltune.errors import InputError, StorageError
from reltune.methods.contract import Base
from reltune.methods.registry import METHODS
from reltune.runs import lock, stages
from reltune.runs.comparison import flow, rates, work
from reltune.runs.comparison.cells import Cell
from reltune.runs.comparison.pace import Pace, fitted
from reltune.runs.comparison.schedule import Grid
from reltune.runs.comparison.statistics import difference
from reltune.runs.comparison.work import Workshop
from reltune.runs.directory import RunDirectory
from reltune.runs.materials import prepare_export
from reltune.tasks.sequence_classification import SequenceClassification
from tiny_models import save_tiny_bert

QUICK = ["--max_steps", 3, "--per_device_train_batch_size", 8, "--head_epochs", 1, "--sizes", "usual"]
MEASURED = ("seconds", "seconds_per_step", "peak_memory_bytes", "analysis_seconds")  # which differ from run to run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(100))
    write_csv(place / "second.csv", review_rows(30, seed=7))
    return place


def compare(place: Path, name: str, *words: object) -> Answer:
    files = ["--model_name_or_path", place / "model", "--train_file", place / "train.csv"]
    return reltune("compare", *files, "--output_dir", place / name, *words)


TWO = [*QUICK, "--methods", "weights,lora", "--probe_steps", 2, "--analysis_examples", 16, "--forgetting_file"]


@pytest.fixture(scope="module")
def compared(place: Path) -> tuple[Path, Answer]:
    """Two methods at four rates each, with two seeds."""
    answer = compare(place, "compared", *TWO, place / "second.csv", "--seeds", 2)
    assert answer.code == 0, answer.err
    return place / "compared", answer


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in MEASURED}
    return [without_times(one) for one in value] if isinstance(value, list) else value


# -- equal footing, and the tables ----------------------------------------------------------------------------------


def test_every_method_has_the_same_steps_and_its_best_rate(compared: tuple[Path, Answer]) -> None:
    record = read(compared[0] / "comparison.json")
    chosen = [one for one in record["trainings"] if one["chosen"] and not one["longer"]]
    assert {(one["cell"], one["seed"]) for one in chosen} == set(
        itertools.product(["weights-0.12pc", "lora-r8"], [42, 43])
    )
    assert {one["steps"] for one in chosen} == {3}
    for cell in ("weights-0.12pc", "lora-r8"):
        tried = [one for one in record["trainings"] if one["cell"] == cell and one["seed"] == 42 and not one["longer"]]
        assert 4 <= len({one["learning_rate"] for one in tried}) <= 6
        best = next(one for one in tried if one["chosen"])
        assert best["metric"] == max(one["metric"] for one in tried if one["metric"] is not None)
        assert {one["learning_rate"] for one in chosen if one["cell"] == cell} == {best["learning_rate"]}
        assert all((one["test"] is not None) == one["chosen"] for one in tried), "test data are for the chosen rate"
    # the probe took 2 batches of 32, cut to 16 examples: as many as 4 steps of 8
    assert {(one["cell"], one["steps"]) for one in record["trainings"] if one["longer"]} == {("lora-r8", 7)}
    assert record["reltune"] and record["machine"] and record["bootstrap"]["draws"] == 10_000


def test_every_method_starts_from_the_same_head(compared: tuple[Path, Answer]) -> None:
    """The one of the seed: also methods that measure nothing, and whose runs by themselves start from an untrained one."""
    heads = {seed: load_file(compared[0] / "seeds" / seed / "head.safetensors") for seed in ("42", "43")}
    assert not torch.equal(heads["42"]["classifier.weight"], heads["43"]["classifier.weight"])
    for run in sorted((compared[0] / "runs").glob("*/seed-*")):
        config = RunConfig.load(run / "config.yaml")
        started = stages.model_with_new_heads(prepare_export(config, RunDirectory(run)), RunDirectory(run))
        assert all(torch.equal(heads[str(config.seed)][name], started.state_dict()[name]) for name in heads["42"]), run


def test_the_tables_are_what_the_trainings_say(compared: tuple[Path, Answer]) -> None:
    path, answer = compared
    record = read(path / "comparison.json")
    assert [table["name"] for table in record["tables"]] == ["usual", "equal_cost"]
    for table in record["tables"]:
        before, weights, lora = table["rows"]
        longer = table["name"] == "equal_cost"
        assert before["label"] == "before training" and lora["steps"] == (7 if longer else 3)
        of = {
            row["method"]: {
                one["seed"]: one["test"]
                for one in record["trainings"]
                if one["chosen"] and one["cell"].startswith(row["method"]) and one["longer"] == (longer and row is lora)
            }
            for row in (weights, lora)
        }
        for row in (weights, lora):
            values = [test["test_accuracy"] for test in of[row["method"]].values()]
            assert row["metrics"]["accuracy"] == pytest.approx(np.mean(values))
            assert row["deviations"]["accuracy"] == pytest.approx(np.std(values, ddof=1))
            changes = [
                test["forgetting_loss"] - record["before"][str(seed)]["forgetting_loss"]
                for seed, test in of[row["method"]].items()
            ]
            assert row["forgetting"]["loss"] == pytest.approx(np.mean(changes))
        pairs = [of["weights"][seed]["test_accuracy"] - of["lora"][seed]["test_accuracy"] for seed in (42, 43)]
        assert weights["differences"]["lora"]["mean"] == pytest.approx(np.mean(pairs))
        assert weights["differences"]["lora"]["low"] == pytest.approx(min(pairs))
        assert weights["analysis_seconds"] > 0 and lora["analysis_seconds"] is None
    page = (path / "report.html").read_text(encoding="utf-8")
    assert "Equal total cost" in page and "weights 0.12%" in page and "ways-seconds" in page
    assert all(len(line) <= 80 for line in answer.out.splitlines() if "│" in line or "%" in line.split("  ")[0][:15])
    again = reltune("report", path)
    assert again.code == 0 and again.out.splitlines()[0] in answer.out


def test_a_finished_run_is_an_ordinary_one(compared: tuple[Path, Answer], tmp_path: Path) -> None:
    """What is left of each cell and seed can be exported."""
    kept = sorted((compared[0] / "runs" / "lora-r8").glob("*/adapter"))
    assert len(kept) == 4  # two seeds, each with a longer one; the other rates' are gone
    assert reltune("export", kept[0].parent, "--to", "lora", "--output_dir", tmp_path / "lora").code == 0
    evaluated = shutil.copytree(kept[0].parent, tmp_path / "run")
    assert reltune("evaluate", evaluated).code == 0
    assert read(evaluated / "all_results.json")["test_loss"] == pytest.approx(
        read(evaluated / "test.json")["test_loss"]
    )


# -- interruptions --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """In the place of a signal that no program can catch."""


def test_interrupted_it_gives_the_same_tables(place: Path, compared: tuple[Path, Answer]) -> None:
    """Killed while it chooses, trains, and tests, and first asked for one seed only; nothing that was finished is done again."""
    done: list[Any] = []
    kills = [(stages, "choose", 0), (Workshop, "_measured", 2), (Workshop, "_measured", 7), (Workshop, "_metrics", 2)]
    real = Workshop.do

    def do(workshop: Workshop, piece: Any, words: str = "") -> None:
        real(workshop, piece, words)
        done.append(piece)

    second = place / "second.csv"
    for owner, name, calls in kills:
        original, left = getattr(owner, name), [calls]

        def killed(*given: Any, original: Any = original, left: list[int] = left, **more: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*given, **more)

        with mock.patch.object(owner, name, killed), mock.patch.object(Workshop, "do", do), pytest.raises(Killed):
            compare(place, "interrupted", *TWO, second, "--seeds", 1 if name == "choose" else 2)
    with mock.patch.object(Workshop, "do", do):
        assert compare(place, "interrupted", *TWO, second, "--seeds", 2).code == 0
    assert len(done) == len(set(done))
    one, other = (read(place / name / "comparison.json") for name in ("compared", "interrupted"))
    for part in ("trainings", "tables", "before", "seeds", "metric"):
        assert without_times(one[part]) == without_times(other[part]), part


def test_more_seeds_may_bring_a_longer_analysis(place: Path, compared: tuple[Path, Answer]) -> None:
    """Then those that train longer do so with every seed anew."""
    shutil.copytree(compared[0], place / "more")
    with mock.patch.object(work, "_examples_seen", lambda *_: 64):
        answer = compare(place, "more", *TWO, place / "second.csv", "--seeds", 3)
    assert answer.code == 0, answer.err
    record = read(place / "more" / "comparison.json")
    longer = [(one["seed"], one["steps"]) for one in record["trainings"] if one["longer"]]
    assert longer == [(42, 11), (43, 11), (44, 11)]
    assert record["tables"][1]["rows"][2]["steps"] == 11 and record["tables"][1]["rows"][2]["seeds"] == 3


def test_what_fails_is_recorded_and_the_rest_goes_on(place: Path) -> None:
    real = stages.tune

    def tune(materials: Any, *others: Any, **more: Any) -> Any:
        if materials.config.method == "lora":
            raise ArithmeticError(
                "training diverged, some weights are not finite any more; try a lower --learning_rate."
            )
        if materials.config.seed == 43:
            raise RuntimeError("no such kernel")
        return real(materials, *others, **more)

    with mock.patch.object(stages, "tune", tune):
        words = [*QUICK, "--methods", "lora,bitfit", "--seeds", 2, "--rate_trials", 1]
        answer = compare(place, "failing", *words)
    assert answer.code == 0, answer.err
    lora, bitfit = read(place / "failing" / "comparison.json")["tables"][0]["rows"][1:]
    assert lora["failed"] == "training diverged, some weights are not finite any more." and not lora["metrics"]
    assert bitfit["metrics"]["accuracy"] >= 0 and bitfit["seeds"] == 1
    assert bitfit["failed"] == "seed 43: RuntimeError: no such kernel. The row is of 1 seed."
    assert "lora r=8 failed: training diverged" in " ".join(answer.out.split())
    assert "Rates were not tuned" in answer.out


def test_a_quantised_base_is_measured_before_training_too(place: Path) -> None:
    words = [*QUICK, "--methods", "weights,lora", "--probe_steps", 2, "--seeds", 1, "--rate_trials", 1]
    answer = compare(place, "quantised", *words, "--no_equal_cost", "--load_in_4bit", "--max_hours", 1)
    assert answer.code == 0, answer.err
    before, *trained = read(place / "quantised" / "comparison.json")["tables"][0]["rows"]
    assert before["metrics"]["loss"] > 0 and not any(row["failed"] for row in trained)
    assert all(read(place / "quantised" / "grid.json")["pace"]["step"].values())


def test_a_full_disk_is_no_failure_of_a_run(place: Path) -> None:
    """It ends the comparison, and the same command goes on."""
    words = [*QUICK, "--methods", "bitfit", "--seeds", 1, "--rate_trials", 1]
    with mock.patch.object(stages, "tune", side_effect=StorageError("the disk is full.")):
        answer = compare(place, "full", *words)
    assert answer.code == 1 and "the disk is full" in answer.err, answer
    assert not list((place / "full").glob("runs/*/*/result.json"))
    assert_refused(reltune("report", place / "full"), "has no tables yet")
    answer = compare(place, "full", *words)
    assert answer.code == 0 and "Going on where it stopped." in answer.out, answer
    assert "One seed: there is no interval" in answer.out


@pytest.mark.slow
def test_several_processes_give_the_same_tables(place: Path, compared: tuple[Path, Answer]) -> None:
    threads = torch.get_num_threads()
    with mock.patch.object(torch, "get_num_threads", lambda: 2 * threads):
        answer = compare(place, "shared", *TWO, place / "second.csv", "--seeds", 2, "--jobs", 2)
    assert answer.code == 0, answer.err
    one, other = (read(place / name / "comparison.json") for name in ("compared", "shared"))
    for part in ("trainings", "tables", "before"):
        assert without_times(one[part]) == without_times(other[part]), part
    assert "2 runs shared the machine" in answer.out


# -- rates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peak", "tried", "edge"),
    [
        (0, [0, -1, 1, -2], False),
        (1, [0, -1, 1, -2, 2], False),
        (-3, [0, -1, 1, -2, -3, -4], False),
        (9, [0, -1, 1, -2, 2, 3], True),
    ],
)
@pytest.mark.parametrize("largest", [True, False])
def test_rates_are_widened_where_the_best_lies_on_an_edge(
    peak: int, tried: list[int], edge: bool, largest: bool
) -> None:
    def objective(steps: int) -> float:
        return -abs(steps - peak) if largest else abs(steps - peak)

    found: dict[int, float | None] = {steps: objective(steps) for steps in rates.first_steps(4)}
    while (steps := rates.wider(found, 4, largest)) is not None:
        found[steps] = objective(steps)
    assert list(found) == tried
    assert rates.on_edge(found, largest) is edge
    assert rates.best(found, largest) == (max(found) if edge else peak)


def test_failed_rates_and_equal_ones() -> None:
    assert rates.best({0: 0.5, -1: 0.5, 1: None, -2: 0.5}, True) == 0
    assert rates.best({0: None, -1: None}, True) is None
    assert rates.wider({0: 0.5, -1: 0.4, 1: None, -2: 0.3}, 4, True) is None  # beyond the best lies one that failed
    assert rates.wider({0: 0.5}, 1, True) is None  # one rate is not tuned
    assert [rates.rate_at(2e-3, steps) for steps in (-1, 0, 1, 2)] == [6.32e-4, 2e-3, 6.32e-3, 2e-2]


# -- statistics -----------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_every_possible_draw() -> None:
    one = dict(enumerate([0.91, 0.93, 0.88, 0.95, 0.90]))
    other = dict(enumerate([0.90, 0.89, 0.89, 0.91, 0.93]))
    pairs = [one[seed] - other[seed] for seed in one]
    means = sorted(sum(draw) / 5 for draw in itertools.product(pairs, repeat=5))  # all 3125 draws are equally likely
    low, high = means[round(0.025 * 3125)], means[round(0.975 * 3125)]
    found = difference(one, other)
    assert found is not None and found.low is not None and found.high is not None
    assert found.mean == pytest.approx(sum(pairs) / 5)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.002)
    assert difference(one, other) == found
    single = difference({1: 0.5, 2: 0.7}, {2: 0.6, 3: 0.1})
    assert single is not None and single.mean == pytest.approx(0.1) and single.low is None
    assert difference({1: 0.5}, {2: 0.6}) is None


# -- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "shira", "layers"])
def test_the_nearest_size_is_the_nearest_of_all(method: str, count: int, place: Path) -> None:
    """Against what PEFT, or freed parameters, train at every rank and every number of layers."""
    config = comparison_config({"model_name_or_path": "model", "output_dir": "out", "train_file": "train.csv"})
    model, missing = SequenceClassification({"text": "text", "label": "label"}, ["neg", "pos"]).load_model(
        place / "model"
    )
    heads = ["classifier"]
    assert missing

    def base(**fields: Any) -> Base:
        return Base(config.of(method, **fields), copy.deepcopy(model), heads)

    found = METHODS[method].nearest(base(), count)
    assert found is not None
    settings: list[dict[str, Any]] = [{"lora_r": r} for r in range(1, 8)]
    if method == "layers":
        settings = [{}, {"target_modules": ["encoder.layer.1", "encoder.layer.0"]}]
    trained = {}
    for fields in settings:
        trained[str(fields)] = METHODS[method].prepare(base(**fields)).parameters
    assert METHODS[method].prepare(base(**found.fields)).parameters == found.parameters
    assert abs(found.parameters - count) == min(abs(size - count) for size in trained.values())


def test_methods_of_one_size_have_no_nearest() -> None:
    config = comparison_config({"model_name_or_path": "model", "output_dir": "out", "train_file": "train.csv"})
    for method in ("full", "head", "bitfit"):
        assert METHODS[method].nearest(Base(config.of(method), mock.Mock()), 1000) is None
    assert METHODS["columns"].nearest(Base(config.of("columns"), mock.Mock()), 1000).fields == {"budget": "1000"}


# -- in so many hours -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_left_out_in_order() -> None:
    cells = (
        Cell("weights-100", "weights 100", "weights", {}, ("equal",), "movement"),
        Cell("weights", "weights 0.12%", "weights", {}, ("usual",), "movement"),
        Cell("lora-r1", "lora r=1", "lora", {}, ("equal",)),
        Cell("dora-r1", "dora r=1", "dora", {}, ("equal",)),
        Cell("full", "full", "full", {}, ("equal", "usual")),
    )
    grid = Grid(
        cells, (1, 2, 3, 4), trials=4, equal_cost=True, new_heads=True, chosen_by="loss", largest=True, batch_size=32
    )
    pace = Pace({cell.name: 1.0 for cell in cells}, evaluation=0.0, steps=100, analysis_steps=100)
    whole = pace.hours(grid)
    # 4 seeds × 100 steps of analysis; 5 cells × (4 + 1 + 3) runs of 100; 3 cells × 4 longer runs of 200
    assert whole == pytest.approx(1.15 * (400 + 5 * 8 * 100 + 3 * 4 * 200) / 3600)
    assert fitted(grid, pace, whole, named=False) == (grid, [])
    smaller, said = fitted(grid, pace, whole - 0.001, named=False)
    assert smaller == dataclasses.replace(grid, equal_cost=False) and "equal total cost" in said[0]
    least, said = fitted(grid, pace, 0.6, named=False)
    assert [cell.name for cell in least.cells] == ["weights-100", "lora-r1", "full"] and pace.hours(least) <= 0.6
    assert [words for words in ("equal total cost", "three seeds", "weights 0.12%", "dora r=1") if words in " ".join(said)] == [
        "equal total cost", "three seeds", "weights 0.12%", "dora r=1"
    ]  # fmt: skip
    named, _ = fitted(grid, pace, 0.9, named=True)
    assert any(cell.method == "dora" for cell in named.cells)
    with pytest.raises(InputError, match=r"max_hours is 0\.1, and the least"):
        fitted(grid, pace, 0.1, named=True)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def unchanged(place: Path) -> Iterator[None]:
    before = contents(place)
    yield
    assert contents(place) == before


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "lroa"], "did you mean 'lora'"),
        (["--seeds", 0], "seeds is 0; it must be at least 1"),
        (["--rate_trials", 3], "take 4 or more, or 1"),
        (["--learning_rate", "1e-3"], "finds each method's own rate"),
        (["--methods", "full", "--lora_r", 4], "none of the methods compared uses it"),
        (["--methods", "full", "--load_in_8bit"], "cannot train a base held in 4 or 8 bits"),
        (["--methods", "head", "--task", "causal_lm"], "the method head cannot train causal_lm"),
        (["--method", "lora"], "unknown flag --method; did you mean '--methods'"),
        (["--budget", "much"], "'much' is no number"),
        (["--sizes", "equl"], "did you mean 'equal'"),
        (["--methods", "layers", "--budget", "0.5%"], "the nearest that it can is 8,544 (top)"),
        (["--methods", "lora", "--budget", 100], "the nearest that it can is 960 (r=1)"),
        (["--max_hours", 0], "max_hours is 0"),
        (["--sizes", "usual", "--budget", "1%"], "says what equal sizes are"),
        (["--metric_for_best_model", "acuracy"], "did you mean 'accuracy'"),
    ],
)
def test_what_is_refused_before_anything_is_written(place: Path, words: list[object], said: str) -> None:
    assert_refused(compare(place, "refused", *words), said)


def test_a_directory_with_something_else(place: Path, compared: tuple[Path, Answer]) -> None:
    second = place / "second.csv"
    assert_refused(
        compare(place, "compared", *TWO, second, "--max_length", 32, "--seeds", 2),
        "max_length is 128 there and 32 here",
        "--overwrite_output_dir",
    )
    assert_refused(compare(place, "model", *QUICK), "holds no comparison")
    other = shutil.copytree(place / "compared", place / "moved")
    (other / "comparison.json").write_text('{"tables": 3}', encoding="utf-8")
    assert_refused(reltune("report", other), "holds no tables")
    rows = (place / "train.csv").read_text(encoding="utf-8")
    try:
        write_csv(place / "train.csv", review_rows(100, seed=1))
        assert_refused(compare(place, other.name, *TWO, second, "--seeds", 2), "the data have changed since")
    finally:
        (place / "train.csv").write_text(rows, encoding="utf-8")


def test_the_library_refuses_what_the_command_does(place: Path) -> None:
    given = {"train_file": place / "train.csv", "methods": "lora", "sizes": "usual"}
    with pytest.raises(InputError, match="'seds' is no field; did you mean 'seeds'"):
        flow.compare(str(place / "model"), place / "library", **given, seds=2)
    with pytest.raises(InputError, match="holds no comparison"):
        flow.compare(str(place / "model"), place / "model", **given)
    held = []
    with (
        mock.patch.object(flow, "start", lambda config, _: held.append(lock._held.copy())),
        mock.patch.object(flow, "run"),
    ):
        flow.compare(str(place / "model"), place / "library", **given)
    assert held == [{place / "library"}] and not (place / "library").exists()


def test_by_default_what_the_task_cannot_take_is_left_out(tmp_path: Path) -> None:
    """A decoder with Conv1D and a head over its vocabulary."""
    flags = task_place(tmp_path, "causal_lm")
    config = comparison_config(
        dict(zip([flag[2:] for flag in flags[::2]], flags[1::2], strict=True)) | {"output_dir": str(tmp_path / "out")}
    )
    started = flow.start(config)
    methods = [cell.method for cell in started.grid.cells]
    assert "head" not in methods and "shira" not in methods and {"weights", "lora", "full", "bitfit"} <= set(methods)
    assert any(note.startswith("head is left out: ") for note in started.notes)


def test_a_config_is_kept(tmp_path: Path) -> None:
    config = comparison_config(
        {
            "model_name_or_path": "m",
            "output_dir": "o",
            "train_file": "t.csv",
            "methods": ["lora"],
            "training": {"max_steps": 3},
        }
    )
    config.save(tmp_path / "comparison.yaml")
    assert ComparisonConfig.load(tmp_path / "comparison.yaml") == config
    more = dataclasses.replace(config, seeds=9, methods=[], jobs=4)
    assert more.difference(config) == ""
    other = comparison_config({**config.shared, "train_file": "u.csv", "load_in_8bit": True})
    assert other.difference(config) == "train_file is t.csv there and u.csv here, and 1 more fields differ"
