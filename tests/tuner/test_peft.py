"""What PEFT, and Transformers through it, expect of an adapter method: save, load, switch, merge, delete, copy."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import reltune
from oracles import dense_update
from reltune.errors import InputError
from reltune.layers.fingerprint import fingerprint
from reltune.plan.plan import ModulePlan, Plan
from reltune.tuner import ReltuneConfig, ReltuneModel
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.registration import register

Selection = dict[str, dict[str, Any]]

# Adapters that share columns, rows, elements, directions and cells in different ways; "second" also trains a module that "first" does not.
FIRST: Selection = {
    "first": {"columns": [5, 0], "rows": [2]},
    "norm": {"weight": True, "bias": True},
    "second": {"columns": [1, 6], "elements": [10, 0, 24], "bias": True, "directions": [0, 2]},
}
SECOND: Selection = {
    "first": {"columns": [4], "rows": [2, 7]},
    "second": {"rows": [1, 3], "elements": [0, 38]},
    "head": {"columns": [0, 3], "rows": [1], "elements": [7, 21], "directions": [2]},
}
THIRD: Selection = {
    "first": {"weight": True},
    "second": {"columns": [6], "bias": True},
    "norm": {"weight": True},
    "head": {"elements": [21, 0, 9]},
}
FOURTH: Selection = {"first": {"directions": [0, 1]}, "second": {"directions": [1]}}


def _vectors(name: str, in_features: int) -> np.ndarray:
    """Four directions of a module's input, which need not be orthogonal."""
    return np.random.default_rng(len(name)).normal(size=(4, in_features)).astype(np.float32)


def _in_the_weight(selection: Selection) -> Selection:
    """The selection without directions, which are not masks of full fine-tuning."""
    return {name: {key: of for key, of in units.items() if key != "directions"} for name, units in selection.items()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.norm(torch.tanh(self.first(x))))))


def _net(seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


X = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def _plan(model: nn.Module, selection: Selection, **fields: Any) -> Plan:
    modules = {
        name: ModulePlan(tuple(model.get_submodule(name).weight.shape), **units)  # type: ignore[union-attr,arg-type]
        for name, units in selection.items()
    }
    for name, module in modules.items():
        module.vectors = _vectors(name, module.shape[-1]) if module.directions else None
    return Plan(modules, "all", 10**9, 10**9, fields.pop("fingerprint", ""), **fields)


def _config(model: nn.Module, selection: Selection, init_weights: bool = False, **fields: Any) -> ReltuneConfig:
    return ReltuneConfig(plan=_plan(model, selection, **fields), init_weights=init_weights)


def _model(selection: Selection = FIRST, dtype: torch.dtype = torch.float64, **more: Selection) -> PeftModel:
    """Adapter "default" and perhaps others, all of them moved away from the base."""
    torch.manual_seed(1)
    base = _net(dtype=dtype)
    model = get_peft_model(base, _config(base, selection))
    for name, other in more.items():
        model.add_adapter(name, _config(_net(dtype=dtype), other))
    return model.eval()


def _layers(model: nn.Module) -> dict[str, ReltuneLayer]:
    return {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, ReltuneLayer)
    }


def _change(model: nn.Module, base: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The adapter's change of every parameter, from its tensors alone: columns, over them rows."""
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    after = {name: p.clone() for name, p in before.items()}
    for name, layer in _layers(model).items():
        weight = after[f"{name}.weight"]
        with torch.no_grad():
            for kind, indices in (("columns", layer.reltune_column_indices), ("rows", layer.reltune_row_indices)):
                trained = getattr(layer, f"reltune_{kind}")
                if adapter not in trained:
                    continue
                for j, i in enumerate(indices[adapter].tolist()):
                    if kind == "columns":
                        weight[:, i] = trained[adapter][:, j]
                    else:
                        weight[i] = trained[adapter][j]
            if adapter in layer.reltune_elements:
                for j, i in enumerate(layer.reltune_element_indices[adapter].tolist()):
                    weight[i // weight.shape[1], i % weight.shape[1]] = layer.reltune_elements[adapter][j]
            if adapter in layer.reltune_weight:
                weight.copy_(layer.reltune_weight[adapter])
            if adapter in layer.reltune_directions:
                vectors = layer.reltune_direction_vectors[adapter].to(weight.dtype)
                weight.add_(layer.reltune_directions[adapter].to(weight.dtype) @ vectors)
            if adapter in layer.reltune_bias:
                after[f"{name}.bias"].copy_(layer.reltune_bias[adapter])
    return {name: after[name] - before[name] for name in after}


def _dense(model: nn.Module, *adapters: str, base: nn.Module | None = None) -> nn.Module:
    """A plain copy of the base with the adapters' changes added up."""
    base = copy.deepcopy(base) if base is not None else _net()
    changes = [_change(model, base, adapter) for adapter in adapters]
    with torch.no_grad():
        for name, p in base.named_parameters():
            for change in changes:
                p.add_(change[name])
    return base.eval()


def _check_output(model: nn.Module, *adapters: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(X), _dense(model, *adapters)(X), rtol=0, atol=1e-12)


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model).unload().state_dict()


def _check_base_is(state: dict[str, Tensor], base: nn.Module) -> None:
    expected = base.state_dict()
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name


def _check_gradients(model: nn.Module, expected: dict[str, Tensor], adapter: str) -> None:
    """Every tensor of the adapter has its part of the dense gradient; cells in both have theirs in the row."""
    for name, layer in _layers(model).items():
        full = expected[f"{name}.weight"]
        parts = {"reltune_weight": full, "reltune_bias": expected[f"{name}.bias"]}
        if adapter in layer.reltune_columns:
            part = full[:, layer.reltune_column_indices[adapter]].clone()
            if adapter in layer.reltune_row_indices:
                part[layer.reltune_row_indices[adapter]] = 0
            parts["reltune_columns"] = part
        if adapter in layer.reltune_rows:
            parts["reltune_rows"] = full[layer.reltune_row_indices[adapter]]
        if adapter in layer.reltune_elements:
            parts["reltune_elements"] = full.flatten()[layer.reltune_element_indices[adapter].long()]
        if adapter in layer.reltune_directions:
            parts["reltune_directions"] = full @ layer.reltune_direction_vectors[adapter].mT
        for kind, part in parts.items():
            if adapter in getattr(layer, kind):
                grad = getattr(layer, kind)[adapter].grad
                torch.testing.assert_close(
                    grad, part, rtol=0, atol=1e-12, msg=lambda m, k=kind, n=name: f"{n} {k}: {m}"
                )


def _all(base: nn.Module) -> Selection:
    """Every weight: the oracle then gives the whole dense gradient."""
    return {
        name.removesuffix(".weight"): {"weight": True, "bias": True} for name in base.state_dict() if "weight" in name
    }


# -- registration ----------------------------------------------------------------------------------------------------


def test_registering_again_changes_nothing() -> None:
    members, configs = list(PeftType), len(PeftType.__members__)
    register(ReltuneConfig, ReltuneModel)
    register(ReltuneConfig, ReltuneModel)
    assert list(PeftType) == members
    assert len(PeftType.__members__) == configs
    assert len({m.value for m in PeftType}) == len(members)


def test_the_new_member_is_like_the_others() -> None:
    member = PeftType.RELTUNE  # type: ignore[attr-defined]
    assert member is PeftType("RELTUNE") is PeftType["RELTUNE"]
    assert member in list(PeftType) and member in PeftType
    assert isinstance(member, PeftType) and member == "RELTUNE" and member.value == member.name == "RELTUNE"
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert json.dumps({"peft_type": member}) == '{"peft_type": "RELTUNE"}'
    assert hash(member) == hash(PeftType("RELTUNE")) and {member: 1}[PeftType.RELTUNE] == 1  # type: ignore[attr-defined]
    assert type(repr(member)) is type(repr(PeftType.LORA)) is str
    assert member != PeftType.LORA and PeftType("LORA") is PeftType.LORA


IMPORTS = {
    "reltune first": "import reltune, sys; assert 'torch' not in sys.modules and 'peft' not in sys.modules; import peft",
    "peft first": "import peft, reltune",
    # as libraries do to find out whether PEFT is installed
    "reltune first, then a look for PEFT": "import reltune, importlib.util; importlib.util.find_spec('peft'); import peft",
}


@pytest.mark.parametrize("order", IMPORTS)
def test_either_order_of_imports_lets_peft_load_the_config(order: str, tmp_path: Path) -> None:
    _config(_net(), FIRST).save_pretrained(tmp_path)
    code = f"{IMPORTS[order]}; print(type(peft.PeftConfig.from_pretrained({str(tmp_path)!r})).__name__, list(peft.PeftType)[-1].name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ReltuneConfig", "RELTUNE"]


