"""Weights that move while the parameters that hold them stay untouched.

For as long as ``moving`` lasts, whoever reads a moving parameter of a module (``module.weight``) gets W₀ − η V, a tensor
of its own that is made anew for each reading. The parameter itself is never written, so there is nothing to put back,
and a checkpoint that is saved meanwhile holds the base. A quantised weight is unpacked first, and its module computes the
plain product.

The backward pass hands a weight's gradient, added up over all readings (tied weights, modules used twice), to ``arrived``
as soon as it is complete, and keeps it no longer unless it is told to. What autograd would keep of a moved weight for
the backward pass is not kept but computed once more: of all moved weights, those of the layer at work are in memory, and
of linear maps only the one at work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reltune.errors import AnalysisError, InputError
from reltune.layers.inventory import Inventory
from reltune.layers.quantised import is_quantised
from reltune.layers.registry import is_packed, layer_type, unpacking
from reltune.layers.units import ModuleInfo
from reltune.ops import recompute
from reltune.ops import votes as ops

HELD = "_reltune_moving"  # where a module has its moving weights, by the names of its parameters


@dataclasses.dataclass(eq=False)
class MovingWeight:
    """One parameter of the model, wherever it is used.

    ``places`` are the modules that own it, with its name there; tied weights have several. ``base`` is the parameter's
    data, or None where its one owner holds it in few bits; ``unpack`` then gives it. ``votes`` V has the weight's shape, a quantised one's as it
    computes. ``step`` is η. Autograd adds up the gradient in ``leaf``, which takes no memory.
    """

    name: str
    places: list[tuple[nn.Module, str]]
    base: Tensor | None
    votes: Tensor
    dtype: torch.dtype
    unpack: Callable[[], Tensor] | None = None
    step: float = 0.0

    def __post_init__(self) -> None:
        scalar = torch.zeros((), dtype=self.dtype, device=self.votes.device)
        self.leaf = scalar.expand(self.votes.shape).requires_grad_()

    def now(self) -> Tensor:
        """W₀ − η V."""
        base = self.base
        if base is None:
            assert self.unpack is not None
            base = self.unpack().to(self.dtype)
        return ops.moved(base, self.votes, self.step)

    def view_now(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        """A view of ``now()``, of which no more is computed than the view spans."""
        span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if self.base is None or span == self.votes.numel() or not self.base.is_contiguous() or 0 in size:
            return self.now().as_strided(size, stride, offset)
        part = slice(offset, offset + span)
        own = ops.moved(self.base.view(-1)[part], self.votes.view(-1)[part], self.step)
        return own.as_strided(size, stride, 0)

    def size(self) -> float:
        """The root of the mean square of W₀."""
        base = self.base
        if base is None:
            assert self.unpack is not None
            base = self.unpack()
        wide = torch.promote_types(base.dtype, torch.float32)
        return float(torch.linalg.vector_norm(base, dtype=wide)) / max(base.numel(), 1) ** 0.5


class _Read(torch.autograd.Function):
    """The moved weight, as a function of the weight's leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, weight: MovingWeight) -> Tensor:
        return weight.now()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Product(torch.autograd.Function):
    """(x (…, in), the weight's leaf, bias (out,) or None, the weight) -> x Wᵀ + b with the moved W.

    Beside W's gradient neither W stands in memory nor, in a block that is checkpointed, the other maps' W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, bias: Tensor | None, weight: MovingWeight) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(x, weight.now(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        to_x = (g @ ctx.weight.now().to(g.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        flat = g.reshape(-1, g.shape[-1])
        to_weight = (flat.mT @ x.reshape(-1, x.shape[-1]).to(g.dtype)).to(ctx.weight.dtype)
        return to_x, to_weight, flat.sum(0) if ctx.needs_input_grad[2] else None, None


class _Saved(NamedTuple):
    """What is kept of a moved weight for the backward pass."""

    weight: MovingWeight
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Again(NamedTuple):
    """What is kept of an input that can be made again."""

    read: Callable[[], Tensor]


class Readings:
    """The moved weights that stand in memory at the moment, and which weights were read since ``forget``."""

    def __init__(self) -> None:
        self.order: dict[MovingWeight, None] = {}
        self.standing: dict[int, tuple[MovingWeight, weakref.ref]] = {}

    def forget(self) -> None:
        self.order.clear()

    def read(self, weight: MovingWeight) -> Tensor:
        tensor = _Read.apply(weight.leaf, weight)
        self.order.setdefault(weight)
        place = tensor.untyped_storage().data_ptr()

        def gone(reference: weakref.ref) -> None:
            if place in self.standing and self.standing[place][1] is reference:
                del self.standing[place]

        self.standing[place] = (weight, weakref.ref(tensor, gone))
        return tensor

    def not_kept(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which autograd keeps no moved weight, and no input that can be made again."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return tensor
        known = self.standing.get(tensor.untyped_storage().data_ptr())
        if known is None or tensor.dtype != known[0].dtype:
            again = recompute.again(tensor)
            return tensor if again is None else _Again(again)
        return _Saved(known[0], tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, _Saved):
        with torch.no_grad():
            return kept.weight.view_now(kept.size, kept.stride, kept.offset)
    return kept.read() if isinstance(kept, _Again) else kept


@contextlib.contextmanager
def moving(
    weights: Iterable[MovingWeight], arrived: Callable[[MovingWeight], None], readings: Readings
) -> Iterator[None]:
    """Let the weights' owners read them moved. ``arrived`` is told when a backward pass has a weight's whole gradient,
    which then stands in ``weight.leaf.grad``."""
    changed: list[tuple[nn.Module, type]] = []
    handles = []
    try:
        for weight in weights:
            handles.append(weight.leaf.register_post_accumulate_grad_hook(functools.partial(_tell, arrived, weight)))
            for module, key in weight.places:
                module.__dict__.setdefault(HELD, {})[key] = weight, readings
        for module in {id(module): module for weight in weights for module, _ in weight.places}.values():
            changed.append((module, type(module)))
            module.__class__ = _reading(
                cast(Any, type(module)), tuple(module.__dict__[HELD]), _computes_product(module)
            )
        yield
    finally:
        for module, own in changed:
            module.__class__ = own
        for weight in weights:
            weight.leaf.grad = None
            for module, _ in weight.places:
                module.__dict__.pop(HELD, None)
        for handle in handles:
            handle.remove()


def _tell(arrived: Callable[[MovingWeight], None], weight: MovingWeight, leaf: Tensor) -> None:
    arrived(weight)


@functools.cache
def _reading(own: Any, keys: tuple[str, ...], product: bool) -> type:
    """A class that differs from ``own`` in where it reads these parameters, and in a linear map's product."""
    content: dict[str, Any] = {key: property(functools.partial(_read_of, key=key)) for key in keys}
    content |= {"__module__": own.__module__, "__doc__": own.__doc__, "__qualname__": own.__qualname__}
    if product:
        content["forward"] = _product
    return type(own.__name__, (own,), content)


