"""What users expect of training: the best checkpoint, early stopping, logs, few bits, and a look at what was forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainingArguments
from transformers.models.llama import modeling_llama

from command_line import reltune, review_rows, write_csv
from reltune.config.run_config import RunConfig
from reltune.plan.plan import ModulePlan, Plan
from reltune.runs import stages, training
from reltune.runs.directory import RunDirectory
from reltune.runs.evaluation import evaluate
from reltune.runs.materials import prepare
from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.image_classification import ImageClassification
from reltune.tasks.regression import Regression
from reltune.tasks.sequence_classification import SequenceClassification
from reltune.tasks.task import Task
from tiny_models import save_tiny_bert, save_tiny_llama, save_tiny_masked

COLUMNS = ["--granularity", "column", "--budget", "5%"]
RATE = ["--granularity", "module", "--budget", "50%", "--learning_rate", 1e-2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(80))
    return place


def new_run(place: Path, name: str, *words: object) -> Path:
    files = ["--model_name_or_path", place / "model", "--train_file", place / "train.csv", "--output_dir", place / name]
    answer = reltune("run", *files, *words)
    assert answer.code == 0, answer.err
    return place / name


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_best_checkpoint_is_kept_by_the_main_metric(place: Path) -> None:
    """A rate that ruins the model after a good start: what is saved is the good start."""
    words = [*RATE, "--num_train_epochs", 6, "--load_best_model_at_end", "--lr_scheduler_type", "constant"]
    run = new_run(place, "best", *words, "--per_device_train_batch_size", 4)
    by_epoch = [entry["eval_accuracy"] for entry in log_of(run) if "eval_accuracy" in entry]
    state = read(run / "trainer_state.json")
    assert state["best_metric"] == max(by_epoch) and len(by_epoch) == 6
    assert read(run / "all_results.json")["eval_accuracy"] == max(by_epoch)
    best = Path(state["best_model_checkpoint"])
    saved, kept = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", best))
    assert saved.keys() == kept.keys() and all(torch.equal(saved[key], kept[key]) for key in saved)


def test_training_stops_when_nothing_gets_better(place: Path) -> None:
    words = ["--early_stopping_patience", 2, "--num_train_epochs", 30, "--learning_rate", 1e-9, *COLUMNS]
    run = new_run(place, "early", *words)
    state = read(run / "trainer_state.json")
    evaluations = [entry for entry in log_of(run) if "eval_accuracy" in entry]
    assert state["epoch"] == len(evaluations) == 3  # the first is the best; two more are not better
    # tune has the flag too: patience 1 stops one evaluation earlier
    assert reltune("tune", run, "--early_stopping_patience", 1, "--overwrite_output_dir").code == 0
    assert read(run / "trainer_state.json")["epoch"] == 2
    assert RunConfig.load(run / "config.yaml").early_stopping_patience == 1
    answer = reltune("run", "--model_name_or_path", place / "model", "--train_file", place / "train.csv",
                     "--output_dir", place / "none", "--early_stopping_patience", 0)  # fmt: skip
    assert answer.code == 2 and "early_stopping_patience" in answer.err


def test_activations_are_offloaded_from_a_gpu_only(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--model_name_or_path", place / "model", "--train_file", place / "train.csv", "--activation_offloading"]
    answer = reltune("run", *words, "--output_dir", place / "offloaded")
    assert answer.code == 2 and "none is used here; leave it out" in answer.err and not (place / "offloaded").exists()


def test_evaluation_by_steps_takes_checkpoints_with_it(place: Path) -> None:
    words = [
        "--max_steps",
        6,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        2,
        "--logging_steps",
        1,
        "--load_best_model_at_end",
    ]
    run = new_run(place, "steps", *words, *COLUMNS)
    log = log_of(run)
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4, 6]
    assert log == [{"step": e["step"], **e} for e in log]
    # resumed from a checkpoint, the log goes on after it
    answer = reltune("tune", run, "--resume_from_checkpoint", "true", "--max_steps", 8, "--overwrite_output_dir")
    assert answer.code == 0, answer.err
    assert [entry["step"] for entry in log_of(run) if "loss" in entry] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_checkpoints_follow_evaluations_that_follow_the_log(place: Path) -> None:
    """Without eval_steps Transformers evaluates as often as it logs."""
    words = ["--max_steps", 6, "--eval_strategy", "steps", "--logging_steps", 2, "--load_best_model_at_end"]
    run = new_run(place, "as_logged", *words, *COLUMNS)
    state = read(run / "trainer_state.json")
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{state['best_global_step']}")


def test_the_best_needs_evaluations(place: Path) -> None:
    run = new_run(place, "unseen", "--max_steps", 1, *COLUMNS)
    for words in (["--early_stopping_patience", 1], ["--load_best_model_at_end"]):
        answer = reltune("tune", run, *words, "--eval_strategy", "no", "--overwrite_output_dir")
        assert answer.code == 2 and f"{words[0][2:]} c" in answer.err and "eval_strategy is no" in answer.err
    # stopping early does not ask for the best to be loaded
    words = ["--early_stopping_patience", 1, "--load_best_model_at_end", "false", "--learning_rate", 1e-9]
    assert reltune("tune", run, *words, "--max_steps", 60, "--overwrite_output_dir").code == 0
    state = read(run / "trainer_state.json")
    assert state["epoch"] == 2 and state["global_step"] < 60


@pytest.mark.parametrize("task", ["sequence_classification", "masked_lm"])
def test_training_that_goes_on_is_training_that_was_never_stopped(task: str, tmp_path: Path) -> None:
    """To the bit, with dropout: from inside an epoch, in which a batch is gathered in parts; and from an end of one, where the
    checkpoint is older than the evaluation."""
    if task == "masked_lm":
        save_tiny_masked(tmp_path / "model")
    else:
        save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "train.csv", review_rows(40))
    words = ["--task", task, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 3, "--num_train_epochs", 2,
             "--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 9, *RATE]  # fmt: skip
    run = new_run(tmp_path, "whole", *words)
    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    last = read(run / "trainer_state.json")["global_step"]
    for step in (1, last // 2, last // 2 + 1):
        again = shutil.copytree(run, tmp_path / f"from_{step}")
        answer = reltune("tune", again, "--resume_from_checkpoint", f"checkpoint-{step}", "--overwrite_output_dir")
        assert answer.code == 0, answer.err
        found = load_file(again / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(found[name], whole[name]) for name in whole), step


def test_tensorboard_sees_what_is_logged(place: Path) -> None:
    words = ["--max_steps", 4, "--logging_steps", 1, "--eval_strategy", "steps", "--eval_steps", 2, *COLUMNS]
    run = new_run(place, "board", *words, "--report_to", "tensorboard")
    (folder,) = (run / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("eval/accuracy", "eval_accuracy")):
        wanted = {entry["step"]: entry[key] for entry in log_of(run) if key in entry}
        assert wanted and {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(wanted)


def test_half_precision_and_checkpointing_train(place: Path) -> None:
    run = new_run(place, "bf16", *RATE, "--num_train_epochs", 6, "--bf16", "--use_cpu", "--gradient_checkpointing")
    assert read(run / "all_results.json")["test_accuracy"] > 0.8


def test_a_gradient_scaler_sees_no_float16(tmp_path: Path) -> None:
    """GradScaler of CUDA refuses to unscale gradients in float16, which new heads of a float16 base have."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3).half().requires_grad_(False), torch.nn.Linear(3, 2).half())
    for fp16, expected in ((False, torch.float16), (True, torch.float32)):
        with training.scaled_in_float32(model, TrainingArguments(str(tmp_path), use_cpu=True, fp16=fp16)):
            assert [p.dtype for p in model.parameters()] == [torch.float16] * 2 + [expected] * 2
        assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_what_liger_puts_into_files_does_not_outlast_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer has Liger change the model's file, a class in it, and torch, where a later model of the process would find it."""
    places = [(modeling_llama, "LlamaMLP"), (modeling_llama, "LlamaRMSNorm"), (modeling_llama, "apply_rotary_pos_emb"),
              (modeling_llama.LlamaForCausalLM, "forward"), (torch.nn.functional, "cross_entropy")]  # fmt: skip
    before = [vars(place)[name] for place, name in places]
    models = []

    def calling(own: Any) -> Any:
        return lambda *args, **kwargs: own(*args, **kwargs)

    def apply(model: Any, config: Any) -> None:
        models.append(model)
        for (place, name), own in zip(places, before, strict=True):
            theirs = type(name, (own,), {}) if isinstance(own, type) else calling(own)
            theirs.__module__ = "liger_kernel.transformers"
            monkeypatch.setattr(place, name, theirs)

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    save_tiny_llama(tmp_path / "model")
    write_csv(tmp_path / "train.csv", review_rows(20))
    new_run(tmp_path, "run", "--task", "causal_lm", "--method", "lora", "--max_steps", 1, "--use_liger_kernel")
    assert models and [vars(place)[name] for place, name in places] == before


