"""Exported models hold what was tuned, for programs in which reltune cannot be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from command_line import assert_refused, contents, reltune, review_rows, write_csv
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.plan.plan import ModulePlan, Plan
from reltune.runs import stages
from reltune.runs.directory import RunDirectory
from reltune.runs.export import lora_summary, to_lora, to_merged
from reltune.runs.materials import prepare
from reltune.tuner import ReltuneConfig
from tiny_models import save_tiny_bert

TEXTS = ["good film", "bad book very dull", "not great 电影", "fine"]
QUERY, VALUE = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.value"
UP, DOWN = "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.output.dense"
VECTORS = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
PLANS = {
    "columns": {QUERY: ModulePlan((32, 32), columns=[0, 7, 31]), UP: ModulePlan((64, 32), columns=[5])},
    "rows": {VALUE: ModulePlan((32, 32), rows=[3, 4]), UP: ModulePlan((64, 32), rows=[63])},
    # cells (row, column) that lie in both: 2 of QUERY and 4 of DOWN
    "both": {
        QUERY: ModulePlan((32, 32), columns=[1, 2], rows=[30]),
        DOWN: ModulePlan((32, 64), columns=[0, 63], rows=[0, 31]),
        VALUE: ModulePlan((32, 32), rows=[9]),
    },
    "elements": {
        UP: ModulePlan((64, 32), elements=list(range(0, 2048, 10))),
        DOWN: ModulePlan((32, 64), columns=[1], elements=[0, 63, 2047]),
    },
    "along": {
        QUERY: ModulePlan((32, 32), directions=[0, 2], vectors=VECTORS[:, :32].copy()),
        DOWN: ModulePlan((32, 64), columns=[5], directions=[1], vectors=VECTORS),
    },
    "whole": {UP: ModulePlan((64, 32), weight=True, bias=True), QUERY: ModulePlan((32, 32), columns=[4], bias=True)},
}
LORA = ("columns", "rows", "both", "along")  # plans that a LoRA adapter can carry

READER = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "reltune":
            raise ImportError("reltune is not here")

sys.meta_path.insert(0, Block())
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base, exports, texts, out = json.loads(sys.argv[1])
logits = {}
for name, (form, path) in exports.items():
    if form == "lora":
        torch.manual_seed(len(name))  # the base's own head is random, and must not matter
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        model = PeftModel.from_pretrained(model, path)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        logits[name] = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
assert not any(name.partition(".")[0] == "reltune" for name in sys.modules)
save_file(logits, out)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and for every plan a run whose adapter was then moved far from the base."""
    place = tmp_path_factory.mktemp("place")
    save_tiny_bert(place / "model")
    write_csv(place / "train.csv", review_rows(60))
    words = [
        "run",
        "--model_name_or_path",
        place / "model",
        "--train_file",
        place / "train.csv",
        "--granularity",
        "column",
        "--budget",
        "30%",
    ]
    assert reltune(*words, "--output_dir", place / "first", "--max_steps", 1).code == 0
    for name, modules in PLANS.items():
        run = place / name
        shutil.copytree(place / "first", run)
        plan = Plan.load(run / "plan")
        plan.modules = modules
        plan.save(run / "plan")
        assert reltune("tune", run, "--overwrite_output_dir").code == 0
        path = run / "adapter" / "adapter_model.safetensors"
        torch.manual_seed(1)
        tensors = load_file(path)
        for key, value in tensors.items():
            if value.is_floating_point():
                value += (0.5 if "classifier" in key else 5) * torch.randn_like(value)
        save_file(tensors, path)
    return place


def tuned_model(run: Path) -> PeftModel:
    return stages.load_tuned(prepare(RunConfig.load(run / "config.yaml")), RunDirectory(run)).eval()


