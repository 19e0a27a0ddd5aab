"""Sweeps: the best by validation data is kept, as tuning with its values gives it; interrupted ones go on."""

from __future__ import annotations

import builtins
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from safetensors.torch import load_file

from command_line import Answer, contents, reltune, review_rows, write_csv
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.plan.plan import Plan
from reltune.runs import stages, training
from reltune.runs import sweep as sweeps
from reltune.runs.directory import RunDirectory
from reltune.tasks.masked_lm import MaskedLM
from reltune.tasks.sequence_classification import SequenceClassification
from tiny_models import save_tiny_bert

SHORT = ["--num_train_epochs", 6, "--per_device_train_batch_size", 8]
RATES = ["1e-9", "1e-2", "1e30"]  # learns nothing, learns, diverges
SWEEP = ["--sweep", f"learning_rate={','.join(RATES)}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, reviews, and a run ``selected`` that waits for tuning."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(100))
    words = [*files(place), "--criteria", "fisher", "--output_dir", place / "selected"]
    assert reltune("analyze", *words).code == 0
    assert reltune("select", place / "selected", "--granularity", "module", "--budget", "30%").code == 0
    return place


def files(place: Path) -> list[object]:
    return ["--model_name_or_path", place / "model", "--train_file", place / "train.csv"]


def tuned(place: Path, name: str, *words: object, code: int = 0) -> tuple[Path, Answer]:
    """A copy of the run, tuned and, if that went well, evaluated."""
    shutil.copytree(place / "selected", place / name)
    answer = reltune("tune", place / name, *words)
    assert answer.code == code, answer
    if code == 0:
        assert reltune("evaluate", place / name).code == 0
    return place / name, answer


@pytest.fixture(scope="module")
def plain(place: Path) -> dict[str, Path]:
    """Plain tuning with each of the rates that does not diverge."""
    return {rate: tuned(place, f"plain_{rate}", "--learning_rate", rate, *SHORT)[0] for rate in RATES[:2]}


@pytest.fixture(scope="module")
def swept(place: Path) -> tuple[Path, Answer]:
    return tuned(place, "swept", *SWEEP, *SHORT)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(run: Path) -> dict[str, float]:
    return {k: v for k, v in read(run / "all_results.json").items() if k.startswith(("eval_", "test_"))}


def same_adapter(a: Path, b: Path) -> bool:
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- what is kept ---------------------------------------------------------------------------------------------------


def test_the_best_is_what_tuning_with_it_gives(swept: tuple[Path, Answer], plain: dict[str, Path]) -> None:
    run, _ = swept
    reached = {rate: metrics(plain[rate])["eval_accuracy"] for rate in plain}
    assert reached["1e-2"] > reached["1e-9"]  # else there is nothing to find
    record = read(run / "sweep.json")
    assert [trial["values"] for trial in record["trials"]] == [{"learning_rate": float(rate)} for rate in RATES]
    assert [trial["metric"] for trial in record["trials"]] == [reached["1e-9"], reached["1e-2"], None]
    assert record["best"] == record["trials"][1] and record["metric"] == "accuracy"
    assert same_adapter(run, plain["1e-2"]) and not same_adapter(run, plain["1e-9"])
    assert metrics(run) == metrics(plain["1e-2"])
    assert {f for f in contents(plain["1e-2"]) if not f.startswith("checkpoint")} == {
        f for f in contents(run) if not f.startswith(("checkpoint", "sweep"))
    } | {"prediction.json"}  # trials are not predicted
    assert (run / "train_log.jsonl").read_text().count("\n") == (plain["1e-2"] / "train_log.jsonl").read_text().count(
        "\n"
    )
    configs = [RunConfig.load(of / "config.yaml") for of in (run, plain["1e-2"])]
    configs[1].output_dir = configs[0].output_dir
    assert configs[0] == configs[1] and configs[0].training["learning_rate"] == 1e-2


