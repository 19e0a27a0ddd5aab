"""Inputs of modules made again in the backward pass from what autograd keeps anyway.

The frozen model's own backward pass keeps the operands of an activation, of a product and of a norm, but not their results,
which are the inputs of the linear maps behind them. Keeping those for the statistics would add 64 + 64 + 235 MB to every
layer of an 8B model at 8,192 tokens. They are instead made again when their gradient comes, by the operation that made
them, from its operands (the attributes ``_saved_…`` of a tensor's ``grad_fn``, as PyTorch documents them), bit by bit
the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

Recipe = Callable[[], Tensor]
LONGEST = 4  # operations in a row that are done again: an RMSNorm is x · r, a cast, · gain


def saved_tensors_are_hooked() -> bool:
    """Whether a hook decides what is kept, as gradient checkpointing does: reading it then would run the block again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def recipe(node: Node | None, epsilon: float = 0.0, longest: int = LONGEST) -> Recipe | None:
    """How to make the result of an operation again, given its ``grad_fn``; None where autograd keeps too little.

    Call it before the backward pass has come by that operation. ``epsilon`` is that of a layer norm, which autograd
    does not keep.
    """
    rule = RULES.get(type(node).__name__) if longest > 0 else None
    return None if rule is None or node is None else rule(node, epsilon, longest - 1)


def is_exact(how: Recipe, x: Tensor) -> bool:
    """Whether the recipe gives x, bit by bit."""
    with torch.no_grad():
        again = how()
    return again.shape == x.shape and again.dtype == x.dtype and torch.equal(again, x)


def _operand(node: Node, index: int, name: str, epsilon: float, longest: int) -> Recipe | None:
    if getattr(node, name) is not None:
        return lambda: getattr(node, name)
    return recipe(node.next_functions[index][0], epsilon, longest)


def _product(node: Node, epsilon: float, longest: int) -> Recipe | None:
    a = _operand(node, 0, "_saved_self", epsilon, longest)
    b = _operand(node, 1, "_saved_other", epsilon, longest)
    return None if a is None or b is None else lambda: a() * b()


def _cast(node: Node, epsilon: float, longest: int) -> Recipe | None:
    before = recipe(node.next_functions[0][0], epsilon, longest)
    dtype = node._input_metadata[0].dtype
    return None if before is None else lambda: before().to(dtype)


def _view(node: Node, epsilon: float, longest: int) -> Recipe | None:
    before = recipe(node.next_functions[0][0], epsilon, longest)
    shape = node._input_metadata[0].shape
    return None if before is None else lambda: before().reshape(shape)


def _layer_norm(node: Any, epsilon: float, longest: int) -> Recipe | None:
    def make() -> Tensor:
        saved = node._saved_input, node._saved_normalized_shape, node._saved_weight, node._saved_bias
        return F.layer_norm(*saved, epsilon)

    return make


def _rms_norm(node: Any, epsilon: float, longest: int) -> Recipe | None:
    def make() -> Tensor:
        from reltune.ops.kernels.rms_norm import rms_norm

        x, gain = node.saved_tensors
        return rms_norm(x, gain, node.epsilon)

    return make


def _handed_on(node: Node, epsilon: float, longest: int) -> Recipe | None:
    return recipe(node.next_functions[0][0], epsilon, longest)


# What autograd calls the backward of an operation -> how to do the operation again.
RULES: dict[str, Callable[[Node, float, int], Recipe | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "_WatchBackward": _handed_on,  # collector.py
    "NativeLayerNormBackward0": _layer_norm,
    "RMSNormBackward": _rms_norm,  # ops/rms_norm.py
    "SiluBackward0": lambda node, *_: lambda: F.silu(node._saved_self),
    "GeluBackward0": lambda node, *_: lambda: F.gelu(node._saved_self, approximate=node._saved_approximate),
}
