"""The only loop over data that measures relevance: one forward and one input-gradient backward pass per batch.

The loss that is differentiated is the sum over examples of each example's own loss, so that the rows of an output
gradient that belong to an example carry that example's gradient alone. No weight ever requires a gradient here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

from reltune.layers.fingerprint import fingerprint
from reltune.layers.inventory import LAYER_TYPES, ModuleInfo, choose, head_modules, new_parameters, take_inventory
from reltune.records import InputError, nearest
from reltune.relevance import CRITERIA
from reltune.relevance.scores import RelevanceScores

# loss_fn(outputs, batch) -> (B,), or a torch loss such as nn.CrossEntropyLoss(), applied to logits and labels.
LossFunction = Callable[[Any, Any], Tensor]
Sums = dict[str, dict[str, dict[str, Tensor]]]  # need -> module -> part -> sum over examples


class AnalysisError(RuntimeError):
    """The measurement itself failed: a loss or a gradient is not finite, or a module mixes examples."""


def analyze(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    loss_fn: LossFunction | nn.Module | None = None,
    criteria: str | Sequence[str] = ("fisher",),
    *,
    target_modules: str | Sequence[str] = (),
    exclude_modules: str | Sequence[str] = (),
    always_trained: str | Sequence[str] | None = None,
    seed: int = 42,
    progress: bool = True,
) -> RelevanceScores:
    """Measure how much each unit of ``model`` matters for the task that ``loader`` and ``loss_fn`` define.

    Args:
        loader: batches, either mappings of tensors (``labels`` among them) or ``(inputs, labels)`` pairs; may be
            None when no criterion looks at data.
        loss_fn: ``loss_fn(outputs, batch)`` gives one loss per example, shape (B,); a torch loss module is applied
            to logits and labels without reduction; None means cross entropy.
        criteria: names from ``reltune.relevance.CRITERIA``; the first is what ``select`` uses by default.
        target_modules, exclude_modules: runs of whole name parts (``layer.5``, ``query``), or regular expressions.
        always_trained: modules or parameters of new heads, never scored; None takes those that ``from_pretrained``
            did not find in the checkpoint.
        progress: show a progress bar on stderr.

    The model is analysed in evaluation mode (no dropout) on the device where it is, and handed back as it was.

    Raises:
        InputError: unknown criterion, pattern without a match, no data, a loss that is not one number per example.
        AnalysisError: a loss or gradient that is not finite, a module whose rows cannot be told apart by example.
    """
    criteria = [criteria] if isinstance(criteria, str) else criteria
    for name in criteria:
        if name not in CRITERIA:
            raise InputError(f"criterion {name!r} is unknown; {nearest(name, CRITERIA)}")
    if not criteria:
        raise InputError(f"no criterion was named; choose from {', '.join(CRITERIA)}.")
    heads = head_modules(model, new_parameters(model) if always_trained is None else always_trained)
    inventory = take_inventory(model, heads)
    chosen = set(choose(inventory, target_modules, exclude_modules))
    measured = [info for info in inventory.modules if info.name in chosen]

    needs = sorted({CRITERIA[name].NEEDS for name in criteria if CRITERIA[name].NEEDS})
    examples, data_hash = 0, ""
    sums: Sums = {}
    if needs:
        if loader is None:
            wanting = [name for name in criteria if CRITERIA[name].NEEDS]
            raise InputError(f"criterion {wanting[0]!r} needs data; pass a loader.")
        examples, data_hash, sums = _pass_over(model, loader, _per_example(loss_fn), measured, needs, progress)

    modules = dict(model.named_modules())
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name in dict.fromkeys(criteria):
        criterion = CRITERIA[name]
        parts[name] = {
            info.name: {
                part: value.detach().cpu()
                for part, value in criterion.scores(
                    info,
                    modules[info.name],
                    sums[criterion.NEEDS][info.name] if criterion.NEEDS else {},
                    examples,
                    seed,
                ).items()
            }
            for info in measured
        }
    provenance = {
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "architecture": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "examples": examples,
        "data": data_hash,
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    inventory = dataclasses.replace(inventory, modules=measured)
    return RelevanceScores(parts, inventory, heads, fingerprint(model, heads), provenance)


def _per_example(loss_fn: LossFunction | nn.Module | None) -> LossFunction:
    if loss_fn is None:
        loss_fn = nn.CrossEntropyLoss()
    if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
        unreduced = copy.copy(loss_fn)
        unreduced.reduction = "none"  # type: ignore[assignment]

        def from_logits(outputs: Any, batch: Any) -> Tensor:
            logits = getattr(outputs, "logits", outputs)
            labels = batch["labels"] if isinstance(batch, Mapping) else batch[1]
            losses = unreduced(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, labels)
            if losses.numel() > labels.numel():
                raise InputError(
                    f"the loss spreads labels of shape {tuple(labels.shape)} over logits of shape "
                    f"{tuple(logits.shape)} and so mixes examples; give both the same shape."
                )
            if losses.ndim <= 1:
                return losses
            # Labels that the loss ignores, such as padding, are no part of an example's mean.
            ignored = getattr(unreduced, "ignore_index", None)
            counted = torch.ones_like(losses) if ignored is None else (labels != ignored).to(losses.dtype)
            return losses.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)

        return from_logits
    return loss_fn


def _pass_over(
    model: nn.Module,
    loader: Iterable[Any],
    losses_of: LossFunction,
    measured: list[ModuleInfo],
    needs: list[str],
    progress: bool,
) -> tuple[int, str, Sums]:
    device = next(model.parameters()).device
    digest = hashlib.sha256()
    examples = 0
    with _frozen(model), torch.enable_grad(), _Collector(model, measured, needs) as collector:
        for index, batch in enumerate(tqdm(loader, desc="analyze", unit="batch", disable=not progress)):
            batch = _to(batch, device)
            for tensor in batch.values() if isinstance(batch, Mapping) else batch:
                if isinstance(tensor, Tensor):
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            if isinstance(batch, Mapping):
                outputs = model(**{key: value for key, value in batch.items() if key != "labels"})
            else:
                outputs = model(batch[0])
            losses = losses_of(outputs, batch)
            if losses.ndim != 1:
                raise InputError(
                    f"loss_fn gave a tensor of shape {tuple(losses.shape)}; it must give one loss per example, shape "
                    "(batch,): leave out the reduction."
                )
            if not torch.isfinite(losses).all():
                bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
                raise AnalysisError(f"the loss of batch {index} is not finite at examples {bad[:8]} of the batch.")
            if not losses.requires_grad:
                raise InputError("the loss does not depend on any measured module; widen target_modules.")
            collector.backward(losses, index)
            examples += len(losses)
    if examples == 0:
        raise InputError("the loader gave no batch; relevance needs at least one example.")
    return examples, digest.hexdigest()[:32], collector.sums


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    if not isinstance(batch, list | tuple):
        raise InputError(
            f"the loader gave a batch of type {type(batch).__name__}; "
            "give mappings of tensors or (inputs, labels) pairs."
        )
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in batch)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no weight gradients, for as long as the context lasts."""
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        for name, module in model.named_modules():
            module.training = modes[name]


