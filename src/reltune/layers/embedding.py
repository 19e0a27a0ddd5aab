"""Embeddings: rows are tokens (or positions), columns are features. The input is the tokens' numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from reltune.layers import per_example
from reltune.layers.units import ModuleInfo
from reltune.ops.squared_gradient import accumulator_dtype


def matches(module: nn.Module) -> bool:
    """nn.Embedding itself, or a subclass that only adds a scale or an offset of positions outside the lookup.

    max_norm changes the weight in the forward pass and scale_grad_by_freq mixes examples: neither is covered.
    """
    return (
        type(module) is nn.Embedding
        and "weight" in module._parameters
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def by_example(module: nn.Module, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and output gradients (B, T, features). Whatever is looked up for one example alone belongs to it."""
    if x.shape[0] != examples and examples > 1:
        raise ValueError(f"its input has shape {tuple(x.shape)}")
    return x.reshape(examples, -1), g.reshape(examples, -1, g.shape[-1])


def statistics(
    info: ModuleInfo,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    g: Tensor,
    wanted: Collection[str],
    shared: per_example.Shared | None = None,
) -> per_example.Statistics:
    """Sums over the examples (layers/per_example.py) for tokens x (B, T) and output gradients g (B, T, features).

    An example's gradient has rows for its own tokens only, so it is held as those: workspace O(B · T · features).
    """
    dtype = accumulator_dtype(g)
    tokens, features = info.shape
    examples = len(x)
    example = torch.arange(examples, device=x.device)[:, None].expand_as(x)
    ids, values = x.reshape(-1), g.reshape(-1, features).to(dtype)
    padding = getattr(module, "padding_idx", None)
    if padding is not None:  # its row gets no gradient
        values = values * (ids != padding)[:, None]
    pairs, place = torch.unique(example.reshape(-1) * tokens + ids, return_inverse=True)
    rows = values.new_zeros(len(pairs), features).index_add_(0, place, values)  # G_s, its rows that are not zero
    row_example, row_token = pairs // tokens, pairs % tokens

    def over_tokens(of: Tensor) -> Tensor:
        return of.new_zeros(tokens, *of.shape[1:]).index_add_(0, row_token, of)

    found: per_example.Statistics = {}
    if "squares" in wanted:
        squares = rows.square()
        found["squares"] = {"column": squares.sum(0), "row": over_tokens(squares.sum(1)), "weight": squares.sum()}
    if "products" in wanted:
        products = rows * weights["weight"][row_token].to(dtype)
        by_column = products.new_zeros(examples, features).index_add_(0, row_example, products)
        found["products"] = {
            "column": by_column.abs().sum(0),
            "row": over_tokens(products.sum(1).abs()),
            "weight": by_column.sum(1).abs().sum(),
        }
    if "sums" in wanted:
        found["sums"] = {"weight": over_tokens(rows)}
    if "square_elements" in wanted:
        found["square_elements"] = {"weight": over_tokens(rows.square())}
    if "absolute_elements" in wanted:
        found["absolute_elements"] = {"weight": over_tokens(rows.abs())}
    return found


def squared_inputs(module: nn.Module, x: Tensor, real: Tensor | None) -> dict[str, Tensor]:
    """How often each token occurs, which is Σ x² of its one-hot input: weight (tokens,)."""
    assert isinstance(module, nn.Embedding)
    counted = x if real is None else x[real.bool()]
    occurrences = torch.bincount(counted.reshape(-1), minlength=module.num_embeddings)
    return {"weight": occurrences.to(accumulator_dtype(module.weight))}


def input_weighted(info: ModuleInfo, weights: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w| · ‖x‖ for every weight: the input of a token's row is its indicator."""
    return {"weight": weights["weight"].abs() * squares["weight"].sqrt()[:, None]}
