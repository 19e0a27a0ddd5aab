"""The four steps on a tiny BERT and real files: in one command, one by one, interrupted, repeated, edited by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from command_line import Answer, contents, reltune, review_rows, write_csv
from reltune.cli import commands as cli
from reltune.config.run_config import RunConfig
from reltune.plan.plan import Plan
from reltune.relevance.scores import RelevanceScores
from reltune.runs import stages, training
from reltune.runs.directory import RunDirectory
from reltune.runs.materials import prepare
from tiny_models import save_tiny_bert

LEARNS = ["--granularity", "module", "--budget", "20%", "--num_train_epochs", 8, "--learning_rate", 1e-2]
QUICK = ["--granularity", "column", "--budget", "5%", "--max_steps", 4]
STAGES = ("relevance", "plan", "adapter")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(120))
    return place


@pytest.fixture(scope="module")
def learned(place: Path) -> Path:
    """A run that learns the task. Tests read it and leave it as it is."""
    assert new_run(place, "learned", *LEARNS).code == 0
    return place / "learned"


@pytest.fixture(scope="module")
def quick(place: Path) -> Path:
    """A run of few steps that selects columns. Likewise."""
    assert new_run(place, "quick", *QUICK).code == 0
    return place / "quick"


def new_run(place: Path, name: str, *words: object, command: str = "run", train: str = "train.csv") -> Answer:
    files = ["--model_name_or_path", place / "model", "--train_file", place / train]
    answer = reltune(command, *files, "--output_dir", place / name, *words)
    assert answer.code == 0 or answer.err, answer
    return answer


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics(run: Path) -> dict[str, float]:
    """What a run reached, without what it cost."""
    return {k: v for k, v in read(run / "all_results.json").items() if k.startswith(("eval_", "test_"))}


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- the whole job --------------------------------------------------------------------------------------------------


def test_run_leaves_every_artefact(learned: Path) -> None:
    written = {str(path.relative_to(learned)) for path in learned.rglob("*") if path.is_file()}
    assert written >= {
        "config.yaml",
        "relevance/scores.safetensors",
        "relevance/scores.json",
        "plan/plan.yaml",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "adapter/tokenizer_config.json",
        "adapter/task.json",
        "task.json",
        "held_out/validation.jsonl",
        "held_out/test.jsonl",
        "trainer_state.json",
        "all_results.json",
        "report.html",
    }
    assert not [name for name in written if name.endswith(".partial")]


def test_run_learns_the_task(learned: Path) -> None:
    """The two classes differ in every text, so that a model that learned anything is right on nearly all."""
    results = read(learned / "all_results.json")
    assert results["test_accuracy"] > 0.9 and results["test_f1_macro"] > 0.9
    assert results["eval_accuracy"] > 0.9
    assert results["test_loss"] < 0.6  # ln 2 knows nothing
    assert (results["eval_samples"], results["test_samples"]) == (18, 18)  # 15% of 120 each
    plan = Plan.load(learned / "plan")
    assert results["trainable_parameters"] == plan.parameters <= plan.budget_parameters
    assert results["head_parameters"] == 2 * 32 + 2
    trained = sum(t.numel() for t in adapter(learned).values() if t.is_floating_point())
    assert trained == results["trainable_parameters"] + results["head_parameters"]
    files = ("adapter_model.safetensors", "adapter_config.json")
    assert results["adapter_bytes"] == sum((learned / "adapter" / name).stat().st_size for name in files)


def test_the_report_shows_the_run(learned: Path) -> None:
    page = (learned / "report.html").read_text(encoding="utf-8")
    assert "fisher" in page
    assert f"{100 * read(learned / 'all_results.json')['test_accuracy']:.2f}" in page
    assert "http" not in page.partition("<body")[0].replace("http-equiv", "")  # nothing to fetch


def test_what_a_normal_run_prints(place: Path) -> None:
    answer = new_run(place, "printed", *QUICK)
    assert "84 training, 18 validation and 18 test texts, 2 classes" in answer.out
    assert "test_accuracy" in answer.out and "Report: " in answer.out
    assert "{" not in answer.out  # no dictionaries of the Trainer
    for bar in ("train the head", "analyze", "tune", "evaluate test"):
        assert f"{bar}: 100%" in answer.err
    lines = [line for line in answer.err.replace("\r", "\n").splitlines() if line.strip(" \x1b[A")]
    other = [line for line in lines if "%|" not in line and "mtime may not be reliable" not in line]
    assert not other


def test_stages_one_by_one_do_the_same(place: Path, quick: Path) -> None:
    assert new_run(place, "staged", "--criteria", "fisher", command="analyze").code == 0
    run = place / "staged"
    assert not (run / "plan").exists()
    for words in (
        ["select", run, "--budget", "5%"],
        ["tune", run, "--max_steps", 4],
        ["evaluate", run],
        ["report", run],
    ):
        answer = reltune(*words)
        assert answer.code == 0, answer
    assert (run / "plan" / "plan.yaml").read_bytes() == (quick / "plan" / "plan.yaml").read_bytes()
    assert metrics(run) == metrics(quick)
    assert same_tensors(adapter(run), adapter(quick))
    assert (run / "report.html").is_file()


def test_a_seed_gives_the_same_run_twice(place: Path, quick: Path) -> None:
    assert new_run(place, "again", *QUICK).code == 0
    assert (place / "again" / "plan" / "plan.yaml").read_bytes() == (quick / "plan" / "plan.yaml").read_bytes()
    assert metrics(place / "again") == metrics(quick)
    assert same_tensors(adapter(place / "again"), adapter(quick))


def test_another_seed_gives_another_run(place: Path, quick: Path) -> None:
    assert new_run(place, "seed_7", *QUICK, "--seed", 7).code == 0
    assert not same_tensors(adapter(place / "seed_7"), adapter(quick))
    assert metrics(place / "seed_7") != metrics(quick)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*(RelevanceScores.load(place / n / "relevance").parts for n in ("seed_7", "quick")))


def test_the_saved_adapter_gives_the_logits_that_were_trained(place: Path, quick: Path, tmp_path: Path) -> None:
    config = RunConfig.load(quick / "config.yaml")
    config.output_dir = str(tmp_path / "run")
    run = RunDirectory(config.output_dir)
    shutil.copytree(quick, run.path)
    materials = prepare(config)
    trained = stages.tune(materials, run).cpu().eval()
    loaded = stages.load_tuned(prepare(config), run).eval()
    batch = materials.collator([materials.test[i] for i in range(8)])
    with torch.no_grad():
        there, back = trained(**batch).logits, loaded(**batch).logits
        with trained.disable_adapter():
            base = trained(**batch).logits
    assert torch.equal(there, back)
    assert not torch.equal(there, base)


def test_the_adapter_directory_suffices(place: Path, quick: Path) -> None:
    """PEFT and Transformers alone read what a run leaves, once reltune is imported."""
    tokenizer = AutoTokenizer.from_pretrained(quick / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=2)
    model = PeftModel.from_pretrained(base, quick / "adapter").eval()
    logits = model(**tokenizer(["good film", "bad book"], padding=True, return_tensors="pt")).logits
    assert logits.shape == (2, 2)


def test_unselected_weights_stay_what_they_were(place: Path, learned: Path, tmp_path: Path) -> None:
    assert reltune("export", learned, "--to", "merged", "--output_dir", tmp_path / "merged").code == 0
    before = load_file(place / "model" / "model.safetensors")
    after = {k.removeprefix("bert."): v for k, v in load_file(tmp_path / "merged" / "model.safetensors").items()}
    chosen = {name.removeprefix("bert.") for name in Plan.load(learned / "plan").modules}
    assert chosen
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name.rpartition(".")[0] not in chosen), name


# -- data -----------------------------------------------------------------------------------------------------------


def test_given_files_are_not_split(place: Path) -> None:
    write_csv(place / "validation.csv", review_rows(10, seed=1))
    write_csv(place / "test.csv", review_rows(14, seed=2))
    test, validation = ["--test_file", place / "test.csv"], ["--validation_file", place / "validation.csv"]
    for name, given, sizes in (
        ("both", [*test, *validation], (120, 10, 14)),
        ("only_test", test, (102, 18, 14)),
        ("only_validation", validation, (102, 10, 18)),
    ):
        answer = new_run(place, name, "--criteria", "fisher", *given, command="analyze")
        assert answer.out.startswith("{} training, {} validation and {} test texts".format(*sizes)), answer
    for words in (["select", "--budget", "5%"], ["tune", "--max_steps", 1], ["evaluate"]):
        assert reltune(words[0], place / "both", *words[1:]).code == 0
    results = read(place / "both" / "all_results.json")
    assert (results["eval_samples"], results["test_samples"]) == (10, 14)


def test_jsonl_and_tsv_hold_the_same_as_csv(place: Path, quick: Path) -> None:
    rows = review_rows(120)
    lines = [json.dumps({"body": text, "topic": label}) for text, label in rows]
    (place / "train.jsonl").write_text("\n".join(lines) + "\n")
    (place / "train.tsv").write_text("topic\tbody\n" + "".join(f"{label}\t{text}\n" for text, label in rows))
    columns = ["--text_column", "body", "--label-column", "topic"]
    for suffix in ("jsonl", "tsv"):
        assert new_run(place, suffix, *columns, *QUICK, train=f"train.{suffix}").code == 0
        assert metrics(place / suffix) == metrics(quick)


@pytest.mark.parametrize(("name", "encoding"), [("gbk", "gbk"), ("bom", "utf-8-sig"), ("utf16", "utf-16")])
def test_chinese_texts_and_labels_in_other_encodings(place: Path, name: str, encoding: str) -> None:
    rows = [
        (f"{'坏' if label == '差评' else '好'} 电影 {text}", label) for text, label in review_rows(60, ("差评", "好评"))
    ]
    write_csv(place / f"{name}.csv", rows, ("文本", "标签"), encoding)
    words = ["--text_column", "文本", "--label_column", "标签", *QUICK]
    given = [] if name == "bom" else ["--encoding", encoding]
    assert new_run(place, name, *words, *given, train=f"{name}.csv").code == 0
    exported = place / f"{name}_merged"
    assert reltune("export", place / name, "--to", "merged", "--output_dir", exported).code == 0
    assert read(exported / "config.json")["id2label"] == {"0": "好评", "1": "差评"}  # by code point
    assert "文本" in (place / name / "config.yaml").read_text(encoding="utf-8")


# -- single weights ---------------------------------------------------------------------------------------------------


def test_a_run_of_single_weights(place: Path) -> None:
    words = [
        "--granularity",
        "element,bias",
        "--criteria",
        "fisher",
        "--budget",
        "5%",
        "--learning_rate",
        1e-2,
        "--num_train_epochs",
        2,
    ]
    assert new_run(place, "elements", *words).code == 0
    run = place / "elements"
    plan = Plan.load(run / "plan")
    assert 0 < plan.indices < plan.parameters == plan.budget_parameters  # biases among them
    assert f"{plan.indices:,} single weights" in (run / "report.html").read_text()
    assert f"{plan.indices:,} single weights" in (run / "adapter" / "README.md").read_text()
    assert read(run / "all_results.json")["trainable_parameters"] == plan.parameters
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    held = {key: tensor for key, tensor in tensors.items() if key.endswith("reltune_elements")}
    assert sum(tensor.numel() for tensor in held.values()) == plan.indices
    before = load_file(place / "model" / "model.safetensors")
    changed = 0
    for key, values in held.items():
        name = key.removeprefix("base_model.model.bert.").removesuffix(".reltune_elements")
        index = tensors[key.replace("elements", "element_indices")]
        assert index.dtype == torch.int32 and index.tolist() == list(plan.modules[f"bert.{name}"].elements)
        changed += int((before[f"{name}.weight"].flatten()[index.long()] != values).sum())
    assert changed > 0.9 * plan.indices
    assert reltune("export", run, "--to", "merged", "--output_dir", place / "elements_merged").code == 0
    merged = load_file(place / "elements_merged" / "model.safetensors")
    for key, values in held.items():
        name = key.removeprefix("base_model.model.").removesuffix(".reltune_elements")
        index = tensors[key.replace("elements", "element_indices")].long()
        assert torch.equal(merged[f"{name}.weight"].flatten()[index], values)


def test_a_budget_spread_evenly(place: Path, quick: Path) -> None:
    shutil.copytree(quick, place / "even")
    assert reltune("select", place / "even", "--spread", "even", "--overwrite_output_dir").code == 0
    plan = Plan.load(place / "even" / "plan")
    assert plan.spread == "even" and len({len(m.columns) for m in plan.modules.values() if m.shape == (32, 32)}) == 1
    assert RunConfig.load(place / "even" / "config.yaml").spread == "even"
    answer = reltune("select", place / "even", "--granularity", "module", "--overwrite_output_dir")
    assert answer.code == 2 and "spread even is for column, row, element" in answer.err
    answer = reltune("select", place / "even", "--granularity", "element", "--overwrite_output_dir")
    assert answer.code == 2 and "analyze again with elements" in answer.err


def test_elements_that_cannot_be_chosen_are_refused_before_hours_are_spent(place: Path) -> None:
    for words, why in (
        (["--granularity", "element,column"], "element cannot compete with column"),
        (["--granularity", "element", "--criteria", "spectral_snr"], "spectral_snr"),
        (["--granularity", "element", "--budget", "0"], "allows nothing"),
        (["--granularity", "element", "--target_modules", "quary"], "'quary'"),
        (["--spread", "evenly"], "'even'"),
    ):
        answer = new_run(place, "refused", *words)
        assert answer.code == 2 and why in answer.err
        assert not (place / "refused").exists()


def test_frozen_weights_in_float8(place: Path, quick: Path) -> None:
    run = place / "float8"
    shutil.copytree(quick, run)
    assert reltune("tune", run, "--frozen_dtype", "float8_e4m3fn", "--overwrite_output_dir").code == 0
    assert read(run / "adapter" / "adapter_config.json")["frozen_dtype"] == "float8_e4m3fn"
    tensors, others = (load_file(of / "adapter" / "adapter_model.safetensors") for of in (run, quick))
    assert list(tensors) == list(others) and all(t.dtype in (torch.float32, torch.int64) for t in tensors.values())
    assert any(not torch.equal(tensors[name], others[name]) for name in tensors)  # it was trained over other weights
    for words in (["evaluate", run], ["export", run, "--to", "lora", "--output_dir", place / "float8_lora"]):
        assert reltune(*words).code == 0  # on the base as it is
    losses = [metrics(of)["eval_loss"] for of in (run, quick)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_what_cannot_be_held_in_float8_is_refused_before_hours_are_spent(place: Path) -> None:
    save_tiny_bert(place / "odd", hidden=20, intermediate=24)
    for model, words, why in (
        ("model", ["--frozen_dtype", "float8"], "'float8_e4m3fn'"),
        ("odd", ["--frozen_dtype", "float8_e4m3fn"], "no linear map that can be held in float8"),
    ):
        files = ["--model_name_or_path", place / model, "--train_file", place / "train.csv"]
        answer = reltune("run", *files, "--output_dir", place / "refused", *words)
        assert answer.code == 2 and why in answer.err
        assert not (place / "refused").exists()


# -- criteria, granularity, names -----------------------------------------------------------------------------------


def test_the_first_criterion_selects(place: Path) -> None:
    words = ["--criteria", "depth,fisher", "--criteria", " magnitude", *QUICK]
    assert new_run(place, "criteria", *words).code == 0
    run = place / "criteria"
    assert RelevanceScores.load(run / "relevance").criteria == ["depth", "fisher", "magnitude"]
    plan = Plan.load(run / "plan")
    assert plan.criterion == "depth"
    assert all(name.startswith("bert.encoder.layer.1.") for name in plan.modules)  # top layers first
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("depth", "fisher", "magnitude"))
    # another of those measured can select later, without measuring again
    before = (run / "relevance" / "scores.safetensors").read_bytes()
    assert reltune("select", run, "--criteria", "magnitude", "--overwrite_output_dir").code == 0
    assert Plan.load(run / "plan").criterion == "magnitude"
    assert (run / "relevance" / "scores.safetensors").read_bytes() == before
    assert RunConfig.load(run / "config.yaml").criteria == ["magnitude"]


def test_several_granularities(place: Path) -> None:
    words = ["--granularity", "row,bias", "--granularity", "norm", "--criteria", "gradient", *QUICK[2:]]
    assert new_run(place, "granularities", *words).code == 0
    modules = Plan.load(place / "granularities" / "plan").modules.values()
    assert any(m.rows for m in modules)
    assert any(m.bias and len(m.shape) == 2 for m in modules)
    assert any(m.weight and len(m.shape) == 1 for m in modules)
    assert not any(m.columns or (m.weight and len(m.shape) == 2) for m in modules)


def test_names_and_regular_expressions(place: Path) -> None:
    words = [
        "--target_modules",
        r"query,pooler,.*\.layer\.[01]{1,2}\.intermediate\.dense",
        "--exclude_modules",
        "layer.0",
    ]
    answer = new_run(place, "named", *words, "--budget", "30%", "--max_steps", 1)
    assert answer.code == 0, answer
    assert set(Plan.load(place / "named" / "plan").modules) == {
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.intermediate.dense",
        "bert.pooler.dense",
    }
    answer = reltune("select", place / "named", "--exclude_modules", "query", "--overwrite_output_dir")
    assert answer.code == 0, answer
    assert set(Plan.load(place / "named" / "plan").modules) == {
        "bert.encoder.layer.1.intermediate.dense",
        "bert.pooler.dense",
    }


def test_modules_excluded_by_name(place: Path) -> None:
    words = ["--exclude_modules", "layer.0,self", "--granularity", "column", "--budget", "20%", "--max_steps", 1]
    assert new_run(place, "excluded", *words).code == 0
    chosen = set(Plan.load(place / "excluded" / "plan").modules)
    assert chosen and all(name.startswith("bert.encoder.layer.1.") and ".self." not in name for name in chosen)


def test_analyze_leaves_budget_and_granularity_to_select(place: Path) -> None:
    """The default budget has no room for a column of this model, and norms have no columns."""
    assert new_run(place, "norms", "--criteria", "fisher", "--target_modules", "LayerNorm", command="analyze").code == 0
    assert reltune("select", place / "norms", "--granularity", "norm", "--budget", 128).code == 0
    assert Plan.load(place / "norms" / "plan").parameters == 128


# -- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_edited_by_hand_is_what_is_tuned(place: Path, quick: Path) -> None:
    run = place / "edited"
    shutil.copytree(quick, run)
    path = run / "plan" / "plan.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = "bert.encoder.layer.0.output.dense"
    values["modules"] = {name: {"shape": [32, 64], "columns": [3, 40], "rows": [0], "bias": True}}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert reltune("tune", run, "--overwrite_output_dir").code == 0
    assert not (run / "all_results.json").exists()  # it was about another adapter
    tensors = {key: value for key, value in adapter(run).items() if "classifier" not in key}
    start = f"base_model.model.{name}.reltune_"
    assert {key.removeprefix(start): tuple(value.shape) for key, value in tensors.items()} == {
        "columns": (32, 2),
        "column_indices": (2,),
        "rows": (1, 64),
        "row_indices": (1,),
        "bias": (32,),
    }
    assert tensors[f"{start}column_indices"].tolist() == [3, 40]
    assert reltune("evaluate", run).code == 0
    assert read(run / "all_results.json")["trainable_parameters"] == 2 * 32 + 64 + 32


def test_select_again_takes_away_what_it_outdates(place: Path, quick: Path) -> None:
    run = place / "reselected"
    shutil.copytree(quick, run)
    assert reltune("select", run, "--budget", 640, "--overwrite_output_dir").code == 0
    left = ["commands.json", "config.yaml", "data.json", "held_out", "plan", "relevance", "task.json"]
    assert sorted(path.name for path in run.iterdir()) == left
    assert RunConfig.load(run / "config.yaml").budget == "640"
    assert Plan.load(run / "plan").budget_parameters == 640


def test_overwriting_a_run(place: Path, quick: Path) -> None:
    run = place / "overwritten"
    shutil.copytree(quick, run)
    (run / "notes.txt").write_text("mine")
    assert new_run(place, "overwritten", "--overwrite_output_dir", *QUICK, "--budget", 320).code == 0
    assert Plan.load(run / "plan").budget_parameters == 320
    assert (run / "notes.txt").read_text() == "mine"


# -- training fields ------------------------------------------------------------------------------------------------


def test_training_fields_are_honoured_and_saved(place: Path) -> None:
    given = ["--num-train-epochs", 2, "--learning_rate=5e-3", "--lr_scheduler_type", "constant", "--bf16", "false"]
    more = ["--per_device_train_batch_size", 21, "--logging_steps", 1, "--warmup_steps", 0]
    assert new_run(place, "fields", "--budget", "5%", *given, *more).code == 0
    state = read(place / "fields" / "trainer_state.json")
    assert state["global_step"] == 2 * 84 / 21
    assert {entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry} == {5e-3}
    assert read(place / "fields" / "all_results.json")["learning_rate"] == 5e-3
    assert RunConfig.load(place / "fields" / "config.yaml").training == {
        "num_train_epochs": 2.0,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "per_device_train_batch_size": 21,
        "logging_steps": 1,
        "warmup_steps": 0.0,
    }


def test_max_steps_and_a_schedule(place: Path) -> None:
    words = ["--max_steps", 5, "--lr_scheduler_type", "cosine", "--logging_steps", 1, "--warmup_steps", 0]
    assert new_run(place, "steps", "--granularity", "column", "--budget", "5%", *words).code == 0
    state = read(place / "steps" / "trainer_state.json")
    assert state["global_step"] == 5
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    expected = [
        training.LEARNING_RATES["selection"] * (1 + torch.cos(torch.tensor(torch.pi * i / 5))) / 2 for i in range(5)
    ]
    assert rates == pytest.approx([float(rate) for rate in expected], rel=1e-5)


def test_tune_takes_its_own_training_fields(place: Path, quick: Path) -> None:
    """In the order of the usage line, [OPTIONS] RUN, and in the other."""
    run = place / "retuned"
    shutil.copytree(quick, run)
    answer = reltune("tune", "--overwrite_output_dir", "--max_steps", 3, "--bf16", "false", run)
    assert answer.code == 0, answer
    assert read(run / "trainer_state.json")["global_step"] == 3
    assert reltune("tune", run, "--overwrite_output_dir", "--learning_rate", 1e-3).code == 0
    assert RunConfig.load(run / "config.yaml").training == {"max_steps": 3, "learning_rate": 1e-3, "bf16": False}
    assert read(run / "trainer_state.json")["global_step"] == 3


def test_the_best_epoch_can_be_kept(place: Path) -> None:
    """Called best here is the highest loss, so that it is not the last epoch."""
    words = ["--load_best_model_at_end", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
    assert new_run(place, "best", "--budget", "5%", "--learning_rate", 0.2, *words).code == 0
    history = read(place / "best" / "trainer_state.json")["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert len(losses) == 3 and losses[-1] < max(losses)
    assert metrics(place / "best")["eval_loss"] == pytest.approx(max(losses), rel=1e-5)


# -- interruptions and failures -------------------------------------------------------------------------------------


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Raise while a selection is tuned; the training of the head runs through."""
    on_step_end: Callable[..., None] = training._StepClock.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if isinstance(kwargs["model"], PeftModel) and state.global_step == step:
            raise error

    monkeypatch.setattr(training._StepClock, "on_step_end", stop)


