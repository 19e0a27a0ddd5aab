"""Experts of a mixture-of-experts layer, all in two 3-D parameters: one linear map per expert and projection.

Transformers keeps the experts of a layer in one module, ``gate_up_proj`` (E, 2·I, H) or ``up_proj`` (E, I, H), and
``down_proj`` (E, H, I), some transposed, some with biases (E, out). Each expert's matrix has units of its own, under the
name ``….experts.gate_up_proj.3``: columns, rows, the whole matrix and its bias, as a linear map has.

A router sends a token to a few experts, so an expert's rows are a part of the batch. While a
module is observed it runs the forward below, which knows the token that each row came from; transformers' own table of
experts implementations puts it in. All experts of a projection are measured together, and their statistics have the
experts as the first dimension. Rows are laid out as (experts, examples, rows of the largest group, features), experts of
about the same load in one block. Shorter groups are filled up with zeros, which add nothing to any statistic.

Memory: the rows sorted by expert, and one block at a time. Statistics of single weights are made expert by expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from reltune.layers import linear
from reltune.layers.padding import in_float64
from reltune.layers.per_example import STATISTICS, Shared, Statistics, shapes
from reltune.layers.protocol import Handle, HeadLayout, LayerType, Observer, Use
from reltune.layers.units import ModuleInfo
from reltune.ops.squared_gradient import accumulator_dtype, block_numbers, stacked_squared_gradient_sums

# The attributes that transformers' decorator use_experts_implementation writes on a module. A module without them computes
# in a way that is not known.
MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")


@dataclasses.dataclass(frozen=True)
class Route:
    """Which expert's and which of the ``total`` tokens each row is, both (S,); sorted by expert, ``counts`` rows each."""

    experts: Tensor
    tokens: Tensor
    counts: list[int]
    total: int


@dataclasses.dataclass(frozen=True)
class ExpertInputs:
    """Inputs (S, in) of a projection in one pass, with the expert and the example (S,) of each."""

    values: Tensor
    expert: Tensor
    example: Tensor
    examples: int


See = Callable[[str, Tensor, Tensor, Route], Tensor]  # (projection, its input rows, its output rows, route) -> output


