"""A base in few bits from end to end: single weights by default, and what is refused at the start."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from command_line import Answer, assert_refused, reltune
from reltune.config.run_config import RunConfig
from reltune.plan.plan import Plan
from reltune.runs import stages
from reltune.runs.directory import RunDirectory
from reltune.runs.materials import prepare_evaluation
from tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny_llama(place / "model", hidden_size=64)
    draw = random.Random(0)
    with (place / "train.jsonl").open("w") as file:
        for _ in range(100):
            words, answer = draw.choice([(["good", "great", "fine"], "good"), (["bad", "poor", "dull"], "bad")])
            prompt = draw.choices(["film", "book", "very", "not"], k=3) + draw.choices(words, k=2)
            file.write(json.dumps({"prompt": " ".join(prompt), "completion": f" {answer}"}) + "\n")
    return place


def new_run(place: Path, name: str, *words: object, model: str = "model") -> Answer:
    files = ["--model_name_or_path", place / model, "--train_file", place / "train.jsonl", "--use_cpu"]
    return reltune("run", *files, "--output_dir", place / name, "--max_new_tokens", 4, *words)


HOLDS = {
    "4": ["--load_in_4bit"],
    "8": ["--load_in_8bit"],
    "float8": ["--frozen_dtype", "float8_e4m3fn"],
}
SHORT = ["--budget", "5%", "--num_train_epochs", 6, "--per_device_train_batch_size", 8, "--probe_steps", 25]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=HOLDS)
def run(place: Path, request: pytest.FixtureRequest) -> Path:
    """A run of the default recipe on a base in few bits."""
    answer = new_run(place, request.param, *HOLDS[request.param], *SHORT)
    assert answer.code == 0, answer.err
    return place / request.param


def test_single_weights_are_chosen_by_movement_and_trained(run: Path) -> None:
    config, plan = RunConfig.load(run / "config.yaml"), Plan.load(run / "plan")
    assert (config.criteria, config.granularity, config.spread) == (["movement"], ["element"], "even")
    assert len(plan.modules) == 14 and all(module.elements and not module.columns for module in plan.modules.values())
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"reltune_elements", "reltune_element_indices"}
    results = read(run / "all_results.json")
    assert results["test_loss"] < 0.7 * results["test_before_loss"]


def test_the_report_and_the_terminal_say_what_the_base_is_held_in(run: Path) -> None:
    words = {"4": "4 bits (NF4)", "8": "8 bits", "float8": "float8_e4m3fn while training"}[run.name]
    head = (run / "report.html").read_text(encoding="utf-8").partition("<h2>")[0]
    assert f"model, linear layers held in {words}</p>" in head
    answer = reltune("report", run)
    assert f"The base model's linear layers are held in {words}." in answer.out, answer


def test_the_adapter_loads_and_gives_the_same_again(run: Path) -> None:
    before = read(run / "all_results.json")
    answer = reltune("evaluate", run)
    assert answer.code == 0, answer.err
    after = read(run / "all_results.json")
    if run.name == "float8":  # evaluated on the base in full precision, both times
        assert after["test_loss"] == pytest.approx(before["test_loss"], rel=1e-6)
    assert after == before


def test_what_an_export_of_it_says(run: Path) -> None:
    answer = reltune("export", run, "--to", "lora", "--output_dir", run / "out")
    assert_refused(answer, "single weights", "--to merged", "--granularity direction")
    answer = reltune("export", run, "--to", "merged", "--output_dir", run / "out")
    if run.name == "float8":
        assert answer.code == 0, answer.err
    else:
        assert_refused(answer, "an adapter cannot be merged into a quantised weight")
        assert not (run / "out").exists()


def test_nothing_packed_is_written_to(run: Path) -> None:
    if run.name == "float8":
        return  # the base is loaded whole here; tests/tuner/test_float8.py looks at it
    directory, config = RunDirectory.open(run)
    materials = prepare_evaluation(config, directory)
    plain = {n: p.data.clone() for n, p in materials.base.look().named_parameters() if not p.is_floating_point()}
    model = stages.load_tuned(materials, directory)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        for mode in (True, False):
            model.train(mode)(input_ids=ids, labels=ids)
    held = {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    assert len(plain) == 14 and all(torch.equal(held[name].data, value) for name, value in plain.items())


def test_a_base_that_no_gradient_passes_is_named_before_anything_is_written(place: Path) -> None:
    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    model = AutoModelForCausalLM.from_pretrained(place / "model", quantization_config=config, dtype=torch.float32)
    shutil.copytree(place / "model", place / "dynamic")
    (place / "dynamic" / "model.safetensors").unlink()
    model.save_pretrained(place / "dynamic")
    answer = new_run(place, "refused", model="dynamic")
    assert_refused(
        answer, "model.layers.0.self_attn.q_proj (Linear) lets no gradient through, because it rounds its inputs"
    )
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--budget", 13],
            "spread evenly allows less than one single weight in each of 14 modules; raise it to 14 at least",
        ),
        (
            ["--budget", 13, "--spread", "columns"],
            "spread evenly allows less than one single weight in each of 14 modules; raise it to 14 at least",
        ),
        (
            ["--export", "lora"],
            "a LoRA file cannot hold what granularity element trains, single weights; add --granularity direction",
        ),
        (
            ["--export", "lora", "--granularity", "column,bias"],
            "granularity bias trains, biases, norms or whole matrices",
        ),
        (["--export", "merged", "--load_in_8bit"], "cannot be merged into a base in 4 or 8 bits"),
        (["--load_in_8bit", "--fsdp"], "fsdp cannot spread a base held in 8 bits"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(words: list[object], said: str, place: Path) -> None:
    assert_refused(new_run(place, "refused", *words), said)
    assert not (place / "refused").exists()


def test_a_step_size_with_which_the_probe_diverges_is_named(place: Path) -> None:
    answer = new_run(place, "diverging", "--load_in_4bit", "--probe_step_size", 3)
    assert answer.code == 2 and "the probe diverges" in answer.err, answer.err
    assert "lower its step_size, which is 3 (--probe_step_size)" in answer.err


@pytest.mark.parametrize(("form", "words"), [("lora", ["--granularity", "column", "--budget", "5%"]), ("merged", [])])
def test_a_run_exports_what_its_config_asks_for(form: str, words: list[object], place: Path) -> None:
    answer = new_run(place, f"exported {form}", "--export", form, *words, "--max_steps", 2, "--probe_steps", 3)
    assert answer.code == 0 and f"Exported to {place / f'exported {form}' / form}" in answer.out, answer.err
    file = "adapter_model.safetensors" if form == "lora" else "model.safetensors"
    assert (place / f"exported {form}" / form / file).is_file()
