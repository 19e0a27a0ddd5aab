"""Linear maps y = x Wᵀ + b: columns (input features), rows (output features), the bias, the whole matrix."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from reltune.layers import per_example
from reltune.layers.units import ModuleInfo
from reltune.ops.squared_gradient import (
    Gram,
    accumulator_dtype,
    input_gram,
    is_fused,
    squared_gradient_sums,
    wants_gram,
)


def matches(module: nn.Module) -> bool:
    """Exactly nn.Linear with a weight of its own: a subclass or reparametrisation may compute otherwise."""
    return type(module) is nn.Linear and "weight" in module._parameters


def by_example(module: nn.Module, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """Input (B, T, in) and output gradient (B, T, out). Rows of one matrix (B·T, in) are taken example by example."""
    if x.shape[0] % examples or (x.shape[0] != examples and x.ndim != 2):
        raise ValueError(f"its input has shape {tuple(x.shape)}")
    return x.reshape(examples, -1, x.shape[-1]), g.reshape(examples, -1, g.shape[-1])


def statistics(
    info: ModuleInfo,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    g: Tensor,
    wanted: Collection[str],
    shared: per_example.Shared | None = None,
) -> per_example.Statistics:
    """Sums over the examples (layers/per_example.py) for inputs x (B, T, in) and output gradients g (B, T, out).

    Squares and products need no gradient of the weight's size.
    """
    dtype = accumulator_dtype(x)
    found: per_example.Statistics = {}
    bias = g.sum(1, dtype=dtype) if info.bias else None
    if "squares" in wanted:
        columns, rows = squared_gradient_sums(x, g, _shared_gram(shared, x, g))
        found["squares"] = {"column": columns, "row": rows, "weight": rows.sum()}
        if bias is not None:
            found["squares"]["bias"] = bias.square().sum()
    if "products" in wanted:
        weight = weights["weight"].to(dtype)
        xs, gs = x.to(dtype), g.to(dtype)
        columns = (xs * (gs @ weight)).sum(1)
        found["products"] = {
            "column": columns.abs().sum(0),
            "row": (gs * (xs @ weight.mT)).sum(1).abs().sum(0),
            "weight": columns.sum(1).abs().sum(),
        }
        if bias is not None:
            found["products"]["bias"] = (bias * weights["bias"].to(dtype)).sum(1).abs().sum()
    if "sums" in wanted:
        found["sums"] = {"weight": g.to(dtype).flatten(0, 1).mT @ x.to(dtype).flatten(0, 1)}
        if bias is not None:
            found["sums"]["bias"] = bias.sum(0)
    elements = set(wanted) & {"square_elements", "absolute_elements"}
    if elements:
        # One example at a time: a gradient of the weight's size is all the workspace this may take.
        for s in range(len(x)):
            gradients = {"weight": (g[s].to(dtype).mT @ x[s].to(dtype))[None]}
            if bias is not None:
                gradients["bias"] = bias[s][None]
            per_example.add(found, per_example.statistics(info, weights, gradients, elements))
    return found


def _shared_gram(shared: per_example.Shared | None, x: Tensor, g: Tensor) -> Gram | None:
    """K_x, where several maps with this input have a use for it."""
    if shared is None or not wants_gram(x.shape[1], x.shape[2], g.shape[2], fused=is_fused(x)):
        return None
    if shared.gram is None and shared.others:
        shared.gram = input_gram(x)
    return shared.gram


def squared_inputs(module: nn.Module, x: Tensor, real: Tensor | None) -> dict[str, Tensor]:
    """Σ x² over all tokens of each input feature: weight (in,), and the number of tokens: bias ().

    ``real`` (x.shape[:-1]) marks the tokens that are no padding.
    """
    squares = x.to(accumulator_dtype(x)).square()
    if real is None:
        return {"weight": squares.flatten(0, -2).sum(0), "bias": squares.new_tensor(x.shape[:-1].numel())}
    kept = real.to(squares.dtype)
    return {"weight": (squares * kept[..., None]).flatten(0, -2).sum(0), "bias": kept.sum()}


def input_weighted(info: ModuleInfo, weights: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w| · ‖x‖ for every weight: the input of W[o, i] is feature i over all tokens, that of a bias is 1."""
    result = {"weight": weights["weight"].abs() * squares["weight"].sqrt()}
    if info.bias:
        result["bias"] = weights["bias"].abs() * squares["bias"].sqrt()
    return result
