"""Inputs of modules made again in the backward pass from what autograd keeps anyway.

The frozen model's own backward pass keeps the operands of an activation, of a product and of a norm, but not their results,
which are the inputs of the linear maps behind them. Keeping those for the analysis, the probe or trained single weights
would add 64 + 64 + 235 MB to every layer of an 8B model at 8,192 tokens. They are instead made again when their gradient
comes, by the operation that made them, from its operands (the attributes ``_saved_…`` of a tensor's ``grad_fn``, as
PyTorch documents them), bit by bit the same; a layer norm's without its epsilon up to a rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

from reltune.ops.stand_in import on_accelerator

Recipe = Callable[[], Tensor]
LONGEST = 4  # operations in a row that are done again: an RMSNorm is x · r, a cast, · gain
REMADE = "reltune_remade"  # where a node has a weak reference to what makes its result again

_forced: list[bool] = []


def is_wanted(x: Tensor) -> bool:
    """Whether inputs are made again: on an accelerator memory is dearer than the few operations, on a CPU it is not."""
    return _forced[-1] if _forced else on_accelerator(x)


@contextmanager
def force(on: bool) -> Iterator[None]:
    """Make inputs again, or keep them, whatever the device, in all forward passes until the context ends."""
    _forced.append(on)
    try:
        yield
    finally:
        _forced.pop()


def saved_tensors_are_hooked() -> bool:
    """Whether a hook decides what is kept, as gradient checkpointing does: reading it then would run the block again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class Remade:
    """The result of an operation for those that read it in the backward pass: made by the first, dropped after the last.

    ``waiting``: how many are still to read it.
    """

    def __init__(self, how: Recipe, device: str) -> None:
        self.how, self.device, self.waiting = how, device, 0
        self.again: Tensor | None = None

    def read(self) -> Tensor:
        again = self.again
        if again is None:
            with torch.no_grad(), torch.autocast(self.device, enabled=False):
                again = self.how()
        self.waiting -= 1
        self.again = again if self.waiting > 0 else None
        return again


def again(x: Tensor) -> Recipe | None:
    """How to read x once more, once, in the backward pass; None where it is not wanted or autograd keeps too little.

    Several readers of one tensor, or of views of it, make it once. Where hooks decide what is kept, they alone may ask.
    """
    node: Any = x.grad_fn
    if node is None or not is_wanted(x):
        return None
    while type(node).__name__ in VIEWS:  # every linear map takes a view of its own
        node = node.next_functions[0][0]
    how = recipe(node)
    if how is None:
        return None
    reference = node.metadata.get(REMADE)  # weak, or the node would hold itself
    remade: Remade | None = None if reference is None else reference()
    if remade is None:
        remade = Remade(how, "cpu" if x.is_meta else x.device.type)
        node.metadata[REMADE] = weakref.ref(remade)
    remade.waiting += 1
    shape = x.shape
    return lambda: remade.read().reshape(shape)


def keep(ctx: Any, x: Tensor, *others: Tensor) -> None:
    """Keep these for an operator's backward pass as ``save_for_backward`` does, but x only if it cannot be made again."""
    ctx.again = None if saved_tensors_are_hooked() else again(x)
    ctx.save_for_backward(x if ctx.again is None else None, *others)


def kept(ctx: Any) -> tuple[Tensor, ...]:
    """What ``keep`` kept."""
    x, *others = ctx.saved_tensors
    return x if ctx.again is None else ctx.again(), *others


def recipe(node: Node | None, epsilon: float | None = None, longest: int = LONGEST) -> Recipe | None:
    """How to make the result of an operation again, given its ``grad_fn``; None where autograd keeps too little.

    The backward pass must not have come by that operation when it is made. ``epsilon`` is that of a layer norm, which
    autograd does not keep.
    """
    rule = RULES.get(type(node).__name__) if longest > 0 else None
    return None if rule is None or node is None else rule(node, epsilon, longest - 1)


def is_exact(how: Recipe, x: Tensor) -> bool:
    """Whether the recipe gives x, bit by bit."""
    with torch.no_grad():
        again = how()
    return again.shape == x.shape and again.dtype == x.dtype and torch.equal(again, x)


def _operand(node: Node, index: int, name: str, epsilon: float | None, longest: int) -> Recipe | None:
    if node.next_functions[1 - index][0] is not None:  # a factor is kept for the other one's gradient
        return lambda: getattr(node, name)
    return recipe(node.next_functions[index][0], epsilon, longest)


def _product(node: Node, epsilon: float | None, longest: int) -> Recipe | None:
    a = _operand(node, 0, "_saved_self", epsilon, longest)
    b = _operand(node, 1, "_saved_other", epsilon, longest)
    return None if a is None or b is None else lambda: a() * b()


def _cast(node: Node, epsilon: float | None, longest: int) -> Recipe | None:
    before = recipe(node.next_functions[0][0], epsilon, longest)
    dtype = node._input_metadata[0].dtype
    return None if before is None else lambda: before().to(dtype)


def _view(node: Node, epsilon: float | None, longest: int) -> Recipe | None:
    before = recipe(node.next_functions[0][0], epsilon, longest)
    shape = node._input_metadata[0].shape
    return None if before is None else lambda: before().reshape(shape)


def _layer_norm(node: Any, epsilon: float | None, longest: int) -> Recipe | None:
    if epsilon is None and node._saved_result1.dtype.itemsize < 4:
        return None  # on a CPU mean and deviation may be rounded as the input is

    def make() -> Tensor:
        saved = node._saved_input, node._saved_normalized_shape, node._saved_weight, node._saved_bias
        if epsilon is not None:
            return F.layer_norm(*saved, epsilon)
        x, _, gain, bias = saved
        y = (x - node._saved_result1) * node._saved_result2
        y = y if gain is None else y * gain
        return (y if bias is None else y + bias).to(x.dtype)

    return make


def _rms_norm(node: Any, epsilon: float | None, longest: int) -> Recipe | None:
    def make() -> Tensor:
        from reltune.ops.rms_norm import rms_norm

        x, gain = node.saved_tensors
        return rms_norm(x, gain, node.epsilon)

    return make


def _gated_product(node: Any, epsilon: float | None, longest: int) -> Recipe | None:
    def make() -> Tensor:
        from reltune.ops.gated_product import gated_product

        gate, up = node.saved_tensors
        return gated_product(gate, up, node.activation)

    return make


def _handed_on(node: Node, epsilon: float | None, longest: int) -> Recipe | None:
    return recipe(node.next_functions[0][0], epsilon, longest)


VIEWS = ("ViewBackward0", "UnsafeViewBackward0")

# What autograd calls the backward of an operation -> how to do the operation again.
RULES: dict[str, Callable[[Any, float | None, int], Recipe | None]] = {
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "_WatchBackward": _handed_on,  # relevance/statistics/collector.py
    "NativeLayerNormBackward0": _layer_norm,
    "RMSNormBackward": _rms_norm,  # ops/rms_norm.py
    "GatedProductBackward": _gated_product,  # ops/gated_product.py
    "SiluBackward0": lambda node, *_: lambda: F.silu(node._saved_self),
    "GeluBackward0": lambda node, *_: lambda: F.gelu(node._saved_self, approximate=node._saved_approximate),
}