def test_a_diverged_trial_is_shown(swept: tuple[Path, Answer], place: Path) -> None:
    run, answer = swept
    failed = read(run / "sweep.json")["trials"][2]
    assert failed["metric"] is None and "not finite" in failed["failed"]
    assert "trial 2 (learning_rate=1e+30) failed: training diverged" in answer.err
    assert "Best on validation data: learning_rate=0.01." in answer.out
    words = " ".join(answer.out.split())  # heads of the table take two lines
    assert "failed" in words and "1e-09" in words and "validation" in words and "accuracy" in words
    assert reltune("report", run).code == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h3>Sweep</h3>" in page and "<strong>0.01</strong>" in page and "failed: training diverged" in page
    assert '<td class="number">1e-09</td>' in page


def test_only_the_best_keeps_what_it_trained(swept: tuple[Path, Answer]) -> None:
    run, _ = swept
    heavy = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".pt", ".bin")]
    heavy = [path for path in heavy if path.parent.name != "stopped_at"]  # the batch at which a trial diverged
    assert {path.relative_to(run).parts[0].partition("-")[0] for path in heavy} == {
        "relevance",
        "adapter",
        "checkpoint",
    }
    assert (run / "sweep" / "trial-0" / "train_log.jsonl").is_file()


@pytest.mark.slow
def test_training_goes_on_from_the_best(swept: tuple[Path, Answer], plain: dict[str, Path], place: Path) -> None:
    words = ["--resume_from_checkpoint", "true", "--num_train_epochs", 8, "--overwrite_output_dir"]
    for name, source in (("more", swept[0]), ("more_plain", plain["1e-2"])):
        shutil.copytree(source, place / name)
        assert reltune("tune", place / name, *words).code == 0
    assert same_adapter(place / "more", place / "more_plain") and not same_adapter(place / "more", swept[0])
    assert not (place / "more" / "sweep.json").exists() and not (place / "more" / "sweep").exists()


def test_when_all_fail(place: Path) -> None:
    run, answer = tuned(place, "all_fail", "--sweep", "learning_rate=1e29,1e30", *SHORT, code=1)
    assert "all 2 trials of the sweep failed" in answer.err and "sweep.json" in answer.err
    record = read(run / "sweep.json")
    assert record["best"] is None and all("not finite" in trial["failed"] for trial in record["trials"])
    assert not (run / "adapter").exists()


# -- what is compared -----------------------------------------------------------------------------------------------


def test_all_combinations_by_another_metric(place: Path) -> None:
    words = ["--sweep", "learning_rate=1e-3,3e-2", "--sweep", "lr-scheduler-type=linear,constant", "--max_steps", 4]
    run, _ = tuned(place, "two", *words, "--metric_for_best_model", "loss")
    record = read(run / "sweep.json")
    assert [list(trial["values"].values()) for trial in record["trials"]] == [
        [1e-3, "linear"],
        [1e-3, "constant"],
        [3e-2, "linear"],
        [3e-2, "constant"],
    ]
    losses = [trial["metric"] for trial in record["trials"]]
    assert len(set(losses)) == 4 and record["best"]["metric"] == min(losses) == metrics(run)["eval_loss"]
    config = RunConfig.load(run / "config.yaml")
    assert {name: config.training[name] for name in record["sweep"]} == record["best"]["values"]
    # The best trial's checkpoints moved here with it, and its records name them where they are now.
    states = [run / "trainer_state.json", *run.glob("checkpoint-*/trainer_state.json")]
    best = [Path(read(file)["best_model_checkpoint"]) for file in states]
    assert len(states) > 1 and all(path.parent == run and path.is_dir() for path in best)


def test_what_counts_as_better() -> None:
    reviews, texts = SequenceClassification({}), MaskedLM({})
    assert training.compared_by({}, reviews) == ("accuracy", True)
    assert training.compared_by({}, texts) == ("perplexity", False)
    for name, largest in (("eval_loss", False), ("mse", False), ("eval_perplexity", False), ("f1_macro", True)):
        assert training.compared_by({"metric_for_best_model": name}, reviews) == (name, largest)
    assert training.compared_by({"metric_for_best_model": "loss", "greater_is_better": True}, reviews) == ("loss", True)


