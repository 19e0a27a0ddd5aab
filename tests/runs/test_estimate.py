"""reltune estimate: what a training takes, from a config alone."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, LlamaConfig, ViTConfig

import reltune
from command_line import reltune as call
from reltune import InputError
from reltune.cost import calibration, devices
from reltune.cost.calibration import Calibration, rate
from reltune.runs import estimate

D, INNER, V, LAYERS = 64, 160, 256, 6
BLOCK = 4 * D * D + 3 * D * INNER


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(path)
    return str(path)


def estimated(model: str, **fields: Any) -> reltune.runs.estimate.Estimate:  # type: ignore[name-defined]
    return reltune.estimate(
        model, **{"device": "h100-80gb", "per_device_train_batch_size": 2, "max_length": 16, **fields}
    )


def test_lora_and_full_fine_tuning_stand_beside(llama: str) -> None:
    found = estimated(llama, method="columns", budget="1%", examples=100)
    assert [row.method for row in found.rows] == ["columns", "lora", "full"]
    columns, lora, full = found.rows
    assert full.trained == found.parameters == 2 * V * D + D + LAYERS * (BLOCK + 2 * D)
    assert lora.trained == LAYERS * 8 * (4 * 2 * D + 3 * (D + INNER))
    assert columns.trained == pytest.approx(found.parameters / 100, rel=0.5)  # at least one column in every module
    assert full.memory["optimizer states"] == 2 * 2 * full.trained + _rounding(full)
    assert columns.total < lora.total < full.total
    assert found.steps == math.ceil(100 / 2) * 3
    assert all(row.hours_by_part["training"] == pytest.approx(row.seconds * found.steps / 3600) for row in found.rows)
    assert all(row.hours == pytest.approx(sum(row.hours_by_part.values())) for row in found.rows)
    assert all(row.fits for row in found.rows)


def _rounding(full: Any) -> int:
    """What 512 bytes a block add to the states of the 57 tensors: two states and a count of steps each."""
    tensors = 2 + 1 + LAYERS * 9
    sizes = [V * D, V * D, D] + [*[D * D] * 4, *[D * INNER] * 3, D, D] * LAYERS
    assert len(sizes) == tensors
    return sum(-(-4 * size // 512) * 512 - 4 * size + 512 for size in sizes)


@pytest.mark.parametrize("method", ["weights", "rows", "directions", "lora", "rslora", "dora", "layers", "full"])
def test_every_method_is_counted(llama: str, method: str) -> None:
    found = estimated(llama, method=method)
    assert found.rows[0].method == method
    assert 0 < found.rows[0].trained <= found.parameters
    assert found.largest_batch is not None and found.largest_batch > 2


def test_single_weights_are_as_many_as_the_budget_allows(llama: str) -> None:
    found = estimated(llama, method="weights", budget="0.5%")
    assert found.rows[0].trained == pytest.approx(0.005 * found.parameters, rel=0.02)


def test_a_plan_is_counted_as_it_is(llama: str, tmp_path: Path) -> None:
    module = "model.layers.4.mlp.down_proj"
    plan = reltune.Plan(
        {module: reltune.plan.plan.ModulePlan((D, INNER), columns=[3, 5])},
        "1000",
        1000,
        10**6,
        "x",
        criterion="magnitude",
    )
    found = estimated(llama, method="columns", plan=plan)
    assert found.rows[0].trained == 2 * D
    spread = estimated(llama, method="columns", budget=str(2 * D))
    assert found.rows[0].memory["activations"] < spread.rows[0].memory["activations"]  # nothing is kept below layer 4


def test_the_largest_batch_is_the_last_that_fits(llama: str) -> None:
    found = estimated(llama, method="lora", device="0.86GiB")
    largest = found.largest_batch
    assert largest and largest > 2
    at, above = (
        estimated(llama, method="lora", device="0.86GiB", per_device_train_batch_size=size).rows[0]
        for size in (largest, largest + 1)
    )
    assert at.fits and not above.fits
    assert at.seconds is None  # a size of memory says nothing of speed


@pytest.mark.parametrize("limit", [50, 1_000, 1_100, 9_999, 250_000, 10**12])
def test_the_largest_batch_is_found_where_memory_bends(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is rounded or held by another tensor from some size on leads a straight line astray."""

    def held(size: int) -> int:
        return 100 + 10 * size + (200 + size if size > 40 else 0) + (size // 7) ** 2 // 50

    monkeypatch.setattr(estimate, "memory_of", lambda count: {"all of it": count})
    tried = []
    subject = types.SimpleNamespace(
        batch_size=8, counted=lambda _, batch_size: tried.append(batch_size) or held(batch_size)
    )
    found = estimate._largest_batch(subject, "lora", limit)
    assert found == max((n for n in range(1, estimate.LARGEST_BATCH + 1) if held(n) <= limit), default=0)
    assert len(tried) <= 2 + estimate.TRIES


def test_a_budget_of_memory_is_kept_or_refused(llama: str) -> None:
    plain = estimated(llama, method="lora", per_device_train_batch_size=64, device="cpu")
    held = plain.rows[0].total - plain.rows[0].memory[estimate.HOLES]  # a budget of memory leaves none
    budget = f"memory={held // 2**20 - 4}MiB"
    less = estimated(llama, method="lora", per_device_train_batch_size=64, device="cpu", budget=budget)
    assert less.rows[0].total < plain.rows[0].total and less.rows[0].fits and less.chosen
    with pytest.raises(InputError, match="needs memory="):
        estimated(llama, method="lora", device="cpu", budget="memory=1KiB")


def test_a_mistyped_field_is_answered_with_the_nearest(llama: str) -> None:
    with pytest.raises(InputError, match=r"'budgett' is no field of a run; did you mean 'budget'"):
        estimated(llama, method="lora", budgett="1%")


def test_a_budget_of_parameters_sets_the_size_of_lora(llama: str) -> None:
    found = estimated(llama, method="lora", budget="20%")
    assert 0.1 * found.parameters < found.rows[0].trained <= 0.2 * found.parameters
    assert any("lora_r" in sentence for sentence in found.chosen)


def test_padding_makes_a_mask_and_packing_none(llama: str) -> None:
    padded, packed = (estimated(llama, method="full", max_length=64, packing=packing) for packing in (False, True))
    assert padded.rows[0].total > packed.rows[0].total


def test_conditions_of_training_count(llama: str) -> None:
    plain = estimated(llama, method="full").rows[0]
    checked = estimated(llama, method="full", gradient_checkpointing=True).rows[0]
    eight = estimated(llama, method="full", optim="adamw_8bit").rows[0]
    several = estimated(llama, method="full", gradient_accumulation_steps=4, max_steps=10)
    assert checked.memory["activations"] < plain.memory["activations"] and checked.seconds > plain.seconds
    assert eight.memory["optimizer states"] < plain.memory["optimizer states"]
    assert several.steps == 10 and several.rows[0].seconds > 3 * plain.seconds
    four = estimated(llama, method="lora", load_in_4bit=True)
    assert four.rows[0].memory["weights, frozen"] < estimated(llama, method="lora").rows[0].memory["weights, frozen"]
    assert "cannot train a base held in 4 or 8 bits" in four.rows[1].error


def test_an_encoder_gets_a_new_head_and_images_have_no_length(tmp_path: Path) -> None:
    BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, architectures=["BertModel"],
    ).save_pretrained(tmp_path / "bert")  # fmt: skip
    found = estimated(str(tmp_path / "bert" / "config.json"), method="head", max_length=128)
    assert (found.task, found.length) == ("sequence_classification", 16)
    assert found.rows[0].head == 32 * 2 + 2 and found.rows[0].trained == 0
    ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
              patch_size=8).save_pretrained(tmp_path / "vit")  # fmt: skip
    found = estimated(str(tmp_path / "vit"), method="lora")
    assert (found.task, found.length) == ("image_classification", 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "h300"], "device 'h300' is no card that is known here"),
        (["--method", "lor"], "method 'lor' is unknown"),
        (["--method", "full", "--budget", "1%"], "the method full does not use it"),
        (["--format", "xml"], "--format 'xml' is unknown; write table or json."),
        (["--granularity", "head"], "how such units are spread is known after an analysis only"),
        (["--method", "bitfit", "--device", "t4"], "this model has none"),
        (["--optim", "galore_adamw", "--device", "t4"], "the states of optim 'galore_adamw' are not known"),
        (["--method", "shira", "--device", "t4"], "depends on numbers, and there are none; choose another method"),
    ],
)
def test_what_cannot_be_estimated_is_refused(llama: str, words: list[str], message: str) -> None:
    answer = call("estimate", "--model_name_or_path", llama, "--max_length", "16", *words)
    assert answer.code == 2
    assert message in " ".join(answer.err.split())


