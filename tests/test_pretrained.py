"""Checkpoints that do not hold what they seem to hold: said, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from reltune.errors import InputError
from reltune.files import model_directory_problem
from reltune.notes import collecting
from reltune.tasks.causal_lm import CausalLM
from tiny_models import save_tiny_llama


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "llama")
    return tmp_path / "llama"


def change_config(path: Path, **values: Any) -> None:
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def test_weights_that_are_missing_are_said_and_learned(llama: Path) -> None:
    change_config(llama, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    with collecting() as notes:
        _, missing = CausalLM().load_model(llama)
    assert len(missing) == 6 and all(name.endswith("_proj.bias") for name in missing)
    assert len(notes) == 1 and f"no values for {missing[0]} and 5 more of a 'qwen2' model" in notes[0]


def test_weights_without_a_place_are_said(llama: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.bias"
    weights = load_file(llama / "model.safetensors")
    save_file({**weights, name: torch.zeros(16)}, llama / "model.safetensors", {"format": "pt"})
    with collecting() as notes:
        CausalLM().load_model(llama)
    assert len(notes) == 1 and f"has {name}, for which a 'llama' model has no place" in notes[0]


def test_a_sharded_checkpoint(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    (llama / "model.safetensors").unlink()
    model.save_pretrained(llama, max_shard_size="10KB")
    found, _ = CausalLM().load_model(llama)
    assert all(torch.equal(found.get_parameter(name), value) for name, value in model.named_parameters())
    min(llama.glob("model-*.safetensors")).unlink()
    with pytest.raises(InputError, match="cannot be found or read"):
        CausalLM().load_model(llama)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_a_base_that_is_saved_in_few_bits_stays_as_it_is(llama: Path, flag: str) -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=nf4).save_pretrained(llama)
    with collecting() as notes:
        model, _ = CausalLM().load_model(llama, quantization_config=BitsAndBytesConfig(**{flag: True}))
    assert len(notes) == 1 and "saved in few bits already" in notes[0]
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "Linear4bit"


def test_packages_that_a_checkpoint_needs(llama: Path) -> None:
    change_config(llama, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(InputError, match="without another package"):
        CausalLM().load_model(llama)


def test_paths(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    assert "merge the two" in str(model_directory_problem(str(llama)))
    folder = llama.parent / "files"
    folder.mkdir()
    (folder / "model.Q4.gguf").touch()
    (folder / "MODEL.GGUF").touch()
    assert f"such as {folder / 'MODEL.GGUF'}" in str(model_directory_problem(str(folder)))
    assert model_directory_problem(str(folder / "model.Q4.gguf")) is None
    assert "rename it" in str(model_directory_problem(str(folder / "MODEL.GGUF")))
    for name in (str(folder / "modle.gguf"), "modle.gguf"):
        assert f"The model file {name} does not exist" in str(model_directory_problem(name))