def _read_of(module: nn.Module, key: str) -> Tensor:
    weight, readings = module.__dict__[HELD][key]
    try:
        return readings.read(weight)
    except AttributeError as error:  # which would have torch look the parameter up instead
        raise RuntimeError(f"{weight.name} could not be read: {error}") from error


def _computes_product(module: nn.Module) -> bool:
    """Whether the module's forward is nn.Linear's, or that of a packed weight, with a weight that is moving."""
    weight, _ = module.__dict__[HELD].get("weight", (None, None))
    return weight is not None and (weight.base is None or type(module).forward is nn.Linear.forward)


def _product(module: Any, input: Tensor) -> Tensor:
    """What nn.Linear computes, and what a packed layer computes that is of the moved weight's type."""
    weight, readings = module.__dict__[HELD]["weight"]
    bias, kind = module.bias, input.dtype
    if type(input) is not Tensor:  # spread over processes
        return F.linear(input, module.weight, bias)
    if weight.base is None:
        input, bias = input.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
    readings.order.setdefault(weight)
    product: Tensor = _Product.apply(input, weight.leaf, bias, weight)
    return product.to(kind) if weight.base is None else product


def weights_that_move(
    model: nn.Module, inventory: Inventory | None, rate: float, votes: torch.dtype, relative: bool = True
) -> list[MovingWeight]:
    """The parameters of the inventory's modules, or all floating-point and quantised ones, each once, with no votes yet.

    η is ``rate``; if ``relative``, times the root mean square of W₀ (of a bias, of the weight that it belongs to). Where that is
    zero, as in a new head that starts from nothing, it is the median of the others.

    Raises InputError for a weight that is held in a way that is not known.
    """
    wanted = None if inventory is None else {id(p) for info in inventory.modules for p in parameters_of(info, model)}
    weights: dict[int, MovingWeight] = {}
    siblings: dict[int, int] = {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            own = f"{name}.{key}" if name else key
            packed = _is_packed(
                own, module, key, parameter
            )  # refuses also what need not move: would gradients pass it?
            if wanted is not None and id(parameter) not in wanted:
                continue
            if id(parameter) in weights:
                weights[id(parameter)].places.append((module, key))
                continue
            weights[id(parameter)] = _moving_weight(own, module, key, parameter, packed, dtype, votes)
            if key.endswith("bias"):
                sibling = module._parameters.get(key.removesuffix("bias") + "weight", module._parameters.get(key[:-5]))
                siblings[id(parameter)] = id(sibling)
    sizes = {
        key: weight.size() for key, weight in weights.items() if key not in siblings or siblings[key] not in weights
    }
    positive = sorted(size for size in sizes.values() if size > 0)
    if not all(map(math.isfinite, positive)):
        bad = next(weights[key].name for key, size in sizes.items() if not math.isfinite(size))
        raise AnalysisError(f"{bad} holds numbers that are not finite; load the model again.")
    middle = positive[len(positive) // 2] if positive else 1.0
    for key, weight in weights.items():
        own_size = sizes.get(key, sizes.get(siblings.get(key, 0), 0.0)) or middle
        weight.step = rate * own_size if relative else rate
    return list(weights.values())


def check_can_move(model: nn.Module) -> None:
    """Raise InputError, naming the weight, where the model holds one in a way that the probe does not know."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                _is_packed(f"{name}.{key}" if name else key, module, key, parameter)


def parameters_of(info: ModuleInfo, model: nn.Module) -> list[nn.Parameter]:
    """The parameters that hold the module's weights; of an expert, those of all experts of its projection."""
    owner = model.get_submodule(info.owner)
    return [owner.get_parameter(key) for key in layer_type(info.layer_type).parameters(info, owner)]


def _is_packed(name: str, module: nn.Module, key: str, parameter: Tensor) -> bool:
    """Whether the module holds this parameter in few bits. Raises InputError where the probe does not know how."""
    if not is_quantised(parameter):
        return False
    if key != "weight" or not is_packed(module):
        kind = parameter.dtype if type(parameter) is nn.Parameter else type(parameter).__name__
        raise InputError(
            f"{name} is quantised ({kind}) in a way that cannot be probed; load the base in bitsandbytes' 4 or 8 bits, "
            "torchao's weight-only types, float8 or a floating-point type, or use another criterion."
        )
    return True


def _moving_weight(
    name: str, module: nn.Module, key: str, parameter: Tensor, packed: bool, dtype: torch.dtype, votes: torch.dtype
) -> MovingWeight:
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(f"{name} is in a ScriptModule, whose weights cannot be moved; load the model as Python code.")
    if not packed:
        zero = torch.zeros(parameter.shape, dtype=votes, device=parameter.device)
        return MovingWeight(name, [(module, key)], parameter.detach(), zero, parameter.dtype)
    if "forward" in vars(module):
        raise InputError(f"{name} is quantised, and its module has a forward of its own; load it on one device.")
    unpack = unpacking(module)
    weight = unpack()
    # Layers that unpack to float32 compute in their input's type, the model's.
    dtype = dtype if weight.dtype == torch.float32 else weight.dtype
    zero = torch.zeros(weight.shape, dtype=votes, device=parameter.device)
    return MovingWeight(name, [(module, key)], None, zero, dtype, unpack)