def test_a_model_that_is_not_there_is_refused() -> None:
    answer = call("estimate", "--model_name_or_path", "./nowhere")
    assert answer.code == 2 and "does not exist" in answer.err
    answer = call("estimate", "--method", "lora")
    assert answer.code == 2 and "--model_name_or_path is missing" in answer.err


def test_the_table_keeps_to_80_columns_and_json_is_read_again(llama: str) -> None:
    words = ("--model_name_or_path", llama, "--max_length", "16", "--device", "rtx4090", "--examples", "100")
    table = call("estimate", *words)
    assert table.code in (None, 0), table.err
    assert max(map(len, table.out.replace(llama, "").splitlines())) <= 90
    assert "the largest batch that fits is" in table.out and "seconds per step" in table.out
    values = json.loads(call("estimate", *words, "--format", "json").out)
    assert values["rows"][0]["total"] == sum(values["rows"][0]["memory"].values())


def test_cards_are_known_by_name_and_size() -> None:
    assert devices.card("H100-80GB").memory > 79 * 2**30
    assert devices.card("rtx4090") == devices.card("4090-24gb") == devices.CARDS["rtx4090-24gb"]
    assert devices.card("24GiB").memory == 24 * 2**30 and devices.card("24GB").memory == 24 * 10**9
    assert devices.calibration_of(devices.card("24GiB")) is None
    with pytest.raises(InputError, match="no size such as 24GiB"):
        devices.card("24 apples")