def test_interrupted_runs_go_on_from_the_finished_stages(
    place: Path, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at_step(patch, 2, KeyboardInterrupt())
        answer = new_run(place, "interrupted", *QUICK)
    assert answer.code == 130
    assert answer.err.endswith(
        "\nreltune: error: interrupted; what was done is kept, and the same command goes on from there.\n"
    )
    assert "Traceback" not in answer.err
    run = place / "interrupted"
    assert [name for name in STAGES if (run / name).exists()] == ["relevance", "plan"]
    assert reltune("tune", run).code == 0
    answer = reltune("evaluate", run)
    assert answer.code == 0
    assert metrics(run) == metrics(quick)
    bars = re.findall(r"(evaluate [a-z ]+): 100%", answer.err)
    data = ["validation before training", "test before training", "validation", "test"]
    assert list(dict.fromkeys(bars)) == [f"evaluate {name}" for name in data]


def test_a_failure_is_one_line_and_debug_tells_where(place: Path, quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr(stages, "measure_metrics", fail)
    before = contents(quick)
    answer = reltune("evaluate", quick)
    assert answer.code == 1
    assert answer.err == "reltune: error: RuntimeError: the disk is full (--debug shows where)\n"
    for words in (["--debug", "evaluate", quick], ["evaluate", quick, "--debug"]):
        answer = reltune(*words)
        assert answer.code == 1
        assert "Traceback" in answer.err and "in fail" in answer.err
        assert answer.err.splitlines()[-1].startswith("reltune: error: RuntimeError: the disk is full")
    assert contents(quick) == before


def test_diverged_training_saves_no_adapter(place: Path) -> None:
    answer = new_run(place, "diverged", *QUICK, "--learning_rate", 1e30, "--max_grad_norm", 0)
    assert answer.code == 1
    assert "diverged" in answer.err and "--learning_rate" in answer.err
    assert not (place / "diverged" / "adapter").exists()


def test_resuming_gives_the_adapter_of_an_uninterrupted_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--granularity", "column,row,bias", "--budget", "5%", "--max_steps", 7]
    saves = ["--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no"]
    assert new_run(place, "whole", *words, *saves).code == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, 5, KeyboardInterrupt())
        assert new_run(place, "stopped", *words, *saves).code == 130
    assert (place / "stopped" / "checkpoint-4").is_dir()
    for number, wanted in enumerate(["true", "checkpoint-4", place / "resumed_2" / "checkpoint-4"]):
        run = place / f"resumed_{number}"
        shutil.copytree(place / "stopped", run)
        answer = reltune("tune", run, "--resume_from_checkpoint", wanted)
        assert answer.code == 0, answer
        assert same_tensors(adapter(run), adapter(place / "whole"))
        assert read(run / "trainer_state.json")["global_step"] == 7
        assert read(run / "training_cost.json")["steps"] == 7
        assert read(run / "training_cost.json")["timed_steps"] == 3  # it went on, it did not begin again
        assert "resume_from_checkpoint" not in RunConfig.load(run / "config.yaml").training


def test_termination_ends_the_process_with_143(place: Path) -> None:
    code = "import sys; from reltune.cli.commands import main; main()"
    words = ["run", "--model_name_or_path", place / "model", "--train_file", place / "train.csv", *QUICK[:4]]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, [*words, "--output_dir", place / "ended", "--num_train_epochs", 9999])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        give_up = time.monotonic() + 120
        while not list((place / "ended").glob("checkpoint-*")) and time.monotonic() < give_up:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "Traceback" not in err
    assert [name for name in STAGES if (place / "ended" / name).exists()] == ["relevance", "plan"]


