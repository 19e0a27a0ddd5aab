"""The relevance artefact: scores by criterion, module and part, with what they were measured on."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import platform
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reltune import markup
from reltune.errors import InputError, nearest
from reltune.files import whole_file, write_json
from reltune.layers.inventory import Inventory
from reltune.layers.units import directions_in, part_shapes
from reltune.names import GRANULARITIES
from reltune.reading import FLOATS, Damaged, typed
from reltune.relevance.artefact import FORMAT, SCORES, Overview, read_scores
from reltune.relevance.criteria.contract import ScoresByName
from reltune.relevance.heatmap import OUTSIDE, Heatmap
from reltune.relevance.rank_correlation import spearman
from reltune.tensor_files import check_saved, load_tensors


@dataclasses.dataclass
class RelevanceScores:
    """The relevance of every unit, by one or several criteria.

    ``parts[criterion][module][part]`` are tensors: column (in,), row (out,), weight (), bias () or norm (), as in
    ``layers/units.py``; element and element_bias where single weights were scored; direction (k,) and direction_vectors (k, in) where
    input directions were. A criterion whose relevance does not add
    up gives larger units parts of their own: module () under a module's name, layer () under a layer's, head (heads,) under
    an attention module's. The ends of a score's 95% interval, where it has one, are in parts named after it: module_low and
    module_high.

    ``always_trained`` names the modules of new heads, which are not scored; ``fingerprint`` is that of the base model;
    ``provenance`` says on which model, data and versions the scores were measured.
    """

    parts: dict[str, ScoresByName]
    inventory: Inventory
    always_trained: list[str]
    fingerprint: str
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        """Without the numbers, of which there may be millions."""
        modules, measured = len(self.inventory.modules), ", ".join(self.criteria)
        return f"<RelevanceScores of {modules} modules of {self.provenance.get('model', 'a model')}, by {measured}>"

    def _repr_html_(self) -> str:
        """The map of the first criterion, and those of the others folded."""
        first, *others = self.criteria
        folded = [
            f"<details><summary>{escape(name)}</summary>{self.heatmap(name)._repr_html_()}</details>" for name in others
        ]
        said = [repr(self)[1:-1], self.depth_sentence(first)]
        return "".join([markup.paragraphs(said), self.heatmap(first)._repr_html_(), *folded])

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
        """The relevance of every unit of one granularity, by layer or module name.

        ``layer``, ``module``, ``bias`` and ``norm`` give one number () per name; ``column`` (in,) and ``row`` (out,) one
        number per feature; ``head`` (heads,) one number per attention head of each attention module; ``element`` one
        number per weight; ``direction`` (k,) one number per input direction, whose vectors ``directions`` gives. Empty for a granularity that the criterion does not score.
        """
        criterion = self.criterion(criterion)
        by_name = self.parts[criterion]
        if kind not in GRANULARITIES:
            raise InputError(f"granularity {kind!r} is unknown; {nearest(kind, GRANULARITIES)}")
        scores = {name: parts[kind] for name, parts in by_name.items() if kind in parts}
        if kind == "head" and not scores:
            sums = {group.name: group.add_up(by_name) for group in self.inventory.attention_heads}
            return {name: total for name, total in sums.items() if total is not None}
        if scores or kind not in ("module", "layer"):
            return scores
        totals: dict[str, Tensor] = {}
        for name, parts in by_name.items():
            summands = [parts[part] for part in ("weight", "bias", "norm") if part in parts]
            if not summands or (kind == "layer" and not self.inventory[name].in_block):
                continue
            key = name if kind == "module" else self.inventory[name].layer
            relevance = torch.stack(summands).sum(0)
            totals[key] = totals[key] + relevance if key in totals else relevance
        return totals

    def directions(self, criterion: str | None = None) -> dict[str, Tensor]:
        """The vectors (k, in) of the input directions that ``by("direction")`` scores, each of length 1, by module name."""
        by_name = self.parts[self.criterion(criterion)]
        return {name: parts["direction_vectors"] for name, parts in by_name.items() if "direction_vectors" in parts}

    def interval(self, kind: str, criterion: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """The two ends of the 95% interval of every unit of one granularity, in the shapes of ``by``."""
        criterion = self.criterion(criterion)
        low, high = f"{kind}_low", f"{kind}_high"
        intervals = {name: (parts[low], parts[high]) for name, parts in self.parts[criterion].items() if low in parts}
        if not intervals:
            raise InputError(
                f"{criterion} gives no intervals for granularity {kind!r}; correlation does for those it scores."
            )
        return intervals

    def adds_up(self, criterion: str | None = None) -> bool:
        """Whether a layer's relevance is the sum of its modules'."""
        by_name = self.parts[self.criterion(criterion)]
        return not any("layer" in parts or "module" in parts for parts in by_name.values())

    def compare(
        self, other: RelevanceScores | None = None, kind: str = "module", top: float = 0.1
    ) -> list[dict[str, Any]]:
        """How far criteria agree on the units of one granularity: every pair of criteria here, or each criterion here with
        the same one in ``other`` (measured on other data, or with another seed).

        Gives for each pair ``first`` and ``second`` (the criteria), ``units`` (how many both score), ``spearman`` (rank
        correlation, −1 to 1, ties at their mean rank; nan when one side is constant) and ``overlap`` (0 to 1: the part of
        the ``top`` share of units, at least one unit, that both have in common; of equal units the earlier one counts as
        better). Units that only one side has are left out.
        """
        if not 0 < top <= 1:
            raise InputError(f"top is {top}; it is the share of units to compare, more than 0 and at most 1.")
        if other is None:
            pairs = [(a, b, self, self) for a, b in itertools.combinations(self.criteria, 2)]
        else:
            pairs = [(name, name, self, other) for name in self.criteria if name in other.parts]
        rows = []
        for first, second, left, right in pairs:
            a, b = left.by(kind, first), right.by(kind, second)
            names = [name for name in a if name in b and a[name].shape == b[name].shape]
            if not names:
                continue
            x, y = (torch.cat([scores[name].reshape(-1).double() for name in names]) for scores in (a, b))
            count = max(1, round(top * len(x)))
            best = [set(torch.argsort(-scores, stable=True)[:count].tolist()) for scores in (x, y)]
            rows.append(
                {
                    "first": first,
                    "second": second,
                    "units": len(x),
                    "spearman": spearman(x, y),
                    "overlap": len(best[0] & best[1]) / count,
                }
            )
        return rows

    def heatmap(self, criterion: str | None = None) -> Heatmap:
        """Layer × module; modules outside the blocks have a row of their own.

        The experts of a projection share a cell: their sum, or their mean where relevance does not add up.
        """
        criterion = self.criterion(criterion)
        modules = self.by("module", criterion)
        rows = list(dict.fromkeys(self.inventory[name].layer for name in modules))
        columns = list(dict.fromkeys(self.inventory[n].place for n in modules if self.inventory[n].in_block))
        if any(not self.inventory[name].in_block for name in modules):
            columns.append(OUTSIDE)
        cells: dict[tuple[int, int], list[float]] = {}
        for name, relevance in modules.items():
            info = self.inventory[name]
            column = info.place if info.in_block else OUTSIDE
            cells.setdefault((rows.index(info.layer), columns.index(column)), []).append(float(relevance))
        adds_up = self.adds_up(criterion)
        values: list[list[float | None]] = [[None] * len(columns) for _ in rows]
        for (i, j), held in cells.items():
            values[i][j] = math.fsum(held) / (1 if adds_up else len(held))
        layers = {} if adds_up else self.by("layer", criterion)
        if layers:  # a module outside the layers has a score that cannot be compared with theirs
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
        if not self.adds_up(criterion):  # a sum would mean nothing and may be negative, so no shares of it
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

    def overview(self) -> Overview:
        """What people are shown of the scores."""
        return Overview(
            self.provenance,
            {info.name: info.layer for info in self.inventory.modules},
            self.inventory.left_out,
            [self.heatmap(criterion) for criterion in self.criteria],
            self.depth_sentence(),
            self.fingerprint,
        )

    def save(self, directory: str | os.PathLike) -> None:
        """Write ``scores.safetensors`` (keys criterion/part/module) and ``scores.json``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        overview = self.overview()
        tensors = {
            f"{criterion}/{part}/{name}": tensor.contiguous()
            for criterion, by_name in self.parts.items()
            for name, parts in by_name.items()
            for part, tensor in parts.items()
        }
        with whole_file(directory / "scores.safetensors") as partial:
            save_file(tensors, partial)
            check_saved(partial, tensors)
        write_json(
            directory / SCORES,
            {
                "format": FORMAT,
                "criteria": self.criteria,
                "tensors": len(tensors),
                "fingerprint": self.fingerprint,
                "always_trained": self.always_trained,
                "provenance": self.provenance,
                **self.inventory.to_dict(),
                # for readers without torch; worked out anew from the tensors by everybody else
                "overview": {
                    "heatmaps": [dataclasses.asdict(heatmap) for heatmap in overview.heatmaps],
                    "depth_sentence": overview.depth_sentence,
                },
            },
        )

    @classmethod
    def load(cls, directory: str | os.PathLike) -> RelevanceScores:
        """Read what ``save`` wrote. Nothing in the files is executed."""
        directory = Path(directory)
        values = read_scores(directory)
        try:
            tensors = load_tensors(directory / "scores.safetensors", FLOATS)
        except FileNotFoundError as error:
            raise InputError(f"{directory} holds no relevance scores; run `reltune analyze` first.") from error
        except (OSError, Damaged) as error:
            raise InputError(f"{directory} holds relevance scores that cannot be read: {error}") from error
        try:
            if len(tensors) != values["tensors"]:
                raise ValueError(f"scores.safetensors has {len(tensors)} tensors and not {values['tensors']}")
            inventory = Inventory.from_dict(values)
            criteria = typed(list[str], values["criteria"], "criteria")
            if not criteria:
                raise ValueError("scores.json names no criterion")
            return cls(
                _sorted_by_criterion(tensors, criteria, inventory),
                inventory,
                typed(list[str], values["always_trained"], "always_trained"),
                typed(str, values["fingerprint"], "fingerprint"),
                typed(dict[str, Any], values["provenance"], "provenance"),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{directory} holds relevance scores that do not fit together ({error}); analyze again."
            ) from error


