"""Routers of mixture-of-experts layers that hold their weight themselves: a linear map from tokens to experts.

Transformers' …TopKRouter modules compute the logits with F.linear and go on to probabilities and choices in the same
forward, so the map's output is seen by no module hook. It is caught where F.linear gives it. Columns are input features,
rows are experts; statistics are those of layers/linear.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from reltune.layers.linear import by_example, input_weighted, squared_inputs, statistics

__all__ = ["Instrumented", "by_example", "input_weighted", "instrument", "matches", "squared_inputs", "statistics"]

CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half)
REFUSED = "its weight is used otherwise than in one kind of linear map"


def matches(module: nn.Module) -> bool:
    """Called …Router, with a matrix and perhaps a bias and nothing else; whether it is a linear map shows when it runs."""
    dimensions = {name: p.ndim for name, p in module.named_parameters()}
    return type(module).__name__.endswith("Router") and dimensions in ({"weight": 2}, {"weight": 2, "bias": 1})


class _Maps(TorchFunctionMode):
    """Hands the input and output of every F.linear by the module's weight to ``see``, and notes any other use of it."""

    def __init__(self, module: nn.Module, see: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.see, self.found, self.otherwise = see, False, False
        self.weights: list[Tensor] = [module.get_parameter("weight")]
        self.biases: list[Tensor | None] = [module._parameters.get("bias")]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            x, weight, bias = (given.get(key) for key in ("input", "weight", "bias"))
            if _among(weight, self.weights) and _among(bias, self.biases) and not _among(x, self.weights):
                self.found = True
                return self.see(x, result)
        if isinstance(result, Tensor):  # neither a shape nor a dtype
            for held in (self.weights, self.biases):
                if any(argument is not None and _among(argument, held) for argument in (*args, *kwargs.values())):
                    if func in CASTS:
                        held.append(result)
                    else:
                        self.otherwise = True
        return result


def _among(tensor: Any, tensors: list) -> bool:
    return any(tensor is one for one in tensors)


class Instrumented:
    """The module as instrumented, until ``remove``."""

    def __init__(
        self, module: nn.Module, see: Callable[[Tensor, Tensor], Tensor], refuse: Callable[[str], None]
    ) -> None:
        self.module, self.own = module, module.__dict__.get("forward")
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            with _Maps(module, see) as maps:
                output = forward(*args, **kwargs)
            if maps.otherwise or not maps.found:
                refuse(REFUSED)
            return output

        module.forward = watched

    def remove(self) -> None:
        del self.module.forward
        if self.own is not None:
            self.module.forward = self.own


def instrument(
    module: nn.Module, see: Callable[[Tensor, Tensor], Tensor], refuse: Callable[[str], None]
) -> Instrumented:
    """From now on the module hands its map's input and output to ``see``, and goes on with what that returns."""
    return Instrumented(module, see, refuse)