# -- comparison -----------------------------------------------------------------------------------------------------


def test_a_run_beside_other_methods(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the demo. The run is taken over as it is: a comparison would have trained the same."""
    config = RunConfig(
        model_name_or_path=str(place / "model"),
        train_file=str(place / "train.csv"),
        output_dir=str(place / "compared"),
        granularity=["column"],
        budget="5%",
        training={"max_steps": 6, "load_best_model_at_end": True},
    )
    cli._run_all(config, overwrite=False, baselines=True)
    record = read(place / "compared" / "comparison" / "comparison.json")
    rows = {row["label"]: row for row in record["tables"][0]["rows"]}
    names = ["before training", "weights 5%", "lora r=8", "full"]
    assert list(rows) == names
    before, ours, lora, full = (rows[name] for name in names)
    # 32 hidden, 64 intermediate: rank 8 on 4 attention maps and 2 maps of the block, in 2 layers, and on the pooler
    assert lora["trainable_parameters"] == 8 * (2 * (4 * 64 + 2 * 96) + 64)
    assert full["trainable_parameters"] == 20864
    assert ours["trainable_parameters"] == Plan.load(place / "compared" / "plan").parameters
    assert {row["head_parameters"] for row in (ours, lora, full)} == {66}
    results = read(place / "compared" / "all_results.json")
    assert (ours["metrics"]["accuracy"], ours["metrics"]["loss"]) == (results["test_accuracy"], results["test_loss"])
    assert before["metrics"]["accuracy"] == results["test_before_accuracy"]
    assert ours["analysis_seconds"] > 0 and lora["analysis_seconds"] is None
    for row in (ours, lora, full):
        assert row["seconds_per_step"] > 0 and row["peak_memory_bytes"] > 0 and row["steps"] == 6
        assert row["adapter_bytes"] > 4 * (row["trainable_parameters"] + row["head_parameters"])
    assert ours["differences"]["lora"]["mean"] == ours["metrics"]["accuracy"] - lora["metrics"]["accuracy"]
    rates = [row["learning_rate"] for row in (ours, full)]
    assert rates == [training.LEARNING_RATES[key] for key in ("selection", "full")]
    page = (place / "compared" / "report.html").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert all(name in page and name in printed for name in names)
    assert "matters most" in printed and "Rates were not tuned" in printed


# -- words ----------------------------------------------------------------------------------------------------------

COMMANDS = ("run", "analyze", "select", "tune", "evaluate", "report", "export", "compare", "demo", "config")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_terminal(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    answer = reltune(*command.split(), "--help")
    assert answer.code == 0 and not answer.err
    assert max(map(len, answer.out.splitlines())) <= 80
    assert "..." not in answer.out.replace("[ARGS]...", "").replace("{RUN}...", "")  # no sentence is cut off
    if not command:
        assert all(f"\n  {name} " in answer.out for name in COMMANDS)


@pytest.mark.parametrize("command", ["select", "tune", "evaluate"])
def test_help_says_no_defaults_where_the_run_has_values(command: str) -> None:
    text = " ".join(reltune(command, "--help").out.split())
    assert "stays as it is in RUN/config.yaml" in text
    assert "[default" not in text and "If not given" not in text
    assert "[default: error]" in reltune("run", "--help").out and "If not given" in reltune("run", "--help").out


def test_no_command_shows_the_help_and_version_the_version() -> None:
    assert reltune().out == reltune("--help").out
    assert reltune("--version").out == "0.1.0\n"
