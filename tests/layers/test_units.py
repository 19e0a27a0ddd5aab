"""What a module is divided into, against a loop over its single weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from reltune.layers.units import ModuleInfo, by_unit, counts, directions_in, matrices, part_shapes, weight_shapes

INFOS = [
    ModuleInfo("map", "linear", "map", 0, (3, 4), True),
    ModuleInfo("map", "linear", "map", 0, (3, 4), False),
    ModuleInfo("convolution", "conv2d", "convolution", 0, (6, 2, 3, 5), True, groups=1),
    ModuleInfo("grouped", "conv2d", "grouped", 0, (6, 2, 3, 1), True, groups=3),
    ModuleInfo("norm", "norm", "norm", 0, (5,), True),
    ModuleInfo("norm", "norm", "norm", 0, (5,), False),
]


def one_by_one(info: ModuleInfo, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight added to the units that it belongs to. Output o of a group reads that group's inputs alone."""
    if len(info.shape) == 1:
        return {"norm": torch.tensor(sum(float(v) for value in values.values() for v in value))}
    out, inputs = info.shape[:2]
    parts = {"column": torch.zeros(inputs * info.groups), "row": torch.zeros(out), "weight": torch.zeros(())}
    for place in itertools.product(*map(range, info.shape)):
        value, group = values["weight"][place], place[0] // (out // info.groups)
        parts["column"][group * inputs + place[1]] += value
        parts["row"][place[0]] += value
        parts["weight"] += value
    if "bias" in values:
        parts["bias"] = torch.tensor(sum(values["bias"].tolist()))
    return parts


@pytest.mark.parametrize("info", INFOS, ids=lambda info: f"{info.name}{'' if info.bias else ' without bias'}")
def test_units_of_every_shape(info: ModuleInfo) -> None:
    torch.manual_seed(0)
    ones = {key: torch.ones(shape) for key, shape in weight_shapes(info).items()}
    assert set(ones) == ({"weight", "bias"} if info.bias else {"weight"})
    values = {key: torch.randn(2, 3, *one.shape) for key, one in ones.items()}
    found = by_unit(info, values)
    one = by_unit(info, {key: value[0, 2] for key, value in values.items()})
    torch.testing.assert_close(one, {key: part[0, 2] for key, part in found.items()})
    for i, j in itertools.product(range(2), range(3)):
        wanted = one_by_one(info, {key: value[i, j] for key, value in values.items()})
        torch.testing.assert_close({key: part[i, j] for key, part in found.items()}, wanted)
    many = one_by_one(info, ones)
    torch.testing.assert_close(counts(info), many)
    sizes = {"column": info.column_parameters, "row": info.row_parameters} if len(info.shape) > 1 else {}
    assert all(many[key].eq(size).all() for key, size in sizes.items())
    assert sum(one.numel() for one in ones.values()) == info.weight_parameters + info.bias_parameters
    shapes = {key: tuple(part.shape) for key, part in many.items()} | {"module": (), "element": info.shape}
    assert part_shapes(info) == shapes | ({"element_bias": (info.shape[0],)} if info.bias else {})
    if len(info.shape) > 1:
        own = list(matrices(info, values["weight"][0, 0]))
        assert len(own) == info.groups
        torch.testing.assert_close(torch.cat(own), values["weight"][0, 0].flatten(1))
        assert sum(map(len, own)) == info.rows


def test_names_of_one_matrix_of_many() -> None:
    expert = ModuleInfo("block.0.experts.up.3", "experts", "block.0", 0, (3, 4), False, holder="block.0.experts")
    assert (expert.owner, expert.stack, expert.place) == ("block.0.experts", "block.0.experts.up", "experts.up")
    assert expert.in_block
    alone = ModuleInfo("experts.up.3", "experts", "experts", 0, (3, 4), False, holder="experts")
    assert (alone.owner, alone.stack, alone.place, alone.in_block) == ("experts", "experts.up", "experts.up", False)


def test_directions_are_counted_where_there_are_some() -> None:
    assert directions_in({"direction": torch.ones(3)}) == 3
    assert directions_in({}) == directions_in({"direction": torch.tensor(1.0)}) == 0
    matrix = ModuleInfo("map", "linear", "map", 0, (3, 4), False)
    shapes = part_shapes(matrix, 2)
    assert shapes["direction"] == (2,) and shapes["direction_vectors"] == (2, 4)
    for none in (part_shapes(matrix), *(part_shapes(info, 2) for info in INFOS[2:])):
        assert not {"direction", "direction_vectors"} & set(none)
