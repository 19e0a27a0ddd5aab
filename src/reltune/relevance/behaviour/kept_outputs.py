"""What lies below the first changed unit is computed once and kept.

A model's pieces are its blocks and what stands before them. One pass of the unchanged model over a batch keeps what each piece
gives. In a later pass, the pieces that end before the first changed unit is reached give what is kept instead of
computing it; the model's own code around them runs as ever.

Which pieces those are is not read off the model's structure but noted in the pass that keeps: the order in which pieces end, and
how many have ended when a unit's module is first called. A piece that runs several times in a pass, or gives something other than
tensors in tuples, lists or mappings, is always computed. Nothing is kept where that could change a result: where the model draws
random numbers, where what a piece gave is overwritten later, or where the outputs of a pass with everything kept are not those of
the plain pass (a model that gives its attention weights, for instance).

Memory: at most a quarter of what is free on the model's device; where one batch needs more than that, of the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LEAST_ROOM = 2**28  # bytes that may be kept whatever seems to be free
OVERWRITTEN = "what a block gives is overwritten later"


class Changed(NamedTuple):
    """Names of the modules that hooks change: in ``inside`` at their input, in their midst or at their output; of blocks that are
    named in ``behind`` nothing but the output."""

    inside: Sequence[str] = ()
    behind: Sequence[str] = ()


@dataclasses.dataclass
class _Pass:
    """What one pass over a batch kept: by piece what it gave, ``None`` where it must be computed."""

    batch: Any  # held, so that its id stays its own
    outputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Pieces in the order in which they ended, and of each unit's module how many had ended when it was first called.
    ended: list[str] = dataclasses.field(default_factory=list)
    before: dict[str, int] = dataclasses.field(default_factory=dict)

    def below(self, changed: Changed) -> list[str]:
        """The pieces that end before anything is changed, and the piece whose output is the first thing changed."""
        ends = [self.before.get(site, len(self.ended)) for site in changed.inside]
        ends += [self.ended.index(s) + 1 if self.ended.count(s) == 1 else self.before.get(s, 0) for s in changed.behind]
        ended = self.ended[: min(ends, default=len(self.ended))]
        return [name for name in ended if self.ended.count(name) == 1 and name in self.outputs]


class KeptOutputs:
    """What the pieces of an unchanged model gave for some batches.

    Args:
        model: in evaluation mode, and not to be changed but by hooks.
        sites: names of the modules that hooks may change.

    Attributes:
        off: why nothing is kept; empty where something may be.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str]) -> None:
        self.model, self.sites = model, sites
        self.place = next(model.parameters()).device
        self.blocks, others = _pieces(model)
        self.pieces = [*others, *self.blocks]
        self.off = "" if self.blocks else "the model has no blocks that follow each other"
        self.passes: dict[int, _Pass] = {}
        self.bytes = 0
        self.checked = False
        self.plain: tuple[Any, Any] | None = None  # a batch and the outputs of its plain pass, until they are checked
        self._changed: Changed | None = None  # what is changed at the moment

    def holds(self, batch: Any) -> bool:
        return id(batch) in self.passes

    def is_full(self) -> bool:
        return self.bytes >= _room(self.place)

    def clear(self) -> None:
        self.passes.clear()
        self.bytes = 0

    @contextlib.contextmanager
    def changed(self, what: Changed) -> Iterator[None]:
        """While this lasts, hooks change the model at these modules."""
        before, self._changed = self._changed, what
        try:
            yield
        finally:
            self._changed = before

    @contextlib.contextmanager
    def used(self, batch: Any) -> Iterator[None]:
        """A pass over this batch, in which what is kept below the changed modules is used."""
        kept = self.passes.get(id(batch))
        if kept is None or self._changed is None or self.off:
            yield
            return
        with self._giving(kept, kept.below(self._changed)):
            yield

    def keep(self, batch: Any, run: Callable[[], Any]) -> Any:
        """``run()``, a pass of the unchanged model over this batch, with what its pieces give kept."""
        if self.off or self.is_full() or self.holds(batch):
            return run()
        device = next(self.model.parameters()).device
        found, versions, states = _Pass(batch), list[tuple[Tensor, int]](), _random_states(device)
        with contextlib.ExitStack() as stack:
            for name in self.pieces:
                stack.enter_context(_forward_as(self.model.get_submodule(name), self._keeping(name, found, versions)))
            for name in self.sites:
                note = self._noting(name, found)
                handle = self.model.get_submodule(name).register_forward_pre_hook(note, prepend=True)
                stack.callback(handle.remove)
            outputs = run()
        if not all(map(torch.equal, states, _random_states(device))):
            self._give_up("the model draws random numbers")
            return outputs
        if any(tensor._version != version for tensor, version in versions):
            self._give_up(OVERWRITTEN)
            return outputs
        self.passes[id(batch)] = found
        if not self.checked:
            self.plain = self.plain or (batch, outputs)
        self.bytes += sum(map(_bytes, found.outputs.values()))
        if self.place.type == "cuda" and len(self.passes) == 1 and self.is_full():
            self.place = torch.device("cpu")
            found.outputs = {name: _mapped(output, _to(self.place)) for name, output in found.outputs.items()}
        return outputs

    def check(self, run: Callable[[Any], Any]) -> None:
        """See once that a pass with everything kept gives the outputs of the plain pass. ``run`` is a pass over a batch."""
        if self.plain is None:
            return
        (batch, outputs), self.plain, self.checked = self.plain, None, True
        kept = self.passes[id(batch)]
        before = [tensor._version for output in kept.outputs.values() for tensor in _tensors(output)]
        try:
            with self._giving(kept, kept.below(Changed())):
                again = run(batch)
        except Exception as error:  # whatever it is: passes over the whole model do without
            self._give_up(f"a pass that uses what is kept failed: {error}")
            return
        if before != [tensor._version for output in kept.outputs.values() for tensor in _tensors(output)]:
            self._give_up(OVERWRITTEN)
        elif not _alike(outputs, again):
            self._give_up("a pass that uses what is kept gives other outputs")

    def _give_up(self, reason: str) -> None:
        self.off, self.plain = reason, None
        self.clear()

    def _keeping(self, name: str, found: _Pass, versions: list[tuple[Tensor, int]]) -> Callable[..., Any]:
        """A forward that keeps what the piece gives. What stands behind a block and is none itself is cheap, or large like logits."""

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            starts = len(found.ended)
            output = original(*args, **kwargs)
            early = name in self.blocks or not any(block in self.blocks for block in found.ended[:starts])
            if early and _keepable(output):
                moved = _mapped(output, _to(self.place))
                versions.extend((tensor, tensor._version) for tensor in _tensors(moved))
                found.outputs[name] = moved
            found.ended.append(name)
            return output

        return forward

    def _noting(self, name: str, found: _Pass) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple) -> None:
            found.before.setdefault(name, len(found.ended))

        return note

    @contextlib.contextmanager
    def _giving(self, kept: _Pass, names: Sequence[str]) -> Iterator[None]:
        """Forward passes in which these pieces give what is kept, once each."""
        device = next(self.model.parameters()).device
        left = set(names)

        def giving(name: str) -> Callable[..., Any]:
            def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                if name not in left:
                    return original(*args, **kwargs)
                left.remove(name)
                return _mapped(kept.outputs[name], _to(device))

            return forward

        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(_forward_as(self.model.get_submodule(name), giving(name)))
            yield


