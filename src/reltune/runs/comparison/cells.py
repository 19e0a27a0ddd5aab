"""What is compared: a method at a size. Each such cell is trained at several rates and with several seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from reltune.config.comparison import ComparisonConfig
from reltune.config.run_config import RunConfig
from reltune.errors import InputError
from reltune.layers.inventory import take_inventory
from reltune.methods.registry import METHODS
from reltune.plan.budget import parse_budget
from reltune.runs import stages
from reltune.runs.materials import Materials

FAR = 2.0  # a size that is so many times too large or too small is not equal


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method at a size.

    Attributes:
        name: its directory's.
        label: what tables call it.
        fields: fields of the run that set the size.
        sizes: the tables that it is in: "equal", "usual".
        analysis: names the analysis that it chooses by, which cells may share; empty where it needs none.
    """

    name: str
    label: str
    method: str
    fields: Mapping[str, Any]
    sizes: tuple[str, ...]
    analysis: str = ""

    def in_table(self, size: str) -> bool:
        return size in self.sizes


def cells_of(config: ComparisonConfig, materials: Materials) -> tuple[list[Cell], list[str]]:
    """The cells of a comparison, and what was left out of it, in sentences.

    Raises InputError for a method that was named and that the task or the base cannot take, and for one whose nearest size is far
    from the budget; of methods that were not named such ones are left out.
    """
    wanted = ("equal", "usual") if config.sizes == "both" else (config.sizes,)
    count = parse_budget(config.budget, _base_parameters(materials))
    cells: list[Cell] = []
    left_out: list[str] = []
    for name in config.names:
        try:
            found = _sizes_of(name, config, materials, wanted, count, left_out)
        except InputError as error:
            if config.methods:
                raise
            left_out.append(f"{name} is left out: {error}")
            continue
        for cell in found:
            same = next((other for other in cells if other.name == cell.name), None)
            if same is None:
                cells.append(cell)
            else:
                cells[cells.index(same)] = dataclasses.replace(same, sizes=(*same.sizes, *cell.sizes))
    if not cells:
        raise InputError(f"nothing is left to compare. {left_out[0]}")
    return cells, left_out


def _sizes_of(
    name: str,
    config: ComparisonConfig,
    materials: Materials,
    wanted: tuple[str, ...],
    count: int,
    left_out: list[str],
) -> list[Cell]:
    """The method's cells, checked as a run is checked before it is started."""
    usual = config.of(name, task=materials.task.name)
    _check(usual, materials)
    nearest = METHODS[name].nearest(_base(usual, materials), count)
    if nearest is None:  # it has one size, which every table shows
        return [_cell(name, "", usual, {}, wanted)]
    found = [_cell(name, _usual_words(usual), usual, {}, ("usual",))] if "usual" in wanted else []
    if "equal" not in wanted:
        return found
    if not 1 / FAR <= nearest.parameters / count <= FAR:
        message = (
            f"{name} cannot train {count:,} parameters, as the budget {config.budget} says; the nearest that it can is "
            f"{nearest.parameters:,} ({nearest.words})"
        )
        if config.methods:
            raise InputError(f"{message}. Give another --budget, take --sizes usual, or leave {name} out.")
        left_out.append(f"{message}, so that it is in no table of equal sizes.")
        return found
    equal = config.of(name, task=materials.task.name, **nearest.fields)
    if equal == usual or (usual.needs_plan and parse_budget(usual.budget, _base_parameters(materials)) == count):
        return [*found, _cell(name, _usual_words(usual), usual, {}, ("equal",))]
    _check(equal, materials)
    return [*found, _cell(name, nearest.words, equal, nearest.fields, ("equal",))]


def _base_parameters(materials: Materials) -> int:
    return take_inventory(materials.base.look(), materials.new_heads).base_parameters


def _check(config: RunConfig, materials: Materials) -> None:
    config.check()
    stages.check_choice(dataclasses.replace(materials, config=config))


def _base(config: RunConfig, materials: Materials) -> Any:
    own = dataclasses.replace(materials, config=config)
    return stages.base_of(own, own.base.look(), None)


def _usual_words(config: RunConfig) -> str:
    if config.needs_plan:
        return str(config.budget)
    return f"r={config.lora_r}" if config.lora_r is not None else ""


def _cell(name: str, words: str, config: RunConfig, fields: Mapping[str, Any], sizes: tuple[str, ...]) -> Cell:
    label = f"{name} {words}".strip()
    directory = "-".join(
        filter(None, [name, words.replace(",", "").replace("=", "").replace("%", "pc").replace(" ", "")])
    )
    return Cell(directory, label, name, dict(fields), sizes, analysis_name(config) if config.needs_plan else "")


def analysis_name(config: RunConfig) -> str:
    """The name of the analysis that a run chooses by: its criterion, and a digest of everything else that decides it."""
    decides = {
        "criteria": config.criteria,
        "elements": config.scores_elements,
        "restrictions": stages.restrictions(config),
        "options": stages.options_of(config),
        "examples": [config.analysis_examples, config.analysis_batch_size],
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.criteria[0]}-{digest}"
