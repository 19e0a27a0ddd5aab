"""What reltune 0.1 wrote is read by the code of today, and says the same (tests/artefacts/v0_1/README.md)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from command_line import reltune
from reltune import Plan, RelevanceScores
from reltune.config.run_config import RunConfig

ARTEFACTS = Path(__file__).parent / "artefacts" / "v0_1"
EXPECTED = json.loads((ARTEFACTS / "expected.json").read_text(encoding="utf-8"))
RUNS = ("columns", "elements", "language")
TOKEN_IDS = torch.tensor([[2, 4, 6, 9, 3], [2, 5, 7, 10, 3], [2, 8, 4, 11, 3]])
# Sums over some dozens of float32 values of which each is right to 6e-8, in another order of summation.
NEARLY = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the artefacts as the current directory: their configs name model and data relative to it."""
    shutil.copytree(ARTEFACTS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def base_model(run: str) -> Any:
    """The model that the run began with, its new head included."""
    if run == "language":
        return AutoModelForCausalLM.from_pretrained("llama")
    model = AutoModelForSequenceClassification.from_pretrained("bert")
    model.load_state_dict(load_file(f"{run}/relevance/head.safetensors"), strict=False)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKEN_IDS).logits


def assert_near(found: torch.Tensor, wanted: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted), **NEARLY)


def assert_scores(relevance: RelevanceScores, wanted: dict[str, Any]) -> None:
    """The sum of each name's units and the first three of them."""
    assert relevance.criteria == list(wanted)
    for criterion, by_granularity in wanted.items():
        for granularity, by_name in by_granularity.items():
            found = relevance.by(granularity, criterion)
            assert found.keys() == by_name.keys()
            for name, (total, *first) in by_name.items():
                values = found[name].double().reshape(-1)
                assert values.sum().item() == pytest.approx(total, rel=1e-5, abs=1e-12), (criterion, granularity, name)
                assert values[:3].tolist() == pytest.approx(first, rel=1e-5, abs=1e-12), (criterion, granularity, name)


@pytest.mark.parametrize("run", [*RUNS, "interrupted"])
def test_a_config_keeps_every_field(run: str) -> None:
    """Read and written again, it has all fields and values that it had; new ones may have joined them."""
    old = yaml.safe_load(Path(run, "config.yaml").read_text(encoding="utf-8"))
    RunConfig.load(Path(run, "config.yaml")).save("again.yaml")
    new = yaml.safe_load(Path("again.yaml").read_text(encoding="utf-8"))
    assert {name: new.get(name) for name in old} == old


@pytest.mark.parametrize("run", RUNS)
def test_relevance_has_the_numbers_that_were_read_from_it(run: str) -> None:
    assert_scores(RelevanceScores.load(Path(run, "relevance")), EXPECTED[run]["relevance"])


def test_relevance_keeps_its_intervals() -> None:
    relevance = RelevanceScores.load("columns/relevance")
    ends = relevance.interval("head", "correlation")
    scores = relevance.by("head", "correlation")
    assert ends.keys() == scores.keys() and len(ends) == 2
    for name, (low, high) in ends.items():
        assert (low <= scores[name]).all() and (scores[name] <= high).all() and (low < high).any()


@pytest.mark.parametrize("run", RUNS)
def test_selection_on_it_gives_the_plan_that_it_gave(run: str) -> None:
    wanted = Plan.load(Path(run, "plan"))
    assert reltune("select", run, "--overwrite_output_dir").code == 0
    assert Plan.load(Path(run, "plan")) == wanted


def test_a_plan_reads_its_indices_from_the_file_beside_it() -> None:
    beside = load_file("elements/plan/indices.safetensors")
    plan = Plan.load("elements/plan")
    chosen = {f"{name}/elements": list(module.elements) for name, module in plan.modules.items() if module.elements}
    assert chosen == {name: values.tolist() for name, values in beside.items()}
    assert sum(map(len, chosen.values())) > 100 and any(module.bias for module in plan.modules.values())


@pytest.mark.parametrize("run", RUNS)
def test_an_adapter_gives_the_logits_that_it_gave(run: str) -> None:
    model = PeftModel.from_pretrained(base_model(run), f"{run}/adapter")
    assert_near(logits(model), EXPECTED[run]["tuned_logits"])
    with model.disable_adapter():
        assert_near(logits(model), EXPECTED[run]["base_logits"])


@pytest.mark.parametrize("run", RUNS)
def test_evaluation_measures_what_it_measured(run: str) -> None:
    results = Path(run, "all_results.json")
    old = json.loads(results.read_text(encoding="utf-8"))
    texts = Path(run, "outputs.jsonl").read_text(encoding="utf-8") if run == "language" else None
    assert reltune("evaluate", run).code == 0
    new = json.loads(results.read_text(encoding="utf-8"))
    assert new.keys() >= old.keys()
    assert new == {**new, **{name: pytest.approx(value, rel=1e-5) for name, value in old.items()}}
    if texts is not None:
        assert Path(run, "outputs.jsonl").read_text(encoding="utf-8") == texts


@pytest.mark.parametrize(
    ("run", "shown"),
    [
        ("columns", ("movement", "full fine-tuning")),
        ("elements", ("taylor", "learning_rate")),
        ("language", ("fisher", "bad bad bad")),
    ],
)
def test_a_report_is_drawn_of_it(run: str, shown: tuple[str, ...]) -> None:
    """With every criterion, the baselines of a comparison, the trials of a sweep, and what a language model wrote."""
    assert reltune("report", run).code == 0
    page = Path(run, "report.html").read_text(encoding="utf-8")
    assert all(words in page for words in shown)


def test_the_exported_lora_is_the_one_that_was_exported() -> None:
    assert reltune("export", "language", "--to", "lora", "--output_dir", "lora").code == 0
    old, new = (load_file(f"{place}/adapter_model.safetensors") for place in ("language_lora", "lora"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    for place in ("language_lora", "lora"):
        model = PeftModel.from_pretrained(base_model("language"), place)
        assert_near(logits(model), EXPECTED["language"]["tuned_logits"])


def test_the_merged_model_gives_the_logits_of_its_adapter() -> None:
    assert reltune("export", "elements", "--to", "merged", "--output_dir", "merged").code == 0
    model = AutoModelForSequenceClassification.from_pretrained("merged")
    assert_near(logits(model), EXPECTED["elements"]["tuned_logits"])


def test_training_goes_on_from_its_checkpoint() -> None:
    """To the adapter that training without an interruption ended with."""
    wanted = load_file("columns/adapter/adapter_model.safetensors")
    answer = reltune("tune", "columns", "--overwrite_output_dir", "--resume_from_checkpoint", "checkpoint-12")
    assert answer.code == 0, answer
    found = load_file("columns/adapter/adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # AdamW divides by the root of squared gradients: where these are near zero, a last digit moves a weight further.
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_an_interrupted_analysis_goes_on() -> None:
    flags = ["--model_name_or_path", "bert", "--train_file", "reviews.csv", "--head_epochs", 4]
    flags += ["--criteria", "fisher", "--probe_steps", 50, "--max_trials", 400]  # the defaults of that time
    answer = reltune("analyze", *flags, "--output_dir", "interrupted", "--analysis_batch_size", 8)
    assert answer.code == 0 and "Going on with the interrupted analysis" in answer.out, answer
    assert_scores(RelevanceScores.load("interrupted/relevance"), EXPECTED["interrupted"]["relevance"])
