"""Relevance of a model's units for a task, by criteria that share what they need."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from reltune.errors import AnalysisError, InputError
from reltune.layers.fingerprint import fingerprint
from reltune.layers.inventory import Inventory, canonical_weights, choose, head_modules, new_parameters, take_inventory
from reltune.layers.quantised import stops_the_gradient
from reltune.losses import Loss, as_loss
from reltune.processes import Processes, unwrapped
from reltune.relevance.batches import batch_size, chained, contents, frozen
from reltune.relevance.behaviour.experiment import Experiment, Parts, checked_options, random_state_kept, with_untouched
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.finding import Criterion, check_parts, find_criteria
from reltune.relevance.resumption import Partial
from reltune.relevance.scores import Assembly, RelevanceScores
from reltune.relevance.statistics.collector import Sums, first_and_others, mixing_sentence
from reltune.relevance.statistics.data_pass import NO_DATA, DataPass
from reltune.relevance.weights.scan import analyze_checkpoint

__all__ = ["AnalysisError", "analyze"]

LossFunction = Callable[[Any, Any], Tensor]  # loss_fn(outputs, batch) -> (B,)


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
    parallel: str = "auto",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> RelevanceScores:
    """Measure how much each unit of ``model`` matters for the task that ``loader`` and ``loss_fn`` define.

    Args:
        model: the model; or the directory or hub id of a checkpoint, which is then scored without loading it, for criteria
            that look at no data (``analyze_checkpoint``, which takes the model's class too).
        loader: batches, either mappings of tensors (``labels`` among them) or ``(inputs, labels)`` pairs; may be
            None when no criterion looks at data.
        loss_fn: a name from ``reltune.losses.LOSSES`` (``"causal_lm"``); or ``loss_fn(outputs, batch)``, which
            gives one loss per example, shape (B,); or a torch loss module, which is applied to logits and labels
            without reduction; None means cross entropy.
        criteria: names from ``reltune.relevance.criteria.CRITERIA`` or of an installed package's criterion, or criteria
            themselves (``relevance/criteria/finding.py`` says what one has); the first is what ``select`` uses by default. Several
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
        parallel: under ``torchrun`` or ``accelerate launch``, how the processes share the data. ``"auto"``: each takes
            every count-th batch of the same loader, unless a ``DistributedSampler`` or accelerate's ``prepare`` has
            dealt the data out already; examples that the sampler repeats count once. ``"split"``: the former in any case;
            ``"sharded"``: each process's loader gives its own part, by whatever means; ``"off"``: this process measures
            by itself. All processes get the scores of all the data.
        options: of criteria that have some, as ``{"correlation": {"max_trials": 400}}``; their files say which.

    Criteria measured from behaviour (ablation, correlation, movement) pass over the data many times, so that all batches
    are then held in host memory; they run in one process.

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
    found = find_criteria(criteria, elements)
    behaviour = {name: criterion for name, criterion in found.items() if hasattr(criterion, "measure")}
    statistical = {name: criterion for name, criterion in found.items() if name not in behaviour}
    asked = checked_options(behaviour, options)
    needs: set[str] = set()
    for criterion in statistical.values():
        needs |= {*criterion.NEEDS, *(criterion.ELEMENT_NEEDS if elements else ())}
    if loader is None and (needs or behaviour):
        wanting = next(name for name in found if name in behaviour or found[name].NEEDS or elements)
        raise InputError(f"criterion {wanting!r} needs data; pass a loader.")
    processes = Processes() if parallel == "off" else Processes.joined()
    if processes.count > 1 and behaviour:
        raise InputError(f"criterion {next(iter(behaviour))!r} runs in one process, and these are {processes.count}.")
    if processes.count > 1 and resume_directory is not None and needs:
        raise InputError(f"resume_directory is for one process, and these are {processes.count}; leave it out.")

    model = unwrapped(model)
    heads = head_modules(model, new_parameters(model) if always_trained is None else always_trained)
    inventory = take_inventory(model, heads)
    inventory = inventory.only(set(choose(inventory, target_modules, exclude_modules)))
    examples, data = 0, ""
    sums: Sums = {}
    parts: dict[str, Parts] = {}
    facts: dict[str, Any] = {}
    kept: list[Partial] = []  # until all criteria are done: the next one may be interrupted too

    def partial(what: Any, name: str = "") -> Partial | None:
        if resume_directory is None:
            return None
        identity = [fingerprint(model), what, [info.name for info in inventory.modules], seed]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return Partial(Path(resume_directory), key, name)

    if behaviour:
        assert loader is not None
        loader = list(loader)
        examples, data = sum(map(batch_size, loader)), f"{sum(map(contents, loader)) % (1 << 128):032x}"
        if examples == 0:
            raise InputError(NO_DATA)
        loss = as_loss(loss_fn)
        with frozen(model), random_state_kept(next(model.parameters()).device):
            batches = with_untouched(model, loss, loader)
        experiment = Experiment(
            criterion="",
            model=model,
            loss=loss,
            inventory=inventory,
            batches=batches,
            options=None,
            seed=seed,
            progress=progress,
            partial=None,
            data=_stream(loader),
            elements=elements,
        )
        for name, criterion in behaviour.items():
            of_options = dataclasses.asdict(asked[name]) if name in asked else {}
            place = partial([name, of_options], name)
            own = dataclasses.replace(experiment, criterion=name, options=asked.get(name), partial=place)
            kept += [place] if place else []
            with frozen(model), random_state_kept(experiment.device):
                parts[name], of_criterion = criterion.measure(own)
            facts[name] = {**of_options, **of_criterion}
    if needs:
        assert loader is not None
        _check_gradients(model)
        if processes.count > 1:  # the fingerprint waits for the device
            processes.agree_on(
                [fingerprint(model), sorted(needs), [info.name for info in inventory.modules], seed],
                "the processes have different models or arguments; load the same weights and ask for the same in each.",
            )
        data_pass = DataPass(model, as_loss(loss_fn), inventory.modules, needs, seed, processes)
        examples, data = data_pass.over(loader, progress and processes.first, partial(sorted(needs)), parallel)
        sums = data_pass.collector.sums
        inventory = _without(inventory, data_pass.collector.mixing, bool(target_modules), processes.first)
    for place in kept:
        place.remove()

    modules = dict(model.named_modules())
    context = Context(examples, seed)
    assemblies = {name: Assembly(of, context, elements, inventory.heads) for name, of in statistical.items()}
    for info in inventory.modules:
        weights = canonical_weights(info, modules[info.owner])
        for assembly in assemblies.values():
            assembly.add(info, weights, sums.get(info.name, {}))
    parts |= {name: assembly.finished() for name, assembly in assemblies.items()}
    check_parts({name: parts[name] for name in statistical}, inventory.modules)
    known = {name for info in inventory.modules for name in (info.name, info.layer)}
    known |= {group.name for group in inventory.heads}  # behaviour was measured of modules that mix examples too
    parts = {name: {place: of for place, of in parts[name].items() if place in known} for name in found}
    provenance = {
        **facts,  # first: no criterion's name takes the place of what follows
        "model": getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__,
        "architecture": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "examples": examples,
        "data": data,
        "seed": seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return RelevanceScores(parts, inventory, heads, fingerprint(model, heads), provenance)


def _stream(batches: Iterable[Any]) -> str:
    data = ""
    for batch in batches:
        data = chained(data, batch)
    return data


def _check_gradients(model: nn.Module) -> None:
    """Below a layer that gives its input no gradient everything would look irrelevant."""
    for name, module in model.named_modules():
        if why := stops_the_gradient(module):
            raise InputError(f"{name} ({type(module).__name__}) lets no gradient through, because it {why}.")


def _without(inventory: Inventory, mixing: Mapping[str, str], named: bool, warn: bool) -> Inventory:
    """The inventory without the modules that mix examples; an error where they were asked for, or are all there are."""
    if not mixing:
        return inventory
    if named or len(mixing) == len(inventory.modules):
        raise AnalysisError(mixing_sentence(mixing))
    if warn:
        names, reason = first_and_others(mixing)
        message = f"{names} not measured: {reason}. Batches of one example can measure it."
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    kept = inventory.only({info.name for info in inventory.modules} - set(mixing))
    kept.left_out |= {f"{name}.weight": reason for name, reason in mixing.items()}
    return kept
