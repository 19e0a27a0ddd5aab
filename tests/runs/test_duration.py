"""The hours of a whole run: analysis, training with and without kept states of frozen layers, evaluation with what is written."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, T5Config

from reltune.config.run_config import RunConfig
from reltune.cost.timing import step_time
from reltune.errors import InputError
from reltune.plan.plan import ModulePlan, Plan
from reltune.runs.duration import course
from reltune.runs.estimate import Row, Subject, beside, place_of
from reltune.runs.forecast import forecast
from reltune.runs.sizes import Sizes

LAYERS, BATCH, TRAIN, HELD_OUT = 6, 8, 200, 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, architectures=["LlamaForCausalLM"],
    ).save_pretrained(place / "llama")  # fmt: skip
    BertConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=LAYERS, num_attention_heads=4,
        architectures=["BertModel"],
    ).save_pretrained(place / "bert")  # fmt: skip
    T5Config(
        vocab_size=256, d_model=64, d_ff=160, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0
    ).save_pretrained(place / "t5")  # fmt: skip
    return place


def row(models: Path, model: str = "llama", plan: Plan | None = None, **fields: Any) -> Row:
    """Of one method alone on an H100."""
    sizes = Sizes.of(fields.pop("examples", TRAIN), fields.pop("eval_examples", HELD_OUT))
    own = {name: value for name, value in fields.items() if name in RunConfig.__dataclass_fields__}
    training = {name: value for name, value in fields.items() if name not in own}
    training = {"per_device_train_batch_size": BATCH, "num_train_epochs": 3.0, **training}
    config = RunConfig(str(models / model), ".", training=training, **{"max_length": 64, **own})
    place, calibration = place_of("h100-80gb")
    place = dataclasses.replace(place, memory=0)
    subject = Subject(config, plan, cuda=True, sizes=sizes)
    return beside(subject, place, calibration, others=(), analysed=plan is not None).rows[0]


def hours(models: Path, model: str = "llama", **fields: Any) -> dict[str, float]:
    return dict(row(models, model, **fields).hours_by_part)


def test_training_takes_its_steps_and_evaluation_its_forward_passes(models: Path) -> None:
    config = RunConfig(str(models / "bert"), ".", method="lora", max_length=64)
    config.training = {"per_device_train_batch_size": BATCH, "num_train_epochs": 2.0}
    _, calibration = place_of("h100-80gb")
    assert calibration is not None
    subject = Subject(config, None, cuda=True, sizes=Sizes(TRAIN, 30, 10))
    count = subject.counted("lora")
    found = course(subject, "lora", calibration, analysed=True)
    steps = 2 * math.ceil(TRAIN / BATCH)
    assert set(found.parts) == {"training", "evaluation"}
    assert found.parts["training"] == pytest.approx(steps * subject.seconds(count, calibration))
    # After each of two epochs the validation data; before training and after it all that is held out.
    read = 2 * 30 + 2 * (30 + 10)
    assert found.parts["evaluation"] == pytest.approx(read / BATCH * step_time(count, calibration).forward)


def test_what_is_evaluated_and_how_often(models: Path) -> None:
    each = hours(models, method="lora", eval_strategy="epoch", num_train_epochs=2)
    never = hours(models, method="lora", eval_strategy="no", num_train_epochs=2)
    assert each["training"] == never["training"]
    assert each["evaluation"] == pytest.approx((2 * 20 + 2 * 40) / (2 * 40) * never["evaluation"])
    every = hours(models, method="lora", eval_strategy="steps", eval_steps=5, num_train_epochs=2)
    assert every["evaluation"] == pytest.approx((10 * 20 + 2 * 40) / (2 * 40) * never["evaluation"])
    none = row(models, method="lora", eval_examples=0)
    assert set(none.hours_by_part) == {"training"} and none.hours == none.hours_by_part["training"]
    assert none.seconds is not None and none.hours == pytest.approx(none.seconds * 75 / 3600)


def test_as_many_are_held_out_as_a_run_splits_off(models: Path) -> None:
    given, split_off = (hours(models, method="lora", examples=700, eval_examples=n) for n in (300, None))
    assert given == split_off


def test_what_is_written_grows_with_its_tokens(models: Path) -> None:
    few, many = (hours(models, method="lora", max_new_tokens=n) for n in (10, 30))
    assert many["writing"] == pytest.approx(3 * few["writing"]) and many["evaluation"] == few["evaluation"]
    assert "writing" not in hours(models, "bert", method="lora")
    # A decoder writes before and after training; an encoder-decoder in every evaluation.
    # In batches of 64: one for each of 2 held-out sets before training and after it, and one for validation after each epoch.
    of_t5 = [hours(models, "t5", method="lora", num_train_epochs=n)["writing"] for n in (1, 2)]
    assert of_t5[1] == pytest.approx(6 / 5 * of_t5[0])
    of_llama = [hours(models, method="lora", num_train_epochs=n)["writing"] for n in (1, 2)]
    assert of_llama[0] == of_llama[1]


def test_the_analysis_is_there_where_a_run_makes_one(models: Path) -> None:
    probe = {n: row(models, method="weights", probe_steps=n) for n in (50, 100)}
    assert probe[100].hours_by_part["analysis"] == pytest.approx(2 * probe[50].hours_by_part["analysis"])
    full = row(models, method="full")
    assert full.seconds is not None
    step = probe[100].hours_by_part["analysis"] * 3600 / 100 / 32 * BATCH  # of as many examples as a training step has
    assert 0.5 * full.seconds < step < 1.5 * full.seconds
    assert "analysis" not in hours(models, method="lora")
    assert "analysis" not in hours(models, method="weights", criteria=["magnitude"])
    plan = Plan({"model.layers.5.mlp.down_proj": ModulePlan((64, 160), columns=[1])}, "64", 64, 10**6, "")
    assert "analysis" not in hours(models, method="columns", plan=plan)
    fisher = [hours(models, method="columns", analysis_examples=n)["analysis"] for n in (50, 100, 10**6)]
    assert fisher[1] == pytest.approx(2 * fisher[0]) and fisher[2] == pytest.approx(4 * fisher[0])  # there are 200
    tried = row(models, method="columns", criteria=["ablation"])
    assert "analysis" not in tried.hours_by_part and tried.left_out == "the analysis by ablation"


TOP = {"method": "layers", "target_modules": ["layers.4", "layers.5"]}


def test_frozen_layers_are_computed_once(models: Path) -> None:
    on, off = (row(models, **TOP, cache_frozen_prefix=mode) for mode in ("on", "off"))
    assert on.prefix is not None and off.prefix is not None
    assert (on.prefix.layers, on.prefix.of, on.prefix.bytes) == (4, LAYERS, TRAIN * 64 * 64 * 4)
    assert on.prefix.kept and not off.prefix.kept
    assert on.seconds is not None and off.hours_by_part["training"] == pytest.approx(on.seconds * 75 / 3600)
    later = 50 * on.prefix.seconds / 3600  # the second and the third pass
    assert on.hours_by_part["training"] == pytest.approx(25 * on.seconds / 3600 + later, rel=0.2)
    assert on.hours_by_part["training"] >= 25 * on.seconds / 3600 + later  # and what it takes to write
    assert on.prefix.median == on.prefix.seconds < on.seconds and off.prefix.median is None  # two passes of three
    once = row(models, **TOP, cache_frozen_prefix="on", num_train_epochs=1.0)
    assert once.prefix is not None and once.prefix.median is not None and once.prefix.median >= on.seconds


def test_a_step_is_predicted_as_most_steps_are(models: Path) -> None:
    """Training measures the median of its steps, of which most begin above the frozen layers."""
    training = {"per_device_train_batch_size": BATCH, "num_train_epochs": 3.0}
    config = RunConfig(str(models / "llama"), ".", training=training, max_length=64, **TOP, cache_frozen_prefix="on")
    found = forecast(config, device="h100-80gb", sizes=Sizes.of(TRAIN, HELD_OUT))
    first, prefix = found.estimate.rows[0].seconds, found.estimate.rows[0].prefix
    assert (
        prefix is not None and first is not None and found.prediction("")["seconds_per_step"] == prefix.seconds < first
    )


def test_the_time_saved_is_that_of_the_frozen_layers(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reltune.runs.duration.FINDING", 0.0)
    monkeypatch.setattr("reltune.runs.duration.READING", math.inf)
    saved = {}
    for lowest in (2, 4):
        chosen = [f"layers.{i}" for i in range(lowest, LAYERS)]
        found = row(models, method="layers", target_modules=chosen)
        assert found.prefix is not None and found.prefix.layers == lowest and found.seconds is not None
        saved[lowest] = found.seconds - found.prefix.seconds
    assert saved[4] == pytest.approx(2 * saved[2], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "fields", "why"),
    [
        ("llama", {"max_steps": 20}, "there is no second pass over the data"),
        ("llama", {"cache_size": "1MB"}, "--cache_size is 1MB"),
        ("bert", {"target_modules": ["layer.4", "layer.5"]}, "the frozen layers have dropout"),
    ],
)
def test_auto_says_why_it_keeps_nothing(
    models: Path, model: str, fields: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reltune.runs.duration.FINDING", 0.0)
    found = row(models, model, **{**TOP, **fields})
    assert found.prefix is not None and not found.prefix.kept and found.prefix.why.startswith(why)
    assert found.seconds is not None
    steps = fields.get("max_steps", 75)
    assert found.hours_by_part["training"] == pytest.approx(found.seconds * steps / 3600)


def test_it_does_not_pay_where_reading_takes_as_long_as_computing(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reltune.runs.duration.FINDING", 1.0)
    found = row(models, **TOP)
    assert found.prefix is not None and found.prefix.pays is False and not found.prefix.kept
    monkeypatch.setattr("reltune.runs.duration.FINDING", 0.0)
    found = row(models, **TOP)
    assert found.prefix is not None and found.prefix.pays and found.prefix.kept


def test_nothing_is_said_where_nothing_is_frozen_or_inputs_change(models: Path) -> None:
    assert row(models, method="full").prefix is None
    assert row(models, **TOP, packing=True).prefix is None
    assert row(models, "bert", method="layers", target_modules=["layer.5"]).prefix is not None
    # Recorded steps begin at the lowest layer.
    assert row(models, "bert", method="layers", target_modules=["layer.5"], cuda_graphs=True).prefix is None


def test_what_cannot_be_recorded_is_not_told(models: Path) -> None:
    for model, fields in (("llama", {}), ("bert", {"gradient_checkpointing": True})):
        with pytest.raises(InputError, match="cannot be recorded"):
            row(models, model, method="full", cuda_graphs=True, **fields)
    with pytest.raises(InputError, match="this is a CPU"):
        Subject(RunConfig(str(models / "bert"), ".", method="full", max_length=64, cuda_graphs=True), None, cuda=False)
    # Nor does a budget turn to it.
    config = RunConfig(str(models / "bert"), ".", method="full", max_length=64, budget="memory=1MiB", cuda_graphs=True)
    with pytest.raises(InputError) as refused:
        forecast(config, device="h100-80gb")
    assert "gradient_checkpointing" not in str(refused.value)


def test_a_budget_of_hours_is_of_the_whole_run(models: Path) -> None:
    def foretold(hours: float) -> Row:
        config = RunConfig(str(models / "bert"), ".", method="full", max_length=64, budget=f"hours={hours:.7f}")
        config.training = {"per_device_train_batch_size": BATCH}
        return forecast(config, sizes=Sizes(TRAIN, 30, 10), device="h100-80gb", with_others=False).estimate.rows[0]

    with pytest.raises(InputError, match="needs hours=") as refused:
        foretold(1e-6)
    (least,) = re.findall(r"needs hours=([\d.]+)", str(refused.value))
    found = foretold(float(least))
    assert found.hours is not None and found.hours <= float(least) < found.hours + 1.1e-5
    assert set(found.hours_by_part) == {"training", "evaluation"}
