"""Linear maps y = x Wᵀ + b: columns (input features), rows (output features), the bias, the whole matrix."""

from __future__ import annotations

from torch import Tensor, nn

from reltune.ops.squared_gradient import accumulator_dtype, squared_gradient_sums


def matches(module: nn.Module) -> bool:
    """Exactly nn.Linear with a weight of its own: a subclass or reparametrisation may compute otherwise."""
    return type(module) is nn.Linear and "weight" in module._parameters


def squared_gradients(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Sums over the examples of squared per-example gradients: column (in,), row (out,), bias (out,).

    x (B, T, in) is the input and g (B, T, out) the gradient of the summed loss with respect to the output.
    """
    columns, rows = squared_gradient_sums(x, g)
    sums = {"column": columns, "row": rows}
    if module.bias is not None:
        sums["bias"] = g.to(rows.dtype).sum(1).square().sum(0)
    return sums


def summed_gradients(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Sums over the examples of the gradients themselves: weight (out, in) and bias (out,)."""
    dtype = accumulator_dtype(x)
    sums = {"weight": g.to(dtype).flatten(0, 1).mT @ x.to(dtype).flatten(0, 1)}
    if module.bias is not None:
        sums["bias"] = g.to(dtype).sum((0, 1))
    return sums
