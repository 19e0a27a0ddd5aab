"""Routers of mixture-of-experts layers that hold their weight themselves: a linear map from tokens to experts.

Transformers' …TopKRouter modules compute the logits with F.linear and go on to probabilities and choices in the same
forward, so the map's output is seen by no module hook. It is caught where F.linear gives it. Columns are input features,
rows are experts; statistics are those of layers/linear.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from reltune.layers.linear import LinearType
from reltune.layers.protocol import Handle, HeadLayout, Observer
from reltune.layers.units import ModuleInfo

CASTS = (Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.bfloat16, Tensor.half)
REFUSED = "its weight is used otherwise than in one kind of linear map"


class RouterType(LinearType):
    """Called …Router, with a matrix and perhaps a bias and nothing else; whether it is a linear map shows when it runs.

    When it is taken out it gives zero logits, so that all experts are alike and ties decide, or its mean logits, so
    that all tokens go to the same experts.
    """

    name = "router"
    covers = "Transformers' …TopKRouter"
    trains = frozenset[str]()
    head_layout: HeadLayout = ""

    def matches(self, module: nn.Module) -> bool:
        dimensions = {name: p.ndim for name, p in module.named_parameters()}
        return type(module).__name__.endswith("Router") and dimensions in ({"weight": 2}, {"weight": 2, "bias": 1})

    def observe(self, module: nn.Module, infos: Sequence[ModuleInfo], observer: Observer) -> list[Handle]:
        (info,) = infos

        def see(x: Tensor, y: Tensor) -> Tensor:
            return observer.see(info.name, x, y, None)

        return [_Watched(module, see, functools.partial(observer.refuse, info.name))]


class _Maps(TorchFunctionMode):
    """Hands the input and output of every F.linear by the module's weight to ``see``, and notes any other use of it."""

    def __init__(self, module: nn.Module, see: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.see, self.seen, self.otherwise = see, False, False
        self.weights: list[Tensor] = [module.get_parameter("weight")]  # and what casts have made of it
        self.biases: list[Tensor | None] = [module._parameters.get("bias")]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            x, weight, bias = (named.get(key) for key in ("input", "weight", "bias"))
            if _among(weight, self.weights) and _among(bias, self.biases) and not _among(x, self.weights):
                self.seen = True
                return self.see(x, result)
        if isinstance(result, Tensor):  # neither a shape nor a dtype
            arguments = [
                one
                for argument in (*args, *kwargs.values())
                for one in (argument if isinstance(argument, list | tuple) else [argument])
            ]
            for held in (self.weights, self.biases):
                if any(one is not None and _among(one, held) for one in arguments):
                    if func in CASTS:
                        held.append(result)
                    else:
                        self.otherwise = True
        return result


def _among(tensor: Any, tensors: list) -> bool:
    return any(tensor is one for one in tensors)


class _Watched:
    """A module that hands its map's input and output to ``see`` and goes on with what that returns, until ``remove``."""

    def __init__(
        self, module: nn.Module, see: Callable[[Tensor, Tensor], Tensor], refuse: Callable[[str], None]
    ) -> None:
        self.module, self.own = module, module.__dict__.get("forward")
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            with _Maps(module, see) as maps:
                output = forward(*args, **kwargs)
            if maps.otherwise or not maps.seen:
                refuse(REFUSED)
            return output

        module.forward = watched

    def remove(self) -> None:
        del self.module.forward
        if self.own is not None:
            self.module.forward = self.own