@pytest.mark.slow
def test_a_budget(place: Path) -> None:
    """The plan is the best trial's; values that were given before give way."""
    words = ["--sweep", "budget=0.5%,30%", "--learning_rate", 3e-2, *SHORT]
    shutil.copytree(place / "selected", place / "unselected")
    answer = reltune("tune", place / "unselected", *words)
    assert answer.code == 2 and "already holds plan" in answer.err
    shutil.rmtree(place / "unselected" / "plan")
    config = RunConfig.load(place / "unselected" / "config.yaml")
    config.granularity = ["column"]
    config.save(place / "unselected" / "config.yaml")
    shutil.copytree(place / "unselected", place / "budget")
    assert reltune("tune", place / "budget", *words).code == 0
    record = read(place / "budget" / "sweep.json")
    best = record["best"]["values"]["budget"]
    assert record["trials"][0]["metric"] != record["trials"][1]["metric"]
    shutil.copytree(place / "unselected", place / "by_hand")
    assert reltune("select", place / "by_hand", "--budget", best).code == 0
    assert reltune("tune", place / "by_hand", "--learning_rate", 3e-2, *SHORT).code == 0
    assert same_adapter(place / "budget", place / "by_hand")
    assert Plan.load(place / "budget" / "plan") == Plan.load(place / "by_hand" / "plan")
    assert RunConfig.load(place / "budget" / "config.yaml").budget == best
    assert reltune("evaluate", place / "budget").code == 0


# -- interrupted ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Every training with the directory it was for and the checkpoint it went on from, by their names."""
    seen: list[tuple[str, str | None]] = []
    train = training.train

    def noted(model: Any, args: Any, *others: Any, **more: Any) -> Any:
        checkpoint = others[4] if len(others) > 4 else None
        seen.append((Path(args.output_dir).name, checkpoint and Path(checkpoint).name))
        return train(model, args, *others, **more)

    monkeypatch.setattr(training, "train", noted)
    return seen


def interrupt(monkeypatch: pytest.MonkeyPatch, trial: str, epoch: int) -> None:
    """Have Ctrl-C come when this trial logs after so many epochs."""
    log = training.LogFile.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        log(self, args, state, control, **more)
        if Path(args.output_dir).name == trial and state.epoch > epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.LogFile, "on_log", on_log)


def test_an_interrupted_sweep_goes_on(
    place: Path, swept: tuple[Path, Answer], trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "trial-1", 2)
        run, answer = tuned(place, "interrupted", *SWEEP, *SHORT, code=130)
    assert "the same command goes on from there" in answer.err
    assert [name for name, _ in trained] == ["trial-0", "trial-1"]
    assert not (run / "adapter").exists() and len(read(run / "sweep.json")["trials"]) == 1
    before = contents(run)
    answer = reltune("tune", run, "--sweep", "learning_rate=1e-3,1e-2")
    assert answer.code == 2 and "already holds sweep" in answer.err  # of other values
    answer = reltune("tune", run, "--learning_rate", 1e-3)
    assert answer.code == 2 and contents(run) == before
    plan = (run / "plan" / "plan.yaml").read_text(encoding="utf-8")
    (run / "plan" / "plan.yaml").write_text(plan + "# edited\n", encoding="utf-8")
    answer = reltune("tune", run)
    assert answer.code == 2 and "has changed since the sweep began" in answer.err
    (run / "plan" / "plan.yaml").write_text(plan, encoding="utf-8")
    trained.clear()
    assert reltune("tune", run).code == 0  # config.yaml has the rest
    assert [name for name, _ in trained] == ["trial-1", "trial-2"]
    assert trained[0][1] is not None and trained[1][1] is None  # the first from its checkpoint
    assert read(run / "sweep.json") == read(swept[0] / "sweep.json")
    assert same_adapter(run, swept[0])
    answer = reltune("tune", run, *SWEEP)
    assert answer.code == 2 and "already holds adapter" in answer.err


