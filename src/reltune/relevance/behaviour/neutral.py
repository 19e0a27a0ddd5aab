"""What it means to take a unit out of the function that a model computes. This is done by hooks: no weight is changed.

- A module contributes nothing: what that is, its layer type says (``neutral`` in layers/). A linear map, a convolution or an
  embedding gives zero at every position, its bias left out too. With ``replace_by="mean"`` it gives its mean output
  over the data, without padding: positions and examples no longer differ, and what follows sees values of the usual size (mean
  ablation, Wang et al., ICLR 2023).
- An attention head gives zero, or its mean, to the output projection: the same as that projection's columns of the head
  set to zero (Michel, Levy and Neubig, NeurIPS 2019, section 2.3, the mask ξ_h = 0).
- A layer hands its input on, as if its residual branches gave zero; with the mean, its input plus the mean of what it
  adds. The block is skipped whole, whichever of its modules are measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reltune.layers.head_group import HeadGroup
from reltune.layers.padding import without_padding
from reltune.layers.protocol import Handle, Observer
from reltune.layers.registry import layer_type
from reltune.layers.units import ModuleInfo
from reltune.relevance.batches import batch_size
from reltune.relevance.behaviour.experiment import Experiment
from reltune.relevance.behaviour.kept_outputs import Changed, KeptOutputs
from reltune.relevance.behaviour.rounds import Round, is_one_round, labels_of, one_round, rounds_of, stratified_order
from reltune.relevance.criteria.contract import ScoresByName

REMOVABLE = ("layer", "module", "head")  # the granularities whose units can be taken out
REPLACEMENTS = ("zero", "mean")

Place = tuple[str, str]  # granularity, and the name of the layer, the module or the attention module


@dataclasses.dataclass(frozen=True)
class Unit:
    """``name`` is that of the layer, the module or the attention module; ``head`` counts within the last."""

    granularity: str
    name: str
    head: int = 0

    @property
    def place(self) -> Place:
        return self.granularity, self.name

    def __str__(self) -> str:
        return f"head {self.head} of {self.name}" if self.granularity == "head" else f"{self.granularity} {self.name}"


class Neutral:
    """Takes units of one experiment out, one or several at a time.

    Making it costs one pass over the data, which tells what can be taken out, the means (O(features) numbers per unit) and in which
    rounds the examples are taken: the first of them has ``sample`` examples, or all.

    Attributes:
        units: those that can be taken out, for each granularity that was asked for.
        left_out: the other ones, with the reason.
        baseline: the metric of the untouched model.
        rounds: the examples, as they are taken.
        base: the untouched model's metric of each example (N,), in the order in which they are taken.
        kept: what the untouched model's blocks give.
    """

    def __init__(self, experiment: Experiment, granularities: Sequence[str], replace_by: str, sample: int) -> None:
        self.experiment, self.model = experiment, experiment.model
        self.infos = experiment.inventory.by_name
        self.groups = {group.name: group for group in experiment.inventory.attention_heads}
        candidates = {
            "layer": [Unit("layer", name) for name in experiment.layers],
            "module": [Unit("module", name) for name in self.infos],
            "head": [Unit("head", group.name, head) for group in self.groups.values() for head in range(group.heads)],
        }
        wanted = [unit for granularity in granularities for unit in candidates[granularity]]
        sites = {self._site(unit): None for unit in wanted}
        self.kept = experiment.kept = KeptOutputs(self.model, list(sites))
        look = _Look(self.model, self.infos, self.groups, with_means=replace_by == "mean")
        places = list(dict.fromkeys(unit.place for unit in wanted))
        batches = experiment.batches
        if is_one_round(sum(map(batch_size, batches)), sample):
            self.base, rounds = look.over(experiment, places, keep=True), one_round(batches)
        else:
            losses: list[Tensor] = []
            metrics = look.over(experiment, places, losses=losses)
            order = stratified_order(labels_of(batches), torch.cat(losses), experiment.seed)
            self.base, rounds = metrics[order], rounds_of(batches, order, sample)
        self.rounds: list[Round] = rounds
        self.baseline = float(self.base.mean())
        experiment.check_kept()
        self.means = look.means()  # what stands for a unit; empty where that is zero
        self.left_out = {unit: reason for unit in wanted if (reason := look.why_not(unit.place))}
        self.units = {
            granularity: [u for u in wanted if u.granularity == granularity and u not in self.left_out]
            for granularity in granularities
        }

    @contextlib.contextmanager
    def without(self, units: Sequence[Unit], strength: float = 1.0) -> Iterator[None]:
        """The model without these units, until the context ends, however it ends.

        With a ``strength`` below 1 they are moved only so far from what they give towards what stands for them.
        """
        heads: dict[str, list[int]] = {}
        modules: list[str] = []
        handles: list[Handle] = []
        blocks = [unit.name for unit in units if unit.granularity == "layer"]
        changed = Changed([self._site(unit) for unit in units if unit.granularity != "layer"], blocks)
        try:
            # All hooks come after the modules' own: what others make of the output goes too.
            for unit in units:
                if unit.granularity == "head":
                    heads.setdefault(unit.name, []).append(unit.head)
                elif unit.granularity == "module":
                    modules.append(unit.name)
                else:
                    block = self.model.get_submodule(unit.name)
                    handles.append(block.register_forward_hook(self._skip(unit.name, strength), with_kwargs=True))
            for infos in _by_owner(self.infos[name] for name in modules):
                module = self.model.get_submodule(infos[0].owner)
                observer = Observer(self._silence(module, infos, strength), refuse=lambda name, reason: None)
                handles += layer_type(infos[0].layer_type).observe(module, infos, observer)
            for name, which in heads.items():
                output = self.model.get_submodule(self.groups[name].output)
                handles.append(output.register_forward_pre_hook(self._cut(name, which, strength)))
            with self.kept.changed(changed):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, batches: Sequence[Any]) -> None:
        """Let what the untouched model's blocks give for these batches be kept, if it is not yet."""
        missing = [batch for batch in batches if not self.kept.holds(batch)]
        if missing and not self.kept.off:
            for _ in dataclasses.replace(self.experiment, batches=missing).forward(keep=True):
                pass
            self.experiment.check_kept()

    def _site(self, unit: Unit) -> str:
        """The module that is changed to take the unit out."""
        if unit.granularity == "head":
            return self.groups[unit.name].output
        return self.infos[unit.name].owner if unit.granularity == "module" else unit.name

    def enter(self, parts: ScoresByName, granularity: str, part: str, scores: Tensor) -> None:
        """Put one score per unit into ``parts``: () per layer and module, (heads,) per attention module."""
        by_name: dict[str, list[Tensor]] = {}
        for unit, score in zip(self.units[granularity], scores, strict=True):
            by_name.setdefault(unit.name, []).append(score)
        for name, own in by_name.items():
            parts.setdefault(name, {})[part] = torch.stack(own) if granularity == "head" else own[0]

    def _skip(self, name: str, strength: float) -> Callable[..., Any]:
        """A hook by which a block hands its input on."""

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            x, y = _stream(args, kwargs), _first(output)
            assert x is not None and y is not None, "looked at before"
            mean = self.means.get(("layer", name))
            kept = _towards(y, x if mean is None else x + mean.to(x.dtype), strength)
            return kept if isinstance(output, Tensor) else type(output)((kept, *output[1:]))

        return hook

    def _silence(
        self, module: nn.Module, infos: Sequence[ModuleInfo], strength: float
    ) -> Callable[[str, Tensor, Tensor, Any], Tensor]:
        """What an observer returns for these to contribute nothing to the module's output."""

        def see(stack: str, x: Tensor, y: Tensor, route: Any) -> Tensor:
            for info in infos:
                if info.stack == stack:
                    mean = self.means.get(("module", info.name))
                    neutral = layer_type(info.layer_type).neutral(info, module, x, y, mean, route)
                    y = _towards(y, neutral, strength)
            return y

        return see

    def _cut(self, name: str, heads: Sequence[int], strength: float) -> Callable[..., Any]:
        """A hook by which an output projection reads nothing of these heads."""
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