# -- files -----------------------------------------------------------------------------------------------------------

HEADS = ["bert.pooler", "classifier"]
BERT: Selection = {
    "bert.encoder.layer.0.attention.self.query": {"columns": [3, 15], "elements": [250, 17, 0], "bias": True},
    "bert.encoder.layer.0.intermediate.dense": {"rows": [31, 4], "columns": [9], "directions": [3]},
    "bert.encoder.layer.1.output.dense": {"weight": True},
    "bert.encoder.layer.1.output.LayerNorm": {"weight": True, "bias": True},
}
IDS = torch.randint(1, 20, (3, 8), generator=torch.Generator().manual_seed(2))


def _bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base model and an adapter on disk, with the logits of both."""
    folder = tmp_path_factory.mktemp("saved")
    base = _bert()
    base.save_pretrained(folder / "base")
    with torch.no_grad():
        base_logits = base(input_ids=IDS).logits
    base = BertForSequenceClassification.from_pretrained(folder / "base")
    mark = fingerprint(base, HEADS)
    config = _config(base, BERT, fingerprint=mark, always_trained=HEADS, task_type="SEQ_CLS")
    torch.manual_seed(1)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(0.1 * torch.randn_like(p))
        logits = model(input_ids=IDS).logits
    model.save_pretrained(folder / "adapter")
    assert not torch.allclose(logits, base_logits, atol=1e-3)
    return {"base": folder / "base", "adapter": folder / "adapter", "logits": logits, "base_logits": base_logits}


def _load_base(saved: dict[str, Any], **kwargs: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(saved["base"], **kwargs).eval()


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_adapter_is_a_config_and_tensors(saved: dict[str, Any]) -> None:
    names = {path.name for path in saved["adapter"].iterdir()}
    assert names - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(saved["adapter"] / "adapter_model.safetensors")
    prefix = "base_model.model.bert.encoder.layer.0.intermediate.dense.reltune_"
    assert tensors[prefix + "column_indices"].tolist() == [9]
    assert tensors[prefix + "row_indices"].tolist() == [31, 4]
    assert tensors[prefix + "row_indices"].dtype == torch.int64
    query = "base_model.model.bert.encoder.layer.0.attention.self.query.reltune_"
    assert tensors[query + "element_indices"].equal(torch.tensor([0, 17, 250], dtype=torch.int32))
    assert tensors[query + "elements"].shape == (3,)
    assert tensors[prefix + "columns"].shape == (32, 1) and tensors[prefix + "rows"].shape == (2, 16)
    assert not any("base_layer" in name or "originals" in name for name in tensors)
    assert {"base_model.model.classifier.weight", "base_model.model.bert.pooler.dense.bias"} <= tensors.keys()
    numbers = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    along = tensors[prefix + "directions"], tensors[prefix + "direction_vectors"]
    assert [tuple(t.shape) for t in along] == [(32, 1), (1, 16)]
    assert numbers == (32 + 3 + 16) + (32 + 2 * 16 + 32 + 16) + 16 * 32 + 2 * 16 + (16 * 16 + 16) + (2 * 16 + 2)


def test_saved_config_says_nothing_of_the_machine_and_holds_no_plan(saved: dict[str, Any]) -> None:
    values = json.loads((saved["adapter"] / "adapter_config.json").read_text(encoding="utf-8"))
    assert "plan" not in values
    assert values["peft_type"] == "RELTUNE" and values["task_type"] == "SEQ_CLS"
    assert values["units"]["bert.encoder.layer.0.intermediate.dense"] == {
        "columns": 1,
        "rows": 2,
        "elements": 0,
        "directions": 1,
        "weight": False,
        "bias": False,
        "shape": [32, 16],
    }
    assert values["target_modules"] == sorted(BERT)  # a set would be written in another order by every process
    assert values.pop("base_model_name_or_path") == str(saved["base"])  # as every PEFT config has it
    assert str(saved["base"].parent) not in json.dumps(values)


def test_config_comes_back_as_it_was(saved: dict[str, Any]) -> None:
    loaded = PeftConfig.from_pretrained(saved["adapter"])
    assert type(loaded) is ReltuneConfig
    assert loaded.target_modules == set(BERT)
    assert loaded.always_trained == HEADS
    assert loaded.fingerprint and loaded.plan is None


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_with_peft(saved: dict[str, Any], low_cpu_mem_usage: bool) -> None:
    model = PeftModel.from_pretrained(
        _load_base(saved), saved["adapter"], low_cpu_mem_usage=low_cpu_mem_usage, torch_device="cpu"
    ).eval()
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(_logits(model), saved["logits"])
    with model.disable_adapter():
        assert torch.equal(_logits(model), saved["base_logits"])


def test_loading_a_second_time_under_another_name(saved: dict[str, Any]) -> None:
    model = PeftModel.from_pretrained(_load_base(saved), saved["adapter"]).eval()
    for low in (False, True):
        model.load_adapter(saved["adapter"], f"again {low}", low_cpu_mem_usage=low, torch_device="cpu")
        assert torch.equal(_logits(model), saved["logits"])
        model.set_adapter(f"again {low}")
        assert torch.equal(_logits(model), saved["logits"])
        model.set_adapter("default")


def test_loading_with_peft_auto_class(saved: dict[str, Any]) -> None:
    model = AutoPeftModelForSequenceClassification.from_pretrained(saved["adapter"]).eval()
    assert torch.equal(_logits(model), saved["logits"])


@pytest.fixture(scope="module")
def transformers_loads_heads(saved: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether this Transformers' own load_adapter loads modules_to_save at all: early ones do not, of LoRA either."""
    folder = tmp_path_factory.mktemp("lora")
    lora = LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    get_peft_model(_load_base(saved), lora).save_pretrained(folder)
    return not _load_base(saved).load_adapter(folder).missing_keys


def _hidden(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]


