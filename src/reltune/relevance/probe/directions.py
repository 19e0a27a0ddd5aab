"""The input directions along which a linear map has moved: the first right singular vectors of its movement."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reltune.layers.registry import layer_type
from reltune.layers.units import ModuleInfo, has_directions
from reltune.ops.singular_vectors import leading_right_vectors


def directions_of(info: ModuleInfo, movement: Mapping[str, Tensor], most: int) -> dict[str, Tensor]:
    """``direction`` (k,), the singular values, and ``direction_vectors`` (k, in) of a weight's movement (out, in), on the host.

    Nothing for a module that cannot be trained along directions, or where nothing moved; k is at most ``most``.
    """
    if not most or "direction" not in layer_type(info.layer_type).trains or not has_directions(info):
        return {}
    values, vectors = leading_right_vectors(movement["weight"], most)
    return {"direction": values.cpu(), "direction_vectors": vectors.cpu()} if len(values) else {}
