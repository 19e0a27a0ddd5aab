"""Experts of a mixture-of-experts layer, all in two 3-D parameters: one linear map per expert and projection.

Transformers keeps the experts of a layer in one module, ``gate_up_proj`` (E, 2·I, H) or ``up_proj`` (E, I, H), and
``down_proj`` (E, H, I), some transposed, some with biases (E, out). Each expert's matrix is a unit owner of its own, named
``….experts.gate_up_proj.3``, with columns, rows, the whole matrix and its bias, as layers/linear.py has them.

A router sends a token to a few experts, so an expert's rows are a part of the batch. During an analysis the module runs
the forward below, put in by transformers' own table of experts implementations, which tells which token each row came
from. All experts of a projection are measured together: statistics have the experts as their first dimension. Rows are
laid out by expert and example, the shorter groups filled up with zeros, which add nothing to any statistic of a gradient:
(experts, examples, rows of the largest group, features), experts of about the same load in one block.

Memory: the rows sorted by expert, and one block at a time. Single weights are gone through expert by expert.
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
from reltune.layers.linear import input_weighted
from reltune.layers.per_example import STATISTICS, Statistics
from reltune.layers.units import ModuleInfo
from reltune.ops.squared_gradient import accumulator_dtype, block_numbers, stacked_squared_gradient_sums

__all__ = [
    "Route",
    "Rows",
    "gathered",
    "infos",
    "input_weighted",
    "instrument",
    "matches",
    "of_expert",
    "squared_inputs",
    "stacked_weights",
    "statistics",
    "weights",
]

# What transformers' decorator use_experts_implementation writes on a module, without which its forward is its own affair.
MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")


@dataclasses.dataclass(frozen=True)
class Route:
    """Which expert's and which of the ``total`` tokens each row is, both (S,); sorted by expert, ``counts`` rows each."""

    experts: Tensor
    tokens: Tensor
    counts: list[int]
    total: int


See = Callable[[str, Tensor, Tensor, Route], Tensor]  # (projection, its input rows, its output rows, route) -> output


def matches(module: nn.Module) -> bool:
    """Experts that transformers can run by any implementation, whole on this device and without a norm of their own."""
    if not all(hasattr(module, mark) for mark in MARKS):
        return False
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return False
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    names = _projections(module)
    known = {*names, *(f"{name}_bias" for name in names if module.has_bias)}
    if set(shapes) != known:
        return False
    return all(
        len(shape) == (2 if name.endswith("_bias") else 3) and shape[0] == module.num_experts
        for name, shape in shapes.items()
    )


