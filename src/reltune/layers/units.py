"""The units of one module: what a module's weight is divided into, and sums of one number per weight over each unit.

Every module is described by the canonical shape of its weight, whatever way round the module stores it: (out, in) for
linear maps; (tokens, features) for embeddings; (out, in / groups, height, width) for 2-D convolutions, whose columns
are the input channels; (features,) for norms. A weight with one dimension has no columns or rows: gain and bias
together are one unit, the norm. Every other weight has columns, rows, the whole weight and, where there is one, the
bias.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

Parts = dict[str, Tensor]  # column, row, weight, bias or norm -> one number for each unit of that granularity


@dataclasses.dataclass(frozen=True)
class ModuleInfo:
    """One matrix or vector whose units can be measured and chosen, with the bias that belongs to it.

    Usually that is a module. A module that holds many such matrices (the experts of a mixture) has one ModuleInfo for
    each of them, and ``holder`` then names the module.

    Args:
        name: the module's name in the model, or a name below the module's for one matrix of many.
        layer_type: the name of its layer type (layers/registry.py).
        layer: the block that it belongs to (``encoder.layer.5``), or the module's own name where it is in no block.
        depth: the number of the block, or of the module in no block, counted from the input on.
        shape: the canonical shape of the weight.
        bias: whether it has a bias.
        groups: of a convolution.
        holder: the module that holds the parameters, where that is another one than ``name``.
    """

    name: str
    layer_type: str
    layer: str
    depth: int
    shape: tuple[int, ...]
    bias: bool
    groups: int = 1
    holder: str | None = None

    @property
    def owner(self) -> str:
        """The name of the module that holds the parameters."""
        return self.name if self.holder is None else self.holder

    @property
    def stack(self) -> str:
        """What is measured together with this one: all matrices whose names differ in the last part alone."""
        return self.name if self.holder is None else self.name.rpartition(".")[0]

    @property
    def is_vector(self) -> bool:
        """Whether the weight has one dimension (a norm's gain), and so no columns and rows."""
        return len(self.shape) == 1

    @property
    def weight_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Number of input features; of an embedding its features, of a convolution its input channels."""
        return self.shape[1] * self.groups

    @property
    def rows(self) -> int:
        """Number of output features; of an embedding its tokens."""
        return self.shape[0]

    @property
    def column_parameters(self) -> int:
        return self.weight_parameters // self.columns

    @property
    def row_parameters(self) -> int:
        return self.weight_parameters // self.rows

    @property
    def bias_parameters(self) -> int:
        return self.shape[0] if self.bias else 0

    @property
    def in_block(self) -> bool:
        return self.layer != self.owner

    @property
    def place(self) -> str:
        """The name inside the block (``attention.self.query``). Everything measured together has one place."""
        return self.stack[len(self.layer) + 1 :] if self.in_block else self.stack


def by_unit(info: ModuleInfo, values: Mapping[str, Tensor]) -> Parts:
    """Add one number per weight up over each unit.

    ``values["weight"]`` has the canonical shape and ``values["bias"]`` the bias's, both perhaps with batch dimensions
    in front, which are kept. Gives column (in,), row (out,), weight () and bias () of a matrix; of a vector norm (),
    which adds up gain and bias.
    """
    weight = values["weight"]
    batch = weight.ndim - len(info.shape)
    if info.is_vector:
        return {"norm": sum((part.sum(-1) for part in values.values()), start=weight.new_zeros(weight.shape[:batch]))}
    if weight.ndim == batch + 2 and info.groups == 1:
        parts = {"column": weight.sum(-2), "row": weight.sum(-1)}
    else:
        grouped = weight.flatten(batch + 2).sum(-1).unflatten(batch, (info.groups, -1))
        parts = {"column": grouped.sum(-2).flatten(-2), "row": grouped.sum(-1).flatten(-2)}
    parts["weight"] = weight.flatten(batch).sum(-1)
    if "bias" in values:
        parts["bias"] = values["bias"].flatten(batch).sum(-1)
    return parts


def counts(info: ModuleInfo) -> Parts:
    """How many weights each unit has, in the shapes of ``by_unit``."""
    if info.is_vector:
        return {"norm": torch.tensor(float(info.weight_parameters + info.bias_parameters))}
    shapes = unit_shapes(info)
    parts = {
        "column": torch.full(shapes["column"], float(info.column_parameters)),
        "row": torch.full(shapes["row"], float(info.row_parameters)),
        "weight": torch.tensor(float(info.weight_parameters)),
    }
    if info.bias:
        parts["bias"] = torch.tensor(float(info.bias_parameters))
    return parts


def unit_shapes(info: ModuleInfo) -> dict[str, tuple[int, ...]]:
    """The shapes of what ``by_unit`` gives without batch dimensions."""
    if info.is_vector:
        return {"norm": ()}
    return {"column": (info.columns,), "row": (info.rows,), "weight": (), **({"bias": ()} if info.bias else {})}


def weight_shapes(info: ModuleInfo) -> dict[str, tuple[int, ...]]:
    """The canonical shapes of the weight and, where there is one, the bias."""
    return {"weight": info.shape, **({"bias": info.shape[:1]} if info.bias else {})}


def part_shapes(info: ModuleInfo, directions: int = 0) -> dict[str, tuple[int, ...]]:
    """The shapes of all parts that a module may be scored by; ``directions``: how many input directions were found in it."""
    elements = {"element": info.shape} | ({"element_bias": info.shape[:1]} if info.bias else {})
    shapes = {**unit_shapes(info), "module": (), **elements}
    if directions and has_directions(info):
        shapes |= {"direction": (directions,), "direction_vectors": (directions, info.columns)}
    return shapes


def has_directions(info: ModuleInfo) -> bool:
    """Whether the weight is one matrix, whose inputs have directions."""
    return len(info.shape) == 2 and info.groups == 1


def directions_in(parts: Mapping[str, Tensor]) -> int:
    """How many input directions there are in a module's scores."""
    found = parts.get("direction")
    return 0 if found is None or found.ndim != 1 else len(found)


def matrices(info: ModuleInfo, weight: Tensor) -> Iterator[Tensor]:
    """A weight of the canonical shape as matrices (out, features): one, or one for each group of a convolution."""
    if weight.ndim == 2 and info.groups == 1:
        yield weight
    else:
        yield from weight.flatten(1).unflatten(0, (info.groups, -1))