def _sorted_by_criterion(
    tensors: dict[str, Tensor], criteria: list[str], inventory: Inventory
) -> dict[str, ScoresByName]:
    """The tensors, by their keys criterion/part/name. Raises ValueError for a tensor that fits no unit of the inventory."""
    shapes = _shapes_by_name(inventory)
    parts: dict[str, ScoresByName] = {name: {info.name: {} for info in inventory.modules} for name in criteria}
    for criterion, name in itertools.product(criteria, shapes):
        own, found = shapes[name], tensors.get(f"{criterion}/direction/{name}")
        if found is not None and name in inventory:
            own = own | part_shapes(inventory[name], directions_in({"direction": found}))
        for part, shape in own.items():
            tensor = tensors.pop(f"{criterion}/{part}/{name}", None)
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(f"{criterion}/{part}/{name} has shape {tuple(tensor.shape)}")
            if not part.endswith(("_low", "_high")) and not tensor.isfinite().all():  # an interval may be open
                raise ValueError(f"{criterion}/{part}/{name} holds numbers that are not finite")
            parts[criterion].setdefault(name, {})[part] = tensor
    empty = [criterion for criterion, by_name in parts.items() if not any(by_name.values())]
    if empty:
        raise ValueError(f"scores.safetensors has nothing of {empty[0]}")
    if tensors:
        raise ValueError(f"scores.json does not know {next(iter(tensors))}")
    return parts


def _shapes_by_name(inventory: Inventory) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shape of every part that a module, a layer or an attention module may have."""
    shapes = {info.name: part_shapes(info) for info in inventory.modules}
    shapes |= {info.layer: {"layer": ()} for info in inventory.modules if info.in_block}
    for group in inventory.attention_heads:
        shapes[group.name] = {**shapes.get(group.name, {}), "head": (group.heads,)}
    for by_part in shapes.values():
        with_interval = [part for part in GRANULARITIES if part in by_part]
        by_part |= {f"{part}_{end}": by_part[part] for part in with_interval for end in ("low", "high")}
    return shapes


def provenance(model: nn.Module, name: str, examples: int, data: str, seed: int) -> dict[str, Any]:
    """What every analysis records: model, number of examples, their fingerprint, seed and versions."""
    return {
        "model": name,
        "architecture": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "examples": examples,
        "data": data,
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
    }