def logits(model: Any, texts: Sequence[str], tokenizer_of: Path) -> torch.Tensor:
    batch = AutoTokenizer.from_pretrained(tokenizer_of)(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits


@pytest.fixture(scope="module")
def foreign_logits(place: Path) -> dict[str, torch.Tensor]:
    """Logits of every export, in a process that cannot import reltune."""
    exports = {}
    for name in PLANS:
        for form in ("lora", "merged") if name in LORA else ("merged",):
            path = place / f"{name}_{form}"
            answer = reltune("export", place / name, "--to", form, "--output_dir", path)
            assert answer.code == 0 and answer.out.startswith(f"Exported to {path}"), answer
            exports[path.name] = (form, str(path))
    arguments = json.dumps([str(place / "model"), exports, TEXTS, str(place / "logits.safetensors")])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, arguments],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return load_file(place / "logits.safetensors")


@pytest.mark.parametrize("name", PLANS)
def test_exports_give_the_logits_that_were_tuned(
    place: Path, foreign_logits: dict[str, torch.Tensor], name: str
) -> None:
    model = tuned_model(place / name)
    tuned = logits(model, TEXTS, place / "model")
    # without the columns and rows, but with the trained head, so that it is they that are seen here
    base = model.base_model.model
    with model.disable_adapter():
        hidden = base.bert(**AutoTokenizer.from_pretrained(place / "model")(TEXTS, padding=True, return_tensors="pt"))
    unmoved = base.classifier(hidden.pooler_output)
    assert (tuned - unmoved).abs().max() >= 0.1
    for form in ("lora", "merged") if name in LORA else ("merged",):
        assert (foreign_logits[f"{name}_{form}"] - tuned).abs().max() <= 1e-5


@pytest.mark.parametrize("name", LORA)
def test_lora_adapters_hold_what_peft_expects(place: Path, foreign_logits: dict[str, torch.Tensor], name: str) -> None:
    config = json.loads((place / f"{name}_lora" / "adapter_config.json").read_text())
    ranks = {module: plan.indices for module, plan in PLANS[name].items()}
    assert (config["peft_type"], config["task_type"]) == ("LORA", "SEQ_CLS")
    assert config["rank_pattern"] == config["alpha_pattern"] == ranks
    assert set(config["target_modules"]) == set(ranks)
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == str(place / "model")
    assert "reltune" not in json.dumps(config).lower().replace(str(place).lower(), "")
    tensors = load_file(place / f"{name}_lora" / "adapter_model.safetensors")
    for module, rank in ranks.items():
        out_features, in_features = PLANS[name][module].shape
        assert tensors[f"base_model.model.{module}.lora_A.weight"].shape == (rank, in_features)
        assert tensors[f"base_model.model.{module}.lora_B.weight"].shape == (out_features, rank)
    assert len(tensors) == 2 * len(ranks) + 2
    lowest, highest = min(ranks.values()), max(ranks.values())
    summary = f"{len(ranks)} modules, ranks {lowest} to {highest} (rank_pattern)"
    assert lora_summary(place / f"{name}_lora") == summary


def test_merged_models_are_complete(place: Path, foreign_logits: dict[str, torch.Tensor]) -> None:
    merged = place / "both_merged"
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "neg", "1": "pos"}
    assert not list(merged.glob("adapter*"))
    ids = [AutoTokenizer.from_pretrained(path)(TEXTS)["input_ids"] for path in (merged, place / "model")]
    assert ids[0] == ids[1]
    names = set(load_file(merged / "model.safetensors"))
    plain = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=2)
    assert names == set(plain.state_dict()) - {"bert.embeddings.position_ids"}