def test_loading_with_transformers(saved: dict[str, Any], transformers_loads_heads: bool) -> None:
    """Transformers loads without load_state_dict, and without PeftModel."""
    model = _load_base(saved)
    info = model.load_adapter(saved["adapter"])
    if not transformers_loads_heads:
        assert all(".modules_to_save." in key for key in info.missing_keys)
        assert torch.equal(
            _hidden(model), _hidden(PeftModel.from_pretrained(_load_base(saved), saved["adapter"]).eval())
        )
        return
    assert not info.missing_keys and not info.unexpected_keys
    assert torch.equal(_logits(model), saved["logits"])
    model.load_adapter(saved["adapter"], "second")
    model.set_adapter("second")
    assert torch.equal(_logits(model), saved["logits"])
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(_logits(model), saved["logits"])
    with torch.no_grad():
        hidden = model.bert(IDS).last_hidden_state
        model.disable_adapters()
        assert torch.equal(model.bert(IDS).last_hidden_state, _load_base(saved).bert(IDS).last_hidden_state)
        model.enable_adapters()  # Transformers forgets the heads here
        assert torch.equal(model.bert(IDS).last_hidden_state, hidden)
    through_auto = BertForSequenceClassification.from_pretrained(saved["adapter"]).eval()
    assert torch.equal(_logits(through_auto), saved["logits"])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_over_an_adapter_with_other_indices(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """As Trainer does when it goes back to its best checkpoint; here the file's columns are others, too."""
    _model({"first": {"columns": [3, 1], "rows": [7]}}).save_pretrained(tmp_path)
    model = _model({"first": {"columns": [5, 0], "rows": [2]}})
    model(X)
    model.load_adapter(tmp_path, "default", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert _layers(model)["first"].reltune_column_indices["default"].tolist() == [3, 1]
    _check_output(model, "default")
    _check_base_is(_base_state(model), _net())


def test_adapter_saved_by_transformers_loads_with_peft(
    saved: dict[str, Any], transformers_loads_heads: bool, tmp_path: Path
) -> None:
    model = _load_base(saved)
    model.load_adapter(saved["adapter"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_load_base(saved), tmp_path).eval()
    assert torch.equal(_hidden(again), _hidden(model))
    if transformers_loads_heads:
        assert torch.equal(_logits(again), saved["logits"])


def test_a_loaded_adapter_can_be_trained_on(saved: dict[str, Any], tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(_load_base(saved), saved["adapter"], is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
    optimizer.step()
    assert not torch.allclose(_logits(model), saved["logits"], atol=1e-3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_load_base(saved), tmp_path).eval()
    assert torch.equal(_logits(again), _logits(model))


def test_loading_into_an_adapter_that_was_merged(saved: dict[str, Any]) -> None:
    """A second adapter arrives while the first is merged; nothing of the first may leak into it."""
    model = PeftModel.from_pretrained(_load_base(saved), saved["adapter"]).eval()
    model.merge_adapter()
    model.load_adapter(saved["adapter"], "second")
    model.unmerge_adapter()
    model.set_adapter("second")
    assert torch.equal(_logits(model), saved["logits"])
    with model.disable_adapter():
        assert torch.equal(_logits(model), saved["base_logits"])


def test_a_saved_config_alone_does_not_train_the_wrong_columns(saved: dict[str, Any]) -> None:
    """It says how many columns are trained, not which: a model made from it must not run before a file was loaded."""
    config = PeftConfig.from_pretrained(saved["adapter"])
    config.inference_mode = False
    model = get_peft_model(_load_base(saved), config)
    with pytest.raises(InputError, match="saved config"):
        model(input_ids=IDS)
    with pytest.raises(InputError, match="saved config"):
        model.merge_adapter()
    set_peft_model_state_dict(model, load_file(saved["adapter"] / "adapter_model.safetensors"))
    assert torch.equal(_logits(model.eval()), saved["logits"])


def test_the_name_of_a_deleted_adapter_without_a_file_is_free(saved: dict[str, Any]) -> None:
    config = PeftConfig.from_pretrained(saved["adapter"])
    base = _load_base(saved)
    model = get_peft_model(base, _config(base, BERT, always_trained=HEADS, task_type="SEQ_CLS")).eval()
    model.add_adapter("other", config)
    model.delete_adapter("other")
    model.add_adapter("other", _config(_bert(), BERT, init_weights=True, always_trained=HEADS, task_type="SEQ_CLS"))
    model.set_adapter("other")
    assert torch.equal(_logits(model), saved["base_logits"])


def test_inject_adapter_in_model(saved: dict[str, Any]) -> None:
    base = _load_base(saved)
    config = _config(base, BERT, init_weights=True)
    model = inject_adapter_in_model(config, base)
    assert model is base
    assert torch.equal(_logits(model), saved["base_logits"])
    model(input_ids=IDS, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert model.bert.encoder.layer[0].intermediate.dense.reltune_rows["default"].grad.any()


# -- forward pass with several adapters ------------------------------------------------------------------------------


def test_output_is_that_of_the_changed_weights() -> None:
    for selection in (FIRST, SECOND, THIRD, FOURTH):
        model = _model(selection)
        _check_output(model, "default")
        assert not torch.allclose(model(X), _net()(X), atol=1e-3)


def test_switching_between_adapters() -> None:
    model = _model(FIRST, other=SECOND, third=THIRD, fourth=FOURTH)
    for name in ("default", "other", "third", "fourth", "other", "default", "fourth", "third", "default"):
        model.set_adapter(name)
        _check_output(model, name)
    _check_base_is(_base_state(model), _net())


@pytest.mark.parametrize(
    "names", [["default", "other"], ["other", "third"], ["third", "default", "other"], ["fourth", "third", "default"]]
)
def test_several_active_adapters_add_their_changes(names: list[str]) -> None:
    model = _model(FIRST, other=SECOND, third=THIRD, fourth=FOURTH)
    model.base_model.set_adapter(names)
    _check_output(model, *names)
    dense = _dense(model, *names)
    expected = dense_update.gradients(dense, _all(dense), lambda m: m(X).square().sum())
    model.zero_grad()
    model(X).square().sum().backward()
    for name in names:
        _check_gradients(model, expected, name)


def test_no_active_adapter_is_the_base() -> None:
    model = _model()
    model.base_model.set_adapter([])
    with torch.no_grad():
        assert torch.equal(model(X), _net()(X))
    model.set_adapter("default")
    _check_output(model, "default")


def test_only_the_active_adapter_is_trained() -> None:
    model = _model(FIRST, other=SECOND)
    model.set_adapter("other")
    assert all((".other" in n) == p.requires_grad for n, p in model.named_parameters() if "reltune_" in n)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert all(".other" in n or n.endswith("base_layer.weight") for n in moved)
    _check_output(model, "other")
    _check_base_is(_base_state(model), _net())


def test_one_optimizer_over_all_adapters_while_switching() -> None:
    """Every adapter follows full fine-tuning of its own weights, whichever was active last."""
    first, second = _in_the_weight(FIRST), _in_the_weight(SECOND)
    model = _model(first, other=second)
    dense = {"default": _dense(model, "default"), "other": _dense(model, "other")}
    optimizers = {
        name: torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith("." + name)], lr=0.1)
        for name in dense
    }
    for name in ("default", "other", "other", "default", "other", "default"):
        model.set_adapter(name)
        optimizers[name].zero_grad()
        model(X).square().mean().backward()
        optimizers[name].step()
        selection = first if name == "default" else second
        dense_update.train(
            dense[name], selection, lambda p: torch.optim.SGD(p, lr=0.1), [[lambda m: m(X).square().mean()]]
        )
    for name, expected in dense.items():
        model.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected(X), rtol=0, atol=1e-10)


# -- disabling, switching and merging beside live graphs --------------------------------------------------------------


def test_disabled_adapters_leave_exactly_the_base() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, x = _model(FIRST, dtype), X.to(dtype)
        with torch.no_grad():
            tuned = model(x)
            with model.disable_adapter():
                assert torch.equal(model(x), _net(dtype=dtype)(x))
            assert torch.equal(model(x), tuned)
            assert not torch.allclose(tuned.float(), _net(dtype=dtype)(x).float(), atol=1e-2)


@pytest.mark.parametrize("reference_has_graph", [False, True])
@pytest.mark.parametrize("first", ["policy", "reference"])
@pytest.mark.parametrize("selection", [FIRST, SECOND, THIRD], ids=["first", "other", "third"])
def test_reference_model_by_disabling_inside_a_step(
    selection: Selection, first: str, reference_has_graph: bool
) -> None:
    """As DPO does it: both outputs enter one loss, and the backward pass comes after both."""
    model = _model(selection)
    dense, base = _dense(model, "default"), _net()

    def reference() -> Tensor:
        with torch.set_grad_enabled(reference_has_graph), model.disable_adapter():
            return model(X)

    for _ in range(2):
        model.zero_grad()
        if first == "policy":
            policy, other = model(X), reference()
        else:
            other, policy = reference(), model(X)
        with torch.no_grad():
            torch.testing.assert_close(other.detach(), base(X), rtol=0, atol=1e-12)
        (policy.sigmoid() * other).sum().backward()
        expected = dense_update.gradients(dense, _all(dense), lambda m: (m(X).sigmoid() * base(X).detach()).sum())
        _check_gradients(model, expected, "default")
    _check_output(model, "default")


def test_reference_by_disabling_after_an_update_by_hand() -> None:
    """The graph that is alive holds the weight of before the update, and the reference must not see it."""
    model, base = _model(FIRST), _net()
    for _ in range(3):
        loss = model(X).square().sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for p, g in zip(trained, grads, strict=True):
                p -= 0.01 * g
            with model.disable_adapter():
                torch.testing.assert_close(model(X), base(X), rtol=0, atol=1e-12)
        _check_output(model, "default")


def test_switching_while_a_graph_is_alive() -> None:
    model = _model(FIRST, other=SECOND)
    losses, expected = {}, {}
    for name in ("default", "other"):
        model.set_adapter(name)
        losses[name] = model(X).square().sum()
        dense = _dense(model, name)
        assert losses[name].item() == pytest.approx(dense(X).square().sum().item(), abs=1e-12)
        expected[name] = dense_update.gradients(dense, _all(dense), lambda m: m(X).square().sum())
    model.base_model.set_adapter(["default", "other"])  # or the first would not take its gradient any more
    sum(losses.values()).backward()
    for name in losses:
        _check_gradients(model, expected[name], name)


def test_a_write_through_data_counts_from_the_next_change_of_mode_on() -> None:
    model = _model().train()
    _check_output(model, "default")
    for name, p in model.named_parameters():
        if name.endswith(".default"):
            p.data.add_(0.5)
    _check_output(model.eval(), "default")


def test_a_parameter_whose_tensor_was_exchanged_is_used() -> None:
    model = _model()
    _check_output(model, "default")
    for name, p in model.named_parameters():
        if name.endswith(".default"):
            p.data = p.data + 0.5
    _check_output(model, "default")


def test_a_step_of_some_of_a_layers_parameters_is_written() -> None:
    model = _model({"second": {"columns": [1], "rows": [3]}})
    layer = _layers(model)["second"]
    columns = layer.reltune_columns["default"]
    model(X).square().sum().backward()
    before = columns.detach().clone()
    torch.optim.SGD([columns], lr=0.1).step()
    outside = [i for i in range(len(columns)) if i != 3]  # where they cross, the row counts
    assert not torch.equal(columns, before)
    assert torch.equal(layer.weight[outside, 1], columns[outside, 0])


def test_a_hand_written_update_of_an_adapter_that_is_switched_away() -> None:
    """Its old values are still in the base weight while a graph needs them."""
    model = _model(FIRST, other=SECOND)
    held = model(X).square().sum()
    model.set_adapter("other")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".default"):
                p.add_(0.5)
    _check_output(model, "other")
    assert held.requires_grad
    del held
    model.set_adapter("default")
    _check_output(model, "default")


def test_a_hand_written_update_of_an_adapter_that_cannot_be_switched_away() -> None:
    """Others come before it, but a graph keeps it in the base weight, where it must be up to date."""
    model = _model(FIRST, other=SECOND)
    held = model(X).square().sum()
    model.base_model.set_adapter(["other", "default"])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5)
    _check_output(model, "other", "default")
    assert held.requires_grad


def test_adding_and_loading_an_adapter_while_a_graph_is_alive(tmp_path: Path) -> None:
    _model(SECOND).save_pretrained(tmp_path)
    model = _model(FIRST)
    dense = _dense(model, "default")
    expected = dense_update.gradients(dense, _all(dense), lambda m: m(X).square().sum())
    loss = model(X).square().sum()
    model.add_adapter("third", _config(_net(), THIRD))
    model.load_adapter(tmp_path, "other")
    loss.backward()
    _check_gradients(model, expected, "default")
    model.set_adapter("other")
    _check_output(model, "other")


def test_deleting_another_adapter_while_a_graph_is_alive() -> None:
    model = _model(FIRST, other=SECOND)
    dense = _dense(model, "default")
    expected = dense_update.gradients(dense, _all(dense), lambda m: m(X).square().sum())
    loss = model(X).square().sum()
    model.delete_adapter("other")
    loss.backward()
    _check_gradients(model, expected, "default")


def test_training_after_a_first_pass_in_inference_mode() -> None:
    """Tensors that are made in inference mode can enter no graph; the layers must not keep any."""
    model = _model(FIRST, third=THIRD)
    model.base_model.set_adapter(["default", "third"])
    _layers(model)["second"].reltune_column_indices["third"] = torch.tensor([3])  # as Transformers loads, past any hook
    with torch.inference_mode():
        model(X)
    dense = _dense(model, "default", "third")
    expected = dense_update.gradients(dense, _all(dense), lambda m: m(X).square().sum())
    model(X).square().sum().backward()
    for name in ("default", "third"):
        _check_gradients(model, expected, name)
    _check_base_is(_base_state(model), _net())


# -- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "names", [["default"], ["other"], ["fourth"], ["default", "other"], ["third", "default", "fourth", "other"]]
)
def test_merging_and_unmerging(names: list[str], dtype: torch.dtype, safe: bool) -> None:
    model, x = _model(FIRST, dtype, other=SECOND, third=THIRD, fourth=FOURTH), X.to(dtype)
    model.base_model.set_adapter(names)
    with torch.no_grad():
        before = model(x)
        for _ in range(2):
            model.merge_adapter(safe_merge=safe)
            merged = model(x)
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
            torch.testing.assert_close(merged, before, rtol=0, atol=tolerance)
            for name, layer in _layers(model).items():
                change = sum(_change(model, _net(dtype=dtype), n)[f"{name}.weight"] for n in names)
                expected = _net(dtype=dtype).get_submodule(name).weight + change
                got = layer.get_base_layer().weight
                torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * 0.1)
            model.unmerge_adapter()
            assert torch.equal(model(x), before)
    _check_base_is(_base_state(model), _net(dtype=dtype))


