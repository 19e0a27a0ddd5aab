"""Adapters of embeddings, Conv1D and convolutions as LoRA adapters that plain PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from reltune.errors import InputError
from reltune.layers.quantised import keep_as_loaded
from reltune.plan.plan import ModulePlan, Plan
from reltune.runs import export
from reltune.runs.export import lora_summary, served, to_lora
from reltune.tuner import ReltuneConfig
from tiny_models import save_tiny_llama


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=2)
        self.mixed = Conv1D(8, 6)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mixed(self.words(tokens))))


class Picture(nn.Module):
    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))
        self.second = nn.Conv2d(6, 4, 1, bias=False)
        self.special = nn.Conv2d(4, 4, 2, **fields)

    def forward(self, x: Tensor) -> Tensor:
        return self.special(torch.tanh(self.second(torch.tanh(self.first(x)))))


TOKENS = torch.tensor([[1, 2, 7, 7], [0, 4, 2, 8]])
IMAGES = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
VECTORS = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
PLANS: dict[str, dict[str, ModulePlan]] = {
    "tokens": {"words": ModulePlan((9, 6), rows=[7, 2, 0])},
    "features": {"words": ModulePlan((9, 6), columns=[1, 5])},
    "tokens and features": {"words": ModulePlan((9, 6), columns=[1], rows=[8, 7])},
    "linear maps stored both ways": {
        "mixed": ModulePlan((8, 6), columns=[0, 5], rows=[7, 2]),
        "head": ModulePlan((3, 8), columns=[3]),
        "words": ModulePlan((9, 6), rows=[1]),
    },
    "directions": {
        "mixed": ModulePlan((8, 6), directions=[1, 0], columns=[3], vectors=VECTORS[:, :6].copy()),
        "head": ModulePlan((3, 8), directions=[2], vectors=VECTORS),
    },
    "channels": {"first": ModulePlan((6, 4, 3, 2), columns=[3, 1]), "second": ModulePlan((4, 6, 1, 1), columns=[5])},
    "filters": {"first": ModulePlan((6, 4, 3, 2), rows=[0, 5]), "special": ModulePlan((4, 4, 2, 2), rows=[2])},
    "channels and filters": {
        "first": ModulePlan((6, 4, 3, 2), columns=[2], rows=[4, 1]),
        "second": ModulePlan((4, 6, 1, 1), columns=[0, 1], rows=[3]),
    },
}
WORDS = ("words", "mixed")


def _base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (Words() if set(PLANS[name]) & set(WORDS) else Picture()).double().eval()


def _adapted(base: nn.Module, modules: dict[str, ModulePlan]) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, ReltuneConfig(plan=Plan(modules, "all", 9999, 9999, ""), init_weights=False)).eval()


@pytest.mark.parametrize("one_rank", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_plain_peft_computes_what_was_tuned(
    name: str, one_rank: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_check_not_larger", lambda *_: None)  # so small a base is smaller than any padding
    inputs = TOKENS if isinstance(_base(name), Words) else IMAGES
    model = _adapted(_base(name), PLANS[name])
    to_lora(model, tmp_path / "lora", one_rank=one_rank)
    if one_rank:
        config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
        assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["r"] == config["lora_alpha"]
        for key, factor in load_file(tmp_path / "lora" / "adapter_model.safetensors").items():
            assert factor.shape[0 if "_A" in key else 1] == config["r"]
        assert lora_summary(tmp_path / "lora").endswith(f"--max-lora-rank {served(config['r'])}")
    loaded = PeftModel.from_pretrained(_base(name), tmp_path / "lora", autocast_adapter_dtype=False).eval()
    assert sum(isinstance(m, LoraLayer) for m in loaded.modules()) == len(PLANS[name])
    with torch.no_grad():
        expected, unchanged = model(inputs), _base(name)(inputs)
        assert (expected - unchanged).abs().max() > 1e-3
        torch.testing.assert_close(loaded(inputs), expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(loaded.merge_and_unload()(inputs), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fields", [{"groups": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}])
def test_convolutions_that_lora_cannot_follow_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    groups = fields.get("groups", 1)
    plan = {"special": ModulePlan((4, 4 // groups, 2, 2), rows=[1], groups=groups)}
    with pytest.raises(InputError, match=r"special cannot .* a convolution with groups, dilation .*--to merged"):
        to_lora(_adapted(Picture(**fields), plan), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits(bits: int, along: bool, tmp_path: Path) -> None:
    """Against plain PEFT on the same base."""
    save_tiny_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)
    held = BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True, **({"bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {})}
    )
    tokens = torch.tensor([[7, 8, 9, 10, 11]])

    def base() -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=held, dtype=torch.float32)
        keep_as_loaded(model)
        return model

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.train()(
                tokens
            ).logits  # in evaluation bitsandbytes rounds the inputs of 8-bit products on a CPU

    name = "model.layers.0.mlp.down_proj"
    units: dict[str, Any] = {"columns": [5, 100], "rows": [63, 2]}
    if along:
        units = {"directions": [1, 0], "vectors": np.random.default_rng(0).normal(size=(2, 128)).astype(np.float32)}
    model = _adapted(base(), {name: ModulePlan((64, 128), **units)})
    expected = logits(model)
    assert (expected - logits(base())).abs().max() > 1e-3
    to_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "lora", autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)


def test_a_padded_file_larger_than_the_base_is_refused(tmp_path: Path) -> None:
    plan = {"words": ModulePlan((9, 6), rows=[1]), "mixed": ModulePlan((8, 6), columns=[0, 1, 2, 3, 4], rows=[0])}
    with pytest.raises(InputError, match=r"padded to one rank of 6, .* more than the base model's"):
        to_lora(_adapted(_base("tokens"), plan), tmp_path / "new", one_rank=True)
    assert not (tmp_path / "new").exists()


def test_the_rank_that_a_server_is_started_with() -> None:
    assert [served(rank) for rank in (1, 8, 9, 16, 257, 600)] == [8, 8, 16, 16, 320, 600]