def _projections(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def infos(name: str, module: nn.Module, layer: str, depth: int) -> list[ModuleInfo]:
    """One per expert and projection."""
    found = []
    for projection in _projections(module):
        sizes = tuple(module.get_parameter(projection).shape[1:])
        shape = sizes[::-1] if module.is_transposed else sizes
        for expert in range(module.get_parameter(projection).shape[0]):
            own = f"{name}.{projection}.{expert}" if name else f"{projection}.{expert}"
            found.append(ModuleInfo(own, "experts", layer, depth, shape, bool(module.has_bias)))
    return found


def weights(info: ModuleInfo, module: nn.Module) -> dict[str, Tensor]:
    """One expert's matrix, (out, in), and bias: views, no copies."""
    projection, expert = info.name.split(".")[-2:]
    return of_expert(stacked_weights(module, projection), int(expert))


def stacked_weights(module: nn.Module, projection: str) -> dict[str, Tensor]:
    """All experts' matrices, (E, out, in), and biases (E, out): views, no copies."""
    weight = module.get_parameter(projection).detach()
    found = {"weight": weight.mT if module.is_transposed else weight}
    if module.has_bias:
        found["bias"] = module.get_parameter(f"{projection}_bias").detach()
    return found


def of_expert(stacked: Mapping[str, Tensor], expert: int) -> dict[str, Tensor]:
    return {name: value[expert] for name, value in stacked.items()}


class _Implementation:
    """A model's configuration with another implementation of its experts, for one module that reads it."""

    def __init__(self, config: Any, implementation: str) -> None:
        self._config = config
        self._experts_implementation = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class Instrumented:
    """The module as instrumented, until ``remove``."""

    def __init__(self, module: nn.Module, see: See) -> None:
        self.module, self.config, self.key = module, module.config, f"reltune-{id(module)}"

        def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return _forward(module, hidden_states, top_k_index, top_k_weights, see)

        ALL_EXPERTS_FUNCTIONS[self.key] = forward
        module.config = _Implementation(self.config, self.key)  # type: ignore[assignment]

    def remove(self) -> None:
        self.module.config = self.config
        del ALL_EXPERTS_FUNCTIONS[self.key]


def instrument(module: nn.Module, see: See) -> Instrumented:
    """From now on the module hands every projection's rows to ``see``, and goes on with what that returns."""
    return Instrumented(module, see)


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
    stacked = stacked_weights(module, projection)
    busy = [expert for expert, count in enumerate(counts) if count] or [0]
    rows = x.split(counts)
    maps = [of_expert(stacked, expert) for expert in busy]
    return torch.cat([F.linear(rows[e], own["weight"], own.get("bias")) for e, own in zip(busy, maps, strict=True)])


@dataclasses.dataclass(frozen=True)
class Rows:
    """Inputs (S, in) of a projection in one pass, with the expert and the example (S,) of each."""

    values: Tensor
    expert: Tensor
    example: Tensor
    examples: int


def gathered(uses: Sequence[tuple[Tensor, Tensor, Route]], examples: int) -> tuple[Rows, Tensor]:
    """All input rows and output gradients (S, out) of a pass, from those of each use of the module.

    Tokens are taken example by example, as many of each; ValueError where they are not.
    """
    for *_, route in uses:
        if route.total % examples:
            raise ValueError(f"its input has {route.total} tokens")
    example = [route.tokens // (route.total // examples) for *_, route in uses]
    expert = [route.experts for *_, route in uses]
    rows = Rows(torch.cat([x for x, *_ in uses]), torch.cat(expert), torch.cat(example), examples)
    return rows, torch.cat([g for _, g, _ in uses])


def _blocks(x: Rows, g: Tensor, experts: int, workspace: int = 0) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Numbers of some experts with their inputs (n, B, T, in) and output gradients (n, B, T, out); none without rows.

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
        xs, gs = (of.new_zeros(*shape, of.shape[1]) for of in (x.values, g))
        xs[where], gs[where] = x.values[rows[first:last]], g[rows[first:last]]
        yield numbers[start:stop], xs, gs
        start, first = stop, last


def statistics(
    info: ModuleInfo,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    x: Rows,
    g: Tensor,
    wanted: Collection[str],
) -> Statistics:
    """Sums over the examples (layers/per_example.py) for every expert of a projection, each part behind a dimension (E,).

    ``weights`` are ``stacked_weights``, x and g what ``gathered`` gives.
    """
    experts, out, features = weights["weight"].shape
    dtype = accumulator_dtype(x.values)
    units = {"column": (features,), "row": (out,), "weight": (), **({"bias": ()} if info.bias else {})}
    single = {"weight": (out, features), **({"bias": (out,)} if info.bias else {})}
    found = {
        need: {
            part: g.new_zeros(experts, *shape, dtype=dtype)
            for part, shape in (units if need in ("squares", "products") else single).items()
        }
        for need in STATISTICS
        if need in wanted
    }
    for some, xs, gs in _blocks(x, g, experts, out * features if set(found) - {"squares"} else 0):
        of_block = _of_block(info, {name: weight[some] for name, weight in weights.items()}, xs, gs, set(found))
        for need, parts in of_block.items():
            for part, value in parts.items():
                found[need][part][some] = value
    return found


def _of_block(info: ModuleInfo, weights: Mapping[str, Tensor], x: Tensor, g: Tensor, wanted: set[str]) -> Statistics:
    dtype = accumulator_dtype(x)
    found: Statistics = {}
    bias = g.sum(2, dtype=dtype) if info.bias else None  # (n, B, out)
    if "squares" in wanted:
        columns, rows = stacked_squared_gradient_sums(x, g)
        found["squares"] = {"column": columns, "row": rows, "weight": rows.sum(1)}
        if bias is not None:
            found["squares"]["bias"] = bias.square().sum((1, 2))
    if wanted & {"products", "sums"}:
        xs, gs = x.to(dtype), g.to(dtype)
    if "products" in wanted:
        weight = weights["weight"].to(dtype)[:, None]
        columns = (xs * (gs @ weight)).sum(2)  # (n, B, in)
        found["products"] = {
            "column": columns.abs().sum(1),
            "row": (gs * (xs @ weight.mT)).sum(2).abs().sum(1),
            "weight": columns.sum(2).abs().sum(1),
        }
        if bias is not None:
            found["products"]["bias"] = (bias * weights["bias"].to(dtype)[:, None]).sum(2).abs().sum(1)
    if "sums" in wanted:
        found["sums"] = {"weight": gs.flatten(1, 2).mT @ xs.flatten(1, 2)}
        if bias is not None:
            found["sums"]["bias"] = bias.sum(1)
    elements = wanted & {"square_elements", "absolute_elements"}
    if elements:
        each = [
            linear.statistics(info, nn.Module(), of_expert(weights, e), x[e], g[e], elements) for e in range(len(x))
        ]
        for need in elements:
            found[need] = {part: torch.stack([of[need][part] for of in each]) for part in each[0][need]}
    return found


def squared_inputs(x: Tensor, route: Route, real: Tensor | None) -> dict[str, Tensor]:
    """Σ x² of each expert's rows: weight (E, in), and the number of rows: bias (E,).

    ``real`` (tokens,) marks the tokens that are no padding.
    """
    squares = x.to(accumulator_dtype(x)).square()
    kept = squares.new_ones(len(x)) if real is None else real[route.tokens].to(squares.dtype)
    experts = len(route.counts)
    return {
        "weight": squares.new_zeros(experts, x.shape[1]).index_add_(0, route.experts, squares * kept[:, None]),
        "bias": squares.new_zeros(experts).index_add_(0, route.experts, kept),
    }