def test_one_merged_adapter_is_the_trained_values_to_the_bit() -> None:
    model = _model(SECOND, torch.bfloat16)
    layer = _layers(model)["first"]
    model.merge_adapter()
    weight = layer.get_base_layer().weight
    assert torch.equal(weight[[2, 7]], layer.reltune_rows["default"].to(torch.bfloat16))
    outside = [0, 1, 3, 4, 5, 6]
    assert torch.equal(weight[outside, 4], layer.reltune_columns["default"][outside, 0].to(torch.bfloat16))


def test_merging_one_after_the_other() -> None:
    model = _model(FIRST, other=SECOND, third=THIRD)
    model.merge_adapter(adapter_names=["other"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(adapter_names=["default"])
    for name, layer in _layers(model).items():
        changes = [_change(model, _net(), n)[f"{name}.weight"] for n in ("default", "other")]
        expected = _net().get_submodule(name).weight + changes[0] + changes[1]
        torch.testing.assert_close(layer.get_base_layer().weight, expected, rtol=0, atol=1e-12)
    model.unmerge_adapter()
    _check_base_is(_base_state(model), _net())
    _check_output(model, "default")


@pytest.mark.parametrize("names", [None, ["default"], ["other"], ["fourth"], ["default", "other", "third", "fourth"]])
def test_merge_and_unload(names: list[str] | None) -> None:
    """Also when another adapter is active, in layers that the merged one does not have."""
    model = _model(FIRST, other=SECOND, third=THIRD, fourth=FOURTH)
    expected = _dense(model, *(names or ["default"]))
    plain = model.merge_and_unload(adapter_names=names)
    assert type(plain) is Net and not _layers(plain)
    assert plain.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(
            tensor, expected.state_dict()[name], rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["columns", "rows", "elements", "directions", "weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_values_that_are_not_finite(kind: str, value: float) -> None:
    selection: Selection = {"second": {kind: True if kind in ("weight", "bias") else [1]}}
    model = _model(selection)
    with torch.no_grad():
        getattr(_layers(model)["second"], f"reltune_{kind}")["default"].view(-1)[0] = value
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    _check_base_is(_base_state(model), _net())


def test_safe_merge_refuses_values_that_the_base_cannot_hold() -> None:
    model = _model({"second": {"columns": [1]}}, torch.float16)
    with torch.no_grad():
        _layers(model)["second"].reltune_columns["default"].view(-1)[0] = 1e6
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


def test_disabling_a_merged_model_unmerges_it() -> None:
    model = _model(FIRST)
    model.merge_adapter()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(X), _net()(X))
    _check_output(model, "default")


def test_merged_model_trains_on_after_unmerging() -> None:
    model, other = _model(FIRST), _model(FIRST)
    for m in (model, other):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05)
        for step in range(4):
            if m is model and step == 2:
                m.merge_adapter()
                m(X)
                m.unmerge_adapter()
            optimizer.zero_grad()
            m(X).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        assert torch.equal(model(X), other(X))


def test_head_of_several_layers_survives_merge_and_unload(saved: dict[str, Any]) -> None:
    """bert.pooler is such a module."""
    model = PeftModel.from_pretrained(_load_base(saved), saved["adapter"]).eval()
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is BertForSequenceClassification
    torch.testing.assert_close(_logits(plain), saved["logits"], rtol=0, atol=1e-6)
    assert plain.state_dict().keys() == _bert().state_dict().keys()


# -- deleting and unloading --------------------------------------------------------------------------------------------


def test_unload_gives_back_the_base() -> None:
    model = _model(FIRST, other=SECOND, third=THIRD)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
    plain = model.unload()
    assert not _layers(plain)
    _check_base_is(plain.state_dict(), _net())


@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("deleted", ["default", "other"])
def test_deleting_leaves_nothing_behind(deleted: str, active: str) -> None:
    model = _model(FIRST, other=SECOND)
    model.set_adapter(active)
    model(X)
    rest = "other" if deleted == "default" else "default"
    expected = copy.deepcopy(model)
    expected.set_adapter(rest)
    model.delete_adapter(deleted)
    assert not [key for key in model.state_dict() if deleted in key.split(".")]
    assert deleted not in model.peft_config
    for layer in _layers(model).values():
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            assert deleted not in getattr(layer, attribute)
        assert deleted not in layer._all_available_adapter_names()
        assert deleted not in layer.active_adapters
        assert layer._written != deleted
    with torch.no_grad():
        assert torch.equal(model(X), expected(X))
    _check_base_is(_base_state(model), _net())


def test_deleting_the_last_adapter_leaves_the_base() -> None:
    model = _model(FIRST)
    model.delete_adapter("default")
    with torch.no_grad():
        assert torch.equal(model.base_model(X), _net()(X))
    model.add_adapter("default", _config(_net(), SECOND))
    model.set_adapter("default")
    _check_output(model, "default")


def test_a_merged_adapter_cannot_be_deleted() -> None:
    model = _model(FIRST, other=SECOND)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    _check_output(model, "default")


def test_adding_an_adapter_starts_from_the_base_and_not_from_the_active_one() -> None:
    model = _model(FIRST)
    model(X)
    model.add_adapter("fresh", _config(_net(), SECOND, init_weights=True))
    _check_output(model, "default")
    model.set_adapter("fresh")
    with torch.no_grad():
        assert torch.equal(model(X), _net()(X))


def test_adding_an_adapter_to_a_merged_model_starts_from_the_base() -> None:
    model = _model(FIRST, third=THIRD)
    model.merge_adapter(adapter_names=["third", "default"])
    model.add_adapter("fresh", _config(_net(), SECOND, init_weights=True))
    model.unmerge_adapter()
    model.set_adapter("fresh")
    with torch.no_grad():
        assert torch.equal(model(X), _net()(X))


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_train_on_independently(way: str, tmp_path: Path) -> None:
    model = _model(FIRST, other=SECOND)

    def step(m: nn.Module, times: int = 1) -> None:
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05)
        for _ in range(times):
            optimizer.zero_grad()
            m(X).square().mean().backward()
            optimizer.step()

    step(model, 2)
    pending = model(X).sum()  # a live graph does not travel along
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    pending.backward()
    model.zero_grad()
    with torch.no_grad():
        start = model(X)
        assert torch.equal(other(X), start)
    step(other, 3)
    with torch.no_grad():
        assert torch.equal(model(X), start)
        after = other(X)
        assert not torch.allclose(after, start, atol=1e-4)
    step(model, 3)
    with torch.no_grad():
        assert torch.equal(model(X), after)
    other.set_adapter("other")
    _check_output(other, "other")
    _check_base_is(_base_state(other), _net())
    _check_base_is(_base_state(model), _net())


def test_a_saved_config_is_the_same_in_every_process() -> None:
    names = ["value", "key", "query", "dense", "proj", "embed", "norm"]
    values = ReltuneConfig(target_modules=names, exclude_modules=names[1:]).to_dict()
    assert (values["target_modules"], values["exclude_modules"]) == (sorted(names), sorted(names[1:]))


def test_config_can_be_copied_with_its_choice() -> None:
    config = _config(_net(), FIRST)
    for other in (copy.deepcopy(config), copy.copy(config), pickle.loads(pickle.dumps(config))):
        torch.manual_seed(3)
        one = get_peft_model(_net(), config)
        torch.manual_seed(3)
        two = get_peft_model(_net(), other)
        assert torch.equal(one(X), two(X))


# -- state_dict of the whole model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("active_then", ["default", "other", "both"])
@pytest.mark.parametrize("active_now", ["default", "other", "none"])
def test_whole_state_is_loaded_whatever_was_active(active_then: str, active_now: str) -> None:
    """The saved base weight holds the values of whichever adapter was active; the loaded one must not keep them."""
    model = _model(FIRST, other=SECOND)
    model.base_model.set_adapter(["other", "default"] if active_then == "both" else [active_then])
    model(X)
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(9)
    fresh = get_peft_model(_net(), _config(_net(), FIRST))
    fresh.add_adapter("other", _config(_net(), SECOND))
    fresh.base_model.set_adapter([] if active_now == "none" else [active_now])
    fresh(X)
    fresh.load_state_dict(state)
    for name in ("default", "other"):
        fresh.set_adapter(name)
        _check_output(fresh, name)
        with torch.no_grad():
            model.set_adapter(name)
            torch.testing.assert_close(fresh(X), model(X), rtol=0, atol=1e-12)
    _check_base_is(_base_state(fresh), _net())


def test_a_base_weight_that_was_saved_with_the_adapters_values_is_put_right() -> None:
    model = _model(_in_the_weight(FIRST))  # directions are not written into the base weight
    _check_output(model, "default")
    state = model.state_dict()
    for name, layer in _layers(model).items():
        key = f"base_model.model.{name}.base_layer.weight"
        assert key in state
        if layer.originals:
            state[key] = _dense(model, "default").get_submodule(name).weight.detach()
    model.load_state_dict(state)
    _check_output(model, "default")
    _check_base_is(_base_state(model), _net())


def test_whole_state_is_loaded_over_other_indices() -> None:
    model = _model({"first": {"columns": [3, 1], "rows": [7]}})
    fresh = _model({"first": {"columns": [5, 3], "rows": [2]}})
    fresh(X)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        assert torch.equal(fresh(X), model(X))
    _check_base_is(_base_state(fresh), _net())


def test_another_base_is_loaded_beneath_the_adapter() -> None:
    model, other = _model(FIRST), _net(seed=3)
    layers = _layers(model)
    state = {
        (f"base_model.model.{n}.base_layer.{k}" if n in layers else f"base_model.model.{n}.{k}"): t.clone()
        for n, m in other.named_children()
        for k, t in m.state_dict().items()
    }
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(model(X), _dense(model, "default", base=other)(X), rtol=0, atol=1e-12)
    _check_base_is(_base_state(model), other)


def test_state_saved_after_a_write_through_data_is_whole() -> None:
    model, fresh = _model(FIRST), _model(FIRST)
    model(X)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.2)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    _check_output(fresh, "default")
    _check_base_is(_base_state(fresh), _net())


