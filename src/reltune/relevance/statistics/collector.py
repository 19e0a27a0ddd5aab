"""Watches every measured module's input and output gradient, and adds up what the criteria need."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reltune.errors import AnalysisError
from reltune.layers.per_example import WEIGHT_SIZED, Shared, Statistics, add, shapes
from reltune.layers.protocol import Handle, Observer, Use
from reltune.layers.registry import layer_type
from reltune.layers.units import ModuleInfo
from reltune.ops.recompute import Recipe, is_exact, recipe, saved_tensors_are_hooked
from reltune.ops.squared_gradient import accumulator_dtype

INPUT = "input"  # in place of a part, of what the forward pass gave
Sums = dict[str, Statistics]  # module -> statistic -> part -> sum over examples


def first_and_others(mixing: Mapping[str, str]) -> tuple[str, str]:
    """The first module with the number of the others, and its reason."""
    name, reason = next(iter(mixing.items()))
    return name + (f" and {len(mixing) - 1} more" if len(mixing) > 1 else ""), reason


def mixing_sentence(mixing: Mapping[str, str]) -> str:
    names, reason = first_and_others(mixing)
    return (
        f"the gradients of {names} cannot be told apart by example: {reason}; leave it out by exclude_modules, or give "
        "batches of one example."
    )


class _Input:
    """A tensor that one or several modules read: how to make it again in the backward pass, and what these modules share."""

    def __init__(self, x: Tensor, recipe: Recipe | None) -> None:
        self.tensor, self.version = weakref.ref(x), x._version
        self.recipe = recipe
        self.again: Tensor | None = None
        self.readers = 0  # modules whose gradient is still to come
        self.shared = Shared(others=False)

    def is_of(self, x: Tensor) -> bool:
        return self.tensor() is x and self.version == x._version

    def make(self) -> Tensor:
        assert self.recipe is not None
        if self.again is None:
            self.again = self.recipe()
        return self.again

    def read(self) -> None:
        """Note that one of the readers is done. After the last one, drop what was kept for all of them."""
        self.readers -= 1
        if self.readers <= 0:
            self.again, self.shared.gram = None, None


class _Watch(torch.autograd.Function):
    """Hand y on unchanged; in the backward pass hand its gradient, with the input x of the module, to ``arrived``.

    A tensor hook would be lost where y is a view (as nn.Linear's output is for inputs with positions) and the next
    operation changes it in place. Returning y.detach(), and not y, makes it no view and lets that operation happen.
    ``anchor`` requires a gradient, so the first measured module starts the graph: nothing below it needs a backward
    pass. Without a recipe x is saved as autograd saves things, so that gradient checkpointing drops and recomputes it.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, held: _Input, arrived: Callable[..., None], name: str
    ) -> Tensor:
        if held.recipe is None:
            ctx.save_for_backward(x)
        ctx.held, ctx.arrived, ctx.name = held, arrived, name
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        held: _Input = ctx.held
        with torch.no_grad():
            try:
                x = held.make() if held.recipe is not None else ctx.saved_tensors[0]
            except RuntimeError as error:
                if "inplace" not in str(error):
                    raise
                raise AnalysisError(
                    f"the input of {ctx.name} was changed in place after use; leave it out by exclude_modules."
                ) from error
            held.shared.others = held.readers > 1
            ctx.arrived(x, g, held.shared)
        held.read()
        return g, *(None,) * 5