@pytest.mark.slow
def test_the_same_run_command_goes_on(place: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*files(place), "--sweep", "learning_rate=1e-3,1e-2", "--sweep", "budget=1%,5%", "--num_train_epochs", 3]
    with monkeypatch.context() as patch:
        interrupt(patch, "trial-1", 1)
        assert reltune("run", *words, "--output_dir", place / "cut").code == 130
    assert [name for name, _ in trained] == ["cut", "trial-0", "trial-1"]  # the head first
    scores = contents(place / "cut" / "relevance")
    trained.clear()
    answer = reltune("run", *words, "--output_dir", place / "cut")
    assert answer.code == 0 and "Going on with the interrupted sweep." in answer.out
    assert [name for name, _ in trained] == ["trial-1", "trial-2", "trial-3"]
    assert contents(place / "cut" / "relevance") == scores
    assert reltune("run", *words, "--output_dir", place / "whole").code == 0
    assert read(place / "cut" / "sweep.json") == read(place / "whole" / "sweep.json")
    assert same_adapter(place / "cut", place / "whole") and metrics(place / "cut") == metrics(place / "whole")
    trained.clear()
    assert reltune("run", *words, "--output_dir", place / "cut", "--overwrite_output_dir").code == 0
    assert len(trained) == 5  # all of it