# -- all together ------------------------------------------------------------------------------------------------------


class Random:
    """A model under a random sequence of operations, beside one plain model per adapter that must agree with it."""

    SELECTIONS = (FIRST, SECOND, THIRD, FOURTH)
    NAMES = ("default", "other", "third", "fourth")

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.model = _model(FIRST, other=SECOND, third=THIRD, fourth=FOURTH)
        self.base = _net()
        self.dense = {name: _dense(self.model, name) for name in self.NAMES}
        self.active = ["default"]
        self.held: list[Tensor] = []

    def pick(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.random))

    def joint(self) -> nn.Module:
        """The base with the changes of all active adapters."""
        joint = copy.deepcopy(self.base)
        with torch.no_grad():
            for name in self.active:
                for p, q, b in zip(
                    joint.parameters(), self.dense[name].parameters(), self.base.parameters(), strict=True
                ):
                    p.add_(q - b)
        return joint

    def check(self) -> None:
        with torch.no_grad():
            torch.testing.assert_close(self.model(X), self.joint()(X), rtol=0, atol=1e-9)

    def step(self) -> None:
        joint = self.joint()
        gradients = dense_update.gradients(joint, _all(joint), lambda m: m(X).square().mean())
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.05)
        optimizer.zero_grad()
        self.model(X).square().mean().backward()
        optimizer.step()
        for name in self.active:
            selection = self.SELECTIONS[self.NAMES.index(name)]
            where = dense_update.masks(self.base, selection)
            with torch.no_grad():
                for key, p in self.dense[name].named_parameters():
                    p.sub_(0.05 * gradients[key] * where[key])
                for module, units in selection.items():
                    weight = self.dense[name].get_submodule(module).weight
                    own = units.get("directions", [])
                    along = torch.from_numpy(_vectors(module, weight.shape[-1])[own]).double()  # type: ignore[index]
                    weight.sub_(0.05 * gradients[f"{module}.weight"] @ along.mT @ along if own else 0)  # type: ignore[operator]

    def switch(self) -> None:
        order = torch.randperm(len(self.NAMES), generator=self.random).tolist()
        self.active = [self.NAMES[i] for i in order[: 1 + self.pick(3)]]
        self.model.base_model.set_adapter(self.active)

    def disable(self) -> None:
        with torch.set_grad_enabled(bool(self.pick(2))), self.model.disable_adapter():
            torch.testing.assert_close(self.model(X).detach(), self.base(X).detach(), rtol=0, atol=1e-9)

    def hold(self) -> None:
        self.held.append(self.model(X))

    def release(self) -> None:
        self.held.clear()

    def merge(self) -> None:
        self.model.merge_adapter()
        self.check()
        self.model.unmerge_adapter()

    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    def replace(self) -> None:
        """Delete an adapter that is not active and add it anew."""
        idle = [name for name in self.NAMES if name not in self.active]
        if idle:
            name = idle[self.pick(len(idle))]
            self.model.delete_adapter(name)
            selection = self.SELECTIONS[self.NAMES.index(name)]
            self.model.add_adapter(name, _config(_net(), selection))
            self.dense[name] = _dense(self.model, name)

    def reload(self) -> None:
        state = copy.deepcopy(self.model.state_dict())
        with torch.no_grad():
            for p in self.model.parameters():
                if p.requires_grad:
                    p.mul_(2)
        if self.pick(2):
            self.model(X)
        self.model.load_state_dict(state)

    def change_by_hand(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                if p.requires_grad:
                    p.add_(0.01)
        for name in self.active:
            self.dense[name] = _dense(self.model, name)


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences_of_operations(seed: int) -> None:
    case = Random(seed)
    operations = [
        case.step,
        case.step,
        case.switch,
        case.disable,
        case.hold,
        case.release,
        case.merge,
        case.copy,
        case.replace,
        case.reload,
        case.change_by_hand,
    ]
    for _ in range(60):
        operations[case.pick(len(operations))]()
        if case.pick(2):
            case.check()
    case.held.clear()
    case.check()
    with torch.no_grad(), case.model.disable_adapter():
        assert torch.equal(case.model(X), case.base(X))
    _check_base_is(case.model.unload().state_dict(), case.base)


# -- configs without a plan ----------------------------------------------------------------------------------------------


def test_config_without_a_plan_takes_the_columns_of_the_largest_weights() -> None:
    base = _net()
    model = get_peft_model(base, ReltuneConfig(r=3, target_modules=["first", "second"]))
    layers = _layers(model)
    assert set(layers) == {"first", "second"}
    for name, layer in layers.items():
        norms = _net().get_submodule(name).weight.square().sum(0)
        largest = sorted(range(len(norms)), key=lambda i: -norms[i].item())[:3]
        assert layer.reltune_column_indices["default"].tolist() == sorted(largest)
    with torch.no_grad():
        assert torch.equal(model(X), _net()(X))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 8 + 3 * 8


def test_second_adapter_without_a_plan_chooses_by_the_base_weights() -> None:
    """Not by what the first adapter has written over them."""
    model = _model({"first": {"columns": [0, 3]}})
    with torch.no_grad():
        _layers(model)["first"].reltune_columns["default"].mul_(100)
    model(X)
    config = ReltuneConfig(r=2, target_modules=["first"])
    model.add_adapter("other", config)
    alone = get_peft_model(_net(), copy.deepcopy(config))
    expected = _layers(alone)["first"].reltune_column_indices["default"]
    assert torch.equal(_layers(model)["first"].reltune_column_indices["other"], expected)


def test_config_without_a_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        _net(),
        ReltuneConfig(r=2, target_modules=["first", "norm", "head"], rank_pattern={"head": 5}, init_weights=False),
    )
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_net(), tmp_path)
    assert torch.equal(again(X), model(X))
    assert not torch.allclose(model(X), _net()(X), atol=1e-3)


