"""LoRA placed and ranked by a plan, through PEFT's own config."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import reltune
from measured_models import tiny_bert
from relevance_cases import data_for, measure
from reltune.errors import InputError
from reltune.plan.lora import rank
from reltune.plan.plan import ModulePlan, Plan


def ranks(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scaling of every LoRA in the model, counted from its tensors."""
    return {
        name.removeprefix("base_model.model."): (module.lora_A["default"].weight.shape[0], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def test_every_module_of_the_plan_gets_its_rank():
    scores = measure(tiny_bert(), [data_for(tiny_bert())], always_trained=["classifier"])
    plan = reltune.select(scores, "40%", ["column", "row"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_bert(), reltune.lora_config(plan, lora_dropout=0.1))
    found = ranks(model)
    assert list(found) == list(plan.modules) and len({r for r, _ in found.values()}) > 1
    for name, (r, scaling) in found.items():
        module = plan.modules[name]
        assert scaling == 2 and r >= 1
        distance = {k: abs(k * sum(module.shape) - module.parameters) for k in (r - 1, r, r + 1) if k >= 1}
        assert distance[r] == min(distance.values())
    assert model.peft_config["default"].lora_dropout == 0.1
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {f"base_model.model.classifier.modules_to_save.default.{kind}" for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (ModulePlan((8, 8), columns=[0]), 1),  # 8 of 16 per rank: still one
        (ModulePlan((8, 8), columns=[0, 1, 2]), 2),
        (ModulePlan((8, 24), rows=[0, 1]), 2),
        (ModulePlan((8, 8), elements=list(range(41))), 3),
        (ModulePlan((8, 8), weight=True), 4),
    ],
)
def test_the_rank_is_the_nearest(module, wanted):
    assert rank(module) == wanted


class Nest(nn.Module):
    """A module whose name is the end of two others'."""

    def __init__(self):
        super().__init__()
        self.head, self.last = nn.Linear(4, 4), nn.ModuleDict({"head": nn.Linear(4, 4)})
        self.inner = nn.ModuleDict({"head": nn.Linear(4, 4), "q": nn.Linear(4, 4)})


def test_namesakes_are_told_apart():
    modules = {
        "head": ModulePlan((4, 4), columns=[0, 1]),
        "inner.head": ModulePlan((4, 4), columns=[0, 1, 2, 3], bias=False),
    }
    plan = Plan(modules, "all", 100, 100, "")
    assert ranks(get_peft_model(Nest(), reltune.lora_config(plan, scaling=0.5))) == {
        "head": (1, 0.5),
        "inner.head": (2, 0.5),
    }


def test_of_conv1d_and_back_from_disk(tmp_path):
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config)
    modules = {"transformer.h.1.mlp.c_fc": ModulePlan((32, 8), rows=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9])}
    lora = reltune.lora_config(Plan(modules, "all", 100, 100, ""), fan_in_fan_out=True)
    model = get_peft_model(base, lora)
    assert ranks(model) == {"transformer.h.1.mlp.c_fc": (2, 2.0)}
    with torch.no_grad():
        model.get_submodule("base_model.model.transformer.h.1.mlp.c_fc").lora_B["default"].weight.normal_()
    ids = torch.arange(8)[None]
    wanted = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(GPT2LMHeadModel(config), tmp_path)
    assert torch.equal(again.eval()(ids).logits, wanted)


def test_of_convolutions_and_embeddings():
    """Counted in the tensors that PEFT makes."""
    torch.manual_seed(0)
    base = nn.ModuleDict(
        {"plain": nn.Conv2d(4, 12, (3, 2)), "grouped": nn.Conv2d(4, 12, 3, groups=2), "words": nn.Embedding(30, 4)}
    )
    modules = {
        "plain": ModulePlan((12, 4, 3, 2), columns=[0, 1]),  # 144 numbers, 36 for each rank
        "grouped": ModulePlan((12, 2, 3, 3), rows=list(range(12)), groups=2),  # 216, 42 for each
        "words": ModulePlan((30, 4), rows=list(range(20))),  # 80, 34 for each
    }
    config = reltune.lora_config(Plan(modules, "all", 1000, 1000, ""))
    model = get_peft_model(base, config)
    trained = dict.fromkeys(modules, 0)
    for name, p in model.named_parameters():
        trained[name.split(".")[2]] += p.numel() if p.requires_grad else 0
    assert config.rank_pattern == {"plain": 4, "grouped": 6, "words": 2}
    assert trained == {"plain": 4 * 36, "grouped": 6 * 42, "words": 2 * 34}


def test_biases_and_norms_are_refused():
    for module in (ModulePlan((4, 4), columns=[0], bias=True), ModulePlan((4,), weight=True)):
        plan = Plan({"a": ModulePlan((4, 4), columns=[0]), "b": module}, "all", 100, 100, "")
        with pytest.raises(InputError, match=r"LoRA trains no biases or norms.*b the first.*select without"):
            reltune.lora_config(plan)