class Collector:
    """Adds up, per module, the statistics asked for.

    What is measured together (``ModuleInfo.stack``: a module, or all experts of one projection) is added up under one
    name, and told apart when the collector is left. Its statistics may have one dimension more until then.

    A module called once per pass is done as soon as its gradient comes; one called several times waits for all of its
    calls, because its gradient is the sum over them. With ``recompute``, inputs that autograd can make again are not
    kept: on an accelerator memory is dearer than the few operations, on a CPU it is not. An example has ``rows_per_example``
    rows of the model's input, which follow each other; their positions count as positions of one example.
    """

    def __init__(
        self, model: nn.Module, measured: list[ModuleInfo], recompute: bool | None = None, rows_per_example: int = 1
    ) -> None:
        self.rows_per_example = rows_per_example
        self.members: dict[str, list[ModuleInfo]] = {}  # stack -> what it holds
        for info in measured:
            self.members.setdefault(info.stack, []).append(info)
        self.infos = {stack: members[0] for stack, members in self.members.items()}
        self.types = {stack: layer_type(info.layer_type) for stack, info in self.infos.items()}
        self.modules = {stack: model.get_submodule(info.owner) for stack, info in self.infos.items()}
        self.sums: Sums = {stack: {} for stack in self.infos}
        self.mixing: dict[str, str] = {}  # modules that cannot be measured, and why
        self.anchor = torch.zeros((), requires_grad=True)
        self.batch = -1
        self.seen: set[str] = set()  # statistics that any pass asked for
        parameter = next(model.parameters(), None)
        self.recompute = (parameter is not None and parameter.is_cuda) if recompute is None else recompute
        epsilons = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
        self.epsilons = sorted(epsilons) or [0.0]
        self.rules: dict[str, float | None] = {}  # module -> with which epsilon its input can be made again
        self._clear()

    def _clear(self) -> None:
        self.calls: dict[str, int] = {}
        self.pending: dict[str, list[Use]] = {}  # uses whose gradients have come
        self.held: dict[int, _Input] = {}
        self.inputs: Statistics = {}  # module -> Σ x² of this pass
        self.in_backward = False

    def __enter__(self) -> Collector:
        self.handles: list[Handle] = []
        by_owner: dict[str, list[ModuleInfo]] = {}
        for members in self.members.values():
            by_owner.setdefault(members[0].owner, []).extend(members)
        # First of the module's hooks: what others make of the output is not part of the module's own map.
        observer = Observer(self._see, self.mixing.__setitem__, lambda: self.rows, first=True)
        for infos in by_owner.values():
            stack = infos[0].stack
            self.handles += self.types[stack].observe(self.modules[stack], infos, observer)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self._clear()
        if any(_):
            return
        for stack in self.infos:
            missing = sorted(self.seen - set(self.sums[stack]))
            if missing and self.types[stack].unseen:
                self.mixing.setdefault(stack, self.types[stack].unseen)
            elif missing:
                self.sums[stack] |= {statistic: self._zeros(stack, statistic) for statistic in missing}
        self._tell_members_apart()

    # -- one batch --------------------------------------------------------------------------------------------------

    def start(self, batch: int, skip: frozenset[tuple[str, str]] = frozenset()) -> None:
        """Begin a batch. ``skip`` names what an earlier try at these examples has added: (kind of pass, module)."""
        self.batch, self.done = batch, set(skip)
        self.witnesses: list[tuple[str, str, Tensor]] = []  # module, part, a number that is finite if all are

    def expect(self, examples: int, wanted: set[str], prefix: str, batch: Any, probe: bool = False) -> None:
        """Get ready for a forward pass of so many examples. ``batch`` is what the model sees of them."""
        self._clear()
        self.examples, self.wanted, self.prefix, self.probe = examples, wanted, prefix, probe
        self.rows = examples * self.rows_per_example
        self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not probe:
            self.seen |= {prefix + need for need in wanted}

    def forward_done(self) -> None:
        """Add what the forward pass alone gave."""
        for name, squares in self.inputs.items():
            if ("inputs", name) not in self.done:
                self._keep(name, {"inputs": squares})
                self.done.add(("inputs", name))

    def backward(self, losses: Tensor) -> None:
        """Differentiate the summed losses and add the batch's statistics."""
        self.in_backward = True
        losses.sum().backward()
        with torch.no_grad():
            for name in list(self.pending):
                self._add(name, self.pending.pop(name))
        self._clear()

    def abandon(self) -> frozenset[tuple[str, str]]:
        """Forget a pass that failed half-way. Gives what it has added, which must not be added again."""
        self._clear()
        return frozenset(self.done)

    def finish(self) -> None:
        """Check once per batch, not once per module, that all that was added is finite: each check waits for the device."""
        if not self.witnesses:
            return
        device = self.witnesses[0][-1].device
        finite = torch.stack([value.to(device, torch.float32) for *_, value in self.witnesses]).isfinite()
        for (name, part, _), good in zip(self.witnesses, finite.tolist(), strict=True):
            if not good:  # the first to come, whatever the model's order: nearest to where it began
                what = f"the gradient of {name} ({part})" if part != INPUT else f"the input of {name}"
                raise AnalysisError(f"{what} is not finite in batch {self.batch}.")

    # -- hooks ------------------------------------------------------------------------------------------------------

    def _see(self, name: str, x: Tensor, y: Tensor, route: Any) -> Tensor:
        """Note one use of a module. Gives y, watched for its gradient."""
        if not self.in_backward:  # else gradient checkpointing recomputes what was counted already
            self.calls[name] = self.calls.get(name, 0) + 1
            if "inputs" in self.wanted and not self.probe:
                with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                    squares = self.types[name].squared_inputs(self.modules[name], x, self.mask, route)
                add(self.inputs, {name: squares})
        if not torch.is_grad_enabled():
            return y

        def arrived(x: Tensor, g: Tensor, shared: Shared) -> None:
            self.pending.setdefault(name, []).append(Use(x, g, route))
            if len(self.pending[name]) >= self.calls.get(name, 0):
                self._add(name, self.pending.pop(name), shared)

        return _Watch.apply(y, x.detach(), self.anchor, self._hold(name, x), arrived, name)

    def _hold(self, name: str, x: Tensor) -> _Input:
        held = self.held.get(id(x))
        if held is None or not held.is_of(x):
            held = self.held[id(x)] = _Input(x, self._recipe(name, x))
        held.readers += 1
        return held

    def _recipe(self, name: str, x: Tensor) -> Recipe | None:
        if not self.recompute or self.in_backward or x.grad_fn is None or saved_tensors_are_hooked():
            return None
        if name not in self.rules:  # tried out once: comparing waits for the device
            recipes = ((epsilon, recipe(x.grad_fn, epsilon)) for epsilon in self.epsilons)
            exact = (epsilon for epsilon, how in recipes if how is not None and is_exact(how, x))
            self.rules[name] = next(exact, None)
        epsilon = self.rules[name]
        return None if epsilon is None else recipe(x.grad_fn, epsilon)

    def _add(self, name: str, uses: list[Use], shared: Shared | None = None) -> None:
        if name in self.mixing or (not self.probe and (self.prefix, name) in self.done):
            return
        its_type, module = self.types[name], self.modules[name]
        try:
            x, g = its_type.gathered(module, uses, self.examples, self.rows_per_example)
        except ValueError as error:
            self.mixing[name] = f"{error} for {self.rows} examples"
            return
        if self.probe:
            if its_type.reaches_others(x, g):
                self.mixing[name] = "an example's loss depends on rows that belong to another"
            return
        shared = shared if len(uses) == 1 else None
        # The caller's autocast would do these sums in bfloat16, where they cancel.
        with torch.autocast(g.device.type, enabled=False):
            statistics = its_type.statistics(self.infos[name], module, x, g, self.wanted, shared)
        self._keep(name, {self.prefix + statistic: parts for statistic, parts in statistics.items()})
        self.done.add((self.prefix, name))

    def _keep(self, name: str, statistics: Statistics) -> None:
        for statistic, parts in statistics.items():
            for part, value in parts.items():
                if part not in ("column", "row"):  # they add up the same numbers as the whole does
                    what = INPUT if statistic == "inputs" else part
                    self.witnesses.append((name, what, value.sum() if value.ndim else value))
            if statistic.removeprefix("sampled_") in WEIGHT_SIZED:
                statistics[statistic] = {part: value.cpu() for part, value in parts.items()}
        add(self.sums[name], statistics)

    def _zeros(self, name: str, statistic: str) -> dict[str, Tensor]:
        """What a module that the loss never sees ends with: a gradient, or an input, of zeros."""
        info, parameter = self.infos[name], next(self.modules[name].parameters())
        statistic = statistic.removeprefix("sampled_")
        if statistic == "inputs":
            wanted: dict[str, tuple[int, ...]] = {"weight": (self.types[name].input_size(info),), "bias": ()}
        else:
            wanted = shapes(info, statistic)
        dtype = accumulator_dtype(parameter)
        return {part: torch.zeros(shape, dtype=dtype, device=parameter.device) for part, shape in wanted.items()}

    def _tell_members_apart(self) -> None:
        for stack, members in self.members.items():
            stacked, reason = self.sums.pop(stack), self.mixing.pop(stack, None)
            for info in members:
                own = {statistic: self.types[stack].own(info, parts) for statistic, parts in stacked.items()}
                self.sums[info.name] = own
                if reason is not None:
                    self.mixing[info.name] = reason
