"""Experts of a mixture-of-experts layer, all in two 3-D parameters: one linear map per expert and projection.

Transformers keeps the experts of a layer in one module, ``gate_up_proj`` (E, 2·I, H) or ``up_proj`` (E, I, H), and
``down_proj`` (E, H, I), some transposed, some with biases (E, out). Each expert's matrix is a unit owner of its own, named
``….experts.gate_up_proj.3``, with columns, rows, the whole matrix and its bias, as layers/linear.py has them.

A router sends a token to a few experts, so an expert's rows are a part of the batch. During an analysis the module runs
the forward below, put in by transformers' own table of experts implementations, which tells which token each row came
from. Rows of one expert are then laid out by example, the shorter ones filled up with zeros, which add nothing to any
statistic of a gradient: (examples, most tokens of one example, features). Whatever holds for linear maps holds then.

Cost: a loop over the experts that got tokens, as in the implementation "eager". Memory: the rows, sorted by expert, and for
one expert at a time the same laid out by example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from reltune.layers.linear import input_weighted, squared_inputs, statistics
from reltune.layers.units import ModuleInfo

__all__ = [
    "Route",
    "by_example",
    "by_expert",
    "infos",
    "input_weighted",
    "instrument",
    "matches",
    "squared_inputs",
    "statistics",
    "weights",
]

# What transformers' decorator use_experts_implementation writes on a module, without which its forward is its own affair.
MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")


@dataclasses.dataclass(frozen=True)
class Route:
    """Which of the ``total`` tokens (S,) each row belongs to; rows are sorted by expert, ``counts`` of them each."""

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
    return _weights(module, projection, int(expert))


def _weights(module: nn.Module, projection: str, expert: int) -> dict[str, Tensor]:
    weight = module.get_parameter(projection).detach()[expert]
    found = {"weight": weight.mT if module.is_transposed else weight}
    if module.has_bias:
        found["bias"] = module.get_parameter(f"{projection}_bias").detach()[expert]
    return found


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
    route = Route(order // choices, counts, tokens)

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
    found = []
    for expert, rows in enumerate(x.split(counts)):
        if len(rows) or not any(counts):
            own = _weights(module, projection, expert)
            found.append(F.linear(rows, own["weight"], own.get("bias")))
    return torch.cat(found)


def by_example(module: nn.Module, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """Inputs (B, T, in) and output gradients (B, T, out), as ``by_expert`` has made them."""
    return x, g


def by_expert(x: Tensor, g: Tensor, route: Route, examples: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert's number, inputs (B, T, in) and output gradients (B, T, out), from rows x (S, in) and g (S, out).

    T is the most rows of one example; examples with fewer have zeros in their place, and T is 0 for an expert without any.
    Tokens are taken example by example, as many of each; ValueError where they are not.
    """
    if route.total % examples:
        raise ValueError(f"its input has {route.total} tokens")
    example = route.tokens // (route.total // examples)
    experts = len(route.counts)
    counts = torch.tensor(route.counts, device=x.device)
    group = torch.arange(experts, device=x.device).repeat_interleave(counts, output_size=len(x)) * examples + example
    sizes = torch.bincount(group, minlength=experts * examples)
    # Sorted by expert and, as the sort was stable, by token: a group's rows follow each other.
    place = torch.arange(len(x), device=x.device) - (sizes.cumsum(0) - sizes)[group]
    longest = sizes.view(experts, examples).amax(1).tolist()
    by_count = (of.split(route.counts) for of in (x, g, example, place))
    for expert, (xs, gs, of, at) in enumerate(zip(*by_count, strict=True)):
        laid_out = (
            xs.new_zeros(examples, longest[expert], xs.shape[1]),
            gs.new_zeros(examples, longest[expert], gs.shape[1]),
        )
        for into, rows in zip(laid_out, (xs, gs), strict=True):
            into[of, at] = rows
        yield expert, *laid_out