def _chosen(config: ReltuneConfig) -> dict[str, int]:
    layers = _layers(get_peft_model(_bert(), config))
    return {
        name: len(layer.reltune_column_indices["default"]) if layer.reltune_column_indices else 0
        for name, layer in layers.items()
    }


def test_rank_pattern_and_more_columns_than_there_are() -> None:
    config = ReltuneConfig(
        r=4, target_modules=["query", "key"], rank_pattern={"layer.1.attention.self.key": 100, "query": 2}
    )
    assert _chosen(config) == {
        "bert.encoder.layer.0.attention.self.query": 2,
        "bert.encoder.layer.0.attention.self.key": 4,
        "bert.encoder.layer.1.attention.self.query": 2,
        "bert.encoder.layer.1.attention.self.key": 16,
    }


def test_all_linear_leaves_out_the_head_and_twice_is_the_same() -> None:
    names = _chosen(ReltuneConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    linear = {n for n, m in _bert().named_modules() if type(m) is nn.Linear}
    assert set(names) == linear - {"classifier"}
    model = get_peft_model(_bert(), ReltuneConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    model.add_adapter("again", ReltuneConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS"))
    assert set(_layers(model)) == linear - {"classifier"}
    assert all("again" in layer.reltune_columns for layer in _layers(model).values())


def test_layers_to_transform_exclude_modules_and_patterns() -> None:
    found = _chosen(
        ReltuneConfig(r=2, target_modules=["query", "value"], layers_to_transform=[1], layers_pattern="layer")
    )
    assert set(found) == {f"bert.encoder.layer.1.attention.self.{part}" for part in ("query", "value")}
    found = _chosen(ReltuneConfig(r=2, target_modules=r".*layer\.\d\.output\.(dense|LayerNorm)"))
    assert found == {
        f"bert.encoder.layer.{i}.output.{part}": r for i in (0, 1) for part, r in (("dense", 2), ("LayerNorm", 0))
    }
    found = _chosen(
        ReltuneConfig(r=2, target_modules=["query", "value"], exclude_modules=["layer.0.attention.self.query"])
    )
    assert len(found) == 3 and "bert.encoder.layer.0.attention.self.query" not in found


def test_default_target_modules_come_from_the_architecture() -> None:
    assert {name.rsplit(".", 1)[-1] for name in _chosen(ReltuneConfig(r=2))} == {"query", "value"}


def test_init_weights_false_is_no_identity() -> None:
    for selection in (FIRST, SECOND, THIRD):
        base = _net()
        same = get_peft_model(_net(), _config(base, selection, init_weights=True))
        moved = get_peft_model(_net(), _config(base, selection, init_weights=False))
        with torch.no_grad():
            assert torch.equal(same(X), base(X))
            assert not torch.allclose(moved(X), base(X), atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"r": 0}, "r is 0"),
        ({"layers_pattern": "layer"}, "layers_to_transform"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform has no effect"),
        ({"target_modules": r".*\.first", "layers_to_transform": 0}, "layers_to_transform has no effect"),
    ],
)
def test_contradictory_configs_are_refused(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ReltuneConfig(**{"target_modules": ["first"], **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["first"]},
        {"exclude_modules": ["first"]},
        {"layers_to_transform": [0]},
        {"rank_pattern": {"first": 2}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_plan_and_a_choice_of_modules_contradict_each_other(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"a plan names its modules.*{next(iter(fields))}"):
        ReltuneConfig(plan=_plan(_net(), FIRST), **fields)


# -- plans that do not fit -------------------------------------------------------------------------------------------------


def test_plan_given_as_a_path(tmp_path: Path) -> None:
    _plan(_net(), FIRST).save(tmp_path / "plan")
    for path in (tmp_path / "plan", tmp_path / "plan" / "plan.yaml", str(tmp_path / "plan")):
        torch.manual_seed(4)
        one = get_peft_model(_net(), ReltuneConfig(plan=path, init_weights=False))
        torch.manual_seed(4)
        two = get_peft_model(_net(), _config(_net(), FIRST))
        assert torch.equal(one(X), two(X))
    with pytest.raises(InputError, match="does not exist"):
        ReltuneConfig(plan=tmp_path / "nowhere")


def test_plan_for_another_model_is_refused(saved: dict[str, Any]) -> None:
    base = _net()
    plan = _plan(base, FIRST, fingerprint=fingerprint(base))
    get_peft_model(_net(), ReltuneConfig(plan=plan))
    with pytest.raises(InputError, match="another base model"):
        get_peft_model(_net(seed=1), ReltuneConfig(plan=plan))
    other = _load_base(saved)
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight.mul_(1.5)
    with pytest.raises(InputError, match="another base model"):
        PeftModel.from_pretrained(other, saved["adapter"])
    # a new head is no part of what the plan is for
    head = _load_base(saved)
    with torch.no_grad():
        head.classifier.weight.mul_(1.5)
    PeftModel.from_pretrained(head, saved["adapter"])


def test_second_adapter_for_another_model_is_refused() -> None:
    base = _net()
    model = get_peft_model(base, _config(base, FIRST, fingerprint=fingerprint(_net())))
    model(X).sum().backward()
    model.add_adapter("fits", _config(_net(), SECOND, fingerprint=fingerprint(_net())))
    with pytest.raises(InputError, match="another base model"):
        model.add_adapter("other", _config(_net(), SECOND, fingerprint=fingerprint(_net(seed=1))))


def test_module_that_is_missing_is_named() -> None:
    plan = _plan(_net(), FIRST)
    plan.modules["secnod"] = plan.modules.pop("second")
    with pytest.raises(InputError, match=r"'secnod'.*'second'"):
        get_peft_model(_net(), ReltuneConfig(plan=plan))


def test_module_of_another_shape_is_refused() -> None:
    plan = _plan(_net(), _in_the_weight(FIRST))
    plan.modules["second"].shape = (8, 16)
    with pytest.raises(InputError, match=r"second.*\[8, 16\].*\[8, 8\]"):
        get_peft_model(_net(), ReltuneConfig(plan=plan))


def test_names_are_taken_in_full() -> None:
    """PEFT's rule by the end of a name would take the namesake as well."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()
            self.first = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.inner(x))

    outer = Outer()
    model = get_peft_model(outer, _config(outer, {"first": {"columns": [1]}}))
    assert set(_layers(model)) == {"first"}


class Shared(nn.Module):
    """Two names for one weight: once the parameter, once the module."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.first = nn.Linear(6, 8)
        self.other = nn.Linear(6, 8)
        if what == "parameter":
            self.first.weight = self.embedding.weight
        else:
            self.other = self.first

    def forward(self, ids: Tensor) -> Tensor:
        return self.first(self.embedding(ids)) + self.other(self.embedding(ids))


@pytest.mark.parametrize("what", ["parameter", "module"])
def test_shared_weights_are_refused(what: str) -> None:
    """Written columns would change the other module too, which has neither a gradient nor an undo."""
    with pytest.raises(InputError, match="first shares its weight with"):
        get_peft_model(Shared(what), ReltuneConfig(r=2, target_modules=["first"]))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} shares its weight with"):
        get_peft_model(_llama(), ReltuneConfig(r=2, target_modules=[name]))


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4, max_norm=1.0, sparse=True)
        self.counting = nn.Embedding(4, 4, scale_grad_by_freq=True)
        self.convolution = nn.Conv1d(4, 4, 1)
        self.subclass = nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)
        self.plain_norm = nn.LayerNorm(4, elementwise_affine=False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedding", "Embedding with max_norm with sparse, which"),
        ("counting", "Embedding with scale_grad_by_freq, which"),
        ("convolution", "Conv1d"),
        ("subclass", "NonDynamicallyQuantizableLinear"),
        ("plain_norm", "LayerNorm"),
    ],
)
def test_unsupported_layer_types_are_named(name: str, kind: str) -> None:
    with pytest.raises(TypeError, match=f"{name} is a {kind}"):
        get_peft_model(Unsupported(), ReltuneConfig(target_modules=[name]))