def test_a_missing_logger_is_named_before_anything_is_written(place: Path) -> None:
    answer = reltune("run", "--model_name_or_path", place / "model", "--train_file", place / "train.csv",
                     "--output_dir", place / "wandb", "--report_to", "clearml")  # fmt: skip
    assert answer.code == 2 and "clearml" in answer.err.lower() and not (place / "wandb").exists()


def test_a_second_set_is_measured_before_and_after(place: Path) -> None:
    """The labels of the second set are swapped: what is learned there is as wrong as it is right on the first."""
    swapped = [(text, {"neg": "pos", "pos": "neg"}[label]) for text, label in review_rows(40, seed=5)]
    write_csv(place / "second.csv", swapped)
    run = new_run(place, "forgetting", *RATE, "--num_train_epochs", 8, "--forgetting_file", place / "second.csv")
    results = read(run / "all_results.json")
    assert results["test_accuracy"] > 0.9 and results["forgetting_after_accuracy"] < 0.1
    assert results["forgetting_before_samples"] == 40
    config = RunConfig.load(run / "config.yaml")
    materials = prepare(config)
    before = stages.model_with_new_heads(materials, RunDirectory(run))
    found = evaluate(before, {"x": materials.forgetting}, materials.task, materials.tokenizer).metrics
    assert found["x_accuracy"] == results["forgetting_before_accuracy"] != results["forgetting_after_accuracy"]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Forgetting, on second.csv: accuracy" in page


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits(place: Path, bits: int) -> None:
    run = new_run(
        place,
        f"bits_{bits}",
        f"--load_in_{bits}bit",
        "--budget",
        "20%",
        "--learning_rate",
        1e-2,
        "--num_train_epochs",
        8,
    )
    assert read(run / "all_results.json")["test_accuracy"] > 0.8
    materials = prepare(RunConfig.load(run / "config.yaml"))
    model = stages.load_tuned(materials, RunDirectory(run))
    kinds = {type(module).__name__ for module in model.modules()}
    assert any(("Linear4bit" if bits == 4 else "Linear8bitLt") in kind or "Quantised" in kind for kind in kinds), kinds


