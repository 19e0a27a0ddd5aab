"""Embeddings: rows are tokens (or positions), columns are features. The input is the tokens' numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reltune.layers.padding import mask_of
from reltune.layers.per_example import Shared, Statistics
from reltune.layers.protocol import Handle, Observer
from reltune.layers.single_weight import SingleWeight
from reltune.layers.units import ModuleInfo
from reltune.ops.squared_gradient import accumulator_dtype


class EmbeddingType(SingleWeight):
    """nn.Embedding itself, or a subclass that only adds a scale or an offset of positions outside the lookup."""

    name = "embedding"
    covers = "nn.Embedding"
    trains = frozenset({"column", "row", "weight"})

    def matches(self, module: nn.Module) -> bool:
        return type(module) is nn.Embedding and "weight" in module._parameters and not self.why_not(module)

    def why_not(self, module: nn.Module) -> str:
        """max_norm changes the weight in the forward pass, scale_grad_by_freq mixes examples: neither is covered."""
        if type(module) is not nn.Embedding:
            return ""
        settings = {
            "max_norm": module.max_norm is not None,
            "scale_grad_by_freq": module.scale_grad_by_freq,
            "sparse": module.sparse,
        }
        return " ".join(f"with {name}" for name, on in settings.items() if on)

    def observe(self, module: nn.Module, infos: Sequence[ModuleInfo], observer: Observer) -> list[Handle]:
        expand = module.register_forward_pre_hook(_looks_up_for_each(infos[0].name, observer), with_kwargs=True)
        return [*super().observe(module, infos, observer), expand]

    def by_example(self, module: nn.Module, x: Tensor, g: Tensor, examples: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, T) and output gradients (B, T, features). All that is looked up for one example belongs to it."""
        if x.shape[0] != examples and examples > 1:
            raise ValueError(f"its input has shape {tuple(x.shape)}")
        return x.reshape(examples, -1), g.reshape(examples, -1, g.shape[-1])

    def statistics(
        self,
        info: ModuleInfo,
        module: nn.Module,
        x: Tensor,
        g: Tensor,
        wanted: Collection[str],
        shared: Shared | None = None,
    ) -> Statistics:
        """From tokens x (B, T) and output gradients g (B, T, features).

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
        rows = values.new_zeros(len(pairs), features).index_add_(0, place, values)  # the rows of G_s that are not zero
        row_example, row_token = pairs // tokens, pairs % tokens

        def over_tokens(values: Tensor) -> Tensor:
            return values.new_zeros(tokens, *values.shape[1:]).index_add_(0, row_token, values)

        sums: Statistics = {}
        if "squares" in wanted:
            squares = rows.square()
            sums["squares"] = {"column": squares.sum(0), "row": over_tokens(squares.sum(1)), "weight": squares.sum()}
        if "products" in wanted:
            products = rows * self.weights(info, module)["weight"][row_token].to(dtype)
            by_column = products.new_zeros(examples, features).index_add_(0, row_example, products)
            sums["products"] = {
                "column": by_column.abs().sum(0),
                "row": over_tokens(products.sum(1).abs()),
                "weight": by_column.sum(1).abs().sum(),
            }
        if "sums" in wanted:
            sums["sums"] = {"weight": over_tokens(rows)}
        if "square_elements" in wanted:
            sums["square_elements"] = {"weight": over_tokens(rows.square())}
        if "absolute_elements" in wanted:
            sums["absolute_elements"] = {"weight": over_tokens(rows.abs())}
        return sums

    def squared_inputs(self, module: nn.Module, x: Tensor, mask: Tensor | None, route: Any) -> dict[str, Tensor]:
        """How often each token occurs, which is Σ x² of its one-hot input: weight (tokens,)."""
        assert isinstance(module, nn.Embedding)
        real = mask_of(x.shape, mask)
        counted = x if real is None else x[real.bool()]
        occurrences = torch.bincount(counted.reshape(-1), minlength=module.num_embeddings)
        return {"weight": occurrences.to(accumulator_dtype(module.weight))}

    def input_size(self, info: ModuleInfo) -> int:
        return info.rows

    def input_weighted(
        self, info: ModuleInfo, weights: Mapping[str, Tensor], squares: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The input of a token's row is its indicator."""
        return {"weight": weights["weight"].abs() * squares["weight"].sqrt()[:, None]}


def _looks_up_for_each(name: str, observer: Observer) -> Any:
    """A hook by which positions, looked up once and broadcast over the batch, are looked up for each example.

    Each then has a gradient of its own.
    """
    last = name.rsplit(".", 1)[-1]
    shared = "position" in last or "token_type" in last or last == "wpe"

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        ids, rows = args[0] if args else next(iter(kwargs.values())), observer.rows()
        if not shared or ids.ndim != 2 or len(ids) != 1 or rows == 1:
            return None
        ids = ids.expand(rows, -1)
        return ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): ids})

    return hook
