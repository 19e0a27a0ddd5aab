"""What it means to take a unit out of the function that a model computes. By hooks: no weight is ever changed.

- A linear map, convolution or embedding gives zero at every position: its weights and its bias contribute nothing. With
  ``replace_by="mean"`` it gives its mean output over the data, without padding: the positions and examples no longer
  differ, and what follows sees values of the usual size (mean ablation, Wang et al., ICLR 2023).
- An expert's projection gives zero, or its mean, for the tokens that are sent to it; a router gives zero logits, by which all
  experts are alike and ties decide, or its mean logits, by which all tokens go the same way.
- A norm normalises without gain and bias, whatever ``replace_by`` says: a zero would take the stream it stands in away.
- A head gives zero, or its mean, to the output projection: the same as that projection's columns of the head set to zero
  (Michel, Levy and Neubig, NeurIPS 2019, section 2.3, the mask ξ_h = 0).
- A layer hands its input on, as if its residual branches gave zero; with the mean, its input plus the mean of what it adds.
  The block is skipped whole, whichever of its modules are measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from reltune.layers import experts, router
from reltune.layers.attention_heads import HeadGroup
from reltune.layers.norm import normalised
from reltune.relevance.batches import batch_size
from reltune.relevance.behaviour.experiment import Experiment
from reltune.relevance.criteria.contract import ScoresByName

KINDS = ("layer", "module", "head")
REPLACEMENTS = ("zero", "mean")


@dataclasses.dataclass(frozen=True)
class Unit:
    """``name`` is that of the layer, the module or the attention module; ``head`` counts within the last."""

    kind: str
    name: str
    head: int = 0

    def __str__(self) -> str:
        return f"head {self.head} of {self.name}" if self.kind == "head" else f"{self.kind} {self.name}"


class Neutral:
    """Takes units of one experiment out, one or several at a time.

    Making it costs one pass over the data, which tells what can be taken out and the means: O(features) numbers per unit.
    ``units`` are those of the kinds asked for; ``left_out`` says why others are not among them. ``baseline`` is the metric
    of the untouched model.
    """

    def __init__(self, experiment: Experiment, kinds: Sequence[str], replace_by: str) -> None:
        self.model = experiment.model
        self.by_mean = replace_by == "mean"
        self.kind_of = {info.name: info.kind for info in experiment.inventory.modules}
        self.owner_of = {info.name: info.owner for info in experiment.inventory.modules}
        self.groups: dict[str, HeadGroup] = {group.name: group for group in experiment.inventory.heads}
        self.means: dict[tuple[str, str], Tensor] = {}  # (kind, name) -> what stands for the unit
        self.left_out: dict[Unit, str] = {}
        self.mask: Tensor | None = None
        self.examples = 0
        candidates = {
            "layer": [Unit("layer", name) for name in experiment.layers],
            "module": [Unit("module", name) for name in self.kind_of],
            "head": [
                Unit("head", group.name, head) for group in experiment.inventory.heads for head in range(group.heads)
            ],
        }
        wanted = [unit for kind in kinds for unit in candidates[kind]]
        self.baseline = self._look(experiment, wanted)
        self.units = {kind: [u for u in wanted if u.kind == kind and u not in self.left_out] for kind in kinds}

    # -- taking units out -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def without(self, units: Sequence[Unit], strength: float = 1.0) -> Iterator[None]:
        """The model without these units, until the context ends, however it ends.

        With a ``strength`` below 1 they are moved only so far from what they give towards what stands for them.
        """
        heads: dict[str, list[int]] = {}
        of_experts: dict[str, list[str]] = {}  # module that holds experts -> those taken out, by their names
        handles: list[RemovableHandle | experts.Instrumented | router.Instrumented] = []
        try:
            for unit in units:
                if unit.kind == "head":
                    heads.setdefault(unit.name, []).append(unit.head)
                    continue
                kind = self.kind_of.get(unit.name) if unit.kind == "module" else None
                if kind == "experts":
                    of_experts.setdefault(self.owner_of[unit.name], []).append(unit.name)
                    continue
                if kind == "router":
                    see = self._turn_down(unit.name, strength)
                    handles.append(router.instrument(self.model.get_submodule(unit.name), see, lambda reason: None))
                    continue
                hook = self._skip(unit, strength) if unit.kind == "layer" else self._silence(unit, strength)
                # After the module's own hooks: what others make of the output goes too.
                module = self.model.get_submodule(unit.name)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            for name, which in heads.items():
                output = self.model.get_submodule(self.groups[name].output)
                handles.append(output.register_forward_pre_hook(self._cut(name, which, strength)))
            for owner, names in of_experts.items():
                handles.append(experts.instrument(self.model.get_submodule(owner), self._dismiss(names, strength)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _skip(self, unit: Unit, strength: float) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            x, y = _stream(args, kwargs), _first(output)
            assert x is not None and y is not None, "looked at before"
            mean = self.means.get(("layer", unit.name))
            kept = _towards(y, x if mean is None else x + mean.to(x.dtype), strength)
            return kept if isinstance(output, Tensor) else type(output)((kept, *output[1:]))

        return hook

    def _silence(self, unit: Unit, strength: float) -> Callable[..., Any]:
        busy = False

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            nonlocal busy
            if self.kind_of[unit.name] == "norm":
                if busy:  # inside `normalised`, which calls the module itself
                    return None
                busy = True
                try:
                    x = args[0] if args else next(iter(kwargs.values()))
                    return _towards(output, normalised(module, x), strength)
                finally:
                    busy = False
            mean = self.means.get(("module", unit.name))
            return _towards(output, torch.zeros_like(output) if mean is None else mean.expand_as(output), strength)

        return hook

    def _cut(self, name: str, heads: Sequence[int], strength: float) -> Callable[..., Any]:
        columns = [column for head in heads for column in self.groups[name].output_columns(head)]

        def hook(module: nn.Module, args: tuple) -> Any:
            x = args[0].clone()
            index = torch.tensor(columns, device=x.device)
            mean = self.means.get(("head", name))
            own = x[..., index]
            stand_in = torch.zeros_like(own) if mean is None else mean[index].expand_as(own)
            x[..., index] = _towards(own, stand_in, strength)
            return (x, *args[1:])

        return hook

    def _turn_down(self, name: str, strength: float) -> Callable[[Tensor, Tensor], Tensor]:
        def see(x: Tensor, y: Tensor) -> Tensor:
            mean = self.means.get(("module", name))
            return _towards(y, torch.zeros_like(y) if mean is None else mean.expand_as(y), strength)

        return see

    def _dismiss(self, names: Sequence[str], strength: float) -> experts.See:
        """Experts by their names, ….experts.down_proj.3, all of one module."""

        def see(projection: str, x: Tensor, y: Tensor, route: experts.Route) -> Tensor:
            for name in names:
                own_projection, expert = name.split(".")[-2:]
                if own_projection == projection:
                    mean = self.means.get(("module", name))
                    neutral = _towards(y, torch.zeros_like(y) if mean is None else mean.expand_as(y), strength)
                    y = torch.where((route.experts == int(expert))[:, None], neutral, y)
            return y

        return see

    def enter(self, parts: ScoresByName, kind: str, part: str, scores: Tensor) -> None:
        """Put one score per unit of a kind into ``parts``: () per layer and module, (heads,) per attention module."""
        by_name: dict[str, list[Tensor]] = {}
        for unit, score in zip(self.units[kind], scores, strict=True):
            by_name.setdefault(unit.name, []).append(score)
        for name, of in by_name.items():
            parts.setdefault(name, {})[part] = torch.stack(of) if kind == "head" else of[0]

    # -- looking at the untouched model -----------------------------------------------------------------------------

    def _look(self, experiment: Experiment, units: Sequence[Unit]) -> float:
        """One pass: the metric, whether each unit can be taken out, and the means."""
        sums: dict[tuple[str, str], tuple[Tensor, float]] = {}
        called: set[tuple[str, str]] = set()
        refused: dict[tuple[str, str], str] = {}

        def add(key: tuple[str, str], values: Tensor, channels: int = -1) -> None:
            if not self.by_mean:
                return
            kept = self._real(values.movedim(channels, -1))
            before, count = sums.get(key, (0, 0.0))
            sums[key] = before + kept.flatten(0, -2).sum(0), count + kept.shape[:-1].numel()

        def see(kind: str, name: str) -> Callable[..., None]:
            key = (kind, name)

            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                called.add(key)
                if kind == "head":
                    if not args:
                        refused[key] = "its output projection is not called with its input first"
                        return
                    add(key, args[0])
                    return
                y = _first(output)
                if kind == "layer":
                    x = _stream(args, kwargs)
                    if x is None or y is None or x.shape != y.shape:
                        refused[key] = "its output has not the shape of its input, so that it cannot be skipped"
                    else:
                        add(key, y - x)
                elif not isinstance(output, Tensor):
                    refused[key] = f"its output is a {type(output).__name__}"
                elif self.kind_of[name] != "norm":
                    add(key, output, 1 if self.kind_of[name] == "conv2d" else -1)

            return hook

        def before(batch: Any) -> None:
            self.examples = batch_size(batch)
            self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

        def see_experts(owner: str) -> experts.See:
            def see(projection: str, x: Tensor, y: Tensor, route: experts.Route) -> Tensor:
                real = torch.ones_like(route.tokens, dtype=torch.bool)
                if self.mask is not None and self.mask.numel() == route.total:
                    real = self.mask.flatten().bool()[route.tokens]
                for name in held[owner]:
                    own_projection, expert = name.split(".")[-2:]
                    rows = route.experts == int(expert)
                    if own_projection == projection and bool(rows.any()):
                        called.add(("module", name))
                        if bool((rows & real).any()):
                            add(("module", name), y[rows & real])
                return y

            return see

        def see_router(name: str) -> Callable[[Tensor, Tensor], Tensor]:
            def see(x: Tensor, y: Tensor) -> Tensor:
                called.add(("module", name))
                add(("module", name), y)
                return y

            return see

        keys = list(dict.fromkeys((unit.kind, unit.name) for unit in units))
        held: dict[str, list[str]] = {}
        for kind, name in keys:
            if kind == "module" and self.kind_of[name] == "experts":
                held.setdefault(self.owner_of[name], []).append(name)
        handles: list[RemovableHandle | experts.Instrumented | router.Instrumented] = []
        try:
            for kind, name in keys:
                of = self.kind_of[name] if kind == "module" else kind
                if of == "experts":
                    continue
                module = self.model.get_submodule(self.groups[name].output if kind == "head" else name)
                if of == "router":
                    refuse = functools.partial(refused.__setitem__, (kind, name))
                    handles.append(router.instrument(module, see_router(name), refuse))
                else:
                    handles.append(module.register_forward_hook(see(kind, name), with_kwargs=True))
            for owner in held:
                handles.append(experts.instrument(self.model.get_submodule(owner), see_experts(owner)))
            metrics = torch.cat([metrics for _, metrics in experiment.forward(before)])
        finally:
            for handle in handles:
                handle.remove()
        for unit in units:
            key = (unit.kind, unit.name)
            if key in refused:
                self.left_out[unit] = refused[key]
            elif key not in called:
                self.left_out[unit] = "the model never calls it"
        for key, (total, count) in sums.items():
            mean = total / count
            spatial = key[0] == "module" and self.kind_of[key[1]] == "conv2d"
            self.means[key] = mean[:, None, None] if spatial else mean
        return float(metrics.mean())

    def _real(self, values: Tensor) -> Tensor:
        """Rows (…, features) in float64 that are no padding, where their positions are the mask's."""
        wide = values.detach().to(torch.float32 if values.device.type == "mps" else torch.float64)
        if wide.ndim > 2 and len(wide) == 1:  # positions are looked up once for all examples
            wide = wide.expand(self.examples, *wide.shape[1:])
        for mask in () if self.mask is None else (self.mask, self.mask.flatten()):
            if wide.shape[:-1] == mask.shape:
                return wide[mask.bool()]
        return wide.reshape(-1, wide.shape[-1])


def _towards(y: Tensor, neutral: Tensor, strength: float) -> Tensor:
    if strength == 1:  # not y + (neutral − y), which keeps what is not finite
        return neutral.to(y.dtype).clone()
    return y.lerp(neutral.to(y.dtype), strength)


def _stream(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """A block's input: what it was given first, or under the name that transformers has for it."""
    found = args[0] if args else kwargs.get("hidden_states")
    return found if isinstance(found, Tensor) else None


def _first(output: Any) -> Tensor | None:
    found = output[0] if type(output) in (tuple, list) and output else output
    return found if isinstance(found, Tensor) else None


def warn_of(neutral: Neutral, criterion: str) -> None:
    """Say what is not scored: a score of 0 would be a lie."""
    by_reason: dict[tuple[str, str], list[Unit]] = {}
    for unit, reason in neutral.left_out.items():
        by_reason.setdefault((unit.kind, reason), []).append(unit)
    for (_, reason), units in by_reason.items():
        others = f" and {len(units) - 1} more" if len(units) > 1 else ""
        warnings.warn(f"{units[0]}{others} not scored by {criterion}: {reason}.", RuntimeWarning, stacklevel=5)
