"""Walk a model once and say which of its parameters are units that can be measured, chosen and trained."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from reltune.errors import InputError, nearest
from reltune.layers import conv1d, conv2d, embedding, experts, linear, norm, quantised, router
from reltune.layers.attention_heads import HeadGroup, heads_and_reasons
from reltune.layers.units import ModuleInfo

# Kind of module -> the file that knows it. The first whose `matches` says yes is taken.
LAYER_TYPES: dict[str, ModuleType] = {
    "quantised": quantised,
    "linear": linear,
    "conv1d": conv1d,
    "conv2d": conv2d,
    "embedding": embedding,
    "norm": norm,
    "router": router,
    "experts": experts,
}


@dataclasses.dataclass
class Inventory:
    """The modules with units, in the model's order, and what was left out and why."""

    modules: list[ModuleInfo]
    left_out: dict[str, str]  # parameter name -> reason
    base_parameters: int  # all parameters of the base model, new heads not counted
    head_parameters: int
    heads: list[HeadGroup] = dataclasses.field(default_factory=list)  # of attention
    without_heads: dict[str, str] = dataclasses.field(default_factory=dict)  # attention module -> reason

    def __getitem__(self, name: str) -> ModuleInfo:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __post_init__(self) -> None:
        self._by_name = {info.name: info for info in self.modules}

    def only(self, names: Collection[str]) -> Inventory:
        """The named modules, and the heads that lie in them altogether."""
        modules = [info for info in self.modules if info.name in names]
        heads = [group for group in self.heads if all(name in names for name in group.modules)]
        return dataclasses.replace(self, modules=modules, heads=heads)


def layer_type(module: nn.Module) -> tuple[str, ModuleType] | None:
    for kind, handler in LAYER_TYPES.items():
        if handler.matches(module):
            return kind, handler
    return None


def module_info(name: str, kind: str, module: nn.Module, layer: str = "", depth: int = 0) -> ModuleInfo:
    """What is known of a module of that kind, other than experts."""
    weight: Any = module.weight
    shape = tuple(weight.shape[::-1] if kind == "conv1d" else weight.shape)
    if kind == "quantised":
        shape = quantised.shape(module)
    bias = getattr(module, "bias", None) is not None
    return ModuleInfo(name, kind, layer, depth, shape, bias, getattr(module, "groups", 1))


def canonical_weights(info: ModuleInfo, module: nn.Module) -> Mapping[str, Tensor]:
    """The weight in its canonical shape, and the bias, from the module that owns them: views, no copies, save for a
    quantised weight."""
    if info.kind == "experts":
        return experts.weights(info, module)
    if info.kind == "quantised":
        return quantised.Weights(module)
    weights = {name: p.detach() for name, p in module.named_parameters(recurse=False) if name in ("weight", "bias")}
    if info.kind == "conv1d":
        weights["weight"] = weights["weight"].mT
    return weights


def new_parameters(model: nn.Module) -> list[str]:
    """Parameters that loading did not find in the checkpoint, as far as transformers marked them.

    A model that was not loaded from a checkpoint has no marks, and then nothing counts as new.
    """
    marks = {name: getattr(p, "_is_hf_initialized", None) for name, p in model.named_parameters()}
    if not any(marks.values()):
        return []
    return sorted(name for name, mark in marks.items() if not mark)


def head_modules(model: nn.Module, names: str | Iterable[str]) -> list[str]:
    """The modules that hold the named parameters or are named themselves, as high up as all they hold is new.

    These are trained and saved whole (PEFT's ``modules_to_save``): a head is one module even when it has several
    layers, and a module with one new parameter is trained as a whole.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = dict(model.named_modules())
    owners: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        owner = name if name in modules else name.rpartition(".")[0]
        if not owner or (name not in modules and name not in parameters):
            raise InputError(
                f"always_trained names {name!r}, which is no part of the model; {nearest(name, parameters)}"
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
    tops = tuple(f"{module}." for module in always_trained)
    heads = {name for name in names if name.startswith(tops)} if tops else set()
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
        found = layer_type(module)
        packed = [p for p in own.values() if quantised.is_quantised(p)]
        tied = [other for key, p in own.items() for other in owners[id(p)] if other not in own]
        if any(key in heads for key in own):
            reason = "new head, always trained"
        elif packed and (found is None or found[0] != "quantised"):
            reason = f"the weight of {type(module).__name__} is a {type(packed[0]).__name__}, which is not covered"
        elif found is None:
            reason = f"layer type {type(module).__name__} has no units yet"
        elif tied:
            reason = f"shares its weight with {tied[0]}"
        else:
            kind, _ = found
            if kind == "experts":
                modules += experts.infos(name, module, layer, depth)
                continue
            modules.append(module_info(name, kind, module, layer, depth))
            continue
        left_out.update(dict.fromkeys(own, reason))

    counted = {id(p): quantised.numel(p) for name, p in names.items() if name not in heads}
    head = {id(p): quantised.numel(p) for name, p in names.items() if name in heads}
    inventory = Inventory(modules, left_out, sum(counted.values()), sum(head.values()))
    inventory.heads, inventory.without_heads = heads_and_reasons(model, inventory)
    return inventory


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
    """Names that a pattern means: those that have it as a run of whole dotted parts (``pooler``, ``layer.5``,
    ``attention.self.query``), or else those that it matches in full as a regular expression."""
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
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matched = matching(everything, pattern)
            if not matched:
                reasons = matching(inventory.left_out, pattern)
                why = f" ({reasons[0]}: {inventory.left_out[reasons[0]]})" if reasons else ""
                raise InputError(f"{field} {pattern!r} matches no module with units{why}; {nearest(pattern, known)}")
            found.update(matched)
        return found

    wanted = expand(target_modules, "target_modules") if target_modules else set(everything)
    wanted -= expand(exclude_modules, "exclude_modules")
    if not wanted:
        raise InputError("exclude_modules leaves no module to choose from; exclude less.")
    return [name for name in everything if name in wanted]
