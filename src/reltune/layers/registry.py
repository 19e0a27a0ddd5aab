"""The layer types that reltune knows.

Other code asks here of which type a module is, and asks that type everything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from reltune.errors import InputError, nearest
from reltune.layers.conv1d import Conv1DType
from reltune.layers.conv2d import Conv2dType
from reltune.layers.embedding import EmbeddingType
from reltune.layers.experts import ExpertsType
from reltune.layers.float8 import Float8Type
from reltune.layers.linear import LinearType
from reltune.layers.norm import NormType
from reltune.layers.protocol import LayerType
from reltune.layers.quantised import QuantisedType
from reltune.layers.router import RouterType
from reltune.layers.units import ModuleInfo

TRAINABLE_PARTS = ("column", "row", "element", "direction", "weight", "bias")

# By name. A module is of the first type that matches it.
_types: dict[str, LayerType] = {
    "float8": Float8Type(),
    "quantised": QuantisedType(),
    "linear": LinearType(),
    "conv1d": Conv1DType(),
    "conv2d": Conv2dType(),
    "embedding": EmbeddingType(),
    "norm": NormType(),
    "router": RouterType(),
    "experts": ExpertsType(),
}


def register(layer_type: LayerType) -> None:
    """Make a layer type known. It is asked before those that are known already whether a module is of it.

    Raises InputError where a member of ``LayerType`` is missing, the name is taken or has signs that files cannot
    carry, or ``trains`` names something that nothing could train.
    """
    members = {name for name in (*LayerType.__annotations__, *vars(LayerType)) if not name.startswith("_")}
    missing = sorted(member for member in members if not hasattr(layer_type, member))
    functions = {member for member in members if member in vars(LayerType)}
    wrong = sorted(f for f in functions if f not in missing and not callable(getattr(layer_type, f)))
    what = f"layer type {type(layer_type).__name__}"
    if missing:
        raise InputError(f"{what} has no {', no '.join(missing)}; layers/protocol.py says what these are.")
    if wrong:
        raise InputError(f"{what} has a {wrong[0]} that is not a function; layers/protocol.py says what it takes.")
    if not re.fullmatch(r"\w+", layer_type.name):
        raise InputError(f"{what} has the name {layer_type.name!r}; use letters, digits and _.")
    if layer_type.name in _types:
        raise InputError(f"{what} has the name {layer_type.name!r}, which is taken; name it otherwise.")
    unknown = sorted(set(layer_type.trains) - set(TRAINABLE_PARTS))
    if unknown:
        raise InputError(f"{what} trains {unknown[0]!r}, which is unknown; {nearest(unknown[0], TRAINABLE_PARTS)}")
    known = dict(_types)
    _types.clear()
    _types.update({layer_type.name: layer_type, **known})


def deregister(name: str) -> None:
    """Forget a layer type that was registered."""
    del _types[name]


def layer_types() -> list[LayerType]:
    """All layer types, in the order in which they are asked."""
    return list(_types.values())


def is_registered(name: str) -> bool:
    return name in _types


def layer_type(name: str) -> LayerType:
    """The layer type with that name; InputError where it is not registered."""
    if name not in _types:
        raise InputError(
            f"layer type {name!r} is not registered here; import the package that registers it. {nearest(name, _types)}"
        )
    return _types[name]


def layer_type_of(module: nn.Module) -> LayerType | None:
    """The layer type that a module is of, if any."""
    return next((layer_type for layer_type in _types.values() if layer_type.matches(module)), None)


def why_not(module: nn.Module) -> str:
    """What keeps a module from being of the layer type that its class belongs to (``with max_norm``), or empty."""
    return next((reason for layer_type in _types.values() if (reason := layer_type.why_not(module))), "")


def is_packed(module: nn.Module) -> bool:
    """Whether the module holds its weight in few bits, in a way that is known."""
    its_type = layer_type_of(module)
    return its_type is not None and its_type.packed


def unpacking(module: nn.Module) -> Callable[[], Tensor]:
    """What gives the weight (out, in) of a module that holds it in few bits, a floating-point copy each time."""
    its_type = layer_type_of(module)
    assert its_type is not None
    (info,) = its_type.infos("", module, "", 0)
    return lambda: its_type.weights(info, module)["weight"]


def canonical_weights(info: ModuleInfo, module: nn.Module) -> Mapping[str, Tensor]:
    """The weight in its canonical shape, and the bias, from the module that owns them.

    Views and no copies, except of a quantised weight, which is dequantised when it is asked for.
    """
    return layer_type(info.layer_type).weights(info, module)