@pytest.mark.slow
def test_interrupted_while_the_best_is_taken_over(
    place: Path, swept: tuple[Path, Answer], trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def stopped(*_: object) -> None:
            raise KeyboardInterrupt

        replace = sweeps.os.replace

        def adopting(a: Path, b: Path) -> None:  # into the run's directory; a trial saves its checkpoints in its own
            return (
                stopped()
                if Path(b).parent == place / "taken" and Path(b).name.startswith("checkpoint")
                else replace(a, b)
            )

        patch.setattr(sweeps.os, "replace", adopting)
        run, _ = tuned(place, "taken", *SWEEP, *SHORT, code=130)
    trained.clear()
    assert reltune("tune", run).code == 0 and trained == []
    assert same_adapter(run, swept[0]) and (run / "training_cost.json").is_file()
    assert RunConfig.load(run / "config.yaml").training["learning_rate"] == 1e-2


# -- ranges ---------------------------------------------------------------------------------------------------------


def ranges(**changed: Any) -> RunConfig:
    fields = {"sweep": {"learning_rate": ["1e-4..1e-1"], "weight_decay": ["0..0.1"]}, "sweep_trials": 24, **changed}
    return RunConfig("model", "run", train_file="train.csv", **fields)


def drawn(tmp_path: Path, config: RunConfig, interrupted: bool = False) -> list[dict[str, float]]:
    """What is tried where the best rate is 3e-3, and small weight decay is better; every third trial diverges."""
    space = sweeps.space(config)
    found: dict[int, dict[str, float]] = {}
    study = sweeps._study(RunDirectory(tmp_path), largest=True)
    while (asked := sweeps._ask(study, space, config)) is not None:
        number, values = asked
        if interrupted and number not in found and number % 2:  # begun again by another process
            study = sweeps._study(RunDirectory(tmp_path), largest=True)
            found[number] = values
            continue
        found[number] = values
        score = -abs(math.log(values["learning_rate"] / 3e-3)) - values["weight_decay"]
        if number % 3 == 2:
            with pytest.warns(UserWarning, match="failed: why"):
                sweeps._tell(study, number, None, "why")
        else:
            sweeps._tell(study, number, score, "")
    return [found[number] for number in sorted(found)]


def test_ranges_are_drawn_from_and_learned(tmp_path: Path) -> None:
    tried = drawn(tmp_path / "one", ranges())
    assert len(tried) == 24 and len({values["learning_rate"] for values in tried}) == 24
    assert all(1e-4 <= of["learning_rate"] <= 1e-1 and 0 <= of["weight_decay"] <= 0.1 for of in tried)
    first, last = tried[:10], tried[-6:]  # TPE draws ten at random
    below = sum(of["learning_rate"] < 3e-3 for of in first)
    assert 2 <= below <= 8  # on a log scale half of them; on a linear one 3% of them
    far = [sum(abs(math.log(of["learning_rate"] / 3e-3)) for of in some) / len(some) for some in (first, last)]
    assert far[1] < 0.7 * far[0]
    assert drawn(tmp_path / "again", ranges()) == tried
    assert drawn(tmp_path / "interrupted", ranges(), interrupted=True) == tried
    assert drawn(tmp_path / "seed", ranges(seed=1)) != tried


def test_a_study_that_a_killed_process_was_writing(tmp_path: Path) -> None:
    run, space = RunDirectory(tmp_path), sweeps.space(ranges())
    first = sweeps._ask(sweeps._study(run, largest=True), space, ranges())
    with run.study.open("a") as file:
        file.write('{"op_code":6,"trial')
    (run.sweep / "study.jsonl.lock").symlink_to(run.study)  # Optuna would wait for it
    study = sweeps._study(run, largest=True)
    assert sweeps._ask(study, space, ranges()) == first
    study.tell(first[0], 0.5)
    assert sweeps._study(run, largest=True).best_value == 0.5


def test_whole_numbers_words_and_the_number_of_trials() -> None:
    space = sweeps.space(
        ranges(
            sweep={"max_steps": ["2..9"], "bf16": ["true", "False"], "optim": ["sgd", "adamw_torch"]}, sweep_trials=None
        )
    )
    assert space["max_steps"] == optuna.distributions.IntDistribution(2, 9, log=True)
    assert space["bf16"].choices == (True, False) and space["optim"].choices == ("sgd", "adamw_torch")


def test_a_range_end_to_end(place: Path) -> None:
    words = ["--sweep", "learning_rate=1e-3..1e-1", "--sweep_trials", 2, "--max_steps", 3]
    run, _ = tuned(place, "range", *words)
    record = read(run / "sweep.json")
    rates = [trial["values"]["learning_rate"] for trial in record["trials"]]
    assert len(rates) == 2 and all(1e-3 <= rate <= 1e-1 for rate in rates)
    plain, _ = tuned(
        place, "range_plain", "--learning_rate", record["best"]["values"]["learning_rate"], "--max_steps", 3
    )
    assert same_adapter(run, plain)
    config = RunConfig.load(run / "config.yaml")
    assert config.sweep == {} and config.sweep_trials is None


# -- what is refused ------------------------------------------------------------------------------------------------

WRONG = [
    (["--sweep", "learnig_rate=1,2"], "'learnig_rate' cannot be swept; did you mean 'learning_rate'"),
    (["--sweep", "max_length=16,32"], "'max_length' cannot be swept; fields of training and the budget"),
    (["--sweep", "metric_for_best_model=loss,accuracy"], "cannot be swept"),
    (["--sweep", "learning_rate=1e-3,fast"], "learning_rate is 'fast'; it must be a number"),
    (["--sweep", "max_steps=1,2.5"], "max_steps is '2.5'; it must be a whole number"),
    (["--sweep", "learning_rate=nan,1e-3"], "learning_rate cannot be 'nan'"),
    (["--sweep", "learning_rate=1e-3"], "one value only"),
    (["--sweep", "learning_rate=1e-3,0.001"], "one value only"),
    (["--sweep", "learning_rate"], "write it like learning_rate=1e-4,1e-3"),
    (["--sweep", "learning_rate="], "write it like learning_rate=1e-4,1e-3"),
    (["--sweep", "max_steps=1,2", "--sweep", "max_steps=3,4"], "max_steps is given twice"),
    (["--sweep", "learning_rate=1e-1..1e-3"], "first end must be the smaller"),
    (["--sweep", "optim=sgd..adamw_torch"], "optim holds no numbers"),
    (["--sweep", "budget=1%..5%"], "budget holds no numbers"),
    (["--sweep", "budget=1%,much"], "much"),
    (["--sweep", "max_steps=1,2", "--sweep_trials", 3], "sweep_trials is for ranges"),
    (["--sweep_trials", 3], "nothing is swept"),
    (["--sweep", "learning_rate=1e-3,-1"], "sweep, learning_rate=-1: training fields: Invalid learning rate"),
    (["--sweep", "max_steps=0,1"], "sweep, max_steps=0: max_steps is 0"),
    (["--sweep", "lr_scheduler_type=linear,cosin"], "did you mean 'cosine'"),
    (["--sweep", "max_steps=1,2", "--max_steps", 3], "max_steps has a value and is swept too"),
    (["--sweep", "budget=1%,2%", "--budget", "3%"], "budget has a value and is swept too"),
    (["--sweep", "max_steps=1,2", "--metric_for_best_model", "acuracy"], "did you mean 'accuracy'"),
]


@pytest.fixture
def nothing_moves(place: Path) -> Iterator[None]:
    before = contents(place / "selected")
    yield
    assert contents(place / "selected") == before and not (place / "new").exists()


@pytest.mark.usefixtures("nothing_moves")
@pytest.mark.parametrize(("words", "message"), WRONG)
def test_refused_before_anything_is_trained(place: Path, trained: list[Any], words: list[object], message: str) -> None:
    answer = reltune("run", *files(place), "--output_dir", place / "new", *words)
    assert answer.code == 2 and message in answer.err and trained == [], answer
    if "--budget" in words:
        return
    again = ["--overwrite_output_dir"] if any("budget" in str(word) for word in words) else []
    answer = reltune("tune", place / "selected", *words, *again)
    assert answer.code == 2 and message in answer.err and trained == [], answer


@pytest.mark.usefixtures("nothing_moves")
def test_refused_while_tuning(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = reltune("tune", place / "selected", *SWEEP, "--resume_from_checkpoint", "true")
    assert answer.code == 2 and "goes on by itself" in answer.err
    imported = builtins.__import__

    def without_optuna(name: str, *others: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ImportError(name)
        return imported(name, *others, **more)

    monkeypatch.delitem(sys.modules, "optuna")
    monkeypatch.setattr(builtins, "__import__", without_optuna)
    answer = reltune("tune", place / "selected", *SWEEP)
    assert answer.code == 2 and 'pip install "reltune[sweep]"' in answer.err


def test_a_metric_that_training_does_not_measure(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceClassification, "metrics", ("accuracy", "written"))
    words = ["--sweep", "max_steps=1,2", "--metric_for_best_model", "written", "--eval_strategy", "no"]
    _, answer = tuned(place, "unmeasured", *words, code=2)
    assert "'written' is not measured while training" in answer.err and "accuracy" in answer.err


def test_in_a_config_file(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = f"model_name_or_path: {place / 'model'}\ntrain_file: {place / 'train.csv'}\noutput_dir: {tmp_path / 'run'}\n"
    file.write_text(text + "sweep: {learning_rate: [1e-3, 0.01], max_steps: 1..3}\ngranularity: column\nbudget: 5%\n")
    words = ["run", "--config", file, "--sweep_trials", 1]
    answer = reltune(*words, "--learning_rate", 2e-3)  # the flag wins: it has a value now
    assert answer.code == 0, answer
    trials = read(tmp_path / "run" / "sweep.json")["trials"]
    assert (
        len(trials) == 1
        and trials[0]["values"].keys() == {"max_steps"}
        and trials[0]["values"]["max_steps"] in (1, 2, 3)
    )
    assert RunConfig.load(tmp_path / "run" / "config.yaml").training["learning_rate"] == 2e-3
    file.write_text(text + "sweep: {learning_rate: [1e-3, 0.01]}\nlearning_rate: 1e-3\n")
    answer = reltune("run", "--config", file, "--overwrite_output_dir")
    assert answer.code == 2 and "learning_rate has a value and is swept too" in answer.err
    with pytest.raises(InputError, match="mapping of fields to lists"):
        RunConfig.load(config_with(tmp_path, "sweep: {learning_rate: [{a: 1}]}"))


def config_with(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"model_name_or_path: m\noutput_dir: o\ntrain_file: t\n{line}\n")
    return path


@pytest.mark.slow
def test_a_trial_that_does_not_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = stages.tune

    def full(materials: Any, *others: Any, **named: Any) -> Any:
        if materials.config.training["per_device_train_batch_size"] == 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tune(materials, *others, **named)

    monkeypatch.setattr(sweeps, "tune", full)
    run, answer = tuned(place, "full", "--sweep", "per_device_train_batch_size=16,8", "--max_steps", 1)
    assert "does not fit in the accelerator's memory" in answer.err
    assert read(run / "sweep.json")["best"]["values"] == {"per_device_train_batch_size": 8}
