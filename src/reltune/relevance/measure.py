"""The only loop over data that measures relevance: one forward and one input-gradient backward pass per batch.

The loss that is differentiated is the sum over examples of each example's own loss, so that the rows of an output
gradient that belong to an example carry that example's gradient alone. No weight ever requires a gradient here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm

from reltune.layers.fingerprint import fingerprint
from reltune.layers.fused_norms import fused_norms
from reltune.layers.inventory import (
    ModuleInfo,
    canonical_weights,
    choose,
    head_modules,
    new_parameters,
    take_inventory,
)
from reltune.layers.per_example import WEIGHT_SIZED
from reltune.layers.quantised import stops_the_gradient
from reltune.records import InputError
from reltune.relevance.batches import batch_size, chained, contents, forward, frozen, moved, part_of, with_labels
from reltune.relevance.checkpointing import checkpointing_in_evaluation
from reltune.relevance.collector import AnalysisError, Collector, Sums
from reltune.relevance.context import Context
from reltune.relevance.experiment import Experiment, Parts, checked_options, random_state_kept
from reltune.relevance.not_finite import where_not_finite
from reltune.relevance.parallel import Processes, unwrapped
from reltune.relevance.partial import Partial, deferred_signals, flat, nested
from reltune.relevance.plugins import Criterion, check_parts, find_criteria
from reltune.relevance.scores import RelevanceScores, assemble
from reltune.relevance.streaming import analyze_checkpoint
from reltune.tasks.losses import Loss, as_loss

__all__ = ["AnalysisError", "analyze"]

LossFunction = Callable[[Any, Any], Tensor]  # loss_fn(outputs, batch) -> (B,)
SAMPLED = "sampled_"  # statistics of the pass whose labels are drawn from the model
NO_DATA = "the loader gave no batch; relevance needs at least one example."
INPUTS = "inputs"  # the statistic that needs no backward pass


def analyze(
    model: nn.Module | str | os.PathLike,
    loader: Iterable[Any] | None = None,
    loss_fn: str | Loss | LossFunction | nn.Module | None = None,
    criteria: str | Criterion | Sequence[str | Criterion] = ("fisher",),
    *,
    elements: bool = False,
    target_modules: str | Sequence[str] = (),
    exclude_modules: str | Sequence[str] = (),
    always_trained: str | Sequence[str] | None = None,
    seed: int = 42,
    progress: bool = True,
    resume_directory: str | os.PathLike | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    parallel: str = "auto",
) -> RelevanceScores:
    """Measure how much each unit of ``model`` matters for the task that ``loader`` and ``loss_fn`` define.

    Args:
        model: the model; or the directory or hub id of a checkpoint, which is then scored without loading it, for criteria
            that look at no data (``analyze_checkpoint``, which takes the model's class too).
        loader: batches, either mappings of tensors (``labels`` among them) or ``(inputs, labels)`` pairs; may be
            None when no criterion looks at data.
        loss_fn: a name from ``reltune.tasks.losses.LOSSES`` (``"causal_lm"``); or ``loss_fn(outputs, batch)``, which
            gives one loss per example, shape (B,); or a torch loss module, which is applied to logits and labels
            without reduction; None means cross entropy.
        criteria: names from ``reltune.relevance.CRITERIA`` or of an installed package's criterion, or criteria
            themselves (``relevance/plugins.py`` says what one has); the first is what ``select`` uses by default. Several
            share one pass over the data (``fisher_true`` has its own).
        elements: score every single weight too, which takes one number per weight and criterion.
        target_modules, exclude_modules: runs of whole name parts (``layer.5``, ``query``), or regular expressions.
        always_trained: modules or parameters of new heads, never scored; None takes those that ``from_pretrained``
            did not find in the checkpoint.
        seed: of the criteria that draw something.
        progress: show a progress bar on stderr.
        resume_directory: where the sums so far are kept every few minutes and when the analysis is interrupted; called
            again with the same model, data and arguments, it goes on from there, with the same result. Removed at the end.
            Of one process only.
        options: of criteria that have some, as ``{"correlation": {"max_trials": 400}}``; their files say which.
        parallel: under ``torchrun`` or ``accelerate launch``, how the processes share the data. ``"auto"``: each takes
            every count-th batch of the same loader, unless a ``DistributedSampler`` or accelerate's ``prepare`` has
            dealt the data out already; examples that the sampler repeats count once. ``"split"``: the former in any case;
            ``"sharded"``: each process's loader gives its own part, by whatever means; ``"off"``: this process measures
            by itself. All processes get the scores of all the data.

    Criteria measured from behaviour (ablation, correlation, movement) pass over the data many times, so that all batches
    are then held in host memory, and run in one process.

    The model is analysed in evaluation mode (no dropout) on the device where it is, and handed back as it was. Gradient
    checkpointing that was enabled on it takes effect. A batch that does not fit in memory is halved, with a warning.

    Raises:
        InputError: unknown criterion, pattern without a match, no data, a loss that is not one number per example.
        AnalysisError: a loss or gradient that is not finite, a module whose rows cannot be told apart by example.
    """
    if not isinstance(model, nn.Module):
        if loader is not None or resume_directory is not None:
            raise InputError("a checkpoint's path is analyzed without data; pass the loaded model with a loader.")
        return analyze_checkpoint(
            model,
            criteria,
            elements=elements,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            always_trained=always_trained,
            seed=seed,
            progress=progress,
        )
    wanted = find_criteria(criteria, elements)
    model = unwrapped(model)
    processes = Processes() if parallel == "off" else Processes.joined()
    heads = head_modules(model, new_parameters(model) if always_trained is None else always_trained)
    inventory = take_inventory(model, heads)
    chosen = set(choose(inventory, target_modules, exclude_modules))
    measured = [info for info in inventory.modules if info.name in chosen]

    behaviour = [name for name, criterion in wanted.items() if hasattr(criterion, "measure")]
    statistical = [name for name in wanted if name not in behaviour]
    asked = checked_options({name: wanted[name] for name in behaviour}, options)
    needs: set[str] = set()
    for name in statistical:
        needs |= {*wanted[name].NEEDS, *(wanted[name].ELEMENT_NEEDS if elements else ())}
    examples, data_hash = 0, ""
    sums: Sums = {}
    parts: dict[str, Parts] = {}
    facts: dict[str, Any] = {}
    kept: list[Partial] = []
    if behaviour:
        if processes.count > 1:
            raise InputError(
                f"criterion {behaviour[0]!r} runs in one process, and these are {processes.count}; start it without a "
                'launcher, or pass parallel="off".'
            )
        if loader is None:
            raise InputError(f"criterion {behaviour[0]!r} needs data; pass a loader.")
        loader = list(loader)
        examples = sum(map(batch_size, loader))
        if examples == 0:
            raise InputError(NO_DATA)
        stream = ""
        for batch in loader:
            stream = chained(stream, batch)
        data_hash = _fingerprint(map(contents, loader))
        of_measured, loss = inventory.only(chosen), as_loss(loss_fn)
        for name in behaviour:
            partial = None
            if resume_directory is not None:
                what = [name, dataclasses.asdict(asked[name])]
                partial = Partial(Path(resume_directory), _key(model, measured, seed, what), name)
                kept.append(partial)  # until all criteria are done: the next one may be interrupted too
            experiment = Experiment(
                criterion=name,
                model=model,
                loss=loss,
                inventory=of_measured,
                batches=loader,
                options=asked[name],
                seed=seed,
                progress=progress,
                partial=partial,
                data=stream,
                elements=elements,
            )
            with frozen(model), random_state_kept(experiment.device):
                parts[name], found = wanted[name].measure(experiment)
            facts[name] = {**dataclasses.asdict(asked[name]), **found}
    if needs:
        if loader is None:
            wanting = [name for name in statistical if wanted[name].NEEDS] or statistical
            raise InputError(f"criterion {wanting[0]!r} needs data; pass a loader.")
        _check_gradients(model)
        data = _Pass(model, as_loss(loss_fn), measured, needs, seed, processes)
        processes.agree_on(
            [fingerprint(model), sorted(needs), [info.name for info in measured], seed],
            "the processes have different models or arguments; load the same weights and ask for the same in each.",
        )
        partial = None
        if resume_directory is not None and processes.count > 1:
            raise InputError(f"resume_directory is for one process, and these are {processes.count}; leave it out.")
        if resume_directory is not None:
            partial = Partial(Path(resume_directory), _key(model, measured, seed, sorted(needs)))
        examples, data_hash = data.over(loader, progress and processes.first, partial, parallel)
        sums, mixing = data.collector.sums, data.collector.mixing
        if mixing:
            _leave_out(mixing, bool(target_modules) or len(mixing) == len(measured), processes.first)
            measured = [info for info in measured if info.name not in mixing]
            inventory.left_out |= {f"{name}.weight": reason for name, reason in mixing.items()}
    for partial in kept:
        partial.remove()

    inventory = inventory.only({info.name for info in measured})
    context = Context(examples, seed)
    modules = dict(model.named_modules())
    parts |= {
        name: assemble(
            wanted[name],
            [(info, canonical_weights(info, modules[info.owner]), sums.get(info.name, {})) for info in measured],
            context,
            elements,
            inventory.heads,
        )
        for name in statistical
    }
    check_parts({name: parts[name] for name in statistical}, measured)
    known = {name for info in inventory.modules for name in (info.name, info.layer)}
    known |= {group.name for group in inventory.heads}  # behaviour was measured of modules that mix examples too
    parts = {name: {place: of for place, of in parts[name].items() if place in known} for name in wanted}
    provenance = {
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "architecture": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "examples": examples,
        "data": data_hash,
        "seed": seed,
        **facts,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return RelevanceScores(parts, inventory, heads, fingerprint(model, heads), provenance)


def _key(model: nn.Module, measured: Sequence[ModuleInfo], seed: int, what: Any) -> str:
    """Names what is measured on which model, for a partial result."""
    identity = [fingerprint(model), what, [info.name for info in measured], seed]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _check_gradients(model: nn.Module) -> None:
    """Below a layer that gives its input no gradient everything would look irrelevant."""
    for name, module in model.named_modules():
        if why := stops_the_gradient(module):
            raise InputError(f"{name} ({type(module).__name__}) lets no gradient through, because it {why}.")


def _fingerprint(contents: Iterable[int]) -> str:
    """Of data, from its batches' contents: no batching, order or number of processes changes it."""
    return f"{sum(contents) % (1 << 128):032x}"


def _seed(seed: int, batch: int) -> int:
    """Of the labels drawn for a batch, whichever process measures it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:8], "big") >> 1


def _leave_out(mixing: Mapping[str, str], named: bool, warn: bool) -> None:
    name, reason = next(iter(mixing.items()))
    others = f" and {len(mixing) - 1} more" if len(mixing) > 1 else ""
    if named:
        raise AnalysisError(
            f"the gradients of {name}{others} cannot be told apart by example: {reason}; leave it out by exclude_modules, or "
            "give batches of one example."
        )
    if warn:
        message = f"{name}{others} not measured: {reason}. Batches of one example can measure it."
        warnings.warn(message, RuntimeWarning, stacklevel=3)


class _Pass:
    """One pass over the data: every batch forward and, unless only inputs are wanted, backward, into the collector."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        measured: list[ModuleInfo],
        needs: set[str],
        seed: int,
        processes: Processes,
    ) -> None:
        self.model, self.loss, self.seed, self.processes = model, loss, seed, processes
        self.sampled = {need for need in needs if need.startswith(SAMPLED)}
        self.observed = needs - self.sampled
        self.collector = Collector(model, measured)
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device)

    def over(
        self, loader: Iterable[Any], progress: bool, partial: Partial | None = None, parallel: str = "auto"
    ) -> tuple[int, str]:
        """The number of examples, and a fingerprint of them that no batching, order or number of processes changes."""
        found = partial.load() if partial else None
        state: dict[str, Any] = {"batches": 0, "examples": 0, "data": "", "contents": 0, "mixing": {}}
        if found is not None:
            state, tensors = found
            on_host = {prefix + need for prefix in ("", SAMPLED) for need in WEIGHT_SIZED}
            self.collector.sums |= nested(tensors, self.device, on_host)
            self.collector.mixing |= state["mixing"]
            self.collector.seen |= self.observed | self.sampled

        data, probed = "", False
        with (
            self.processes.together() as still_at_work,
            _evaluated(self.model),
            self.collector,
            deferred_signals(partial is not None) as waiting,
        ):
            share = self.processes.share(loader, parallel)
            for index, batch in enumerate(tqdm(loader, desc="analyze", unit="batch", disable=not progress)):
                data = chained(data, batch)
                if index == 0 and share.every > 1:
                    still_at_work()
                    self._same_stream(data)
                if index < state["batches"]:
                    if index == state["batches"] - 1 and data != state["data"]:
                        raise InputError(
                            f"the data is not what the interrupted analysis in {partial and partial.path.parent} has seen; "
                            "give it the same data, or remove that directory."
                        )
                    continue
                number = share.number(index)
                if share.examples is not None:
                    batch = part_of(batch, 0, min(batch_size(batch), share.examples - state["examples"]))
                if number is None or batch_size(batch) == 0:
                    continue
                content = contents(batch)
                batch = moved(batch, self.device)
                self.generator.manual_seed(_seed(self.seed, number))
                examples = self._add(batch, number)
                if not probed and batch_size(batch) > 1 and self.backward_needs:
                    self._probe(part_of(batch, 0, 2))
                    probed = True
                state.update(batches=index + 1, examples=state["examples"] + examples, data=data)
                state["contents"] = (state["contents"] + content) % (1 << 128)
                if partial and (waiting or partial.due()):
                    partial.save({**state, "mixing": self.collector.mixing}, flat(self.collector.sums))
                if waiting:
                    signal.raise_signal(waiting.pop())
                still_at_work()
            if share.every > 1:
                self.collector.seen |= self.observed | self.sampled  # of processes that got no batch, too
                if data == "":
                    still_at_work()
                    self._same_stream(data)
        if share.every > 1:
            self._same_stream(data)
        counted = self.processes.gather([state["examples"], f"{state['contents']:x}", self.collector.mixing])
        examples = sum(of[0] for of in counted)
        if examples == 0:
            raise InputError(NO_DATA)
        for *_, mixing in counted:
            self.collector.mixing |= mixing
        self.processes.add_up(self.collector.sums)
        if partial:
            partial.remove()
        return examples, _fingerprint(int(of[1], 16) for of in counted)

    def _same_stream(self, data: str) -> None:
        """Where every process takes its batches from the same stream, it must be the same indeed."""
        self.processes.agree_on(
            data,
            "the processes' loaders give different batches, so that some would be measured twice and others never; shuffle "
            'with a generator of the same seed, or pass parallel="sharded" if each loader gives its own part.',
        )

    @property
    def backward_needs(self) -> set[str]:
        return (self.observed - {INPUTS}) | {need.removeprefix(SAMPLED) for need in self.sampled}

    def _add(self, batch: Any, index: int, skip: frozenset[tuple[str, str]] = frozenset()) -> int:
        """Add the batch's statistics; in two halves where it does not fit in memory. Gives its number of examples."""
        self.collector.start(index, skip)
        try:
            examples = 0
            if self.observed:
                examples = self._run(batch, self.observed, "")
            if self.sampled:
                examples = self._run(batch, {need.removeprefix(SAMPLED) for need in self.sampled}, SAMPLED)
        except (torch.OutOfMemoryError, MemoryError):
            if batch_size(batch) < 2:
                raise
        else:
            self.collector.finish()
            return examples
        # Outside the handler, which keeps the failed pass's tensors alive.
        size = batch_size(batch)
        skip = self.collector.abandon()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory with {size} examples; going on with {size // 2} at a time.", stacklevel=4)
        halves = part_of(batch, 0, size // 2), part_of(batch, size // 2, size)
        return sum(self._add(half, index, skip) for half in halves)

    def _run(self, batch: Any, wanted: set[str], prefix: str) -> int:
        with torch.set_grad_enabled(wanted != {INPUTS}):
            self.collector.expect(batch_size(batch), wanted, prefix, batch)
            outputs = forward(self.model, batch)
            self.collector.forward_done()
            if wanted == {INPUTS}:
                return batch_size(batch)
            if prefix:
                with torch.no_grad():
                    batch = with_labels(batch, self.loss.sample_labels(outputs, batch, self.generator))
            losses = self._losses(outputs, batch)
            self.collector.backward(losses)
        return len(losses)

    def _losses(self, outputs: Any, batch: Any) -> Tensor:
        losses = self.loss.per_example(outputs, batch)
        if losses.ndim != 1:
            raise InputError(
                f"loss_fn gave a tensor of shape {tuple(losses.shape)}; it must give one loss per example, shape "
                "(batch,): leave out the reduction."
            )
        if len(losses) != batch_size(batch):
            raise InputError(
                f"loss_fn gave {len(losses)} losses for {batch_size(batch)} examples; it must give one loss per example: leave "
                "out the reduction."
            )
        if not torch.isfinite(losses).all():
            bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
            raise AnalysisError(
                f"the loss of batch {self.collector.batch} is not finite at examples {bad[:8]} of the batch: "
                f"{where_not_finite(self.model, batch)}."
            )
        if not losses.requires_grad:
            if self.collector.mixing:
                _leave_out(self.collector.mixing, named=True, warn=False)
            raise InputError("the loss does not depend on any measured module; widen target_modules.")
        return losses

    def _probe(self, pair: Any) -> None:
        """Differentiate the loss of the first of two examples: where the second's rows get a gradient too, the module
        mixes examples, or its input's first axis is not the examples."""
        self.collector.expect(2, self.backward_needs, "", pair, probe=True)
        outputs = forward(self.model, pair)
        self.collector.backward(self.loss.per_example(outputs, pair)[:1])


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    with frozen(model), fused_norms(model), checkpointing_in_evaluation(model), torch.enable_grad():
        yield
