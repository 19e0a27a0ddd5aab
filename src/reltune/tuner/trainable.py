"""Which class trains a layer type: the second half of what is particular to a type, beside layers/.

A type that is registered in layers/registry.py says in ``trains`` what of it can be trained; the class entered here says
how: what attaches gradients to columns and rows, what a change adds to the output, and how it is written as a LoRA adapter.
"""

from __future__ import annotations

from reltune.errors import InputError
from reltune.layers.registry import layer_type
from reltune.tuner.conv2d import ReltuneConv2d
from reltune.tuner.embedding import ReltuneEmbedding
from reltune.tuner.float8 import ReltuneFloat8Linear
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.linear import ReltuneLinear, ReltuneLinearConv1D
from reltune.tuner.norm import ReltuneNorm
from reltune.tuner.quantised import ReltuneQuantisedLinear

# By the layer type's name.
_classes: dict[str, type[ReltuneLayer]] = {
    "float8": ReltuneFloat8Linear,
    "quantised": ReltuneQuantisedLinear,
    "linear": ReltuneLinear,
    "conv1d": ReltuneLinearConv1D,
    "conv2d": ReltuneConv2d,
    "embedding": ReltuneEmbedding,
    "norm": ReltuneNorm,
}
NEEDED = {"column": ("attach_columns", "change_of_output"), "row": ("attach_rows", "change_of_output")}


def register_trainable(name: str, layer_class: type[ReltuneLayer]) -> None:
    """Have modules of the layer type with that name trained by ``layer_class``, a subclass of ReltuneLayer.

    Raises InputError for a layer type that is not registered or trains nothing, one that has a class already, and a class
    that lacks what the type says can be trained.
    """
    trains = layer_type(name).trains
    if not trains:
        raise InputError(f"layer type {name!r} says that nothing of it can be trained; name what can in its trains.")
    if name in _classes:
        raise InputError(f"layer type {name!r} is trained by {_classes[name].__name__} already.")
    if not (isinstance(layer_class, type) and issubclass(layer_class, ReltuneLayer)):
        raise InputError(f"{layer_class!r} is not a subclass of reltune.tuner.layer.ReltuneLayer; derive it from that.")
    needed = {method for part in trains for method in NEEDED.get(part, ())}
    missing = sorted(method for method in needed if getattr(layer_class, method) is getattr(ReltuneLayer, method))
    if missing:
        raise InputError(
            f"{layer_class.__name__} has no {', no '.join(missing)}, and layer type {name!r} says that its "
            f"{' and '.join(f'{part}s' for part in sorted(trains & set(NEEDED)))} can be trained."
        )
    _classes[name] = layer_class


def deregister_trainable(name: str) -> None:
    """Forget the class that trains a layer type."""
    del _classes[name]


def trainable_class(name: str) -> type[ReltuneLayer]:
    """The class that trains the layer type with that name; InputError where there is none."""
    if name not in _classes:
        raise InputError(
            f"layer type {name!r} has no class that trains it; enter one with reltune.tuner.trainable.register_trainable."
        )
    return _classes[name]
