"""Batches whose samples ask for different adapters (PEFT's ``adapter_names``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from reltune.layers.inventory import take_inventory
from reltune.plan.plan import ModulePlan, Plan
from reltune.tuner import ReltuneConfig
from reltune.tuner.layer import ReltuneLayer

ASKED = ["other", "__base__", "default", "default", "other", "__base__"]


class Everything(nn.Module):
    """One layer of every type that can be trained, and a head that is saved whole."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 16)
        self.picture = nn.Conv2d(4, 6, 2, groups=2)
        self.mixed = Conv1D(5, 6)
        self.norm = nn.LayerNorm(5)
        self.plain = nn.Linear(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        pictures = self.words(tokens).unflatten(-1, (4, 4))  # (samples, 4 tokens as channels, 4, 4)
        h = torch.tanh(self.picture(pictures)).flatten(2).mT.contiguous()
        return self.head(torch.tanh(self.plain(self.norm(torch.tanh(self.mixed(h)))))).mean(1)


TOKENS = torch.randint(0, 9, (6, 4), generator=torch.Generator().manual_seed(0))
UNITS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {
        "words": {"columns": [1, 2], "rows": [3, 4]},
        "picture": {"columns": [0, 3], "rows": [5]},
        "mixed": {"columns": [2]},
        "norm": {"weight": True, "bias": True},
        "plain": {"rows": [1], "columns": [2], "bias": True},
    },
    "other": {"words": {"rows": [0, 8]}, "mixed": {"weight": True}, "plain": {"columns": [0, 4]}},
}


def _model() -> PeftModel:
    torch.manual_seed(0)
    base = Everything().double()
    inventory = take_inventory(base)
    configs = {}
    for name, chosen in UNITS.items():
        modules = {
            key: ModulePlan(inventory[key].shape, groups=inventory[key].groups, **units)
            for key, units in chosen.items()
        }
        plan = Plan(modules, "all", 9999, 9999, "", always_trained=["head"])
        configs[name] = ReltuneConfig(plan=plan, init_weights=False)
    model = get_peft_model(base, configs["default"])
    model.add_adapter("other", configs["other"])
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "modules_to_save.other" in key:
                p.add_(0.5)
    return model.eval()


def _alone(model: PeftModel, adapter: str, *args: Any, **kwargs: Any) -> Any:
    if adapter == "__base__":
        with model.disable_adapter():
            return model(*args, **kwargs)
    model.set_adapter(adapter)
    return model(*args, **kwargs)


@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("graph", [False, True], ids=["", "while a graph lives"])
def test_every_sample_gets_its_own_adapter(active: str, graph: bool) -> None:
    model = _model()
    with torch.no_grad():
        alone = {name: _alone(model, name, TOKENS) for name in ("__base__", "default", "other")}
    assert (alone["default"] - alone["other"]).abs().min() > 1e-4
    assert (alone["default"] - alone["__base__"]).abs().min() > 1e-4
    model.set_adapter(active)
    held = model(TOKENS) if graph else None
    for asked in (ASKED, ASKED[::-1], ["__base__"] * 6, ["other"] * 6):
        expected = torch.stack([alone[name][i] for i, name in enumerate(asked)])
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS, adapter_names=asked), expected, rtol=0, atol=1e-12)
        written = {m._written for m in model.modules() if isinstance(m, ReltuneLayer)}
        assert graph or written == {None}  # no adapter is favoured, and the base's samples cost nothing more
    del held
    with torch.no_grad():  # and nothing of it stays behind
        torch.testing.assert_close(model(TOKENS), alone[active], rtol=0, atol=1e-12)
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, ReltuneLayer))


def test_values_that_changed_while_a_graph_lives() -> None:
    model = _model()
    held = model(TOKENS)
    held.sum().backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "reltune" in name and "default" in name:
                p.mul_(1.5)
        found = model(TOKENS, adapter_names=["default"] * 6)
        torch.testing.assert_close(found, _alone(model, "default", TOKENS), rtol=0, atol=1e-12)
    del held


def test_gradients_reach_every_adapter_that_was_asked_for() -> None:
    model = _model()
    model.set_requires_grad(["default", "other"])
    asked = ["default"] * 3 + ["other"] * 3
    model(TOKENS, adapter_names=asked).square().sum().backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "reltune" in name}
    assert mixed
    for adapter, samples in (("default", slice(0, 3)), ("other", slice(3, 6))):
        model.zero_grad()
        model.set_adapter(adapter)
        model(TOKENS[samples]).square().sum().backward()
        for name, p in model.named_parameters():
            if "reltune" in name and name.endswith(adapter):
                torch.testing.assert_close(p.grad, mixed[name], rtol=0, atol=1e-12)


def test_what_cannot_be_asked_for() -> None:
    model = _model()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): missing"):
        model(TOKENS, adapter_names=["missing"] * 6)
    with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 6"):
        model(TOKENS, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(TOKENS, adapter_names=ASKED)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(TOKENS, adapter_names=ASKED)
    model.unmerge_adapter()
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, ReltuneLayer))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generation(kind: str, beams: int) -> None:
    torch.manual_seed(0)
    if kind == "llama":
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
        base: Any = LlamaForCausalLM(LlamaConfig(**sizes, **ends, intermediate_size=24, vocab_size=30))
        targets = ["q_proj", "down_proj"]
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 30}
        base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=29))
        targets = ["q", "wo"]
    model = get_peft_model(base.double(), ReltuneConfig(target_modules=targets, r=6, init_weights=False))
    model.add_adapter("other", ReltuneConfig(target_modules=targets[:1], r=9, init_weights=False))
    with torch.no_grad():
        for p in (p for name, p in model.named_parameters() if "reltune" in name):
            p.add_(torch.randn_like(p))
    model.eval()
    ids = torch.randint(2, 28, (3, 5), generator=torch.Generator().manual_seed(1))
    fields = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "min_new_tokens": 4}
    fields |= {"num_beams": beams, "do_sample": False}
    asked = ["other", "default", "__base__"]
    mixed = model.generate(**fields, adapter_names=asked)
    for i, name in enumerate(asked):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**fields)
        else:
            model.set_adapter(name)
            alone = model.generate(**fields)
        assert mixed[i].tolist() == alone[i].tolist()
