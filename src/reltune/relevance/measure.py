"""Relevance of a model's units for a task, by one or several criteria that share what they need."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reltune.errors import AnalysisError, InputError
from reltune.layers.fingerprint import digest, fingerprint
from reltune.layers.inventory import Inventory, choose, new_head_modules, new_parameters, take_inventory
from reltune.layers.quantised import check_not_packed
from reltune.layers.registry import canonical_weights
from reltune.losses import Loss, as_loss
from reltune.processes import Processes, unwrapped
from reltune.relevance.assembly import Assembly
from reltune.relevance.batches import frozen
from reltune.relevance.behaviour.experiment import Experiment, random_state_kept, with_untouched
from reltune.relevance.behaviour.held_batches import HeldBatches, hold_batches
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.contract import (
    BehaviourCriterion,
    Criterion,
    ScoresByName,
    StatisticalCriterion,
    needs_data,
    options_of,
    statistics_of,
)
from reltune.relevance.criteria.registry import check_scores, find_criteria
from reltune.relevance.resumption import Partial
from reltune.relevance.scores import RelevanceScores, provenance
from reltune.relevance.statistics.collector import Sums, first_and_others, mixing_sentence
from reltune.relevance.statistics.data_pass import DataPass
from reltune.relevance.statistics.shared_pass import measure_loader
from reltune.relevance.weights.scan import analyze_checkpoint

__all__ = ["AnalysisError", "analyze"]

LossFunction = Callable[[Any, Any], Tensor]  # loss_fn(outputs, batch) -> (B,)
UserLoss = str | Loss | LossFunction | nn.Module | None


def analyze(
    model: nn.Module | str | os.PathLike,
    loader: Iterable[Any] | None = None,
    loss_fn: UserLoss = None,
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
        model: the model; or the directory or hub id of a checkpoint, which is then scored without loading it, by criteria
            that look at no data (``analyze_checkpoint``, which can also be told the model's class).
        loader: batches, either mappings of tensors (``labels`` among them) or ``(inputs, labels)`` pairs; may be
            None when no criterion looks at data.
        loss_fn: a name from ``reltune.losses.LOSSES`` (``"causal_lm"``); or ``loss_fn(outputs, batch)``, which
            gives one loss per example, shape (B,); or a torch loss module, which is applied to logits and labels
            without reduction; None means cross entropy.
        criteria: names from ``reltune.relevance.criteria.registry.CRITERIA`` or of an installed package's criterion, or
            criteria themselves (``reltune/relevance/criteria/contract.py`` says what one has). ``select`` uses the first
            by default. ``reltune run`` measures ``movement`` with ``elements`` where nothing is named. Several share one pass over the data (``fisher_true`` has its own).
        elements: score every single weight too, which takes one number per weight and criterion.
        target_modules: modules to measure: runs of whole name parts (``layer.5``, ``query``), or regular expressions.
        exclude_modules: modules to leave out, in the same words.
        always_trained: modules or parameters of new heads, which are never scored; None means the parameters that
            ``from_pretrained`` did not find in the checkpoint.
        seed: for criteria that draw random numbers.
        progress: show a progress bar on stderr.
        resume_directory: where intermediate results are kept, every few minutes and when the analysis is interrupted.
            Called again with the same model, data and arguments, it goes on from there and gives the same result. The
            files are removed at the end. For one process only, but for criteria that share the data (movement).
        parallel: under ``torchrun`` or ``accelerate launch``, how the processes share the data. ``"auto"``: of P
            processes each takes every P-th batch of the same loader, unless a ``DistributedSampler`` or accelerate's
            ``prepare`` has already dealt out the data; examples that the sampler repeats count once. ``"split"``: every
            P-th batch in any case. ``"sharded"``: each process's loader gives its own part, by whatever means.
            ``"off"``: this process measures by itself. All processes get the scores of all the data.
        options: options of single criteria, such as ``{"correlation": {"max_trials": 400}}``; the criteria's files
            list theirs.

    Criteria measured from behaviour (ablation, correlation, movement) pass over the data many times. All batches are
    then held in host memory; movement runs in several processes too, the others in one.

    The model is analysed in evaluation mode (no dropout), by movement in training mode, on the device where it is, and
    handed back as it was. Gradient checkpointing that was enabled on it takes effect. A batch that does not fit in memory
    is halved, with a warning.

    Raises:
        InputError: an unknown criterion, a pattern without a match, no data, a loss that is not one number per example.
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
    by_name = find_criteria(criteria, elements)
    behaviour = {name: one for name, one in by_name.items() if isinstance(one, BehaviourCriterion)}
    statistical = {name: one for name, one in by_name.items() if not isinstance(one, BehaviourCriterion)}
    option_objects = options_of(by_name, options)
    needs = {need for criterion in statistical.values() for need in statistics_of(criterion, elements)}
    processes = Processes() if parallel == "off" else Processes.joined()
    _check_data_and_processes(by_name, loader, needs, processes, resume_directory)

    model = unwrapped(model)
    new_heads = new_head_modules(model, new_parameters(model) if always_trained is None else always_trained)
    inventory = take_inventory(model, new_heads)
    inventory = inventory.only(set(choose(inventory, target_modules, exclude_modules)))
    directory = None if resume_directory is None else Path(resume_directory)
    analysis = _Analysis(model, loss_fn, inventory, elements, seed, progress, directory)
    scores: dict[str, ScoresByName] = {}
    facts: dict[str, Any] = {}
    sums: Sums = {}
    examples, data = 0, ""
    kept: list[Partial] = []
    if behaviour:
        assert loader is not None
        held = hold_batches(loader, processes, parallel)
        examples, data = held.examples, held.fingerprint
        scores, facts, kept = _measure_behaviour(analysis, behaviour, option_objects, held, processes)
        loader, parallel = held.batches, parallel if held.same_on_all else "sharded"
    if needs:
        assert loader is not None
        examples, data, sums, mixing = _add_up_statistics(analysis, needs, loader, processes, parallel)
        inventory = _without_mixing(inventory, mixing, bool(target_modules), processes.first)
    for partial in kept:  # only now: the pass over the data may have been interrupted too
        partial.remove()

    scores |= _assemble(analysis, inventory, statistical, sums, Context(examples, seed))
    scores = {name: _of_inventory(scores[name], inventory) for name in by_name}
    model_name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    facts |= provenance(model, model_name, examples, data, seed)  # a criterion's name does not hide any of these
    facts["weights"] = digest(model, new_heads)
    return RelevanceScores(scores, inventory, new_heads, fingerprint(model, new_heads), facts)


DIFFERENT_PROCESSES = (
    "the processes have different models or arguments; load the same weights and ask for the same in each."
)


@dataclasses.dataclass(frozen=True)
class _Analysis:
    """What one call of ``analyze`` measures, and how."""

    model: nn.Module
    loss_fn: UserLoss
    inventory: Inventory
    elements: bool
    seed: int
    progress: bool
    resume_directory: Path | None

    def partial(self, measured: Any, criterion: str = "") -> Partial | None:
        """The file for intermediate results. Results of another model, or of anything but ``measured``, are not used."""
        if self.resume_directory is None:
            return None
        names = [info.name for info in self.inventory.modules]
        identity = json.dumps([fingerprint(self.model, as_held=True), measured, names, self.seed])
        return Partial(self.resume_directory, hashlib.sha256(identity.encode()).hexdigest(), criterion)


def _check_data_and_processes(
    criteria: Mapping[str, Criterion],
    loader: Iterable[Any] | None,
    needs: set[str],
    processes: Processes,
    resume_directory: str | os.PathLike | None,
) -> None:
    behaviour = [name for name, criterion in criteria.items() if isinstance(criterion, BehaviourCriterion)]
    if loader is None and (needs or behaviour):
        # Where none needs data for its units, single weights are asked for, and the first one needs it for them.
        name = next((name for name, criterion in criteria.items() if needs_data(criterion)), next(iter(criteria)))
        raise InputError(f"criterion {name!r} needs data; pass a loader.")
    alone = [name for name in behaviour if not getattr(criteria[name], "SHARES_DATA", False)]
    if processes.count > 1 and alone:
        raise InputError(f"criterion {alone[0]!r} runs in one process, and there are {processes.count}.")
    if processes.count > 1 and resume_directory is not None and needs:
        raise InputError(f"resume_directory is for one process, and there are {processes.count}; leave it out.")


def _measure_behaviour(
    analysis: _Analysis,
    criteria: Mapping[str, BehaviourCriterion],
    options: Mapping[str, Any],
    held: HeldBatches,
    processes: Processes,
) -> tuple[dict[str, ScoresByName], dict[str, Any], list[Partial]]:
    """Let each criterion run the model. Gives scores and facts by criterion, and where intermediate results are kept."""
    model, loss = analysis.model, as_loss(analysis.loss_fn)
    if processes.count > 1:
        names = [info.name for info in analysis.inventory.modules]
        processes.agree_on([fingerprint(model), sorted(criteria), names, analysis.seed], DIFFERENT_PROCESSES)
    with processes.together(), frozen(model), random_state_kept(next(model.parameters()).device):
        batches = with_untouched(model, loss, held.batches)
    scores, facts, kept = {}, {}, []
    for name, criterion in criteria.items():
        values = dataclasses.asdict(options[name]) if name in options else {}
        partial = analysis.partial([name, values], name)
        kept += [partial] if partial else []
        experiment = Experiment(
            criterion=name,
            model=model,
            loss=loss,
            inventory=analysis.inventory,
            batches=batches,
            options=options.get(name),
            seed=analysis.seed,
            progress=analysis.progress,
            partial=partial,
            data=held.stream,
            elements=analysis.elements,
            processes=processes,
            same_batches=held.same_on_all,
        )
        with frozen(model), random_state_kept(experiment.device):
            scores[name], measured = criterion.measure(experiment)
        facts[name] = {**values, **measured}
    return scores, facts, kept


def _add_up_statistics(
    analysis: _Analysis, needs: set[str], loader: Iterable[Any], processes: Processes, parallel: str
) -> tuple[int, str, Sums, dict[str, str]]:
    """One pass over the data. Gives the number of examples, their fingerprint, the statistics of each module, and the
    modules that mix examples, with the reasons."""
    model, modules = analysis.model, analysis.inventory.modules
    check_not_packed(model)
    if processes.count > 1:  # only then: the fingerprint waits for the device
        processes.agree_on(
            [fingerprint(model), sorted(needs), [info.name for info in modules], analysis.seed], DIFFERENT_PROCESSES
        )
    data_pass = DataPass(model, as_loss(analysis.loss_fn), modules, needs, analysis.seed)
    partial = analysis.partial(sorted(needs))
    progress = analysis.progress and processes.first
    examples, data = measure_loader(data_pass, loader, processes, parallel, partial, progress)
    return examples, data, data_pass.collector.sums, data_pass.collector.mixing


def _assemble(
    analysis: _Analysis,
    inventory: Inventory,
    criteria: Mapping[str, StatisticalCriterion],
    sums: Sums,
    context: Context,
) -> dict[str, ScoresByName]:
    """The scores by each statistical criterion."""
    modules = dict(analysis.model.named_modules())
    assemblies = {
        name: Assembly(criterion, context, analysis.elements, inventory.attention_heads)
        for name, criterion in criteria.items()
    }
    for info in inventory.modules:
        weights = canonical_weights(info, modules[info.owner])
        for assembly in assemblies.values():
            assembly.add(info, weights, sums.get(info.name, {}))
    scores = {name: assembly.finished() for name, assembly in assemblies.items()}
    check_scores(scores, inventory.modules)
    return scores


def _of_inventory(scores: ScoresByName, inventory: Inventory) -> ScoresByName:
    """The scores of the inventory's modules alone: behaviour criteria have scored those that mix examples, too."""
    known = {name for info in inventory.modules for name in (info.name, info.layer)}
    known |= {group.name for group in inventory.attention_heads}
    return {name: parts for name, parts in scores.items() if name in known}


def _without_mixing(inventory: Inventory, mixing: Mapping[str, str], named: bool, warn: bool) -> Inventory:
    """The inventory without the modules that mix examples. An error where the user named modules, or where all mix."""
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