class _Look:
    """One pass over the untouched model: what is called, what cannot be taken out, and the mean outputs."""

    def __init__(
        self,
        model: nn.Module,
        infos: Mapping[str, ModuleInfo],
        groups: Mapping[str, HeadGroup],
        with_means: bool,
    ) -> None:
        self.model, self.infos, self.groups, self.with_means = model, infos, groups, with_means
        self.called: set[Place] = set()
        self.refused: dict[Place, str] = {}
        self.sums: dict[Place, tuple[Tensor, int]] = {}  # sum of the outputs, and of how many rows
        self.mask: Tensor | None = None
        self.examples = 0

    def over(self, experiment: Experiment, places: Sequence[Place], **how: Any) -> Tensor:
        """Pass over the data once (``how``: as in ``Experiment.forward``) and look at these places. Gives the metrics (N,)."""
        handles: list[Handle] = []
        try:
            for granularity, name in places:
                if granularity == "layer":
                    block = self.model.get_submodule(name)
                    handles.append(block.register_forward_hook(self._see_layer(name), with_kwargs=True))
                elif granularity == "head":
                    output = self.model.get_submodule(self.groups[name].output)
                    handles.append(output.register_forward_hook(self._see_heads(name), with_kwargs=True))
            for infos in _by_owner(self.infos[name] for granularity, name in places if granularity == "module"):
                module = self.model.get_submodule(infos[0].owner)
                observer = Observer(self._see_modules(infos), self._refuse_module)
                handles += layer_type(infos[0].layer_type).observe(module, infos, observer)
            return torch.cat([metrics for _, metrics in experiment.forward(self._before, **how)])
        finally:
            for handle in handles:
                handle.remove()

    def why_not(self, place: Place) -> str:
        """Why nothing can be taken out there, or empty."""
        return self.refused.get(place, "" if place in self.called else "the model never calls it")

    def means(self) -> dict[Place, Tensor]:
        """The mean outputs (features,), where they are wanted: of a layer of what it adds, of heads of their input."""
        return {place: total / count for place, (total, count) in self.sums.items()}

    def _before(self, batch: Any) -> None:
        self.examples = batch_size(batch)
        self.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def _add(self, place: Place, rows: Tensor) -> None:
        if len(rows):
            total, count = self.sums.get(place, (0, 0))
            self.sums[place] = total + rows.sum(0), count + len(rows)

    def _see_layer(self, name: str) -> Callable[..., None]:
        place = ("layer", name)

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.called.add(place)
            x, y = _stream(args, kwargs), _first(output)
            if x is None or y is None or x.shape != y.shape:
                self.refused[place] = "its output has not the shape of its input, so that it cannot be skipped"
            elif self.with_means:
                self._add(place, without_padding(y - x, self.mask, self.examples))

        return hook

    def _see_heads(self, name: str) -> Callable[..., None]:
        place = ("head", name)

        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.called.add(place)
            if not args:
                self.refused[place] = "its output projection is not called with its input first"
            elif self.with_means:
                self._add(place, without_padding(args[0], self.mask, self.examples))

        return hook

    def _see_modules(self, infos: Sequence[ModuleInfo]) -> Callable[[str, Tensor, Tensor, Any], Tensor]:
        def see(stack: str, x: Tensor, y: Tensor, route: Any) -> Tensor:
            for info in infos:
                its_type = layer_type(info.layer_type)
                if info.stack != stack or not its_type.is_used(info, route):
                    continue
                self.called.add(("module", info.name))
                if self.with_means:
                    rows = its_type.output_rows(info, y, self.mask, self.examples, route)
                    self._add(("module", info.name), rows)
            return y

        return see

    def _refuse_module(self, name: str, reason: str) -> None:
        self.refused["module", name] = reason


