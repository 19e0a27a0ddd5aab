"""Adapters that strangers send: every layer type × kind of unit × index, other bases, and files that were tampered with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fuzz_loaders
from reltune.errors import InputError, StorageError
from reltune.layers.fingerprint import Base, any_base, digest, fingerprint
from reltune.layers.inventory import take_inventory
from reltune.methods.adapter import load_adapter, save_adapter
from reltune.plan.plan import ModulePlan, Plan
from reltune.tensor_files import check_saved
from reltune.tuner import ReltuneConfig
from reltune.tuner.checks import check_indices, read_adapter_config

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Every side has another size, so that no side passes for another one.
KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 7),
    "conv1d": lambda: Conv1D(7, 5),
    "embedding": lambda: nn.Embedding(11, 6),
    "conv2d": lambda: nn.Conv2d(4, 6, (2, 3)),
    "grouped": lambda: nn.Conv2d(4, 6, (2, 3), groups=2),
}
SIZES = {  # columns and rows, by what a layer type calls so
    "linear": (5, 7),
    "conv1d": (5, 7),
    "embedding": (6, 11),
    "conv2d": (4, 6),
    "grouped": (4, 6),
}
CASES = [(kind, unit) for kind in KINDS for unit in ("column", "row")] + [("linear", "element"), ("conv1d", "element")]


class Net(nn.Module):
    """One module to adapt; PEFT saves a model's name with the adapter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = KINDS[kind]()
        if kind == "conv1d":
            nn.init.normal_(self.inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def size_of(kind: str, unit: str) -> int:
    columns, rows = SIZES[kind]
    return {"column": columns, "row": rows, "element": columns * rows}[unit]


def saved(kind: str, unit: str, folder: Path, indices: list[int]) -> Path:
    """An adapter on these units, with values that are not the base's."""
    model = Net(kind)
    (info,) = take_inventory(model).modules
    plan = Plan({"inner": ModulePlan(info.shape, groups=info.groups, **{f"{unit}s": indices})}, "all", 10**6, 10**6, "")
    adapted = get_peft_model(model, ReltuneConfig(plan=plan))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.arange(1.0, parameter.numel() + 1).reshape(parameter.shape) * 10)
    save_adapter(adapted, folder, None)
    return folder


