"""Every layer type × every kind of unit: training, switching, disabling, merging, saving; on the accelerator if there is one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel
from transformers.pytorch_utils import Conv1D

from oracles import dense_update
from relevance_cases import measure
from reltune.layers.inventory import take_inventory
from reltune.layers.registry import layer_type
from reltune.plan.plan import ModulePlan, Plan
from reltune.plan.selection import select
from reltune.tuner import ReltuneConfig
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.written_weight import Seen

Selection = dict[str, dict[str, Any]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNITS = ["columns", "rows", "columns and rows", "elements", "columns, rows and elements", "weight and bias", "bias"]


class Words(nn.Module):
    """An embedding with a padding token, and Transformers' Conv1D behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=2)
        self.positions = nn.Embedding(5, 6)
        self.mixed = Conv1D(8, 6)
        self.head = Conv1D(3, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(torch.tanh(self.mixed(h)))


class Picture(nn.Module):
    """Convolutions of all sorts: strided and padded, in groups, depthwise, with another padding mode, dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=1)
        self.grouped = nn.Conv2d(6, 4, 3, padding=1, groups=2, padding_mode="circular")
        self.depthwise = nn.Conv2d(4, 8, 2, groups=4, bias=False)
        self.dilated = nn.Conv2d(8, 3, 2, dilation=(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = torch.tanh(module(x))
        return x


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": 12, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8, "bos_token_id": 0}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, eos_token_id=0, tie_word_embeddings=False))


def _bert() -> nn.Module:
    sizes = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**sizes, **dropout, intermediate_size=12, max_position_embeddings=8, pad_token_id=2))


def _vit() -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=3))


TOKENS = torch.tensor([[1, 2, 7, 7], [0, 4, 2, 8]], device=DEVICE)
IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).to(DEVICE)

MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "words": (Words, TOKENS),
    "picture": (Picture, IMAGES),
    "gpt2": (_gpt2, TOKENS),
    "bert": (_bert, TOKENS),
    "vit": (_vit, IMAGES),
}


def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double().eval().to(DEVICE)


def _output(model: nn.Module, name: str) -> Tensor:
    inputs = MODELS[name][1]
    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
    found = model(inputs)
    return found if isinstance(found, Tensor) else found[0]


def _losses(name: str, steps: int) -> list[list[Callable[[nn.Module], Tensor]]]:
    def loss(step: int) -> Callable[[nn.Module], Tensor]:
        def run(model: nn.Module) -> Tensor:
            y = _output(model, name)
            target = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(step))
            return (y - target.to(DEVICE)).square().mean()

        return run

    return [[loss(step)] for step in range(steps)]


def _selection(model: nn.Module, units: str, second: bool = False) -> Selection:
    """Units of every module that has some; ``second`` takes others of them, some of them the same."""
    found: Selection = {}
    for info in take_inventory(model).modules:
        own: dict[str, Any] = {}
        if info.layer_type == "norm":
            own = {"weight": True} if units.startswith("weight") else {}
        elif units.startswith("weight"):
            own = {"weight": True}
        elif units == "elements":
            flat = [2, 2 * info.columns + 1, info.weight_parameters - 1] if not second else [2 * info.columns + 1, 3]
            own = {"elements": flat} if "element" in layer_type(info.layer_type).trains else {"columns": [0]}
        elif units == "directions":
            own = {"directions": [2, 0] if not second else [1]}
            own = own if "direction" in layer_type(info.layer_type).trains else {"columns": [0]}
        elif "columns" in units or "rows" in units:
            columns, rows = ([0, info.columns - 1], [info.rows - 1, 0]) if not second else ([0], [1, 0])
            own = {"columns": columns} if "columns" in units else {}
            own |= {"rows": rows} if "rows" in units else {}
            if (
                "elements" in units and "element" in layer_type(info.layer_type).trains
            ):  # in none of these columns and rows
                own["elements"] = [info.columns + 2, info.columns + 1]
        if "bias" in units and info.bias:
            own["bias"] = True
        if own:
            found[info.name] = own
    return found


def _config(model: nn.Module, selection: Selection, **fields: Any) -> ReltuneConfig:
    inventory = take_inventory(model)
    modules = {
        name: ModulePlan(inventory[name].shape, groups=inventory[name].groups, **units)
        for name, units in selection.items()
    }
    for module in modules.values():
        if module.directions:
            module.vectors = np.random.default_rng(1).normal(size=(3, module.shape[1])).astype(np.float32)
    return ReltuneConfig(plan=Plan(modules, "all", 10**9, 10**9, ""), **fields)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _merged(model: PeftModel, *adapters: str) -> dict[str, Tensor]:
    return copy.deepcopy(model).merge_and_unload(adapter_names=list(adapters) or None).state_dict()


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", MODELS)
def test_trajectory_is_that_of_full_fine_tuning(name: str, units: str) -> None:
    dense = _made(name)
    selection = _selection(dense, units)
    model = get_peft_model(_made(name), _config(dense, selection)).eval()
    start, where = copy.deepcopy(dense).state_dict(), dense_update.masks(dense, selection)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)

    steps = _losses(name, 8)
    expected = dense_update.train(dense, selection, optimizer, steps, max_norm=1.0)
    mine, losses = optimizer(_trained(model)), []
    for (loss,) in steps:
        mine.zero_grad()
        value = loss(model)
        value.backward()
        torch.nn.utils.clip_grad_norm_(_trained(model), 1.0)
        mine.step()
        losses.append(value.item())
    assert losses == pytest.approx(expected, rel=0, abs=1e-9)
    merged = _merged(model)
    for key, tensor in dense.state_dict().items():
        assert (merged[key] - tensor).abs().max() <= 1e-9 * max(1.0, tensor.abs().max().item()), key
        assert torch.equal(merged[key][~where[key]], start[key][~where[key]]), key
    assert any((merged[key] != start[key]).any() for key in merged)
    with torch.no_grad():
        torch.testing.assert_close(_output(model, name), _output(dense, name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("units", ["columns and rows", "elements", "weight and bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_under_autocast_losses_fall_as_those_of_full_fine_tuning(name: str, dtype: torch.dtype, units: str) -> None:
    """In half precision products round, and both by the same rules: parameters and their gradients stay in float32."""
    dense = _made(name).float()
    selection = _selection(dense, units)
    model = get_peft_model(_made(name).float(), _config(dense, selection)).eval()
    steps = [[_autocast(loss, dtype)] for (loss,) in _losses(name, 6)]
    expected = dense_update.train(dense, selection, lambda p: torch.optim.SGD(p, lr=0.2), steps)
    optimizer, losses = torch.optim.SGD(_trained(model), lr=0.2), []
    for (loss,) in steps:
        optimizer.zero_grad()
        value = loss(model)
        (value * 1024).backward()  # as a gradient scaler does
        for parameter in _trained(model):
            assert parameter.dtype == torch.float32
            if parameter.grad is not None:  # the loss does not reach a pooler
                parameter.grad /= 1024
        optimizer.step()
        losses.append(value.item())
    assert losses == pytest.approx(expected, rel=2e-2 if dtype == torch.bfloat16 else 4e-3)
    assert abs(losses[-1] - expected[0]) > 10 * abs(losses[-1] - expected[-1])  # and they have moved


def _autocast(loss: Callable[[nn.Module], Tensor], dtype: torch.dtype) -> Callable[[nn.Module], Tensor]:
    def run(model: nn.Module) -> Tensor:
        with torch.autocast(DEVICE, dtype):
            return loss(model)

    return run


def test_the_padding_token_gets_no_gradient_in_any_way() -> None:
    for units in ({"rows": [2, 7]}, {"columns": [1, 3]}, {"weight": True}):
        base = _made("words")
        model = get_peft_model(base, _config(base, {"words": units}))
        for path in ("written", "beside"):
            model.zero_grad()
            loss = _losses("words", 1)[0][0]
            if (
                path == "beside"
            ):  # while a graph of the first adapter lives, another one's values are added to its product
                held = _output(model, "words")
                model.add_adapter("other", _config(_made("words"), {"words": units}, init_weights=False))
                model.set_adapter("other")
            loss(model).backward()
            layer = model.base_model.model.words
            reached = []
            for kind in ("reltune_columns", "reltune_rows", "reltune_weight"):
                for adapter, trained in getattr(layer, kind).items():
                    if trained.grad is not None:
                        row = 0 if kind == "reltune_rows" else 2
                        assert not trained.grad[row].any() and trained.grad.any(), (units, path, adapter)
                        reached.append(adapter)
            assert reached == ["default" if path == "written" else "other"], (units, path)
        del held


def _two(name: str, units: str, other: str) -> PeftModel:
    """Adapter "default" and "other", both moved away from the base."""
    torch.manual_seed(1)
    base = _made(name)
    model = get_peft_model(base, _config(base, _selection(base, units), init_weights=False)).eval()
    model.add_adapter("other", _config(_made(name), _selection(_made(name), other, second=True), init_weights=False))
    return model


PAIRS = [
    ("columns and rows", "columns and rows"),
    ("columns", "rows"),
    ("rows", "weight and bias"),
    ("elements", "elements"),
    ("columns, rows and elements", "elements"),
    ("directions", "directions"),
    ("columns and rows", "directions"),
]


def _added(model: PeftModel, name: str, *adapters: str) -> nn.Module:
    """A plain copy of the base with the changes of the adapters added up."""
    plain, base = _made(name), _made(name).state_dict()
    state = {key: value.clone() for key, value in base.items()}
    for adapter in adapters:
        for key, value in _merged(model, adapter).items():
            state[key] += value - base[key]
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("pair", PAIRS, ids=" | ".join)
@pytest.mark.parametrize("name", MODELS)
def test_adapters_switch_add_up_and_leave(name: str, pair: tuple[str, str]) -> None:
    model = _two(name, *pair)
    base = _made(name)
    with torch.no_grad():
        for adapters in (["default"], ["other"], ["default", "other"], ["other", "default"]):
            model.base_model.set_adapter(adapters)
            expected = _output(_added(model, name, *adapters), name)
            torch.testing.assert_close(_output(model, name), expected, rtol=0, atol=1e-10)
            with model.disable_adapter():
                assert torch.equal(_output(model, name), _output(base, name))
            model.merge_adapter(safe_merge=True)
            torch.testing.assert_close(_output(model, name), expected, rtol=0, atol=1e-10)
            model.unmerge_adapter()
    state = copy.deepcopy(model).unload().state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    model.delete_adapter("other")
    model.set_adapter("default")
    with torch.no_grad():
        expected = _output(_added(model, name, "default"), name)
        torch.testing.assert_close(_output(model, name), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pair", PAIRS, ids=" | ".join)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_asked_for_while_a_graph_lives(name: str, pair: tuple[str, str]) -> None:
    """Disabling, switching and adding, computed beside the product, have the values and the gradients they should."""
    model = _two(name, *pair)
    loss = _losses(name, 1)[0][0]

    def gradients(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, _trained(model), allow_unused=True, materialize_grads=True)  # BERT's pooler

    model.set_adapter("default")
    expected = gradients(loss(model))
    held = loss(model)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(_output(model, name), _output(_made(name), name), rtol=0, atol=1e-10)
    model.set_adapter("other")
    beside = gradients(loss(model))
    model.set_adapter("default")
    for got, want in zip(gradients(held), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    del held
    model.set_adapter("other")
    written = {m._written for m in model.modules() if isinstance(m, ReltuneLayer)}
    assert ("other" in written) == ("weight" not in pair[1]) and "default" not in written
    assert any(g.any() for g in beside)
    for got, want in zip(gradients(loss(model)), beside, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("units", ["columns and rows", "columns, rows and elements", "directions", "weight and bias"])
@pytest.mark.parametrize("name", MODELS)
def test_saved_adapters_load(name: str, units: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = _two(name, units, "columns")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_made(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    loaded.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        with torch.no_grad():
            assert torch.equal(_output(loaded, name), _output(model, name))


@pytest.mark.parametrize(
    ("name", "target", "count"),
    [
        ("words", "words", 6),
        ("words", "mixed", 6),
        ("picture", "grouped", 6),
        ("picture", "strided", 3),
        ("picture", "depthwise", 4),
    ],
)
def test_without_a_plan_the_largest_columns_are_taken(name: str, target: str, count: int) -> None:
    base = _made(name)
    where = [dense_update.masks(base, {target: {"columns": [i]}})[f"{target}.weight"] for i in range(count)]
    weight = base.get_submodule(target).weight.detach()  # type: ignore[union-attr,operator]
    norms = torch.stack([weight[mask].norm() for mask in where])  # type: ignore[index]
    model = get_peft_model(base, ReltuneConfig(target_modules=[target], r=2))
    indices = model.base_model.model.get_submodule(target).reltune_column_indices["default"]  # type: ignore[union-attr,index]
    assert indices.tolist() == sorted(norms.topk(2).indices.tolist())
    every = get_peft_model(_made(name), ReltuneConfig(target_modules=[target], r=99))
    assert len(every.base_model.model.get_submodule(target).reltune_column_indices["default"]) == count  # type: ignore[union-attr,index,arg-type]


def test_all_linear_finds_conv1d_again_under_an_adapter() -> None:
    model = get_peft_model(_made("gpt2"), ReltuneConfig(target_modules="all-linear", r=1))
    model.add_adapter("other", ReltuneConfig(target_modules="all-linear", r=2))
    assert model.targeted_module_names and model.peft_config["default"].target_modules
    for layer in (m for m in model.modules() if isinstance(m, ReltuneLayer)):
        assert {"default", "other"} <= set(layer.reltune_columns)


@pytest.mark.parametrize("change", [{"groups": 1, "shape": (4, 3, 3, 3), "columns": [4]}, {"groups": 4}])
def test_groups_of_another_model_are_refused(change: dict[str, Any]) -> None:
    plan = ModulePlan(**{"shape": (4, 3, 3, 3), "rows": [1], "groups": 2, **change})
    with pytest.raises(ValueError, match=r"groups|columns"):
        get_peft_model(_made("picture"), ReltuneConfig(plan=Plan({"grouped": plan}, "all", 999, 999, "")))


@pytest.mark.parametrize("name", ["words", "picture"])
def test_compiled_layers_give_the_same_values(name: str) -> None:
    model = _two(name, "columns and rows", "columns")
    expected = _output(model, name)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(_output(compiled, name), expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(_output(run, name).square().sum(), _trained(model)) for run in (compiled, model)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "granularity", "target"),
    [
        ("bert", "row", "word_embeddings"),
        ("bert", "column", "position_embeddings"),
        ("vit", "row", "patch_embeddings"),
        ("vit", "column", "patch_embeddings"),
        ("picture", "column", "grouped"),
        ("picture", "row", "depthwise"),
        ("gpt2", "column", "mlp"),
    ],
)
def test_measured_units_are_selected_saved_and_tuned(name: str, granularity: str, target: str, tmp_path: Path) -> None:
    model = _made(name)
    relevance = measure(model, criteria=["magnitude"])
    plan = select(relevance, "20%", granularity, target_modules=[target])
    assert plan.modules and all(target in key for key in plan.modules)
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.modules == plan.modules
    again.check_model(take_inventory(model), again.fingerprint)
    tuned = get_peft_model(_made(name), ReltuneConfig(plan=tmp_path, init_weights=False))
    assert sum(p.numel() for p in _trained(tuned)) == plan.parameters <= plan.budget_parameters
    start, where = model.state_dict(), dense_update.masks(model, _chosen(plan))
    for key, value in tuned.merge_and_unload().named_parameters():
        assert torch.equal(value != start[key], where[key]), key


def _chosen(plan: Plan) -> Selection:
    return {name: {"columns": m.columns, "rows": m.rows} for name, m in plan.modules.items()}


@pytest.mark.parametrize("units", ["columns", "rows", "columns and rows", "directions"])
@pytest.mark.parametrize("name", ["words", "picture", "gpt2"])
def test_the_lora_form_is_the_change(name: str, units: str) -> None:
    """lora_B lora_A against the difference of the merged and the base's weight; of a convolution one after the other."""
    base = _made(name)
    model = get_peft_model(_made(name), _config(base, _selection(base, units)))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in _trained(model):
            p += torch.randn_like(p)
    merged, weights = _merged(model), base.state_dict()
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, ReltuneLayer)}
    assert set(layers) == {info.name for info in take_inventory(base).modules if info.layer_type != "norm"}
    for key, layer in layers.items():
        change = merged[f"{key}.weight"] - weights[f"{key}.weight"]
        refused = key in ("grouped", "depthwise", "dilated")
        assert bool(layer.why_no_lora("default")) == refused
        if refused:
            continue
        assert layer.fan_in_fan_out == (type(base.get_submodule(key)) is Conv1D)
        factors = layer.lora_tensors("default")
        if isinstance(base.get_submodule(key), nn.Embedding):
            found = (factors["lora_embedding_B"] @ factors["lora_embedding_A"]).mT  # as PEFT adds it
        elif change.ndim == 4:
            found = torch.einsum("orxy,rihw->oihw", factors["lora_B.weight"], factors["lora_A.weight"])
        else:
            found = factors["lora_B.weight"] @ factors["lora_A.weight"]
            found = found.mT if layer.fan_in_fan_out else found
        torch.testing.assert_close(found, change)
        torch.testing.assert_close(layer.get_delta_weight("default"), change)


