"""Hooks that see every measured module's input and output gradient, and add up what the criteria need."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reltune.errors import AnalysisError
from reltune.layers import experts, router
from reltune.layers.inventory import LAYER_TYPES, ModuleInfo, canonical_weights
from reltune.layers.per_example import WEIGHT_SIZED, Shared, Statistics, add
from reltune.relevance.statistics.recompute import Recipe, is_exact, recipe, saved_tensors_are_hooked

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
    """One tensor that one or several modules read: how to have it again in the backward pass, and what they share."""

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
        """One of the readers is done; the last one takes with it what was kept for all."""
        self.readers -= 1
        if self.readers <= 0:
            self.again, self.shared.gram = None, None


class _Watch(torch.autograd.Function):
    """Hand y on unchanged, and on the way back its gradient, with the input x of the module, to ``arrived``.

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

    A module called once per pass is done as soon as its gradient comes; one called several times waits for all of its
    calls, because its gradient is the sum over them. With ``recompute``, inputs that autograd can make again are not
    kept: on an accelerator memory is dearer than the few operations, on a CPU it is not. The ``rows_per_example`` rows of an
    example follow each other; their positions count as positions of one example.
    """

    def __init__(
        self, model: nn.Module, measured: list[ModuleInfo], recompute: bool | None = None, rows_per_example: int = 1
    ) -> None:
        self.rows_per_example = rows_per_example
        # All experts of a projection are measured together, under the projection's name, until they are told apart at the
        # end; their statistics have one dimension more.
        self.experts: dict[str, list[ModuleInfo]] = {}
        self.infos: dict[str, ModuleInfo] = {}
        for info in measured:
            name = info.name
            if info.kind == "experts":
                name = name.rpartition(".")[0]
                self.experts.setdefault(name, []).append(info)
            self.infos.setdefault(name, info)
        self.modules = {name: model.get_submodule(info.owner) for name, info in self.infos.items()}
        self.sums: Sums = {name: {} for name in self.infos}
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
        # Module -> input and output gradient, of experts with their route too, of each use.
        self.pending: dict[str, list[tuple]] = {}
        self.held: dict[int, _Input] = {}
        self.inputs: Statistics = {}  # module -> Σ x² of this pass
        self.in_backward = False
        self.looking = False  # inside a statistic, which may call the module itself

    def __enter__(self) -> Collector:
        self.handles: list[Any] = []
        for name, module in self.modules.items():
            kind = self.infos[name].kind
            if kind == "experts":  # together, below
                continue
            if kind == "router":
                see, refuse = functools.partial(self._see, name), functools.partial(self.mixing.__setitem__, name)
                self.handles.append(router.instrument(module, see, refuse))
                continue
            # First of the module's hooks: what others make of the output is no part of the linear map.
            self.handles.append(module.register_forward_hook(self._forward_hook(name), prepend=True, with_kwargs=True))
            if kind == "embedding":
                self.handles.append(module.register_forward_pre_hook(self._expand(name), with_kwargs=True))
        for owner, module in {self.infos[name].owner: self.modules[name] for name in self.experts}.items():
            self.handles.append(experts.instrument(module, functools.partial(self._see_experts, owner)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self._clear()
        if not any(_):
            for name in self.infos:
                missing = sorted(self.seen - set(self.sums[name]))
                if missing and name in self.experts:
                    # A fused kernel in the place of the whole layer would hide them.
                    self.mixing.setdefault(name, "the loss does not reach it, or other code runs in its place")
                    continue
                for prefix_and_need in missing:
                    self.sums[name][prefix_and_need] = self._zeros(name, prefix_and_need)
            self._tell_experts_apart()

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
        for name, found in self.inputs.items():
            if ("inputs", name) not in self.done:
                self._keep(name, {"inputs": found})
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

    def _expand(self, name: str) -> Callable[..., Any]:
        """Positions are looked up once and broadcast over the batch; looked up per example, they have a gradient each."""
        last = name.rsplit(".", 1)[-1]
        shared = "position" in last or "token_type" in last or last == "wpe"

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            ids = args[0] if args else next(iter(kwargs.values()))
            if not shared or ids.ndim != 2 or len(ids) != 1 or self.rows == 1:
                return None
            ids = ids.expand(self.rows, -1)
            return ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): ids})

        return hook

    def _forward_hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if self.looking:
                return None
            return self._see(name, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    def _see(self, name: str, x: Tensor, y: Tensor, *route: experts.Route) -> Tensor:
        """Note one use of a module. Gives y, watched for its gradient."""
        if not self.in_backward:  # else gradient checkpointing recomputes what was counted already
            self.calls[name] = self.calls.get(name, 0) + 1
            if "inputs" in self.wanted and not self.probe:
                add(self.inputs, {name: self._inputs_of(name, x, *route)})
        if not torch.is_grad_enabled():
            return y

        def arrived(x: Tensor, g: Tensor, shared: Shared) -> None:
            self.pending.setdefault(name, []).append((x, g, *route))
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

    def _see_experts(self, owner: str, projection: str, x: Tensor, y: Tensor, route: experts.Route) -> Tensor:
        name = f"{owner}.{projection}" if owner else projection
        return self._see(name, x, y, route) if name in self.infos else y

    def _tell_experts_apart(self) -> None:
        for projection, infos in self.experts.items():
            stacked, reason = self.sums.pop(projection), self.mixing.pop(projection, None)
            for info in infos:
                expert = int(info.name.rpartition(".")[2])
                self.sums[info.name] = {need: experts.of_expert(parts, expert) for need, parts in stacked.items()}
                if reason is not None:
                    self.mixing[info.name] = reason

    def _inputs_of(self, name: str, x: Tensor, route: experts.Route | None = None) -> dict[str, Tensor]:
        info, real, mask = self.infos[name], None, self.mask
        if route is not None:
            real = mask.flatten() if mask is not None and mask.numel() == route.total else None
            return experts.squared_inputs(x, route, real)
        if mask is not None:
            leading = x.shape if info.kind == "embedding" else x.shape[:-1]
            if leading == mask.shape:
                real = mask
            elif leading == mask.flatten().shape:
                real = mask.flatten()
        self.looking = True
        try:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                return LAYER_TYPES[info.kind].squared_inputs(self.modules[name], x, real)
        finally:
            self.looking = False

    def _add(self, name: str, uses: list[tuple], shared: Shared | None = None) -> None:
        if name in self.mixing or (not self.probe and (self.prefix, name) in self.done):
            return
        if name in self.experts:
            self._add_experts(name, uses)
            return
        info, module = self.infos[name], self.modules[name]
        handler = LAYER_TYPES[info.kind]
        try:
            pairs = [handler.by_example(module, x, g, self.rows) for x, g in uses]
        except ValueError as error:
            self.mixing[name] = f"{error} for {self.rows} examples"
            return
        if self.rows > self.examples:
            pairs = [(self._of_examples(x), self._of_examples(g)) for x, g in pairs]
        if self.probe:
            if any(g[1:].any() for _, g in pairs):
                self.mixing[name] = "an example's loss depends on rows that belong to another"
            return
        x, g = pairs[0] if len(pairs) == 1 else (torch.cat(together, 1) for together in zip(*pairs, strict=True))
        shared = shared if len(pairs) == 1 else None
        # The caller's autocast would do these sums in bfloat16, where they cancel.
        with torch.autocast(x.device.type, enabled=False):
            found = handler.statistics(info, module, canonical_weights(info, module), x, g, self.wanted, shared)
        self._keep(name, {self.prefix + need: parts for need, parts in found.items()})
        self.done.add((self.prefix, name))

    def _of_examples(self, values: Tensor) -> Tensor:
        """The positions (rows, T, …) of all rows of an example as positions of one, (B, rows per example · T, …)."""
        return values.unflatten(0, (self.examples, self.rows_per_example)).flatten(1, 2)

    def _add_experts(self, name: str, uses: list[tuple]) -> None:
        info, module = self.infos[name], self.modules[name]
        try:
            x, g = experts.gathered(uses, self.examples)
        except ValueError as error:
            self.mixing[name] = f"{error} for {self.examples} examples"
            return
        if self.probe:
            if g[x.example > 0].any():
                self.mixing[name] = "an example's loss depends on rows that belong to another"
            return
        weights = experts.stacked_weights(module, name.rpartition(".")[2])
        with torch.autocast(g.device.type, enabled=False):
            found = experts.statistics(info, module, weights, x, g, self.wanted)
        self._keep(name, {self.prefix + need: parts for need, parts in found.items()})
        self.done.add((self.prefix, name))

    def _keep(self, name: str, found: Statistics) -> None:
        for need, parts in found.items():
            for part, value in parts.items():
                if part not in ("column", "row"):  # they add up the same numbers as the whole does
                    what = INPUT if need == "inputs" else part
                    self.witnesses.append((name, what, value.sum() if value.ndim else value))
            if need.removeprefix("sampled_") in WEIGHT_SIZED:
                found[need] = {part: value.cpu() for part, value in parts.items()}
        add(self.sums[name], found)

    def _zeros(self, name: str, need: str) -> dict[str, Tensor]:
        """The statistics of an input and a gradient of zeros: what a module that the loss never sees ends with."""
        info, module = self.infos[name], self.modules[name]
        weights = canonical_weights(info, module)
        weight, handler = weights["weight"], LAYER_TYPES[info.kind]
        features = weight[0].numel() * info.groups if info.kind != "norm" else info.shape[0]
        with torch.no_grad():
            x = weight.new_zeros(1, 1, features)
            if info.kind == "embedding":
                x = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
            g = weight.new_zeros(1, 1, info.shape[-1] if info.kind == "embedding" else info.shape[0])
            base = need.removeprefix("sampled_")
            if base == "inputs":
                shape = info.shape[:1] if info.kind == "embedding" else (features,)
                return {"weight": weight.new_zeros(shape), "bias": weight.new_zeros(())}
            return handler.statistics(info, module, weights, x, g, {base})[base]