class ExpertsType(LayerType):
    """Experts that transformers can run by any implementation, whole on this device and without a norm of their own.

    Taken out, an expert's projection gives zero, or its mean, for the tokens that are sent to it.
    """

    name = "experts"
    covers = "the experts of Transformers' mixtures"
    trains = frozenset[str]()
    packed = False
    head_layout: HeadLayout = ""
    unseen = "the loss does not reach it, or other code runs in its place"  # a fused kernel of the whole layer, say

    def matches(self, module: nn.Module) -> bool:
        if not all(hasattr(module, mark) for mark in MARKS):
            return False
        if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
            return False
        held = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        names = _projections(module)
        known = {*names, *(f"{name}_bias" for name in names if module.has_bias)}
        if set(held) != known:
            return False
        return all(
            len(shape) == (2 if name.endswith("_bias") else 3) and shape[0] == module.num_experts
            for name, shape in held.items()
        )

    def why_not(self, module: nn.Module) -> str:
        return ""

    def infos(self, name: str, module: nn.Module, layer: str, depth: int) -> list[ModuleInfo]:
        """One per expert and projection."""
        infos = []
        for projection in _projections(module):
            sizes = tuple(module.get_parameter(projection).shape[1:])
            shape = sizes[::-1] if module.is_transposed else sizes
            for expert in range(module.get_parameter(projection).shape[0]):
                own = f"{name}.{projection}.{expert}" if name else f"{projection}.{expert}"
                infos.append(ModuleInfo(own, self.name, layer, depth, shape, bool(module.has_bias), holder=name))
        return infos

    def holder(self, name: str) -> str | None:
        return ".".join(name.split(".")[:-2])

    def weights(self, info: ModuleInfo, module: nn.Module) -> dict[str, Tensor]:
        return self.own(info, _stacked_weights(module, _projection(info)))

    def laid_out(self, info: ModuleInfo, module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.own(info, _stacked(module, _projection(info), values))

    def parameters(self, info: ModuleInfo, module: nn.Module) -> tuple[str, ...]:
        projection = _projection(info)
        return (projection, f"{projection}_bias") if info.bias else (projection,)

    def observe(self, module: nn.Module, infos: Sequence[ModuleInfo], observer: Observer) -> list[Handle]:
        stacks = {_projection(info): info.stack for info in infos}

        def see(projection: str, x: Tensor, y: Tensor, route: Route) -> Tensor:
            return observer.see(stacks[projection], x, y, route) if projection in stacks else y

        return [_Watched(module, see)]

    def gathered(
        self, module: nn.Module, uses: Sequence[Use], examples: int, rows_per_example: int
    ) -> tuple[ExpertInputs, Tensor]:
        """All input rows and output gradients (S, out); tokens are taken example by example, as many of each."""
        for use in uses:
            if use.route.total % examples:
                raise ValueError(f"its input has {use.route.total} tokens")
        example = [use.route.tokens // (use.route.total // examples) for use in uses]
        expert = [use.route.experts for use in uses]
        inputs = ExpertInputs(torch.cat([use.input for use in uses]), torch.cat(expert), torch.cat(example), examples)
        return inputs, torch.cat([use.gradient for use in uses])

    def reaches_others(self, x: ExpertInputs, g: Tensor) -> bool:
        return bool(g[x.example > 0].any())

    def statistics(
        self,
        info: ModuleInfo,
        module: nn.Module,
        x: ExpertInputs,
        g: Tensor,
        wanted: Collection[str],
        shared: Shared | None = None,
    ) -> Statistics:
        """For every expert of a projection at once, each part with the experts (E,) as its first dimension."""
        weights = _stacked_weights(module, _projection(info))
        experts, out, features = weights["weight"].shape
        dtype = accumulator_dtype(x.values)
        sums = {
            statistic: {
                part: g.new_zeros(experts, *shape, dtype=dtype) for part, shape in shapes(info, statistic).items()
            }
            for statistic in STATISTICS
            if statistic in wanted
        }
        for some, xs, gs in _blocks(x, g, experts, out * features if set(sums) - {"squares"} else 0):
            block = {name: weight[some] for name, weight in weights.items()}
            for statistic, parts in _block_statistics(block, info.bias, xs, gs, set(sums)).items():
                for part, value in parts.items():
                    sums[statistic][part][some] = value
        return sums

    def squared_inputs(self, module: nn.Module, x: Tensor, mask: Tensor | None, route: Route) -> dict[str, Tensor]:
        """The weight has Σ x² of each expert's rows (E, in), the bias the number of rows (E,)."""
        squares = x.to(accumulator_dtype(x)).square()
        real = _real(mask, route)
        kept = squares.new_ones(len(x)) if real is None else real.to(squares.dtype)
        experts = len(route.counts)
        return {
            "weight": squares.new_zeros(experts, x.shape[1]).index_add_(0, route.experts, squares * kept[:, None]),
            "bias": squares.new_zeros(experts).index_add_(0, route.experts, kept),
        }

    def input_size(self, info: ModuleInfo) -> int:
        return info.columns

    def input_weighted(
        self, info: ModuleInfo, weights: Mapping[str, Tensor], squares: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return linear.LinearType().input_weighted(info, weights, squares)

    def own(self, info: ModuleInfo, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value[_expert(info)] for name, value in stacked.items()}

    def is_used(self, info: ModuleInfo, route: Route) -> bool:
        return route.counts[_expert(info)] > 0

    def output_rows(self, info: ModuleInfo, y: Tensor, mask: Tensor | None, examples: int, route: Route) -> Tensor:
        rows, real = route.experts == _expert(info), _real(mask, route)
        return in_float64(y[rows if real is None else rows & real.bool()])

    def neutral(
        self, info: ModuleInfo, module: nn.Module, x: Tensor, y: Tensor, mean: Tensor | None, route: Route
    ) -> Tensor:
        stand_in = torch.zeros_like(y) if mean is None else mean.to(y.dtype).expand_as(y)
        return torch.where((route.experts == _expert(info))[:, None], stand_in, y)


def _projections(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _projection(info: ModuleInfo) -> str:
    return info.stack.rpartition(".")[2]


def _expert(info: ModuleInfo) -> int:
    return int(info.name.rpartition(".")[2])


def _real(mask: Tensor | None, route: Route) -> Tensor | None:
    """The mask of each row's token, where it is a mask of the tokens."""
    return None if mask is None or mask.numel() != route.total else mask.flatten()[route.tokens]


def _stacked_weights(module: nn.Module, projection: str) -> dict[str, Tensor]:
    """All experts' matrices, (E, out, in), and biases (E, out): views, no copies."""
    held = {key: value.detach() for key, value in module._parameters.items() if value is not None}
    return _stacked(module, projection, held)


def _stacked(module: nn.Module, projection: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight, bias = values[projection], values.get(f"{projection}_bias")
    stacked = {"weight": weight.mT if module.is_transposed else weight}
    return stacked if bias is None else {**stacked, "bias": bias}


class _Implementation:
    """A model's configuration with another implementation of its experts, for one module that reads it."""

    def __init__(self, config: Any, implementation: str) -> None:
        self._config = config
        self._experts_implementation = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class _Watched:
    """A module that hands every projection's rows to ``see`` and goes on with what that returns, until ``remove``."""

    def __init__(self, module: nn.Module, see: See) -> None:
        self.module, self.config, self.key = module, module.config, f"reltune-{id(module)}"

        def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return _forward(module, hidden_states, top_k_index, top_k_weights, see)

        ALL_EXPERTS_FUNCTIONS[self.key] = forward
        module.config = _Implementation(self.config, self.key)  # type: ignore[assignment]

    def remove(self) -> None:
        self.module.config = self.config
        del ALL_EXPERTS_FUNCTIONS[self.key]


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, see: See) -> Tensor:
    """What transformers' implementations compute, with rows sorted by expert."""
    tokens, choices = top_k_index.shape
    expert = top_k_index.reshape(-1)
    counts = torch.bincount(expert, minlength=module.num_experts)[: module.num_experts].tolist()
    # Numbers past the last expert mean "to none".
    order = expert.argsort(stable=True)[: sum(counts)]
    route = Route(expert[order], order // choices, counts, tokens)

    up, down = _projections(module)
    x = hidden_states[route.tokens]
    y = see(up, x, _linear(module, up, x, counts), route)
    inner = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    y = see(down, inner, _linear(module, down, inner, counts), route)
    weighted = y * top_k_weights.reshape(-1)[order][:, None]
    parts = weighted.new_zeros(tokens * choices, weighted.shape[-1]).index_copy(0, order, weighted)
    return parts.view(tokens, choices, -1).sum(1).to(hidden_states.dtype)


def _linear(module: nn.Module, projection: str, x: Tensor, counts: list[int]) -> Tensor:
    """Each expert's map on its rows of x (S, in)."""
    stacked = _stacked_weights(module, projection)
    busy = [expert for expert, count in enumerate(counts) if count] or [0]
    rows = x.split(counts)
    weight, bias = stacked["weight"], stacked.get("bias")
    return torch.cat([F.linear(rows[e], weight[e], None if bias is None else bias[e]) for e in busy])


def _blocks(x: ExpertInputs, g: Tensor, experts: int, workspace: int = 0) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Some experts at a time: their numbers, inputs (n, B, T, in) and output gradients (n, B, T, out).

    Experts without rows are left out.

    ``workspace`` is what the caller needs for each expert, in numbers, beside Gram matrices (B, T, T).
    """
    sizes = torch.bincount(x.expert * x.examples + x.example, minlength=experts * x.examples).view(experts, x.examples)
    by_load = sizes.amax(1).argsort(stable=True)
    sizes = sizes[by_load]
    loads, counts, numbers = sizes.amax(1).tolist(), sizes.sum(1).tolist(), by_load.tolist()
    slot = torch.empty_like(by_load)
    slot[by_load] = torch.arange(experts, device=slot.device)
    group, rows = (slot[x.expert] * x.examples + x.example).sort(stable=True)
    place = torch.arange(len(rows), device=rows.device) - (sizes.flatten().cumsum(0) - sizes.flatten())[group]

    features = x.values.shape[1] + g.shape[1]
    start = sum(load == 0 for load in loads)
    first = 0
    while start < experts:
        stop = start + 1
        # Experts of about the same load, so that little of a block is filling.
        while stop < experts and loads[stop] <= 2 * loads[start]:
            each = x.examples * loads[stop] * (loads[stop] + features) + workspace
            if (stop + 1 - start) * each > block_numbers(x.values):
                break
            stop += 1
        last = first + sum(counts[start:stop])
        here = group[first:last] - start * x.examples
        where = here // x.examples, here % x.examples, place[first:last]
        shape = stop - start, x.examples, loads[stop - 1]
        xs, gs = (flat.new_zeros(*shape, flat.shape[1]) for flat in (x.values, g))
        xs[where], gs[where] = x.values[rows[first:last]], g[rows[first:last]]
        yield numbers[start:stop], xs, gs
        start, first = stop, last


def _block_statistics(
    weights: Mapping[str, Tensor], has_bias: bool, x: Tensor, g: Tensor, wanted: set[str]
) -> Statistics:
    """Of some experts, from inputs (n, B, T, in) and output gradients (n, B, T, out)."""
    dtype = accumulator_dtype(x)
    sums: Statistics = {}
    bias = g.sum(2, dtype=dtype) if has_bias else None  # (n, B, out)
    if "squares" in wanted:
        columns, rows = stacked_squared_gradient_sums(x, g)
        sums["squares"] = {"column": columns, "row": rows, "weight": rows.sum(1)}
        if bias is not None:
            sums["squares"]["bias"] = bias.square().sum((1, 2))
    if wanted & {"products", "sums"}:
        xs, gs = x.to(dtype), g.to(dtype)
    if "products" in wanted:
        weight = weights["weight"].to(dtype)[:, None]
        columns = (xs * (gs @ weight)).sum(2)  # (n, B, in)
        sums["products"] = {
            "column": columns.abs().sum(1),
            "row": (gs * (xs @ weight.mT)).sum(2).abs().sum(1),
            "weight": columns.sum(2).abs().sum(1),
        }
        if bias is not None:
            sums["products"]["bias"] = (bias * weights["bias"].to(dtype)[:, None]).sum(2).abs().sum(1)
    if "sums" in wanted:
        sums["sums"] = {"weight": gs.flatten(1, 2).mT @ xs.flatten(1, 2)}
        if bias is not None:
            sums["sums"]["bias"] = bias.sum(1)
    elements = wanted & {"square_elements", "absolute_elements"}
    if elements:
        each = [linear.statistics({}, has_bias, x[e], g[e], elements) for e in range(len(x))]
        for statistic in elements:
            sums[statistic] = {part: torch.stack([one[statistic][part] for one in each]) for part in each[0][statistic]}
    return sums