def test_four_and_eight_bits_at_once(place: Path) -> None:
    answer = reltune("run", "--model_name_or_path", place / "model", "--train_file", place / "train.csv",
                     "--output_dir", place / "both", "--load_in_4bit", "--load_in_8bit")  # fmt: skip
    assert answer.code == 2 and "choose one" in answer.err


def test_a_task_s_own_rates_are_defaults(tmp_path: Path) -> None:
    def rate(task: Task, method: str, **given: float) -> float:
        return training.arguments(str(tmp_path), method, 0, {"use_cpu": True, **given}, task).learning_rate

    assert [rate(CausalLM(), "selection"), rate(CausalLM(), "full")] == [1e-3, training.LEARNING_RATES["full"]]
    assert rate(SequenceClassification(), "selection") == training.LEARNING_RATES["selection"]
    assert rate(CausalLM(), "selection", learning_rate=5e-4) == 5e-4
    assert training.default_rate("weights", ImageClassification(), 0.01) == pytest.approx(2.5e-3)
    assert training.default_rate("weights", SequenceClassification(), 0.01) == pytest.approx(5e-3)
    assert training.default_rate("shira", SequenceClassification(), 0.01) == pytest.approx(1e-2)


def test_bf16_needs_no_other_flag_on_a_machine_without_an_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    args = training.arguments(str(tmp_path), "full", 0, {"bf16": True}, SequenceClassification())
    assert args.bf16 and args.device.type == "cpu"


def test_the_rate_follows_what_is_trained(tmp_path: Path) -> None:
    def method_and_rate(**modules: ModulePlan) -> tuple[str, float]:
        method, share = training.method_of(Plan(modules, "", 0, 0, ""))
        return method, training.default_rate(method, Regression(), share)

    one, few, many = (ModulePlan((100, 100), elements=list(range(count))) for count in (1, 25, 100))
    assert method_and_rate(a=many, norm=ModulePlan((100,), weight=True)) == ("weights", pytest.approx(1e-2))  # 1%
    assert method_and_rate(a=few) == ("weights", pytest.approx(2e-2))
    assert method_and_rate(a=one) == ("weights", 2e-2)  # no rate above
    assert method_and_rate(a=one, b=ModulePlan((50, 200), elements=list(range(199)))) == (
        "weights",
        pytest.approx(1e-2),
    )
    assert method_and_rate(a=many, b=ModulePlan((100, 100), columns=[3])) == ("selection", 2e-3)
    assert method_and_rate(a=ModulePlan((100, 100), rows=[3], bias=True)) == ("selection", 2e-3)
    assert method_and_rate(a=many, b=ModulePlan((100, 100), weight=True)) == ("layer", 1e-3)
    given = {"use_cpu": True, "learning_rate": 3e-4}
    args = training.arguments(str(tmp_path), "weights", 0, given, Regression(), 0.01)
    assert args.learning_rate == 3e-4