def test_bias_that_is_not_there_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False))
    plan = Plan({"0": ModulePlan((3, 3), bias=True)}, "all", 100, 9, "")
    with pytest.raises(InputError, match="bias of 0, which has no bias"):
        get_peft_model(net, ReltuneConfig(plan=plan))


# -- dtype, device, compiler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_change_of_dtype(dtype: torch.dtype) -> None:
    model = _model(FIRST, other=SECOND)
    model(X)
    model.to(dtype)
    for layer in _layers(model).values():
        for buffers in (layer.reltune_column_indices, layer.reltune_row_indices):
            assert all(t.dtype == torch.int64 for t in buffers.values())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            expected = _dense(model, name, base=_net(dtype=dtype))
            torch.testing.assert_close(model(X.to(dtype)), expected(X.to(dtype)), rtol=0, atol=tolerance)
        with model.disable_adapter():
            assert torch.equal(model(X.to(dtype)), _net(dtype=dtype)(X.to(dtype)))
    _check_base_is(_base_state(model), _net(dtype=dtype))


def test_moving_to_another_device_in_between() -> None:
    """Every tensor is replaced by another one, as a move does."""
    model, other = _model(FIRST, other=SECOND), _model(FIRST, other=SECOND)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in (model, other)]
    for step in range(4):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            m(X).square().mean().backward()
            optimizer.step()
        if step % 2:
            model._apply(lambda t: t.clone())
    with torch.no_grad():
        assert torch.equal(model(X), other(X))
    model.set_adapter("other")
    _check_output(model, "other")
    _check_base_is(_base_state(model), _net())


