"""The four steps at BERT-base's true shape, with random weights made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from command_line import contents, reltune, review_rows, write_csv
from reltune.plan.plan import Plan
from tiny_models import tiny_tokenizer


@pytest.mark.slow
def test_one_full_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(
        tmp_path / "model"
    )  # BERT-base is the default: 12 layers, 768, 30,522 words
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_csv(tmp_path / "train.csv", review_rows(48))
    words = ["--model_name_or_path", tmp_path / "model", "--train_file", tmp_path / "train.csv", "--max_steps", 2]
    answer = reltune("run", *words, "--output_dir", tmp_path / "run")
    assert answer.code == 0, answer
    plan = Plan.load(tmp_path / "run" / "plan")
    assert plan.base_parameters == 109_482_240  # as published
    assert plan.budget_parameters == 547_411  # 0.5%
    assert plan.budget_parameters - 3072 < plan.parameters <= plan.budget_parameters  # no column is left that would fit
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["train_steps"] == 2
    assert results["trainable_parameters"] == plan.parameters
    assert results["adapter_bytes"] < 4_000_000
    answer = reltune("export", tmp_path / "run", "--to", "lora", "--output_dir", tmp_path / "lora")
    assert answer.code == 0, answer
    assert "adapter_model.safetensors" in contents(tmp_path / "lora")
