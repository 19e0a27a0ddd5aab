"""The relevance artefact: scores per criterion, kind of unit and module, with what they were measured on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reltune.layers.inventory import Inventory, ModuleInfo
from reltune.records import GRANULARITIES, Heatmap, InputError, nearest, write_json

FORMAT = "reltune-relevance-1"


@dataclasses.dataclass
class RelevanceScores:
    """``parts[criterion][module][part]``: column (in,), row (out,), weight (), bias () of a linear map; norm () of a norm.

    ``provenance`` says on which model, data and versions the scores were measured.
    """

    parts: dict[str, dict[str, dict[str, Tensor]]]
    inventory: Inventory
    always_trained: list[str]
    fingerprint: str
    provenance: dict[str, Any]

    @property
    def criteria(self) -> list[str]:
        return list(self.parts)

    def criterion(self, name: str | None = None) -> str:
        """The criterion asked for, or the first that was measured."""
        if name is None:
            return self.criteria[0]
        if name not in self.parts:
            raise InputError(
                f"criterion {name!r} was not measured here; measured: {', '.join(self.criteria)}. Analyze with it first."
            )
        return name

    def by(self, kind: str, criterion: str | None = None) -> dict[str, Tensor]:
        """Relevance of every unit of a kind, by layer or module name.

        ``layer``, ``module``, ``bias`` and ``norm`` give one number () per name; ``column`` (in,) and ``row`` (out,)
        give one number per feature.
        """
        parts = self.parts[self.criterion(criterion)]
        if kind in ("column", "row", "bias", "norm"):
            return {name: found[kind] for name, found in parts.items() if kind in found}
        if kind not in ("module", "layer"):
            raise InputError(f"granularity {kind!r} is unknown; {nearest(kind, GRANULARITIES)}")
        total: dict[str, Tensor] = {}
        for name, found in parts.items():
            key = name if kind == "module" else self.inventory[name].layer
            if kind == "layer" and not self.inventory[name].in_block:
                continue
            relevance = sum(found[part] for part in ("weight", "bias", "norm") if part in found)
            total[key] = total[key] + relevance if key in total else relevance  # type: ignore[assignment]
        return total

    def heatmap(self, criterion: str | None = None) -> Heatmap:
        """Layer × module; modules outside the blocks have a row of their own."""
        criterion = self.criterion(criterion)
        modules = self.by("module", criterion)
        rows = list(dict.fromkeys(self.inventory[name].layer for name in modules))
        columns = list(dict.fromkeys(self.inventory[n].place for n in modules if self.inventory[n].in_block))
        if any(not self.inventory[name].in_block for name in modules):
            columns.append("(outside the layers)")
        values: list[list[float | None]] = [[None] * len(columns) for _ in rows]
        for name, relevance in modules.items():
            info = self.inventory[name]
            column = info.place if info.in_block else "(outside the layers)"
            values[rows.index(info.layer)][columns.index(column)] = float(relevance)
        by_row = [math.fsum(v for v in row if v is not None) for row in values]
        total = math.fsum(by_row) or 1.0
        return Heatmap(criterion, rows, columns, values, [row / total for row in by_row])

    def depth_sentence(self, criterion: str | None = None) -> str:
        """One line: where relevance lies by depth."""
        criterion = self.criterion(criterion)
        layers = {name: float(value) for name, value in self.by("layer", criterion).items()}
        if len(layers) < 2:
            return f"The model has fewer than two layers, so {criterion} relevance has no depth to lie in."
        total = math.fsum(layers.values()) or 1.0
        shares = [value / total for value in layers.values()]
        top = max(range(len(shares)), key=shares.__getitem__)
        half = len(shares) // 2
        upper = math.fsum(shares[len(shares) - half :])
        return (
            f"By {criterion}, layer {top} of 0–{len(shares) - 1} matters most ({shares[top]:.0%} of the layers' relevance); "
            f"the top layer holds {shares[-1]:.0%}, the upper {half} of {len(shares)} layers together {upper:.0%}."
        )

    def save(self, directory: str | os.PathLike) -> None:
        """Write ``scores.safetensors`` (keys criterion/part/module) and ``scores.json``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{criterion}/{part}/{name}": tensor.contiguous()
            for criterion, modules in self.parts.items()
            for name, found in modules.items()
            for part, tensor in found.items()
        }
        partial = directory / "scores.safetensors.partial"
        save_file(tensors, partial)
        partial.replace(directory / "scores.safetensors")
        inventory = dataclasses.asdict(self.inventory)
        write_json(
            directory / "scores.json",
            {
                "format": FORMAT,
                "criteria": self.criteria,
                "fingerprint": self.fingerprint,
                "always_trained": self.always_trained,
                "provenance": self.provenance,
                **inventory,
            },
        )

    @classmethod
    def load(cls, directory: str | os.PathLike) -> RelevanceScores:
        """Read what ``save`` wrote. Nothing in the files is executed."""
        directory = Path(directory)
        try:
            values = json.loads((directory / "scores.json").read_text(encoding="utf-8"))
            tensors = load_file(directory / "scores.safetensors")
        except FileNotFoundError as error:
            raise InputError(f"{directory} holds no relevance scores; run `reltune analyze` first.") from error
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{directory} holds relevance scores that cannot be read: {error}") from error
        form = values.get("format") if isinstance(values, dict) else None
        if form != FORMAT:
            raise InputError(f"{directory}/scores.json has format {form!r}, not {FORMAT!r}; analyze again.")
        try:
            modules = [ModuleInfo(**{**info, "shape": tuple(info["shape"])}) for info in values["modules"]]
            parts: dict[str, dict[str, dict[str, Tensor]]] = {}
            for criterion in values["criteria"]:
                parts[criterion] = {info.name: {} for info in modules}
                for info in modules:
                    for part, shape in _part_shapes(info).items():
                        tensor = tensors.pop(f"{criterion}/{part}/{info.name}")
                        if tensor.shape != shape:
                            raise ValueError(f"{criterion}/{part}/{info.name} has shape {tuple(tensor.shape)}")
                        parts[criterion][info.name][part] = tensor
            counts = values["base_parameters"], values["head_parameters"]
            inventory = Inventory(modules, values["left_out"], *counts)
            return cls(parts, inventory, values["always_trained"], values["fingerprint"], values["provenance"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{directory} holds relevance scores that do not fit together ({error}); analyze again."
            ) from error


def _part_shapes(info: ModuleInfo) -> dict[str, tuple[int, ...]]:
    """The parts that a module is scored by, and their shapes."""
    if info.kind == "norm":
        return {"norm": ()}
    out_features, in_features = info.shape
    bias: dict[str, tuple[int, ...]] = {"bias": ()} if info.bias else {}
    return {"column": (in_features,), "row": (out_features,), "weight": (), **bias}