def test_rates_between_the_measured_ones_lie_on_a_line_of_logarithms() -> None:
    rates = [(10.0, 1.0), (1000.0, 100.0)]
    assert rate(rates, 1) == 1 and rate(rates, 10**6) == 100
    assert rate(rates, 100) == pytest.approx(10)


def test_a_calibration_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = Calibration("cpu", "a CPU", {"float32": [(1.0, 2.0)]}, {}, [(1.0, 2.0)], 1e-5)
    calls = []

    def measure(device: torch.device) -> Calibration:
        calls.append(device)
        return made

    monkeypatch.setattr(calibration, "measure", measure)
    first = calibration.calibrated(torch.device("cpu"))
    again = calibration.calibrated(torch.device("cpu"))
    assert len(calls) == 1 and first == made
    assert again.bandwidth == [[1.0, 2.0]] and again.per_operation == 1e-5


def test_tasks_own_defaults_are_known_without_their_packages() -> None:
    from reltune.runs.estimate import CLASSES, TASK_DEFAULTS
    from reltune.tasks.registry import TASKS

    assert set(CLASSES) == set(TASKS)
    size = "per_device_train_batch_size"
    own = {name: task.defaults[size] for name, task in TASKS.items() if size in task.defaults}
    assert own == {name: values[size] for name, values in TASK_DEFAULTS.items()}