def test_change_of_dtype_while_merged() -> None:
    model = _model(THIRD, other=FIRST)
    model.merge_adapter(adapter_names=["default", "other"])
    model.float()
    model.unmerge_adapter()
    _check_base_is(_base_state(model), _net(dtype=torch.float32))


def test_compiled_inference_and_training_give_the_same_values() -> None:
    model, plain = _model(FIRST, other=SECOND), _model(FIRST, other=SECOND)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), plain(X))
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(compiled(X), plain(X))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (model, plain)]
    for _ in range(4):
        losses = []
        for run, optimizer in zip((compiled, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss = run(X).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    for m in (model, plain):
        m.set_adapter("other")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), plain(X), rtol=0, atol=1e-12)


def test_training_does_not_compile_again_after_every_step() -> None:
    torch._dynamo.reset()
    model = _model(FIRST)
    compiled = torch.compile(model, backend=(counter := _CountCompilations()))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    counts = []
    for _ in range(5):
        compiled(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(counter.count)
    assert counts[-1] == counts[1]


class _CountCompilations:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.count += 1
        return graph.forward


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():  # larger, or greedy decoding would say the same whatever is changed
        for p in model.parameters():
            p.mul_(8)
    return model


def test_new_tokens_are_trained_and_saved_along(tmp_path: Path) -> None:
    config = ReltuneConfig(r=2, target_modules=["down_proj"], trainable_token_indices=[3, 7], task_type="CAUSAL_LM")
    model = get_peft_model(_llama(), config)
    ids = torch.tensor([[3, 7, 5, 3]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert not torch.allclose(logits, _llama()(input_ids=ids).logits, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_llama(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=0, atol=1e-12)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=0, atol=1e-10)


def test_decoder_generates_the_same_merged_and_not() -> None:
    base = _llama()
    selection: Selection = {
        "model.layers.0.self_attn.k_proj": {"rows": [1, 5]},
        "model.layers.1.mlp.down_proj": {"columns": [0, 20]},
        "model.layers.1.input_layernorm": {"weight": True},
        "model.norm": {"weight": True},
    }
    untuned = copy.deepcopy(base)
    model = get_peft_model(base, _config(base, selection, task_type="CAUSAL_LM"))
    ids = torch.randint(0, 30, (2, 5))
    written = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    with model.disable_adapter():
        assert torch.equal(
            model.generate(input_ids=ids, max_new_tokens=12, do_sample=False),
            untuned.generate(input_ids=ids, max_new_tokens=12, do_sample=False),
        )
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=12, do_sample=False), written)


def test_reltune_offers_the_config_by_name() -> None:
    assert reltune.ReltuneConfig is ReltuneConfig


# -- what else PEFT's methods are expected to do -------------------------------------------------------------------------


def test_base_weights_are_read_and_replaced_beneath_the_adapters() -> None:
    """Whatever is written into them, and whether or not a graph needs it there."""
    for active in (["default"], ["default", "other"]):
        model, base = _model(FIRST, other=SECOND), _net()
        model.base_model.set_adapter(active)
        with torch.no_grad():
            expected = model(X)
        assert get_base_model_state_dict(model).keys() == base.state_dict().keys()
        saved = get_base_model_state_dict(model)
        _check_base_is(saved, base)
        # and without a copy of the model, where no graph needs the weights
        assert saved["first.weight"].data_ptr() == _layers(model)["first"].weight.data_ptr()
        held = model(X).sum()
        saved = get_base_model_state_dict(model)
        _check_base_is(saved, base)
        held.backward()
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
        other = _net(seed=4)
        set_base_model_state_dict(model, other.state_dict())
        _check_base_is(get_base_model_state_dict(model), other)
        _check_output_over(model, other, *active)


def _check_output_over(model: nn.Module, base: nn.Module, *adapters: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(X), _dense(model, *adapters, base=base)(X), rtol=0, atol=1e-12)


def test_reference_output_while_a_graph_lives_is_the_base_to_the_bit() -> None:
    model = _model(FIRST, dtype=torch.float32)
    x = X.float()
    held = model(x).sum()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), _net(dtype=torch.float32)(x))
    held.backward()


@pytest.mark.parametrize("units", [{"columns": [0, 2]}, {"weight": True}, {"bias": True}], ids=lambda u: next(iter(u)))
def test_hooks_of_the_base_layer_are_called_whatever_is_asked_for(units: dict[str, Any]) -> None:
    model = _model({"first": units})
    calls: list[nn.Module] = []
    _layers(model)["first"].base_layer.register_forward_hook(lambda module, *_: calls.append(module))
    held = model(X)
    with torch.no_grad(), model.disable_adapter():  # while a graph holds the weight
        model(X)
    held.sum().backward()
    with torch.no_grad():
        model(X)
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["columns", "rows", "weight", "bias", "elements", "directions"])
def test_half_precision_bases_train_in_float32_unless_told_otherwise(dtype: torch.dtype, kind: str) -> None:
    units: Any = True if kind in ("weight", "bias") else [1, 3]
    for cast, expected in ((True, torch.float32), (False, dtype)):
        base = _net(dtype=dtype)
        model = get_peft_model(base, _config(base, {"first": {kind: units}}), autocast_adapter_dtype=cast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
        model(X.to(dtype)).float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == expected for p in model.parameters() if p.requires_grad)


def test_model_on_the_meta_device_is_adapted_and_filled_later(tmp_path: Path) -> None:
    model = _model(FIRST)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = Net()
    loaded = PeftModel.from_pretrained(empty, tmp_path, low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"meta"}
    fresh = get_peft_model(Net().to("meta"), ReltuneConfig(target_modules=["first"], r=2))
    assert {p.device.type for p in fresh.parameters()} == {"meta"}


def test_gradients_are_turned_on_and_off_by_adapter() -> None:
    model = _model(FIRST, other=SECOND)

    def trained() -> set[str]:
        return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"default"}
    model.set_requires_grad("default", requires_grad=False)
    assert trained() == set()
    model.set_requires_grad(["default", "other"])
    assert trained() == {"default", "other"}
    model.set_adapter("other", inference_mode=True)
    assert trained() == set()


def test_whole_tensors_are_used_under_fsdp() -> None:
    """FSDP puts the parameters that a forward pass finds past the registered ones."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = _model({"first": {"columns": [1], "rows": [2]}, "norm": {"weight": True, "bias": True}})
        with torch.no_grad():
            expected = model(X)
            wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
            torch.testing.assert_close(wrapped(X), expected, rtol=0, atol=1e-12)
    finally:
        dist.destroy_process_group()


def test_tensors_put_past_the_registered_ones_are_left_there() -> None:
    model = _model({"norm": {"weight": True, "bias": True}})
    module = _layers(model)["norm"].get_base_layer()
    put = {name: p.detach().clone() for name, p in module.named_parameters()}
    vars(module).update(put)
    _check_output(model, "default")
    assert all(vars(module)[name] is tensor for name, tensor in put.items())


def test_what_reltune_does_not_do_is_refused_by_name(tmp_path: Path) -> None:
    model = _model(FIRST, other=SECOND)
    with pytest.raises(NotImplementedError, match="make several active at once"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(_net(), ReltuneConfig(target_modules=["first"]), mixed=True)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)
    lora = get_peft_model(_net(), LoraConfig(target_modules=["first"]))
    with pytest.raises(InputError, match=r"first already has an adapter of another method \(peft.tuners.lora"):
        get_peft_model(lora, ReltuneConfig(target_modules=["first"]))
    words = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"cannot be applied to modules of type .*ReltuneEmbedding"):
        get_peft_model(words, ReltuneConfig(target_modules=["0"], trainable_token_indices={"0": [1]}))