def _pieces(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the outermost members of lists of modules, and of the modules beside these lists."""
    blocks: list[str] = []
    others: list[str] = []

    def has_lists(module: nn.Module) -> bool:
        return any(isinstance(one, nn.ModuleList | nn.Sequential) and len(one) > 1 for one in module.modules())

    def walk(name: str, module: nn.Module) -> None:
        in_list = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        for key, child in module.named_children():
            path = f"{name}.{key}" if name else key
            if in_list:
                blocks.append(path)
            elif has_lists(child):
                walk(path, child)
            else:
                others.append(path)

    walk("", model)
    return blocks, others


@contextlib.contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward, which is given the module's own first."""
    own, original = module.__dict__.get("forward"), module.forward
    module.forward = lambda *args, **kwargs: forward(original, *args, **kwargs)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _keepable(output: Any) -> bool:
    if isinstance(output, Tensor):
        return type(output) is Tensor
    if type(output) in (tuple, list):
        return all(map(_keepable, output))
    if type(output) is dict:
        return all(map(_keepable, output.values()))
    return output is None or isinstance(output, bool | int | float)


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple | list):
        return type(output)(_mapped(one, change) for one in output)
    if isinstance(output, dict):
        return {key: _mapped(one, change) for key, one in output.items()}
    return output


def _to(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for one in output.values():
            yield from _tensors(one)
    elif isinstance(output, tuple | list):
        for one in output:
            yield from _tensors(one)


def _bytes(output: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(output))


def _alike(outputs: Any, again: Any) -> bool:
    """Whether two passes gave the same but for what kernels that add in no fixed order may do."""
    a, b = list(_tensors(outputs)), list(_tensors(again))
    if [tensor.shape for tensor in a] != [tensor.shape for tensor in b]:
        return False
    for one, other in zip(a, b, strict=True):
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return False
            continue
        tolerance = 1e-2 if one.element_size() < 4 else 1e-5
        scale = float(one.detach().abs().nan_to_num(0, 0, 0).amax()) if one.numel() else 0.0
        if not torch.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True):
            return False
    return True


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _room(device: torch.device) -> int:
    """Bytes that may be kept there."""
    if device.type == "cuda":
        return max(LEAST_ROOM, torch.cuda.mem_get_info(device)[0] // 4)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return max(LEAST_ROOM, free // 4)