def tampered(folder: Path, unit: str, indices: list[int]) -> None:
    tensors = load_file(folder / WEIGHTS)
    (key,) = [key for key in tensors if key.endswith(f"reltune_{unit}_indices")]
    tensors[key] = torch.tensor(indices, dtype=tensors[key].dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def canonical(kind: str, weight: Tensor) -> Tensor:
    return weight.mT if kind == "conv1d" else weight


def changed(kind: str, unit: str, index: int) -> Tensor:
    """Which cells of the canonical weight a unit has, written out cell by cell."""
    where = torch.zeros_like(canonical(kind, Net(kind).inner.weight), dtype=torch.bool)
    columns, _ = SIZES[kind]
    if unit == "row":
        where[index] = True
    elif unit == "element":
        where[index // columns, index % columns] = True
    elif kind == "grouped":  # four channels in two groups, three filters in each
        where[index // 2 * 3 : index // 2 * 3 + 3, index % 2] = True
    else:
        where[:, index] = True
    return where


def stored_index(kind: str, unit: str, index: int) -> int:
    """Files count single weights as the weight is stored, which of Conv1D is the other way round."""
    if (kind, unit) != ("conv1d", "element"):
        return index
    columns, rows = SIZES[kind]
    return index % columns * rows + index // columns


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize(("kind", "unit"), CASES)
def test_the_first_and_the_last_unit_are_loaded_where_they_belong(
    tmp_path: Path, kind: str, unit: str, which: str
) -> None:
    index = 0 if which == "first" else size_of(kind, unit) - 1
    folder = saved(kind, unit, tmp_path / "made", [1])
    tampered(folder, unit, [stored_index(kind, unit, index)])
    base = canonical(kind, Net(kind).inner.weight.detach().clone())
    merged = canonical(kind, load_adapter(Net(kind), folder).merge_and_unload().inner.weight.detach())
    where = changed(kind, unit, index)
    assert torch.equal(merged[~where], base[~where]) and (merged[where] != base[where]).all()


@pytest.mark.parametrize("load", [load_adapter, lambda base, path: PeftModel.from_pretrained(base, str(path))])
@pytest.mark.parametrize("fault", ["one too far", "negative", "repeated", "far"])
@pytest.mark.parametrize(("kind", "unit"), CASES)
def test_indices_that_are_no_units_are_refused(
    tmp_path: Path, kind: str, unit: str, fault: str, load: Callable[..., Any]
) -> None:
    folder = saved(kind, unit, tmp_path / "made", [1, 2])
    size = size_of(kind, unit)
    far = 2**62 if unit != "element" else 2**31 - 1  # the widest of its type
    indices = {"one too far": [0, size], "negative": [-1, 1], "repeated": [1, 1], "far": [0, far]}[fault]
    tampered(folder, unit, indices)
    with pytest.raises(InputError, match="indices"):
        load(Net(kind), folder)


@pytest.mark.parametrize(("kind", "unit"), CASES)
def test_the_same_in_a_plan(tmp_path: Path, kind: str, unit: str) -> None:
    (info,) = take_inventory(Net(kind)).modules
    size = size_of(kind, unit)
    for indices, good in (
        ([0], True),
        ([size - 1], True),
        ([size], False),
        ([-1], False),
        ([1, 1], False),
        ([2**70], False),
    ):
        plan = Plan(
            {"inner": ModulePlan(info.shape, groups=info.groups, **{f"{unit}s": indices})}, "all", 10**6, 10**6, ""
        )
        plan.save(tmp_path / "plan")
        if good:
            get_peft_model(Net(kind), ReltuneConfig(plan=tmp_path / "plan"))
        else:
            with pytest.raises(InputError):
                Plan.load(tmp_path / "plan")


def test_single_weights_inside_of_columns_or_rows_are_refused(tmp_path: Path) -> None:
    for kind in ("linear", "conv1d"):
        model = Net(kind)
        (info,) = take_inventory(model).modules
        units = ModulePlan(info.shape, columns=[4], rows=[6], elements=[0])
        adapted = get_peft_model(model, ReltuneConfig(plan=Plan({"inner": units}, "all", 10**6, 10**6, "")))
        save_adapter(adapted, tmp_path / kind, None)
        for index in (4, 5 * 6):  # in row 0 and column 4; in row 6 and column 0
            tampered(tmp_path / kind, "element", [stored_index(kind, "element", index)])
            with pytest.raises(InputError, match="single weights that lie in its"):
                load_adapter(Net(kind), tmp_path / kind)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["units"]["inner"].update(columns=10**12), "columns, and it has 5"),
        (lambda v: v["units"]["inner"].update(columns=-1), "columns, and it has 5"),
        (lambda v: v["units"]["inner"].update(rows=8), "rows, and it has 7"),
        (lambda v: v["units"]["inner"].update(elements=10**15), "elements, and it has 35"),
        (lambda v: v["units"]["inner"].update(directions=10**15), "directions, and it has 7"),
        (lambda v: v["units"]["inner"].update(columns=True), "columns, and it has 5"),
        (lambda v: v["units"]["inner"].update(weight=1), "must be true or false"),
        (lambda v: v["units"]["inner"].update(weight=True), "whole weight of inner and parts"),
        (lambda v: v["units"]["inner"].update(shape=[7, 6]), r"shape \[7, 5\] in this one, and \[7, 6\]"),
        (lambda v: v["units"]["inner"].pop("columns"), "must have columns"),
        (lambda v: v["units"].update(outer={}), "which this model does not have"),
        (lambda v: v.update(units=[1]), "units .* of the wrong kind"),
        (lambda v: v.update(exclude_modules="(a+)+$"), "patterns"),
        (lambda v: v.update(target_modules="["), "patterns"),
        (lambda v: v.update(fingerprint=3), "fingerprint .* of the wrong kind"),
        (lambda v: v.update(peft_type="MULTITASK_PROMPT_TUNING"), "which reltune does not load"),
        (lambda v: v.update(peft_type=3), "no adapter's config"),
        (lambda v: v.update(r="x"), "r .* of the wrong kind"),
        (lambda v: v.update(base_parameters=-1), "base_parameters .* of the wrong kind"),
        (lambda v: v.update(always_trained="head"), "always_trained .* of the wrong kind"),
        (lambda v: v["units"]["inner"].update(rows=1), "lacks|does not fit"),
    ],
)
def test_configs_that_were_tampered_with(tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    folder = saved("linear", "column", tmp_path / "made", [1, 2])
    rewrite(folder, change)
    with pytest.raises(InputError, match=words):
        load_adapter(Net("linear"), folder)


def saved_lora(folder: Path) -> Path:
    """A LoRA adapter as PEFT saves it, whose B is not zero."""
    adapted = get_peft_model(Net("linear"), LoraConfig(r=2, target_modules=["inner"], init_lora_weights=False))
    adapted.peft_config["default"].init_lora_weights = True
    save_adapter(adapted, folder, None)
    return folder


def test_a_lora_adapter_is_loaded_as_peft_does(tmp_path: Path) -> None:
    folder = saved_lora(tmp_path / "made")
    model, x = load_adapter(Net("linear"), folder), torch.randn(3, 5)
    assert torch.equal(model(x), PeftModel.from_pretrained(Net("linear"), str(folder))(x))
    assert not torch.equal(model(x), Net("linear")(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(r=10**7), "does not fit"),
        (lambda v: v.update(rank_pattern={"inner": 10**7}), "does not fit"),
        (lambda v: v.update(r=2**63), "does not fit"),
        (lambda v: v.update(target_modules="(i|inner)+x"), "patterns in target_modules"),
        (lambda v: v.update(alpha_pattern={"(a+)+": 3}), "patterns in alpha_pattern"),
        (lambda v: v.update(layer_replication=[[0, 1]] * 10**5), "sets 'layer_replication'"),
        (lambda v: v.update(init_lora_weights="pissa"), "sets 'init_lora_weights'"),
        (lambda v: v.update(megatron_config={}, megatron_core="megatron.x"), "sets 'megatron_c"),
    ],
)
def test_lora_configs_that_were_tampered_with(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    folder = saved_lora(tmp_path / "made")
    rewrite(folder, change)
    fuzz_loaders.forget_peak()
    before = fuzz_loaders.gauge(b"VmRSS:")
    with pytest.raises(InputError, match=words):
        load_adapter(Net("linear"), folder)
    assert fuzz_loaders.gauge(b"VmHWM:") - before < fuzz_loaders.MEMORY, (
        "nothing is allocated for a rank that a file claims"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, key: t.update({key: t[key] * torch.nan}), "not finite"),
        (lambda t, key: t.update({key: t[key] * torch.inf}), "not finite"),
        (lambda t, key: t.update({key: t[key][:1].clone()}), "does not fit"),
        (lambda t, key: t.pop(key), "lacks .*reltune_columns"),
    ],
)
def test_weights_that_were_tampered_with(tmp_path: Path, change: Callable[..., Any], words: str) -> None:
    folder = saved("linear", "column", tmp_path / "made", [1, 2])
    tensors = load_file(folder / WEIGHTS)
    change(tensors, next(key for key in tensors if key.endswith("reltune_columns")))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=words):
        load_adapter(Net("linear"), folder)
    if words == "not finite":
        with pytest.raises(InputError, match="finite"):
            PeftModel.from_pretrained(Net("linear"), str(folder))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot be read"),
        (b"[1]", "is no adapter's config, which is a mapping"),
        (b'{"r": NaN}', "cannot be read"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    path = saved("linear", "column", tmp_path / "made", [1]) / CONFIG
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_adapter_config(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_adapter_config(tmp_path / "nowhere.json")


@pytest.mark.parametrize("index", [[[1, 2]], [1.0, 2.0]])
def test_indices_that_are_no_list_of_whole_numbers(index: list[Any]) -> None:
    with pytest.raises(InputError, match="indices of rows are no list of whole numbers"):
        check_indices(ModulePlan((7, 5)), None, torch.tensor(index), None, False)


@pytest.mark.parametrize(
    ("index", "why"),
    [([3, -1], "rows name -1, and there are 7"), ([7, 0, 2], "rows name 7, and"), ([6, 2, 6], "rows name 6 twice")],
)
def test_the_index_that_is_wrong_is_named(index: list[int], why: str) -> None:
    with pytest.raises(InputError, match=why):
        check_indices(ModulePlan((7, 5)), torch.tensor([0, 4]), torch.tensor(index), None, False)


def test_files_that_are_no_adapter(tmp_path: Path) -> None:
    folder = saved("linear", "column", tmp_path / "made", [1, 2])
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter(Net("linear"), folder)
    (folder / WEIGHTS).unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="a link that leads out"):
        load_adapter(Net("linear"), folder)
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(InputError, match="can run code"):
        load_adapter(Net("linear"), folder)


def test_a_save_is_read_back(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.0, torch.nan]), "b": torch.zeros(2, 0)}
    save_file(tensors, tmp_path / "x")
    check_saved(tmp_path / "x", tensors)
    for other in (
        {**tensors, "a": torch.tensor([1.0, 2.0])},
        {**tensors, "a": tensors["a"].double()},
        {**tensors, "b": torch.zeros(0, 2)},
        {"a": tensors["a"]},
    ):
        with pytest.raises(StorageError, match="cannot be read back"):
            check_saved(tmp_path / "x", other)