def test_a_lora_adapter_cannot_carry_whole_tensors(place: Path, tmp_path: Path) -> None:
    answer = reltune("export", place / "whole", "--to", "lora", "--output_dir", tmp_path / "new")
    assert answer.code == 2
    assert "--to merged" in answer.err and QUERY in answer.err
    answer = reltune("export", place / "elements", "--to", "lora", "--output_dir", tmp_path / "new")
    assert answer.code == 2
    assert f"trains in {UP} and 1 more cannot" in answer.err and "single weights" in answer.err
    assert "--to merged" in answer.err
    assert not (tmp_path / "new").exists()
    norm = "bert.encoder.layer.0.output.LayerNorm"
    for modules in (
        {norm: ModulePlan((32,), weight=True)},
        {QUERY: ModulePlan((32, 32), bias=True)},
        {QUERY: ModulePlan((32, 32), weight=True)},
        {QUERY: ModulePlan((32, 32), columns=[1]), norm: ModulePlan((32,), bias=True)},
    ):
        with pytest.raises(InputError, match="--to merged"):
            to_lora(adapted(place / "model", modules), tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_vllm_is_offered_what_it_takes(place: Path, tmp_path: Path) -> None:
    for words, told in (
        (
            ("--to", "lora", "--for", "vllm"),
            "vLLM serves no adapter that saves modules whole, and this one saves classifier",
        ),
        (("--to", "merged", "--for", "vllm"), "--for vllm is about LoRA adapters"),
        (("--to", "lora", "--for", "tgi"), "--for 'tgi' is unknown"),
    ):
        assert_refused(reltune("export", place / "along", *words, "--output_dir", tmp_path / "new"), told)
        assert not (tmp_path / "new").exists()


def test_directories_in_use_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for form in ("lora", "merged"):
        for target in (tmp_path / "used", tmp_path / "used" / "notes.txt", place / "columns"):
            answer = reltune("export", place / "columns", "--to", form, "--output_dir", target)
            assert answer.code == 2 and str(target) in answer.err
    assert contents(tmp_path) == before


def test_exporting_leaves_the_run_alone(place: Path, tmp_path: Path) -> None:
    before = contents(place / "both")
    (tmp_path / "empty").mkdir()
    assert reltune("export", place / "both", "--to", "merged", "--output_dir", tmp_path / "empty").code == 0
    assert contents(place / "both") == before


def adapted(path: Path, modules: dict[str, ModulePlan], dtype: torch.dtype = torch.float32) -> PeftModel:
    """The model with a new adapter, moved away from the base at random."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=dtype)
    plan = Plan(modules, "100%", 20864, 20864, "", always_trained=["classifier"], task_type="SEQ_CLS")
    model = get_peft_model(model, ReltuneConfig(plan=plan))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_bfloat16_bases_merge_as_peft_merges_them(place: Path, tmp_path: Path) -> None:
    """The trained values are float32; each way rounds them to bfloat16 once or twice, half a unit in the last place each."""
    model = adapted(place / "model", PLANS["both"], torch.bfloat16)
    assert model.base_model.model.get_submodule(QUERY).reltune_columns["default"].dtype == torch.float32
    to_lora(model, tmp_path / "lora")
    base = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=2, dtype=torch.bfloat16)
    original = {name: base.get_submodule(name).weight.detach().clone() for name in PLANS["both"]}
    by_peft = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    to_merged(model, tokenizer, tmp_path / "merged")
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert ours.dtype == torch.bfloat16
    for name, plan in PLANS["both"].items():
        a, b = (m.get_submodule(name).weight.detach().float() for m in (ours, by_peft))
        chosen = torch.zeros(plan.shape, dtype=torch.bool)
        chosen[:, plan.columns] = True
        chosen[plan.rows] = True
        assert torch.equal(a[~chosen], original[name].float()[~chosen])
        assert torch.equal(b[~chosen], original[name].float()[~chosen])
        assert (a - original[name].float())[chosen].abs().max() > 0.1
        # the delta is rounded at its own size, which may be the larger
        scale = torch.maximum(torch.maximum(a.abs(), b.abs()), (a - original[name].float()).abs())[chosen]
        assert ((a - b)[chosen].abs() <= scale * 2**-7).all()
    difference = logits(ours, TEXTS, place / "model") - logits(by_peft, TEXTS, place / "model")
    assert difference.abs().max() <= 0.02
