"""The inventory of a model: which of its parameters are in units that can be measured and chosen, and why others are not."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from reltune.errors import InputError, nearest
from reltune.layers import quantised
from reltune.layers.attention_heads import find_attention_heads
from reltune.layers.head_group import HeadGroup
from reltune.layers.registry import is_registered, layer_type, layer_type_of
from reltune.layers.units import ModuleInfo
from reltune.reading import typed


@dataclasses.dataclass
class Inventory:
    """What of a model can be measured and chosen.

    Args:
        modules: the modules with units, in the model's order.
        left_out: the names of the other parameters, with the reason why they have no units.
        base_parameters: number of parameters of the base model, without those of new heads.
        head_parameters: number of parameters of the new heads (classifiers), which no checkpoint has values for; 0 where the model has its own.
        attention_heads: the attention heads, one group for each attention module.
        without_attention_heads: the names of other attention modules, with the reason why they have none.
    """

    modules: list[ModuleInfo]
    left_out: dict[str, str]
    base_parameters: int
    head_parameters: int
    attention_heads: list[HeadGroup] = dataclasses.field(default_factory=list)
    without_attention_heads: dict[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> ModuleInfo:
        return self.by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def __post_init__(self) -> None:
        self.by_name = {info.name: info for info in self.modules}

    def only(self, names: Collection[str]) -> Inventory:
        """The named modules, and the attention heads that lie in them altogether."""
        modules = [info for info in self.modules if info.name in names]
        groups = [group for group in self.attention_heads if all(name in names for name in group.modules)]
        return dataclasses.replace(self, modules=modules, attention_heads=groups)

    def to_dict(self) -> dict[str, Any]:
        """The fields as files have them: a module's layer type is called kind, and attention heads heads."""
        values = dataclasses.asdict(self)
        for info in values["modules"]:
            del info["holder"]  # follows from the name
        return {
            "modules": [
                {"name": info.pop("name"), "kind": info.pop("layer_type"), **info} for info in values["modules"]
            ],
            "left_out": values["left_out"],
            "base_parameters": values["base_parameters"],
            "head_parameters": values["head_parameters"],
            "heads": values["attention_heads"],
            "without_heads": values["without_attention_heads"],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Inventory:
        """The inventory of ``to_dict``, from a mapping that may have other keys too.

        Raises KeyError, TypeError or ValueError where the values do not fit together.
        """
        inventory = cls(
            [_read_info(entry) for entry in typed(list[dict[str, Any]], values["modules"], "modules")],
            typed(dict[str, str], values["left_out"], "left_out"),
            typed(int, values["base_parameters"], "base_parameters"),
            typed(int, values["head_parameters"], "head_parameters"),
            typed(list[HeadGroup], values["heads"], "heads"),
            typed(dict[str, str], values["without_heads"], "without_heads"),
        )
        if len(inventory.by_name) < len(inventory.modules):
            raise ValueError("modules name one twice")
        for group in inventory.attention_heads:
            group.check(inventory.by_name)
        return inventory


def _read_info(entry: Mapping[str, Any]) -> ModuleInfo:
    fields = dict(entry)
    shape = typed(list[int], fields.pop("shape"), "shape")
    name, kind = typed(str, fields.pop("name"), "name"), typed(str, fields.pop("kind"), "kind")
    holder = layer_type(kind).holder(name) if is_registered(kind) else None
    kinds = {"layer": str, "depth": int, "bias": bool, "groups": int}
    fields = {key: typed(kinds[key], value, key) for key, value in fields.items()}
    info = ModuleInfo(name=name, layer_type=kind, shape=tuple(shape), holder=holder, **fields)
    sizes = (
        all(0 < size < 2**63 for size in shape) and 0 < len(shape) < 9 and info.groups > 0 and math.prod(shape) < 2**63
    )
    if not sizes or info.shape[0] % info.groups:
        raise ValueError(f"{name} has the shape {shape} in {info.groups} groups")
    return info


def new_parameters(model: nn.Module) -> list[str]:
    """The parameters that loading did not find in the checkpoint, by the marks that transformers leaves on the others.

    A model that was not loaded from a checkpoint has no marks, and then nothing counts as new.
    """
    marks = {name: getattr(p, "_is_hf_initialized", None) for name, p in model.named_parameters()}
    if not any(marks.values()):
        return []
    return sorted(name for name, mark in marks.items() if not mark)


def new_head_modules(model: nn.Module, names: str | Iterable[str]) -> list[str]:
    """The modules to train and save whole (PEFT's ``modules_to_save``) for these names of new parameters or modules.

    A module that has one new parameter is trained whole. A module whose parts are all new is given in the place of
    its parts: a new head is one module, however many layers it has.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = dict(model.named_modules())
    owners: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        owner = name if name in modules else name.rpartition(".")[0]
        if not owner or (name not in modules and name not in parameters):
            raise InputError(
                f"always_trained names {name!r}, which is not a part of the model; {nearest(name, parameters)}"
            )
        owners.add(owner)
    if not owners:
        return []

    def inside(name: str, places: Iterable[str]) -> bool:
        return any(name.startswith(place + ".") for place in places)

    for name in sorted(modules, key=lambda name: name.count(".")):
        held = [p for p in parameters if name and p.startswith(name + ".")]
        if held and not inside(name, owners) and all(inside(p, owners) for p in held):
            owners = {owner for owner in owners if not owner.startswith(name + ".")} | {name}
    return sorted(owners)


def take_inventory(model: nn.Module, always_trained: Iterable[str] = ()) -> Inventory:
    """List every module with units. ``always_trained`` names the modules of new heads."""
    names = dict(model.named_parameters(remove_duplicate=False))
    new_heads = tuple(f"{module}." for module in always_trained)
    in_new_heads = {name for name in names if name.startswith(new_heads)}
    owners: dict[int, list[str]] = {}
    for name, parameter in names.items():
        owners.setdefault(id(parameter), []).append(name)

    modules: list[ModuleInfo] = []
    left_out: dict[str, str] = {}
    depths: dict[str, int] = {}
    for name, module in model.named_modules():
        own = {f"{name}.{key}" if name else key: p for key, p in module.named_parameters(recurse=False)}
        if not own:
            continue
        layer = _block(model, name)
        depth = depths.setdefault(layer, len(depths))
        its_type = layer_type_of(module)
        packed = [p for p in own.values() if quantised.is_quantised(p)]
        tied = [other for key, p in own.items() for other in owners[id(p)] if other not in own]
        if any(key in in_new_heads for key in own):
            reason = "new head, always trained"
        elif packed and (its_type is None or not its_type.packed):
            reason = f"the weight of {type(module).__name__} is a {type(packed[0]).__name__}, which is not covered"
        elif its_type is None:
            reason = f"layer type {type(module).__name__} has no units yet"
        elif tied:
            reason = f"shares its weight with {tied[0]}"
        else:
            modules += its_type.infos(name, module, layer, depth)
            continue
        left_out.update(dict.fromkeys(own, reason))

    base = {id(p): quantised.numel(p) for name, p in names.items() if name not in in_new_heads}
    new = {id(p): quantised.numel(p) for name, p in names.items() if name in in_new_heads}
    groups_and_reasons = find_attention_heads(model, {info.name: info for info in modules}, left_out)
    return Inventory(modules, left_out, sum(base.values()), sum(new.values()), *groups_and_reasons)


def _block(model: nn.Module, name: str) -> str:
    """The outermost numbered block that holds the module (``encoder.layer.5``), else the module's own name."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        if parts[i - 1].isdigit():
            parent = model.get_submodule(".".join(parts[: i - 1]))
            if isinstance(parent, nn.ModuleList | nn.Sequential):
                return ".".join(parts[:i])
    return name


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """The names that a pattern means.

    These are the names that have it as a run of whole dotted parts (``pooler``, ``layer.5``, ``attention.self.query``);
    where there are none, those that it matches in full as a regular expression.
    """
    names = list(names)
    plain = [name for name in names if f".{pattern}." in f".{name}."]
    if plain:
        return plain
    try:
        expression = re.compile(pattern)
    except re.error:
        return []
    return [n for n in names if expression.fullmatch(n)]


def choose(
    inventory: Inventory, target_modules: str | Sequence[str] = (), exclude_modules: str | Sequence[str] = ()
) -> list[str]:
    """Names of the modules that may be used. A pattern that matches nothing is an InputError."""
    everything = [info.name for info in inventory.modules]
    parts = {part for name in everything for part in (name, name.rsplit(".", 1)[-1])}
    known = sorted(parts, key=lambda part: (part.count("."), part))  # the short ones first

    def expand(patterns: str | Sequence[str], field: str) -> set[str]:
        names: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = matching(everything, pattern)
            if not matched:
                reasons = matching(inventory.left_out, pattern)
                why = f" ({reasons[0]}: {inventory.left_out[reasons[0]]})" if reasons else ""
                raise InputError(f"{field} {pattern!r} matches no module with units{why}; {nearest(pattern, known)}")
            names.update(matched)
        return names

    wanted = expand(target_modules, "target_modules") if target_modules else set(everything)
    wanted -= expand(exclude_modules, "exclude_modules")
    if not wanted:
        raise InputError("exclude_modules leaves no module to choose from; exclude less.")
    return [name for name in everything if name in wanted]
