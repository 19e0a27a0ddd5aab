"""Units of one module's parameters: sums of one number per weight over columns, rows, the matrix, the bias.

Canonical shapes, whatever way round the module stores its weight: linear maps and embeddings (out, in), an embedding's
rows being its tokens; 2-D convolutions (out, in / groups, height, width), a column being an input channel; norms
(features,).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

Parts = dict[str, Tensor]  # column, row, weight, bias, norm -> one number per unit of that kind
DIMENSIONS = {
    "linear": 2,
    "quantised": 2,
    "conv1d": 2,
    "conv2d": 4,
    "embedding": 2,
    "router": 2,
    "experts": 2,
    "norm": 1,
}


@dataclasses.dataclass(frozen=True)
class ModuleInfo:
    """One module that owns units, or one expert's matrix in a module that holds many.

    ``kind`` is a key of inventory.LAYER_TYPES and ``shape`` the weight's canonical shape: (out, in) for linear maps,
    also where the module stores (in, out). ``layer`` is the block it belongs to (``encoder.layer.5``) or its own name
    when it stands outside the blocks; ``depth`` counts blocks and such modules from the input on.
    """

    name: str
    kind: str
    layer: str
    depth: int
    shape: tuple[int, ...]
    bias: bool
    groups: int = 1  # of a convolution

    @property
    def owner(self) -> str:
        """The module that holds the parameters: itself, or the module whose experts this is one of (layers/experts.py)."""
        return ".".join(self.name.split(".")[:-2]) if self.kind == "experts" else self.name

    @property
    def weight_parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Input features; of an embedding its features, of a convolution its input channels."""
        return self.shape[1] * self.groups

    @property
    def rows(self) -> int:
        """Output features; of an embedding its tokens."""
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
        """The name inside its block: attention.self.query. All experts of one projection stand in one place."""
        name = self.name.rpartition(".")[0] if self.kind == "experts" else self.name
        return name[len(self.layer) + 1 :] if self.in_block else name


def by_unit(info: ModuleInfo, values: Mapping[str, Tensor]) -> Parts:
    """Add one number per weight up over each unit.

    ``values["weight"]`` has the canonical shape and ``values["bias"]`` the bias's, both perhaps behind batch dimensions,
    which are kept. Gives column (in,), row (out,) and weight () of a matrix, bias (), or norm () of a norm, gain and
    bias together.
    """
    weight = values["weight"]
    batch = weight.ndim - DIMENSIONS[info.kind]
    if info.kind == "norm":
        return {"norm": sum((part.sum(-1) for part in values.values()), start=weight.new_zeros(weight.shape[:batch]))}
    if info.kind == "conv2d":
        grouped = weight.flatten(-2).sum(-1).unflatten(batch, (info.groups, -1))
        parts = {"column": grouped.sum(-2).flatten(-2), "row": grouped.sum(-1).flatten(-2)}
    else:
        parts = {"column": weight.sum(-2), "row": weight.sum(-1)}
    parts["weight"] = weight.flatten(batch).sum(-1)
    if "bias" in values:
        parts["bias"] = values["bias"].flatten(batch).sum(-1)
    return parts


def counts(info: ModuleInfo) -> Parts:
    """How many weights each unit has, in the shapes of ``by_unit``."""
    if info.kind == "norm":
        return {"norm": torch.tensor(float(info.weight_parameters + info.bias_parameters))}
    shapes = part_shapes(info)
    parts = {
        "column": torch.full(shapes["column"], float(info.column_parameters)),
        "row": torch.full(shapes["row"], float(info.row_parameters)),
        "weight": torch.tensor(float(info.weight_parameters)),
    }
    if info.bias:
        parts["bias"] = torch.tensor(float(info.bias_parameters))
    return parts


def part_shapes(info: ModuleInfo) -> dict[str, tuple[int, ...]]:
    """The shapes of the parts that a module may be scored by."""
    elements = {"element": info.shape} | ({"element_bias": info.shape[:1]} if info.bias else {})
    if info.kind == "norm":
        return {"norm": (), "module": (), **elements}
    shapes: dict[str, tuple[int, ...]] = {"column": (info.columns,), "row": (info.rows,), "weight": (), "module": ()}
    return shapes | elements | ({"bias": ()} if info.bias else {})
