"""The relevance artefact: scores per criterion, kind of unit and module, with what they were measured on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reltune.errors import InputError, nearest
from reltune.files import write_json
from reltune.layers.attention_heads import HeadGroup
from reltune.layers.inventory import Inventory
from reltune.layers.units import ModuleInfo, Parts, part_shapes
from reltune.relevance.criteria.context import Context
from reltune.relevance.heatmap import Heatmap

FORMAT = "reltune-relevance-3"
KINDS = ("layer", "module", "head", "column", "row", "element", "bias", "norm")


@dataclasses.dataclass
class RelevanceScores:
    """``parts[criterion][module][part]``: column (in,), row (out,), weight (), bias () or norm (), as layers/units.py has
    them; element and element_bias where single weights were scored. Relevance that does not add up has parts of its own
    for larger units: module () of a module, layer () under a layer's name, head (heads,) under an attention module's. The
    ends of a score's 95% interval, where it has one, are in parts named after its own: module_low, module_high.

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
        give one number per feature; ``head`` (heads,) gives one number per head of each attention module (layers/attention_heads.py).
        Empty for a kind that the criterion does not score.
        """
        criterion = self.criterion(criterion)
        parts = self.parts[criterion]
        if kind not in KINDS:
            raise InputError(f"granularity {kind!r} is unknown; {nearest(kind, KINDS)}")
        own = {name: found[kind] for name, found in parts.items() if kind in found}
        if kind == "head" and not own:
            sums = {group.name: group.add_up(parts) for group in self.inventory.heads}
            return {name: total for name, total in sums.items() if total is not None}
        if own or kind not in ("module", "layer"):
            return own
        total: dict[str, Tensor] = {}
        for name, found in parts.items():
            summands = [found[part] for part in ("weight", "bias", "norm") if part in found]
            if not summands or (kind == "layer" and not self.inventory[name].in_block):
                continue
            key = name if kind == "module" else self.inventory[name].layer
            relevance = torch.stack(summands).sum(0)
            total[key] = total[key] + relevance if key in total else relevance
        return total

    def interval(self, kind: str, criterion: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """The ends of the 95% interval of every unit of a kind, in the shapes of ``by``."""
        criterion = self.criterion(criterion)
        ends = (f"{kind}_low", f"{kind}_high")
        found = {
            name: (parts[ends[0]], parts[ends[1]]) for name, parts in self.parts[criterion].items() if ends[0] in parts
        }
        if not found:
            raise InputError(
                f"{criterion} gives no intervals for granularity {kind!r}; correlation does for those it scores."
            )
        return found

    def adds_up(self, criterion: str | None = None) -> bool:
        """Whether a layer's relevance is the sum of its modules'."""
        return not any(
            "layer" in found or "module" in found for found in self.parts[self.criterion(criterion)].values()
        )

    def compare(
        self, other: RelevanceScores | None = None, kind: str = "module", top: float = 0.1
    ) -> list[dict[str, Any]]:
        """How far criteria agree on the units of a kind: every pair of criteria here, or each criterion here with the
        same one in ``other`` (other data, another seed).

        Gives ``first``, ``second``, ``units``, ``spearman`` (rank correlation, −1 to 1, ties at their mean rank; nan when
        one side is constant) and ``overlap`` (0 to 1: the part of the ``top`` share of units, at least one, that both
        have in common; ties go to the earlier unit). Units that only one side has are left out.
        """
        if not 0 < top <= 1:
            raise InputError(f"top is {top}; it is the share of units to compare, more than 0 and at most 1.")
        if other is None:
            pairs = [(a, b, self, self) for a, b in itertools.combinations(self.criteria, 2)]
        else:
            pairs = [(name, name, self, other) for name in self.criteria if name in other.parts]
        found = []
        for first, second, left, right in pairs:
            a, b = left.by(kind, first), right.by(kind, second)
            names = [name for name in a if name in b and a[name].shape == b[name].shape]
            if not names:
                continue
            x, y = (torch.cat([of[name].reshape(-1).double() for name in names]) for of in (a, b))
            count = max(1, round(top * len(x)))
            best = [set(torch.argsort(-v, stable=True)[:count].tolist()) for v in (x, y)]
            found.append(
                {
                    "first": first,
                    "second": second,
                    "units": len(x),
                    "spearman": spearman(x, y),
                    "overlap": len(best[0] & best[1]) / count,
                }
            )
        return found

    def heatmap(self, criterion: str | None = None) -> Heatmap:
        """Layer × module; modules outside the blocks have a row of their own.

        The experts of a projection share a cell: their sum, or their mean where relevance does not add up.
        """
        criterion = self.criterion(criterion)
        modules = self.by("module", criterion)
        rows = list(dict.fromkeys(self.inventory[name].layer for name in modules))
        columns = list(dict.fromkeys(self.inventory[n].place for n in modules if self.inventory[n].in_block))
        if any(not self.inventory[name].in_block for name in modules):
            columns.append("(outside the layers)")
        cells: dict[tuple[int, int], list[float]] = {}
        for name, relevance in modules.items():
            info = self.inventory[name]
            column = info.place if info.in_block else "(outside the layers)"
            cells.setdefault((rows.index(info.layer), columns.index(column)), []).append(float(relevance))
        adds_up = self.adds_up(criterion)
        values: list[list[float | None]] = [[None] * len(columns) for _ in rows]
        for (i, j), held in cells.items():
            values[i][j] = math.fsum(held) / (1 if adds_up else len(held))
        layers = {} if adds_up else self.by("layer", criterion)
        if layers:  # of the layers alone: a module's own score is none of a layer's kind
            by_row = [float(layers[row]) if row in layers else 0.0 for row in rows]
        else:
            by_row = [math.fsum(v for v in row if v is not None) for row in values]
        total = math.fsum(map(abs, by_row)) or 1.0
        return Heatmap(criterion, rows, columns, values, [row / total for row in by_row], adds_up)

    def depth_sentence(self, criterion: str | None = None) -> str:
        """One line: where relevance lies by depth."""
        criterion = self.criterion(criterion)
        layers = {name: float(value) for name, value in self.by("layer", criterion).items()}
        if len(layers) < 2:
            known = {info.layer for info in self.inventory.modules if info.in_block}
            if len(known) >= 2:
                return f"{criterion} does not score layers here, so it says nothing about depth."
            return f"The model has fewer than two layers, so {criterion} relevance has no depth to lie in."
        scores = list(layers.values())
        top = max(range(len(scores)), key=scores.__getitem__)
        half = len(scores) // 2
        if not self.adds_up(criterion):  # shares would be of a sum that means nothing, and that may be negative
            upper, lower = (math.fsum(some) / len(some) for some in (scores[len(scores) - half :], scores[:-half]))
            return (
                f"By {criterion}, layer {top} of 0–{len(scores) - 1} matters most ({scores[top]:.3g}); the top layer has "
                f"{scores[-1]:.3g}, the upper {half} of {len(scores)} layers {upper:.3g} on average and those below {lower:.3g}."
            )
        total = math.fsum(scores) or 1.0
        shares = [value / total for value in scores]
        return (
            f"By {criterion}, layer {top} of 0–{len(shares) - 1} matters most ({shares[top]:.0%} of the layers' relevance); "
            f"the top layer holds {shares[-1]:.0%}, the upper {half} of {len(shares)} layers together "
            f"{math.fsum(shares[len(shares) - half :]):.0%}."
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
                "tensors": len(tensors),
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
            if len(tensors) != values["tensors"]:
                raise ValueError(f"scores.safetensors has {len(tensors)} tensors and not {values['tensors']}")
            shapes = {info.name: part_shapes(info) for info in modules}
            heads = [HeadGroup(**group) for group in values["heads"]]
            shapes |= {info.layer: {"layer": ()} for info in modules if info.in_block}
            for group in heads:
                shapes[group.name] = {**shapes.get(group.name, {}), "head": (group.heads,)}
            for of in shapes.values():
                of |= {f"{part}_{end}": of[part] for part in KINDS if part in of for end in ("low", "high")}
            parts: dict[str, dict[str, dict[str, Tensor]]] = {
                criterion: {info.name: {} for info in modules} for criterion in values["criteria"]
            }
            for criterion, name in itertools.product(values["criteria"], shapes):
                for part, shape in shapes[name].items():
                    tensor = tensors.pop(f"{criterion}/{part}/{name}", None)
                    if tensor is None:
                        continue
                    if tensor.shape != shape:
                        raise ValueError(f"{criterion}/{part}/{name} has shape {tuple(tensor.shape)}")
                    parts[criterion].setdefault(name, {})[part] = tensor
            empty = [criterion for criterion, of in parts.items() if not any(of.values())]
            if empty:
                raise ValueError(f"scores.safetensors has nothing of {empty[0]}")
            if tensors:
                raise ValueError(f"scores.json does not know {next(iter(tensors))}")
            counts = values["base_parameters"], values["head_parameters"]
            inventory = Inventory(modules, values["left_out"], *counts, heads, values["without_heads"])
            for group in heads:
                group.check(inventory)
            return cls(parts, inventory, values["always_trained"], values["fingerprint"], values["provenance"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{directory} holds relevance scores that do not fit together ({error}); analyze again."
            ) from error


class _OnHost(Mapping[str, Tensor]):
    """Tensors that are copied to the host when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Assembly:
    """One criterion's ``parts`` from each module's weights and statistics (relevance/criteria/registry.py says what it has), which
    come one module at a time; keeps none of them."""

    def __init__(
        self, criterion: ModuleType, context: Context, elements: bool = False, heads: Sequence[HeadGroup] = ()
    ) -> None:
        self.criterion, self.context, self.elements = criterion, context, elements
        self.combine = getattr(criterion, "combine", None)
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.layers: dict[str, tuple[Parts, ...]] = {}
        self.heads = heads if self.combine is not None else ()
        self.held_by_heads = {name for group in self.heads for name in group.modules}
        self.inside_heads: dict[str, tuple[Parts, ...]] = {}

    def add(self, info: ModuleInfo, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]]) -> None:
        combine = self.combine
        weights, sums = self._in_one_place(weights, sums)
        quantities = tuple(
            {part: value.detach().cpu() for part, value in of.items()}
            for of in self.criterion.quantities(info, weights, sums, self.context)
        )
        found = quantities[0]
        if combine is not None and found:
            if info.name in self.held_by_heads:
                self.inside_heads[info.name] = quantities
            quantities = tuple({**of, "module": _whole(of)} for of in quantities)
            found = {part: combine(*(of[part] for of in quantities)) for part in quantities[0]}
            if info.in_block:
                whole = tuple({"layer": of["module"]} for of in quantities)
                held = self.layers.get(info.layer)
                self.layers[info.layer] = (
                    whole
                    if held is None
                    else tuple({"layer": a["layer"] + b["layer"]} for a, b in zip(held, whole, strict=True))
                )
        self.parts[info.name] = dict(found)
        if self.elements and (single := self.criterion.elements(info, weights, sums, self.context)):
            self.parts[info.name]["element"] = single["weight"].detach().cpu()
            if "bias" in single:
                self.parts[info.name]["element_bias"] = single["bias"].detach().cpu()

    def _in_one_place(
        self, weights: Mapping[str, Tensor], sums: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Mapping[str, Tensor]]]:
        """All on the host where some of what the criterion needs is: statistics of single weights never wait on an
        accelerator."""
        needs = (*self.criterion.NEEDS, *(self.criterion.ELEMENT_NEEDS if self.elements else ()))
        if not any(value.device.type == "cpu" for need in needs for value in sums.get(need, {}).values()):
            return weights, sums
        return _OnHost(weights), {need: _OnHost(sums[need]) for need in needs if need in sums}

    def finished(self) -> dict[str, dict[str, Tensor]]:
        if self.combine is not None:
            for layer, of in self.layers.items():
                self.parts[layer] = {"layer": self.combine(*(quantity["layer"] for quantity in of))}
            for group in self.heads:
                if all(name in self.inside_heads for name in group.modules):
                    by_quantity = zip(*(self.inside_heads[name] for name in group.modules), strict=True)
                    totals = [group.add_up(dict(zip(group.modules, of, strict=True))) for of in by_quantity]
                    if all(total is not None for total in totals):
                        self.parts.setdefault(group.name, {})["head"] = self.combine(*totals)
        return self.parts


def _whole(parts: Parts) -> Tensor:
    """All of a module's parameters."""
    values = [parts[part] for part in ("weight", "bias", "norm") if part in parts]
    return torch.stack(values).sum(0)


def spearman(x: Tensor, y: Tensor) -> float:
    ranks = torch.stack([_ranks(x), _ranks(y)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    return float((ranks[0] @ ranks[1]) / (ranks[0].norm() * ranks[1].norm()))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 on, equal values at the mean of theirs."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count + 1) / 2)[place]