def _by_owner(infos: Iterable[ModuleInfo]) -> list[list[ModuleInfo]]:
    """In one list those that one module owns."""
    by_owner: dict[str, list[ModuleInfo]] = {}
    for info in infos:
        by_owner.setdefault(info.owner, []).append(info)
    return list(by_owner.values())


def _towards(y: Tensor, neutral: Tensor, strength: float) -> Tensor:
    if strength == 1:  # not y + (neutral − y), which keeps what is not finite
        return neutral.to(y.dtype).clone()
    return y.lerp(neutral.to(y.dtype), strength)


def _stream(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """A block's input: what it was given first, or under the name that transformers has for it."""
    stream = args[0] if args else kwargs.get("hidden_states")
    return stream if isinstance(stream, Tensor) else None


def _first(output: Any) -> Tensor | None:
    first = output[0] if type(output) in (tuple, list) and output else output
    return first if isinstance(first, Tensor) else None


def warn_of(neutral: Neutral, criterion: str) -> None:
    """Say what is not scored: a score of 0 would be a lie."""
    by_reason: dict[tuple[str, str], list[Unit]] = {}
    for unit, reason in neutral.left_out.items():
        by_reason.setdefault((unit.granularity, reason), []).append(unit)
    for (_, reason), units in by_reason.items():
        others = f" and {len(units) - 1} more" if len(units) > 1 else ""
        warnings.warn(f"{units[0]}{others} not scored by {criterion}: {reason}.", RuntimeWarning, stacklevel=5)