@dataclasses.dataclass
class _Use:
    """One call of a module: its input, and the gradient of its output once it has come."""

    x: Tensor
    version: int
    g: Tensor | None = None


class _Watch(torch.autograd.Function):
    """Hand y on unchanged, and its gradient to ``arrived`` on the way back.

    A tensor hook would be lost where y is a view (as nn.Linear's output is for inputs with positions) and the next
    operation changes it in place. Returning y.detach(), and not y, makes it no view and lets that operation happen.
    ``anchor`` requires a gradient, so the first measured module starts the graph: nothing below it needs a backward
    pass.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, arrived: Callable[[Tensor], None]) -> Tensor:
        ctx.arrived = arrived
        return y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.arrived(g)
        return g, None, None


class _Collector:
    """Hooks that see every measured module's input and output gradient and add up the statistics asked for.

    A module called once per pass is done as soon as its gradient comes, and its input is let go; one called several
    times waits until the pass is over, because its gradient is the sum over its calls.
    """

    def __init__(self, model: nn.Module, measured: list[ModuleInfo], needs: list[str]) -> None:
        self.modules = {info.name: (model.get_submodule(info.name), LAYER_TYPES[info.kind]) for info in measured}
        self.sums: Sums = {need: {info.name: self._zeros(info, need) for info in measured} for need in needs}
        self.uses: dict[str, list[_Use]] = {}
        self.batch_size = 0
        self.batch = -1
        self.anchor = torch.zeros((), requires_grad=True)

    def __enter__(self) -> _Collector:
        self.handles = [
            # First of the module's hooks: what others make of the output is no part of the linear map.
            module.register_forward_hook(self._forward_hook(name), prepend=True, with_kwargs=True)
            for name, (module, _) in self.modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.uses.clear()

    def backward(self, losses: Tensor, batch: int) -> None:
        """Differentiate the summed losses (B,) and add the batch's statistics."""
        self.batch_size, self.batch = len(losses), batch
        losses.sum().backward()
        with torch.no_grad():
            for name in self.uses:
                self._add(name, [use for use in self.uses[name] if use.g is not None])
        self.uses.clear()

    def _zeros(self, info: ModuleInfo, need: str) -> dict[str, Tensor]:
        """The statistics of an input and a gradient of zeros: what a module that the loss never sees ends with."""
        module, handler = self.modules[info.name]
        weight = next(module.parameters())
        with torch.no_grad():
            x, g = weight.new_zeros(1, 1, info.shape[-1]), weight.new_zeros(1, 1, info.shape[0])
            return getattr(handler, need)(module, x, g)

    def _forward_hook(self, name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            use = _Use(x, x._version)
            self.uses.setdefault(name, []).append(use)

            def arrived(g: Tensor) -> None:
                use.g = g
                if len(self.uses[name]) == 1:
                    self._add(name, self.uses.pop(name))

            return _Watch.apply(output, self.anchor, arrived)

        return hook

    def _add(self, name: str, uses: list[_Use]) -> None:
        if not uses:
            return
        module, handler = self.modules[name]
        pairs = [self._by_example(name, use) for use in uses]
        x, g = pairs[0] if len(pairs) == 1 else (torch.cat(together, 1) for together in zip(*pairs, strict=True))
        for need, sums in self.sums.items():
            # The caller's autocast would do these sums in bfloat16, where they cancel.
            with torch.autocast(x.device.type, enabled=False):
                added = getattr(handler, need)(module, x, g)
            for part, value in added.items():
                if not torch.isfinite(value).all():
                    raise AnalysisError(f"the gradient of {name} ({part}) is not finite in batch {self.batch}.")
                sums[name][part] += value

    def _by_example(self, name: str, use: _Use) -> tuple[Tensor, Tensor]:
        """Input and output gradient as (B, T, features)."""
        assert use.g is not None
        if use.x._version != use.version:
            raise AnalysisError(f"the input of {name} was changed in place after use; leave it out by exclude_modules.")
        if use.x.shape[0] != self.batch_size:
            raise AnalysisError(
                f"{name} got an input of shape {tuple(use.x.shape)} for {self.batch_size} examples, so its rows cannot "
                "be told apart by example; leave it out by exclude_modules."
            )
        return (
            use.x.reshape(self.batch_size, -1, use.x.shape[-1]),
            use.g.reshape(self.batch_size, -1, use.g.shape[-1]),
        )