# -- another base ---------------------------------------------------------------------------------------------------


def with_base(folder: Path, model: nn.Module) -> Path:
    """An adapter that records this model."""
    base = Base.of(model)
    (info,) = take_inventory(model).modules
    plan = Plan({"inner": ModulePlan(info.shape, columns=[1])}, "all", 10**6, base.parameters, base.fingerprint)
    plan.architecture, plan.weights = base.architecture, base.weights
    save_adapter(get_peft_model(copy.deepcopy(model), ReltuneConfig(plan=plan)), folder, None)
    return folder


def test_another_base_is_named_by_what_differs(tmp_path: Path) -> None:
    class Other(Net):
        pass

    class Larger(Net):
        def __init__(self, kind: str) -> None:
            super().__init__(kind)
            self.more = nn.Parameter(torch.zeros(3))

    Larger.__name__ = "Net"
    folder = with_base(tmp_path / "made", Net("linear"))
    load_adapter(Net("linear"), folder)
    load_adapter(Net("linear").bfloat16(), folder)  # the same model in fewer bits
    tuned = Net("linear")
    with torch.no_grad():
        tuned.inner.weight[0, 0] += 1
    wrong = Other("linear")
    with torch.no_grad():
        wrong.inner.weight.mul_(2)
    for model, words in (
        (tuned, "weights differ and nothing else"),
        (wrong, "for a Net, and this is a Other"),
        (Larger("linear"), "40|42"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            load_adapter(copy.deepcopy(model), folder)
        assert "--force" in str(caught.value)
        with any_base():
            load_adapter(copy.deepcopy(model), folder)
        config = ReltuneConfig.from_pretrained(str(folder))
        config.force = True
        PeftModel.from_pretrained(copy.deepcopy(model), str(folder), config=config)
    with any_base(), pytest.raises(InputError, match="shape"):
        load_adapter(Net("grouped"), folder)


def test_adapters_of_older_versions_say_less(tmp_path: Path) -> None:
    folder = with_base(tmp_path / "made", Net("linear"))
    rewrite(folder, lambda v: [v.pop(name) for name in ("architecture", "base_parameters", "weights")])
    rewrite(folder, lambda v: v["units"]["inner"].pop("shape"))
    load_adapter(Net("linear"), folder)
    other = Net("linear")
    with torch.no_grad():
        other.inner.weight.mul_(2)
    with pytest.raises(InputError, match="fingerprint"):
        load_adapter(other, folder)


def test_the_digest_sees_what_lies_between_the_samples() -> None:
    model = nn.Linear(2000, 3)
    before = digest(model), fingerprint(model)
    assert before[0] == digest(copy.deepcopy(model).bfloat16())
    with torch.no_grad():
        model.weight[1, 1] += 1
    assert digest(model) != before[0] and fingerprint(model) == before[1]
    assert digest(nn.Linear(3, 2, device="meta")) == ""
    both = nn.ModuleDict({"a": nn.Linear(3, 2), "head": nn.Linear(2, 2)})
    kept = digest(both, ["head"])
    with torch.no_grad():
        both["head"].weight.zero_()
    assert digest(both, ["head"]) == kept != digest(both)
