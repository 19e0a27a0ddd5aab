"""What an adapter's files may say: checked before anything is made from it.

Sizes come from the units' own description (``ModuleInfo``, or a plan's full shapes), never from a weight at hand: that may be
stored the other way round, packed, or a shard of the whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reltune.errors import InputError
from reltune.layers.units import ModuleInfo, has_directions
from reltune.plan.plan import ModulePlan
from reltune.reading import Damaged, read_json

if TYPE_CHECKING:
    from reltune.tuner.config import ReltuneConfig

COUNTS = ("columns", "rows", "elements", "directions")
MADE_SINCE = ("elements", "directions", "shape")  # adapters of older versions know nothing of these
MEND = "its file is damaged or was made for another model"


def read_adapter_config(path: str | os.PathLike) -> dict[str, Any]:
    """What ``adapter_config.json`` says. Raises InputError where it is no mapping of fields."""
    try:
        values = read_json(path, finite=True)
    except (OSError, Damaged) as error:
        raise InputError(f"{path} cannot be read ({error}); save or copy the adapter again.") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path} is no adapter's config, which is a mapping of fields; save or copy the adapter again."
        )
    values.pop("runtime_config", None)  # has a meaning in the process alone that wrote it
    return values


def check_fields(config: ReltuneConfig) -> None:
    """Raise InputError for fields of the wrong kind, which a file may hold."""
    texts = ("fingerprint", "architecture", "weights")
    wrong = next((name for name in texts if not isinstance(getattr(config, name), str)), "")
    if not _is_count(config.base_parameters):
        wrong = "base_parameters"
    if not _are_names(config.always_trained):
        wrong = "always_trained"
    if not (config.units is None or (isinstance(config.units, dict) and _are_names(list(config.units)))):
        wrong = "units"
    patterns = isinstance(config.target_modules, str) or config.exclude_modules or config.layers_pattern
    if config.units is not None and patterns:  # it names its modules in full; a pattern could take for ever to match
        wrong = "units beside patterns of modules"
    if type(config.r) is not int:
        wrong = "r"
    if wrong:
        raise InputError(f"{wrong} of a reltune adapter's config is of the wrong kind; {MEND}.")


def check_sizes(sizes: Any, info: ModuleInfo) -> None:
    """Raise InputError unless an adapter's sizes for a module (an entry of ``ReltuneConfig.units``) are those of units that it has."""
    known = (*COUNTS, "weight", "bias", "shape")
    if not isinstance(sizes, Mapping) or not set(known) - set(MADE_SINCE) <= set(sizes) <= set(known):
        raise InputError(f"units of {info.name} in the adapter's config must have {', '.join(known)}; {MEND}.")
    if "shape" in sizes and sizes["shape"] != list(info.shape):
        raise InputError(
            f"the adapter was made for another base model: {info.name} has shape {list(info.shape)} in this one, and "
            f"{str(sizes['shape'])[:80]} in the adapter's."
        )
    matrix = not info.is_vector
    largest = {
        "columns": info.columns if matrix else 0,
        "rows": info.rows if matrix else 0,
        "elements": info.weight_parameters if matrix else 0,
        "directions": max(info.shape) if has_directions(info) else 0,
    }
    for name in COUNTS:
        count = sizes.get(name, 0)
        if not _is_count(count) or count > largest[name]:
            raise InputError(
                f"the adapter's config gives {info.name} {str(count)[:20]} {name}, and it has {largest[name]:,}; {MEND}."
            )
    for name in ("weight", "bias"):
        if type(sizes[name]) is not bool:
            raise InputError(f"{name} of {info.name} in the adapter's config must be true or false; {MEND}.")
    if sizes["weight"] and any(sizes.get(name, 0) for name in COUNTS):
        raise InputError(f"the adapter's config trains the whole weight of {info.name} and parts of it; {MEND}.")


def check_indices(
    units: ModulePlan, columns: Tensor | None, rows: Tensor | None, elements: Tensor | None, transposed: bool
) -> None:
    """Raise InputError for indices, read from a file, that are no units of the module or name one twice.

    ``units`` has the module's full shape. ``elements`` count the weight as it is stored, which may be ``transposed``.
    """
    sides = (("columns", columns, units.column_count), ("rows", rows, units.shape[0]))
    given = [(name, index, size) for name, index, size in sides if index is not None and not index.is_meta]
    for name, index, size in given:
        if index.dtype not in (torch.int32, torch.int64) or index.ndim != 1:
            raise InputError(f"an adapter's indices of {name} are no list of whole numbers; {MEND}.")
        ordered = index.long().sort().values
        if len(index) and bool((ordered[0] < 0) | (ordered[-1] >= size)):
            wrong = int(ordered[0] if ordered[0] < 0 else ordered[-1])
            raise InputError(
                f"an adapter's indices of {name} name {wrong}, and there are {size:,}, counted from 0; {MEND}."
            )
        if bool((ordered.diff() == 0).any()):
            raise InputError(
                f"an adapter's indices of {name} name {int(ordered[:-1][ordered.diff() == 0][0])} twice; {MEND}."
            )
    if elements is None or elements.is_meta or not given:
        return
    length = units.shape[0] if transposed else units.shape[-1]
    first, second = elements.long() // length, elements.long() % length
    places = {"columns": first if transposed else second, "rows": second if transposed else first}
    for name, index, size in given:
        chosen = torch.zeros(size, dtype=torch.bool, device=index.device)
        chosen[index.long()] = True
        if bool(chosen[places[name]].any()):
            raise InputError(f"an adapter has single weights that lie in its {name}; {MEND}.")


def check_finite(name: str, values: Tensor) -> None:
    """Raise InputError for trained values, read from a file, that are not numbers."""
    if values.is_floating_point() and not values.is_meta and not bool(values.isfinite().all()):
        raise InputError(
            f"an adapter's values {name} are not all finite numbers; it is damaged, or its training diverged."
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
