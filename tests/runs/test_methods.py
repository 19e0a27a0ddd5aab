"""Every way to train on tiny models: what it changes, and that it can be measured again, gone on with and exported."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from command_line import Answer, assert_refused, reltune
from measured_models import tiny_mixtral
from method_cases import MODELS, task_place
from reltune.config.method import METHODS as NAMES
from reltune.config.run_config import RunConfig
from reltune.methods.registry import METHODS
from reltune.runs import stages
from reltune.runs.directory import RunDirectory
from reltune.runs.materials import prepare_export

QUICK = ["--max_steps", 2, "--per_device_train_batch_size", 8, "--use_cpu", True]
PLANNED = ("weights", "columns", "rows", "directions")
LOW_RANK = ("lora", "rslora", "dora")
# Tasks and methods that do not go together, with the tiny model of each task.
REFUSED = {
    **{("head", task): "no head of the task's own" for task in ("causal_lm", "masked_lm", "seq2seq", "preference")},
    ("shira", "causal_lm"): "Conv1D",
    ("bitfit", "seq2seq"): "this model has none",
    ("bitfit", "preference"): "this model has none",
}
# Every method on an encoder with a new head; one of each kind on a decoder with Conv1D and tied embeddings.
ALL_WAYS = [(method, "sequence_classification") for method in NAMES]
ALL_WAYS += [(method, "causal_lm") for method in ("lora", "bitfit", "full")]
OTHER_TASKS = [task for task in MODELS if task not in ("sequence_classification", "causal_lm")]
TRAINED = {  # parameters that each method may change, beside new heads
    "lora": r".*(query|key|value|dense|c_attn|c_proj|c_fc)\.weight",
    "bitfit": r".*\.bias",
    "layers": r"(bert\.encoder\.layer|transformer\.h)\.1\..*",
    "head": r"nothing",
    "full": r".*",
}
TRAINED |= dict.fromkeys((*LOW_RANK, "shira", *PLANNED), TRAINED["lora"])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """For each task a directory with a model and rows, and the flags that name them."""
    found = {}
    for task in MODELS:
        place = tmp_path_factory.mktemp(task)
        found[task] = place, task_place(place, task)
    return found


def run(method: str, place: tuple[Path, list[str]], *words: object, name: str = "") -> Answer:
    directory, flags = place
    chosen = ["--budget", "20%", "--head_epochs", 1, "--probe_steps", 2] if method in PLANNED else []
    return reltune(
        "run", "--method", method, *flags, "--output_dir", directory / (name or method), *QUICK, *chosen, *words
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return {file.name: load_file(file) for file in (directory / "adapter").glob("*.safetensors")}.popitem()[1]


def outputs(model: Any, directory: Path) -> torch.Tensor:
    ids = torch.tensor([[2, 4, 6, 5, 3], [2, 7, 4, 9, 3]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(("method", "task"), ALL_WAYS)
def test_a_run_goes_all_its_ways(
    method: str, task: str, places: dict[str, tuple[Path, list[str]]], tmp_path: Path
) -> None:
    """Trained twice as long, once with an interruption; measured again; merged and written as LoRA, and read by plain libraries."""
    answer = run(method, places[task], "--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 2)
    assert answer.code == 0, answer.err
    directory = places[task][0] / method
    results = read(directory / "all_results.json")
    assert reltune("evaluate", directory).code == 0
    assert read(directory / "all_results.json") == results, "evaluated again"
    assert reltune("report", directory).code == 0 and (directory / "report.html").is_file()

    whole = adapter(directory)
    again = shutil.copytree(directory, tmp_path / "again")
    answer = reltune("tune", again, "--overwrite_output_dir", "--resume_from_checkpoint", "checkpoint-1")
    assert answer.code == 0, answer.err
    resumed = adapter(again)
    assert resumed.keys() == whole.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)

    # what changed, and that the tuned model is the merged one
    config = RunConfig.load(directory / "config.yaml")
    materials = prepare_export(config, RunDirectory(directory))
    base = materials.base.take()
    before = {name: value.clone() for name, value in base.named_parameters()}
    heads = tuple(f"{head}." for head in materials.new_heads)
    tuned = outputs(stages.load_tuned(materials, RunDirectory(directory), base), directory)
    answer = reltune("export", directory, "--to", "merged", "--output_dir", tmp_path / "merged")
    assert answer.code == 0, answer.err
    merged = materials.task.load_model(str(tmp_path / "merged"))[0]
    assert torch.allclose(outputs(merged, directory), tuned, atol=1e-5)
    changed = {name for name, value in merged.named_parameters() if not torch.equal(value, before[name])}
    assert all(name.startswith(heads) or re.fullmatch(TRAINED[method], name) for name in changed), changed
    assert len(changed) > (1 if method == "head" else 3)
    if method != "full":
        assert len(changed) < len(before)

    answer = reltune("export", directory, "--to", "lora", "--output_dir", tmp_path / "lora")
    if method in (*LOW_RANK, "columns", "rows", "directions"):
        assert answer.code == 0, answer.err
        plain = PeftModel.from_pretrained(materials.base.take(), str(tmp_path / "lora"))
        assert "reltune" not in type(plain.base_model).__module__
        assert torch.allclose(outputs(plain, directory), tuned, atol=1e-5)
    else:
        assert answer.code == 2 and "--to merged" in answer.err


@pytest.mark.parametrize(
    ("method", "task"),
    [("lora", task) for task in OTHER_TASKS]
    + [
        ("full", "masked_lm"),  # tied embeddings
        ("shira", "token_classification"),
        ("head", "question_answering"),
        ("bitfit", "image_classification"),
        ("layers", "preference"),  # its base is the reference
    ],
)
def test_every_task(method: str, task: str, places: dict[str, tuple[Path, list[str]]]) -> None:
    """The other eight: trained, measured before and after, and the same when it is measured again from disk."""
    answer = run(method, places[task])
    assert answer.code == 0, answer.err
    directory = places[task][0] / method
    results = read(directory / "all_results.json")
    assert results["test_loss"] != results["test_before_loss"]
    assert math.isfinite(results["test_loss"])
    assert results["learning_rate"] > 0
    if task == "preference":
        assert "test_reward_accuracy" in results and "test_before_reward_accuracy" not in results
        assert results["test_before_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert reltune("evaluate", directory).code == 0
    assert read(directory / "all_results.json") == results


@pytest.mark.parametrize(("method", "task"), list(REFUSED))
def test_what_a_task_cannot_take(method: str, task: str, places: dict[str, tuple[Path, list[str]]]) -> None:
    answer = run(method, places[task], name="refused")
    assert answer.code == 2 and REFUSED[method, task] in answer.err, answer
    assert not (places[task][0] / "refused").exists()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ranks_by_relevance(method: str, places: dict[str, tuple[Path, list[str]]], tmp_path: Path) -> None:
    """Each module has the rank that comes nearest to what the plan would train of it; others have no adapter."""
    words = ["--rank_by", "relevance", "--budget", "20%"]
    answer = run(method, places["sequence_classification"], *words, name=f"{method}-ranked")
    assert answer.code == 0, answer.err
    directory = places["sequence_classification"][0] / f"{method}-ranked"
    plan = stages.Plan.load(directory / "plan")
    assert plan.granularity == ["column"] and plan.criterion == "fisher"
    found = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for key, tensor in adapter(directory).items()
        if key.endswith("lora_A.weight")
    }
    wanted = {n: max(1, round(len(m.columns) * m.shape[0] / sum(m.shape))) for n, m in plan.modules.items()}
    assert found == wanted and len(set(found.values())) > 1
    results = read(directory / "all_results.json")
    assert results["trainable_parameters"] == sum(
        wanted[n] * sum(m.shape) + (m.shape[0] if method == "dora" else 0) for n, m in plan.modules.items()
    )
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "fisher" in page and f"of ranks {min(found.values())} to {max(found.values())}" in page
    answer = reltune("export", directory, "--to", "lora", "--output_dir", tmp_path / "lora")
    assert answer.code == 0 and "rank_pattern" in answer.out, answer


def test_lora_on_a_base_in_four_bits(places: dict[str, tuple[Path, list[str]]], tmp_path: Path) -> None:
    """Trained, measured again and written as LoRA; merging would round it, which PEFT does without a word."""
    answer = run("lora", places["sequence_classification"], "--load_in_4bit", name="packed")
    assert answer.code == 0, answer.err
    directory = places["sequence_classification"][0] / "packed"
    results = read(directory / "all_results.json")
    assert reltune("evaluate", directory).code == 0
    assert read(directory / "all_results.json") == results
    assert reltune("export", directory, "--to", "lora", "--output_dir", tmp_path / "lora").code == 0
    answer = reltune("export", directory, "--to", "merged", "--output_dir", tmp_path / "merged")
    assert_refused(answer, "cannot be merged into a quantised weight")
    assert not (tmp_path / "merged").exists()


def test_a_sweep_of_lora(places: dict[str, tuple[Path, list[str]]]) -> None:
    answer = run("lora", places["regression"], "--sweep", "learning_rate=1e-4,1e-2", name="swept")
    assert answer.code == 0, answer.err
    directory = places["regression"][0] / "swept"
    record = read(directory / "sweep.json")
    assert [trial["values"]["learning_rate"] for trial in record["trials"]] == [1e-4, 1e-2]
    results = read(directory / "all_results.json")
    assert results["learning_rate"] == record["best"]["values"]["learning_rate"]
    assert (
        results["trainable_parameters"] == 13 * 8 * 64 + 4 * 8 * 32
    )  # 32 + 32 in attention and pooler, 32 + 64 in MLPs


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--method", "weights", "--lora_r", 4], ("lora_r", "weights", "lora")),
        (["--method", "full", "--budget", "1%"], ("budget", "full", "columns")),
        (["--method", "full", "--sweep", "budget=1%,2%"], ("budget", "full")),
        (["--method", "bitfit", "--target_modules", "query"], ("target_modules", "bitfit")),
        (["--method", "lora", "--budget", "1%", "--lora_r", 4], ("budget", "lora_r")),
        (["--method", "lora", "--granularity", "column"], ("granularity", "rank_by")),
        (["--method", "lora", "--probe_steps", 7], ("probe_steps", "rank_by")),
        (["--method", "lora", "--frozen_dtype", "float8_e4m3fn"], ("frozen_dtype", "lora")),
        (["--method", "lora", "--rank_by", "relevance", "--lora_r", 4], ("lora_r", "rank_by")),
        (["--method", "lora", "--rank_by", "relevance", "--granularity", "bias"], ("bias", "ranks")),
        (["--method", "lora", "--rank_by", "size"], ("rank_by", "size")),
        (["--method", "shira", "--lora_dropout", 0.1], ("lora_dropout", "shira", "lora")),
        (["--method", "columns", "--granularity", "row"], ("columns", "row")),
        (["--method", "lorra"], ("lorra", "lora")),
        (["--method", "full", "--load_in_4bit"], ("full", "load_in_4bit", "lora")),
        (["--method", "shira", "--load_in_8bit"], ("shira", "load_in_8bit")),
        (["--method", "lora", "--lora_r", 0], ("lora_r", "at least 1")),
        (["--method", "lora", "--lora_dropout", 1], ("lora_dropout", "at most")),
        (["--method", "lora", "--target_modules", "qwery"], ("qwery", "query")),
        (["--method", "head", "--task", "causal_lm"], ("head", "causal_lm")),
    ],
)
def test_what_is_refused(
    words: list[object], named: tuple[str, ...], places: dict[str, tuple[Path, list[str]]]
) -> None:
    place, flags = places["sequence_classification"]
    assert_refused(reltune("run", *flags, "--output_dir", place / "wrong", *words), *named)
    assert not (place / "wrong").exists()


def test_methods_without_an_analysis(places: dict[str, tuple[Path, list[str]]]) -> None:
    place, flags = places["sequence_classification"]
    answer = reltune("analyze", *flags, "--output_dir", place / "wrong", "--method", "full")
    assert_refused(answer, "full", "reltune run")
    assert run("full", places["sequence_classification"], name="done").code == 0
    assert_refused(reltune("select", place / "done", "--overwrite_output_dir"), "full")


def test_an_adapter_of_another_base(places: dict[str, tuple[Path, list[str]]], tmp_path: Path) -> None:
    """The frozen part of the base is known again, by what was trained beside it."""
    assert run("bitfit", places["multilabel_classification"], name="own").code == 0
    directory = places["multilabel_classification"][0] / "own"
    config = RunConfig.load(directory / "config.yaml")
    base = prepare_export(config, RunDirectory(directory)).base.take()
    with torch.no_grad():
        base.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(stages.InputError, match="another base"):
        METHODS["bitfit"].load(base, directory / "adapter")


def test_the_registry_and_the_config_name_the_same_methods() -> None:
    assert list(METHODS) == list(NAMES)
    assert all(method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize(
    ("method", "given", "wanted"),
    [
        ("weights", {}, (["movement"], ["element"], "0.12%", "even")),
        ("columns", {}, (["fisher"], ["column"], "0.5%", "global")),
        ("rows", {"criteria": "gradient"}, (["gradient"], ["row"], "0.5%", "global")),
        ("columns", {"granularity": "column", "budget": "1%"}, (["fisher"], ["column"], "1%", "global")),
        ("weights", {"granularity": "column"}, (["fisher"], ["column"], "0.5%", "global")),
        ("lora", {"rank_by": "relevance"}, (["fisher"], ["column"], "0.5%", "global")),
        ("lora", {}, (None, None, None, None)),
        ("full", {}, (None, None, None, None)),
    ],
)
def test_what_a_method_chooses_by(method: str, given: dict[str, Any], wanted: tuple[Any, ...], tmp_path: Path) -> None:
    config = RunConfig("model", "run", train_file="train.csv", method=method, **given)
    config.check()
    assert (config.criteria, config.granularity, config.budget, config.spread) == wanted
    config.save(tmp_path / "config.yaml")
    assert RunConfig.load(tmp_path / "config.yaml") == config
    if method == "lora" and not given:
        assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (8, 16, 0)


def test_lora_on_a_mixture_of_experts_is_read_back(places: dict[str, tuple[Path, list[str]]], tmp_path: Path) -> None:
    """PEFT writes another field for it than for other models, which are none in fact."""
    _, flags = places["causal_lm"]
    at = flags.index("--model_name_or_path") + 1
    tokenizer = AutoTokenizer.from_pretrained(flags[at])
    model = tiny_mixtral(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    model.float().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    place = tmp_path, [*flags[:at], str(tmp_path / "model"), *flags[at + 1 :]]
    assert run("lora", place).code == 0
    adapter = tmp_path / "lora" / "adapter"
    assert read(adapter / "adapter_config.json")["target_parameters"] == []
    assert any("q_proj" in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert reltune("evaluate", tmp_path / "lora").code == 0