def test_what_no_lora_can_carry_says_what_to_do() -> None:
    base = _made("words")
    for units, why in (
        ("elements", "trains single weights"),
        ("weight and bias", "trains a whole weight"),
        ("bias", "a bias"),
    ):
        model = get_peft_model(_made("words"), _config(base, _selection(base, units)))
        assert why in model.get_submodule("base_model.model.mixed").why_no_lora("default")


def test_a_layer_by_its_defaults_trains_from_the_bases_values() -> None:
    base = _made("words")
    model = get_peft_model(_made("words"), _config(base, _selection(base, "columns")))
    layer = model.get_submodule("base_model.model.head").eval()
    assert layer.train() is layer and layer.training and layer.base_layer.training
    layer.update_layer("other", ModulePlan((3, 8), columns=[5, 1]))
    assert torch.equal(layer.reltune_columns["other"], base.head.weight[[5, 1]])  # Conv1D's is stored (in, out)


def test_a_layer_that_is_to_change_something_at_once_starts_near_the_base() -> None:
    base = _made("words")
    layer = get_peft_model(base, _config(base, _selection(base, "columns"))).get_submodule("base_model.model.head")
    torch.manual_seed(0)
    layer.update_layer("near", ModulePlan((3, 8), columns=[*range(8)]), init_weights=False)
    away = layer.reltune_columns["near"] - _made("words").head.weight
    assert 0.05 < away.std() < 0.2 and away.count_nonzero() == 24


def test_a_copy_knows_whether_its_tensors_were_written_to() -> None:
    tensor = torch.zeros(2)
    seen = Seen([tensor])
    for _ in range(2):
        other, copied = copy.deepcopy((seen, tensor))
        assert other.still([copied]) and not other.still([copied, copied]) and not other.still([tensor])
        copied.add_(1)
        assert not other.still([copied])
        tensor.add_(0)
        other, copied = copy.deepcopy((seen, tensor))
        assert not seen.still([tensor]) and not other.still([copied])
        seen = Seen([tensor])
