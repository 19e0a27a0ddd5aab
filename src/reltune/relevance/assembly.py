"""The scores of one statistical criterion, put together from one module at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from reltune.layers.head_group import HeadGroup
from reltune.layers.units import ModuleInfo, Parts
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import (
    CombiningCriterion,
    ElementCriterion,
    ModuleSums,
    ScoresByName,
    StatisticalCriterion,
    statistics_of,
)


class Assembly:
    """Takes the weights and statistics of each module in turn, keeps none of them, and ends with the criterion's scores.

    ``elements``: score single weights too. ``heads``: the attention heads that lie in the modules.
    """

    def __init__(
        self,
        criterion: StatisticalCriterion,
        context: Context,
        elements: bool = False,
        heads: Sequence[HeadGroup] = (),
    ) -> None:
        self.criterion, self.context = criterion, context
        self.by_element = criterion if elements and isinstance(criterion, ElementCriterion) else None
        self.needs = statistics_of(criterion, elements)
        self.combine = criterion.combine if isinstance(criterion, CombiningCriterion) else None
        self.scores: ScoresByName = {}
        self.layers: dict[str, tuple[Parts, ...]] = {}
        self.heads = heads if self.combine is not None else ()  # plain sums are added up when they are asked for
        self.held_by_heads = {name for group in self.heads for name in group.modules}
        self.inside_heads: dict[str, tuple[Parts, ...]] = {}

    def add(self, info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums) -> None:
        """Score one module. ``sums`` are its statistics, added up over all examples."""
        weights, sums = self._in_one_place(weights, sums)
        quantities = tuple(
            {part: value.detach().cpu() for part, value in quantity.items()}
            for quantity in self.criterion.quantities(info, weights, sums, self.context)
        )
        scores = dict(quantities[0])
        if self.combine is not None and scores:
            if info.name in self.held_by_heads:
                self.inside_heads[info.name] = quantities
            quantities = tuple({**quantity, "module": _whole(quantity)} for quantity in quantities)
            scores = {part: self.combine(*(quantity[part] for quantity in quantities)) for part in quantities[0]}
            if info.in_block:
                self._add_to_layer(info.layer, tuple(quantity["module"] for quantity in quantities))
        self.scores[info.name] = scores
        if self.by_element is not None:
            single_weights = self.by_element.elements(info, weights, sums, self.context)
            for key, part in (("weight", "element"), ("bias", "element_bias")):
                if key in single_weights:
                    scores[part] = single_weights[key].detach().cpu()

    def _add_to_layer(self, layer: str, modules: tuple[Tensor, ...]) -> None:
        before = self.layers.get(layer)
        totals = modules if before is None else (a["layer"] + b for a, b in zip(before, modules, strict=True))
        self.layers[layer] = tuple({"layer": total} for total in totals)

    def _in_one_place(self, weights: Mapping[str, Tensor], sums: ModuleSums) -> tuple[Mapping[str, Tensor], ModuleSums]:
        """All on the host where some of what the criterion needs is: statistics of single weights never wait on an
        accelerator."""
        if not any(value.device.type == "cpu" for need in self.needs for value in sums.get(need, {}).values()):
            return weights, sums
        return _OnHost(weights), {need: _OnHost(sums[need]) for need in self.needs if need in sums}

    def finished(self) -> ScoresByName:
        """The scores by module; where relevance does not add up, by layer and attention module too."""
        if self.combine is not None:
            for layer, quantities in self.layers.items():
                self.scores[layer] = {"layer": self.combine(*(quantity["layer"] for quantity in quantities))}
            for group in self.heads:
                if all(name in self.inside_heads for name in group.modules):
                    by_quantity = zip(*(self.inside_heads[name] for name in group.modules), strict=True)
                    totals = [group.add_up(dict(zip(group.modules, parts, strict=True))) for parts in by_quantity]
                    if all(total is not None for total in totals):
                        self.scores.setdefault(group.name, {})["head"] = self.combine(*totals)
        return self.scores


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


def _whole(parts: Parts) -> Tensor:
    """The total over all of a module's parameters."""
    return torch.stack([parts[part] for part in ("weight", "bias", "norm") if part in parts]).sum(0)
