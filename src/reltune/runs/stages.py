"""The stages of a run: each reads one artefact and writes the next.

config.yaml ─analyze▶ relevance/ ─select▶ plan/ ─tune▶ adapter/ ─evaluate▶ all_results.json ─report▶ report.html
"""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback

from reltune.config.analysis import AnalysisConfig
from reltune.config.recipes import BEST, MOST, PER_EXAMPLE, larger_budget
from reltune.config.run_config import RunConfig
from reltune.config.selection import SelectionConfig
from reltune.config.training_fields import DEFAULTS
from reltune.cost.memory import give_back_what_is_freed
from reltune.errors import AnalysisError, InputError, batch_of, first_line
from reltune.files import check_destination, discard, disk_bytes, read_json, whole_directory, whole_file, write_json
from reltune.layers.fingerprint import fingerprint, is_forced
from reltune.layers.float8 import convertible
from reltune.layers.inventory import Inventory, take_inventory
from reltune.layers.quantised import check_not_packed
from reltune.layers.registry import layer_type
from reltune.layers.units import has_directions
from reltune.methods.contract import Base, Trainable
from reltune.methods.registry import METHODS
from reltune.names import CONTINUING, IN_GGUF, WITHOUT_DATA
from reltune.notes import note
from reltune.plan.budget import parse_budget, read_budget
from reltune.plan.granularities import check_together
from reltune.plan.plan import Plan
from reltune.plan.search import Limits
from reltune.plan.selection import check_scored, check_share, modules_with_elements
from reltune.plan.selection import select as choose_units
from reltune.processes import Processes
from reltune.reading import Damaged
from reltune.relevance.criteria.registry import find_criteria
from reltune.relevance.measure import analyze as measure_relevance
from reltune.relevance.probe.moving_weights import check_can_move
from reltune.relevance.resumption import deferred_signals
from reltune.relevance.scores import RelevanceScores
from reltune.relevance.weights.scan import analyze_checkpoint
from reltune.report.record import LMEvalRecord
from reltune.runs import export as exporting
from reltune.runs import lm_evaluation, prefix_cache, training
from reltune.runs.asking import asked_in
from reltune.runs.cards import add_results, describe_adapter, describe_lora, describe_merged, describe_method
from reltune.runs.data_record import read_task, record_bad_rows, record_data
from reltune.runs.directory import ADAPTER_FILES, RunDirectory
from reltune.runs.evaluation import evaluate as measure_metrics
from reltune.runs.forecast import Forecast, Settings, digest_of, forecast
from reltune.runs.gguf_file import check_architecture, check_tokenizer
from reltune.runs.graphed_step import why_not_unasked
from reltune.runs.kept_batch import STOPPED_AT, keep_batch
from reltune.runs.materials import EvaluationMaterials, Materials, ModelMaterials, placement
from reltune.runs.ollama import write_modelfile
from reltune.runs.sizes import NOT_KNOWN, Sizes
from reltune.tasks.registry import TASKS
from reltune.tasks.task import Task
from reltune.tensor_files import load_tensors

WITHOUT_NEW_HEADS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # PEFT's task types that train no head by themselves


def keep_to_budget(config: RunConfig) -> None:
    """Under a budget of memory on a CPU, have malloc give back what is freed. From the start on: blocks go into holes that an analysis has
    left in the heap before they are mapped."""
    on_cpu = not torch.cuda.is_available() or config.training.get("use_cpu")
    if on_cpu and config.budget is not None and read_budget(config.budget).memory is not None:
        give_back_what_is_freed()


def check_choice(materials: Materials, select: bool = True) -> None:
    """Raise InputError for patterns that match no module and budgets that no unit fits, before hours are spent.

    A trial selection, by a criterion that needs no data, fails where the real one would fail after the analysis. Without
    ``select`` the patterns alone are checked.
    """
    config = materials.config
    METHODS[config.method].check_config(config)
    prefix_cache.check(config, materials.task, materials.base.look())
    if not config.needs_plan:
        METHODS[config.method].check(base_of(materials, materials.base.look(), None))
        return
    find_criteria(config.criteria, config.scores_elements)
    model = materials.base.look()
    if not set(config.criteria) <= set(WITHOUT_DATA):
        check_not_packed(model)
    if "movement" in config.criteria:
        check_can_move(model)
    if select:
        check_scored(config.granularity, config.criteria[0])
        check_together(config.granularity, config.spread)
    relevance = measure_relevance(
        model,
        criteria=["depth"],
        target_modules=config.target_modules,
        exclude_modules=[*config.exclude_modules, *materials.not_tuned],
        always_trained=materials.new_heads,
        progress=False,
    )
    if config.frozen_dtype is not None:
        convertible(model, materials.new_heads)
    if select:
        relevance.provenance |= restrictions(config)
        budgets = config.sweep.get("budget", [config.budget])
        if "element" in config.granularity:
            # One weight always fits, wherever a column could be chosen; a number for every weight would be made for nothing.
            modules = modules_with_elements(relevance.inventory, everywhere=bool(config.target_modules))
            if not modules:
                raise InputError(
                    "no module that may be chosen has single weights that can be trained; choose another --granularity, such as "
                    "direction."
                )
            for budget in budgets:
                limit = parse_budget(budget, relevance.inventory.base_parameters)
                if config.spread != "global":
                    check_share(limit, len(modules))
            config, budgets = dataclasses.replace(config, granularity=["column"], spread="global"), ["100%"]
        if "direction" in config.granularity:
            relevance = with_directions(relevance, config)
        for budget in budgets:
            choose(dataclasses.replace(config, budget=budget), relevance)


def advise(materials: Materials) -> None:
    """Say where more single weights would suit the data, if nothing but a count of them limits the choice."""
    config, examples = materials.config, materials.sizes.train
    chosen = config.needs_plan and (config.criteria, config.granularity) == ([BEST.criterion], [BEST.granularity])
    if not chosen or examples is None or "budget" in config.sweep or "=" in config.budget:
        return
    parameters = take_inventory(materials.base.look(), materials.new_heads).base_parameters
    count = parse_budget(config.budget, parameters)
    if (more := larger_budget(count, examples, parameters)) is not None:
        note(
            f"{count:,} weights are few for {examples:,} training examples: in studies some {PER_EXAMPLE} for each did best, and "
            f"{MOST:.0%} of the model was the most that was tried (docs/config.md). Consider --budget {more}."
        )


def with_directions(relevance: RelevanceScores, config: RunConfig) -> RelevanceScores:
    """As many directions as the analysis may keep, without their vectors, as if the config's criterion had found them."""
    parts = {
        info.name: {"direction": torch.ones(min(config.probe_directions, *info.shape))}
        for info in relevance.inventory.modules
        if "direction" in layer_type(info.layer_type).trains and has_directions(info) and config.probe_directions
    }
    return dataclasses.replace(relevance, parts={config.criteria[0]: parts})


def analyze(materials: Materials, run: RunDirectory) -> RelevanceScores:
    """Train the new heads briefly, then measure relevance: gradients through an untrained head mean nothing.

    Of several processes the first one's new heads count, and the first one writes.
    """
    config, processes = materials.config, Processes.joined()
    with processes.together():
        if processes.first:
            record_data(run, config, materials.task, materials.splits, materials.notes)
    model = _with_trained_new_heads(materials, run)
    discard(run.path / STOPPED_AT)
    try:
        relevance = measure(materials, model, run.relevance if processes.count == 1 else None)
    except (AnalysisError, InputError) as error:
        place = keep_batch(run.path, batch_of(error), materials.tokenizer, str(error))
        if place is not None:
            raise type(error)(f"{error} The batch is in {place}.") from error
        raise
    with processes.together():
        if processes.first:
            relevance.save(run.relevance)
    return relevance


def measure(materials: Materials, model: nn.Module, resume_directory: Path | None = None) -> RelevanceScores:
    """Relevance of the units of a model, whose new heads were trained, as the config says."""
    config = materials.config
    relevance = measure_relevance(
        model.to(materials.arguments("head").device),
        _drawn_examples(materials),
        materials.task.relevance_loss,
        config.criteria,
        elements=config.scores_elements,
        target_modules=config.target_modules,
        exclude_modules=[*config.exclude_modules, *materials.not_tuned],
        always_trained=materials.new_heads,
        seed=config.seed,
        resume_directory=resume_directory,
        options={name: given for name, given in options_of(config).items() if name in config.criteria},
    )
    relevance.provenance |= restrictions(config)
    return relevance


def _with_trained_new_heads(materials: Materials, run: RunDirectory) -> nn.Module:
    """The base model with new heads that were trained, in this analysis or in the interrupted one that goes on."""
    if materials.new_heads and run.head.is_file():
        return model_with_new_heads(materials, run)
    model, processes = materials.base.take(), Processes.joined()
    if materials.new_heads:
        train_new_heads(materials, model, materials.config.head_epochs)
        processes.take_from_first(model.get_submodule(name) for name in materials.new_heads)
        with processes.together():
            if processes.first:
                with whole_file(run.head) as partial:
                    save_file(new_head_tensors(model, materials.new_heads), partial)
    return model


def _drawn_examples(materials: Materials) -> DataLoader:
    """The training examples that relevance is measured on, drawn by seed, in batches."""
    config, sample = materials.config, materials.sample
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randperm(len(sample), generator=generator)[: config.analysis_examples].tolist()
    return DataLoader(Subset(sample, drawn), batch_size=config.analysis_batch_size, collate_fn=materials.collator)


def options_of(config: AnalysisConfig) -> dict[str, dict[str, Any]]:
    """What the config says about single criteria."""
    return {
        "correlation": {"max_trials": config.max_trials},
        "movement": {
            "steps": config.probe_steps,
            "step_size": config.probe_step_size,
            "directions": config.probe_directions,
        },
    }


def analyze_weights(config: RunConfig, run: RunDirectory, overwrite: bool = False) -> RelevanceScores:
    """Measure relevance by criteria that look at no data, tensor by tensor, with no model in memory.

    The run's directory is made when everything is measured.
    """
    run.check_start(config, overwrite, "analysis")
    relevance = analyze_checkpoint(
        config.model_name_or_path,
        config.criteria,
        elements=config.scores_elements,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        seed=config.seed,
    )
    relevance.provenance |= restrictions(config)
    run.create(config)
    relevance.save(run.relevance)
    return relevance


def restrictions(config: SelectionConfig) -> dict[str, Any]:
    """What keeps modules out of the analysis and, later, out of the choice."""
    return {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}


def train_new_heads(materials: Materials, model: nn.Module, epochs: float) -> training.TrainingCost | None:
    """Train the new heads alone, with everything else frozen."""
    if epochs == 0:
        return None
    model.requires_grad_(False)
    for name in materials.new_heads:
        model.get_submodule(name).requires_grad_(True)
    args = training.arguments(
        materials.config.output_dir,
        "head",
        materials.config.seed,
        {
            key: materials.config.training[key]
            for key in ("per_device_train_batch_size", "use_cpu")
            if key in materials.config.training
        },
        materials.task,
        num_train_epochs=epochs,
        save_strategy="no",
        eval_strategy="no",
    )
    # N processes with B each take the batches of one with N·B, as in training; dropout alone differs. Of more than the usual
    # size, many processes would take few steps, and the head would stay untrained.
    usual = {**DEFAULTS, **materials.task.defaults}["per_device_train_batch_size"]
    together = min(args.per_device_train_batch_size * args.world_size, usual)
    args.per_device_train_batch_size = max(1, together // args.world_size)
    _, cost = training.train(
        model,
        args,
        materials.task,
        materials.tokenizer,
        materials.sample,
        description="train the head",
    )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # not what is held in few bits
    return cost


def new_head_tensors(model: nn.Module, new_heads: Sequence[str]) -> dict[str, torch.Tensor]:
    """The new heads' tensors under their names in the model."""
    prefixes = tuple(f"{name}." for name in new_heads)
    return {
        name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items() if name.startswith(prefixes)
    }


def model_with_new_heads(materials: ModelMaterials, run: RunDirectory) -> nn.Module:
    """The base model with the new heads that relevance was measured with, or that a comparison has trained for all methods; else
    with untrained ones."""
    model = materials.base.take()
    if materials.new_heads and (materials.config.needs_plan or run.head.is_file()):
        if not run.head.is_file():
            raise InputError(f"{run.head} is missing; run `reltune analyze` again.")
        model.load_state_dict(_new_heads(run.head, model, materials.new_heads), strict=False)
    return model


def _new_heads(file: Path, model: nn.Module, new_heads: Sequence[str]) -> dict[str, torch.Tensor]:
    """What ``new_head_tensors`` gave, from its file. Raises InputError where it does not fit the model's new heads."""
    try:
        tensors = load_tensors(file)
    except (OSError, Damaged) as error:
        raise InputError(f"{file} cannot be read ({error}); run `reltune analyze` again.") from error
    own, prefixes = model.state_dict(), tuple(f"{name}." for name in new_heads)
    for name, tensor in tensors.items():
        if not name.startswith(prefixes) or name not in own or own[name].shape != tensor.shape:
            raise InputError(
                f"{file} has {name}, which is no part of this model's new heads; run `reltune analyze` again."
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{file} has numbers in {name} that are not finite; run `reltune analyze` again.")
    return tensors


def select(config: RunConfig, run: RunDirectory, sizes: Sizes = NOT_KNOWN) -> Plan:
    """Choose units under the budget from the saved relevance, and store the config as the run's. Of several processes the first
    one chooses. ``sizes``: of the data, for a budget of memory or time."""
    processes = Processes.joined()
    with processes.together():
        if processes.first:
            relevance, found = RelevanceScores.load(run.relevance), None
            if read_budget(config.budget).is_limited:
                found = forecast_of(config, run, relevance, None, sizes, shown=False)
                plan = found.plan
                assert plan is not None
            else:
                plan = choose(config, relevance, config.criteria[0])
            run.clear("select")
            config.save(run.config_file)  # before the plan, which is there only with its config
            with whole_directory(run.plan) as partial:
                plan.save(partial)
            if found is not None:
                write_json(run.prediction, found.prediction(_conditions(config, run, sizes)))
    return Plan.load(run.plan)


def forecast_of(
    config: RunConfig,
    run: RunDirectory,
    relevance: RelevanceScores | None,
    device: str | None = None,
    sizes: Sizes = NOT_KNOWN,
    plan: Plan | None = None,
    shown: bool = True,
) -> Forecast:
    """What a run will train and what that takes, by this relevance or plan; ``shown``: beside what else could be trained.

    Random numbers that are drawn on the way are not missing afterwards: training begins from the same values with it and without.
    """
    if config.task is None and (recorded := read_task(run, config)) is not None:
        config = dataclasses.replace(config, task=recorded.name)
    wanted: dict[str, Any] = {}
    if relevance is not None:
        wanted = {
            "criterion": config.criteria[0],
            "task_type": _task_type(config, relevance.always_trained),
            "restricted": _restricted(config, relevance),
        }
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        return forecast(
            config,
            relevance=relevance,
            plan=plan,
            device=device,
            sizes=sizes,
            with_frontier=shown,
            with_others=shown,
            **wanted,
        )


def check_affordable(config: RunConfig, run: RunDirectory, sizes: Sizes) -> None:
    """Raise InputError for a budget of memory or time that nothing keeps, before hours are spent."""
    for budget in config.sweep.get("budget", [config.budget]):
        if budget is not None and read_budget(budget).is_limited:
            forecast_of(dataclasses.replace(config, budget=budget, sweep={}), run, None, None, sizes, shown=False)


def settled(
    materials: Materials, run: RunDirectory, plan: Plan | None, predict: bool
) -> tuple[Materials, dict[str, Any]]:
    """The run's materials with the settings that its budget asks for, and what was predicted, which is empty where nothing was.

    A prediction that was made when the plan was chosen counts, unless the config has changed since. Without a budget of memory or
    time there are no settings, and a prediction is made if it is wanted and can be.
    """
    config = materials.config
    limited = config.budget is not None and read_budget(config.budget).is_limited
    sized = config.rank_from_budget
    processes = Processes.joined()
    made: dict[str, Any] = {}
    with processes.together():
        digest = _conditions(config, run, materials.sizes)
        before = read_json(run.prediction) if run.prediction.is_file() else {}
        if before.get("of") == digest:
            made = before
        elif processes.first and (limited or sized or predict):
            try:
                made = forecast_of(config, run, None, None, materials.sizes, plan, shown=False).prediction(digest)
            except Exception as error:  # a training that cannot be predicted is a training all the same
                if limited or sized:
                    raise
                if not isinstance(error, InputError):  # which says that this one cannot be
                    warnings.warn(
                        f"memory and time of this training are not predicted ({type(error).__name__}: {first_line(error)}).",
                        stacklevel=2,
                    )
    made = processes.gather(made)[0]
    if not made:
        return materials, {}
    own = Settings(made["fields"], made["training"]).of(config) if made["fields"] or made["training"] else config
    return dataclasses.replace(materials, config=own), made


def _conditions(config: RunConfig, run: RunDirectory, sizes: Sizes) -> str:
    """A digest of what a prediction depends on."""
    if config.task is None and (recorded := read_task(run, config)) is not None:
        config = dataclasses.replace(config, task=recorded.name)
    return digest_of(config, run.plan_digest() if config.needs_plan else "", sizes)


def choose(config: RunConfig, relevance: RelevanceScores, criterion: str | None = None) -> Plan:
    """The plan for a config whose budget is one of parameters; of another one that part counts."""
    return choose_units(
        relevance,
        config.budget,
        config.granularity,
        criterion=criterion,
        spread=config.spread,
        model_name_or_path=config.model_name_or_path,
        task_type=_task_type(config, relevance.always_trained),
        limits=Limits(parse_budget(config.budget, relevance.inventory.base_parameters)),
        **_restricted(config, relevance),
    )


def _restricted(config: RunConfig, relevance: RelevanceScores) -> dict[str, Any]:
    """The patterns that keep modules out of the choice. Those that the analysis has followed already are not matched again: it kept only
    what they allow, so that nothing is left for ``exclude_modules`` to match."""
    wanted = restrictions(config)
    for name, patterns in wanted.items():
        if patterns and patterns == relevance.provenance.get(name):
            measured = [info.name for info in relevance.inventory.modules]
            wanted[name] = measured if name == "target_modules" else []
    return wanted


def _task_type(config: RunConfig, new_heads: Sequence[str]) -> str | None:
    """PEFT's name of the task. Without a new head it is left out where PEFT would train a head because of it."""
    task_type = TASKS[config.task].peft_task_type if config.task else None
    return task_type if new_heads or task_type in WITHOUT_NEW_HEADS else None


def tune(
    materials: Materials,
    run: RunDirectory,
    resume_from_checkpoint: str | None = None,
    description: str = "tune",
    goes_on: bool = False,
    predict: bool = False,
    try_graphs: bool = False,
) -> Any:
    """Train by the config's method and save the adapter, with the tokenizer beside it. ``description`` names the progress bar.

    Whatever can be wrong with the plan, the training fields or the checkpoint is found before anything of an earlier
    adapter is removed. What its memory and time will be is predicted where the budget depends on it, or if wanted (``predict``). Of
    several processes the first one writes. With ``goes_on``, a training that was interrupted goes on from its newest checkpoint.
    Ctrl-C and termination take effect after a step, of which a checkpoint is kept. If the config does not say whether steps are recorded
    as CUDA graphs, with ``try_graphs`` they are where they can be.
    """
    processes = Processes.joined()
    with processes.together():
        checkpoint = run.checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        if checkpoint:
            _check_unchanged(run, _begun(materials, run))
        if goes_on and not checkpoint:
            checkpoint = checkpoint_to_go_on_from(materials, run)
        asked = materials.config
        plan = Plan.load(run.plan) if asked.needs_plan else None
        materials.arguments("selection")  # refuses what cannot be, before anything is predicted by it
    materials, predicted = settled(materials, run, plan, predict)
    keep_to_budget(asked)
    with processes.together():
        config, method = materials.config, METHODS[materials.config.method]
        base = model_with_new_heads(materials, run)
        inventory = take_inventory(base, materials.new_heads)
        base_fingerprint = fingerprint(base, materials.new_heads)
        if checkpoint and not is_forced():
            _check_unchanged(run, {"base": base_fingerprint})
        trainable = method.prepare(base_of(materials, base, plan))
        model = trainable.model
        materials.check_training(model)
        args = materials.arguments(trainable.rate, trainable.divisor)
        asks = (
            config.cuda_graphs is None and not try_graphs and not (config.budget and read_budget(config.budget).memory)
        )
        if asks and not why_not_unasked(vars(config), args, materials.task.name, base):
            note(
                "The model is small: where the GPU waits for Python, --cuda_graphs trains the same in a fraction of the time (docs/tasks.md)."
            )
        example = materials.collator([materials.sample[0]])
        cache = prefix_cache.decide(
            config,
            materials.task,
            model,
            args,
            materials.train,
            example,
            run.prefix,
            predicted.get("frozen_prefix_pays"),
        )
    with processes.together():
        if processes.first:
            run.clear("tune", checkpoints=checkpoint is None)
            asked.save(run.config_file)
            if predicted:
                write_json(run.prediction, predicted)
            else:
                discard(run.prediction)
            write_json(run.begun, {**_begun(materials, run), "base": base_fingerprint})
            record_data(run, materials.config, materials.task, materials.splits, materials.notes)
    with deferred_signals(processes.count == 1) as waiting:
        callbacks: list[TrainerCallback] = [training.LogFile(run.log), training.EndsAfterStep(waiting)]
        if materials.config.early_stopping_patience is not None:
            callbacks.append(training.stops_early(materials.config.early_stopping_patience))
        trainer, cost = training.train(
            model,
            args,
            materials.task,
            materials.tokenizer,
            materials.train,
            materials.validation,
            checkpoint,
            description,
            callbacks,
            config.activation_offloading,
            None if try_graphs and config.cuda_graphs is None else bool(config.cuda_graphs),
            cache,
            None if materials.samples is None else materials.samples.asked_in(run),
        )
        state = training.gathered_state(trainer)
        with processes.together():
            if processes.first:
                with whole_file(run.path / "trainer_state.json") as partial:
                    trainer.state.save_to_json(str(partial))
                facts = {**dataclasses.asdict(cost), "learning_rate": args.learning_rate, "machine": training.machine()}
                facts["fingerprint"] = base_fingerprint
                facts |= {} if cache is None else {"frozen_prefix": cache.facts}
                write_json(run.path / "training_cost.json", facts)
                record_bad_rows(run, materials.splits)  # of streamed rows more are known by now
                planned = plan if config.rank_by is None else None
                if planned is None:
                    write_json(run.method, _method_record(materials, trainable, base, inventory))
                with whole_directory(run.adapter) as adapter:  # the last, by which training counts as done
                    method.save(model, adapter, state)
                    materials.saved_tokenizer().save_pretrained(str(adapter))
                    if planned is not None:
                        describe_adapter(adapter, planned, config, run, materials.task)
                    else:
                        describe_method(adapter, config, run, trainable.lines, materials.task)
    if waiting:
        signal.raise_signal(waiting.pop())
    return model


def _begun(materials: Materials, run: RunDirectory) -> dict[str, Any]:
    """What a training begins with beside its config: a digest of the plan, and of the examples as far as a look at some shows."""
    record: dict[str, Any] = {"plan": run.plan_digest() if materials.config.needs_plan else None}
    if not materials.config.streaming:
        count = len(materials.train)
        some = [repr(materials.train[index]) for index in range(0, count, max(1, count // 32))]
        record |= {"examples": count, "data": hashlib.sha256("".join(some).encode()).hexdigest()}
    return record


def checkpoint_to_go_on_from(materials: Materials, run: RunDirectory) -> str | None:
    """The checkpoint that an interrupted training goes on from: None where there is none, or none with the optimizer's state.

    Raises InputError where plan or data have changed since it began.
    """
    checkpoint = run.newest_checkpoint()
    if checkpoint is None or materials.config.training.get("save_only_model"):
        return None
    _check_unchanged(run, _begun(materials, run))
    return checkpoint


def _check_unchanged(run: RunDirectory, now: Mapping[str, Any]) -> None:
    """Raise InputError where something of what a training goes on with is not what it began with."""
    before = read_json(run.begun) if run.begun.is_file() else {}  # an older version began it, or began it with less
    changed = next((name for name, value in now.items() if before.get(name, value) != value), None)
    if changed is None:
        return
    what = {"plan": f"the plan in {run.plan}", "base": "the base model"}.get(changed, "what the training data hold")
    raise InputError(
        f"{what} has changed since the training in {run.path} was interrupted; put it back, or begin anew with `reltune tune "
        f"{run.path} --overwrite_output_dir`."
    )


def base_of(materials: Materials, model: nn.Module, plan: Plan | None) -> Base:
    """What the config's method is given: a base model that it may change, unless it only checks it."""
    config, new_heads = materials.config, materials.new_heads
    return Base(config, model, new_heads, materials.not_tuned, _task_type(config, new_heads), plan)


def _method_record(materials: Materials, trainable: Trainable, base: nn.Module, inventory: Inventory) -> dict[str, Any]:
    """What a method trained that no plan describes, for ``method.json``."""
    layers = {info.name: info.layer for info in inventory.modules}
    by_layer = dict.fromkeys(layers.values(), 0)
    for name, parameter in trainable.model.named_parameters():
        parts = name.removeprefix("base_model.model.").split(".")
        owners = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        layer = next((layers[owner] for owner in owners if owner in layers), None)
        if parameter.requires_grad and layer is not None:
            by_layer[layer] += parameter.numel()
    return {
        "method": materials.config.method,
        "architecture": type(base).__name__,
        "lines": list(trainable.lines),
        "trainable_parameters": trainable.parameters,
        "head_parameters": trainable.head_parameters,
        "by_layer": by_layer,
    }


def load_tuned(materials: ModelMaterials, run: RunDirectory, base: nn.Module | None = None) -> Any:
    """The run's adapter from disk on a base model: on ``base``, or on the untouched one if none is given.

    Its ``disable_adapter()`` gives the base model back for a while.
    """
    if not run.has_adapter:
        raise InputError(f"{run.path} holds no adapter; run `reltune tune` first.")
    return METHODS[materials.config.method].load(materials.base.take() if base is None else base, run.adapter)


def evaluate(materials: EvaluationMaterials, run: RunDirectory) -> dict[str, float]:
    """Metrics on held-out data before training and after it, written to ``all_results.json``; and what the model wrote for
    test examples, to ``outputs.jsonl``.

    Before training means: the base model with the new heads that relevance was measured with, or with untrained ones where none
    was. It is the tuned model with its adapter disabled, which has the base's weights to the bit. Several processes, each with the whole model, share the data, and the first
    one writes.
    """
    processes = Processes.joined()
    with processes.together():
        model = load_tuned(materials, run, model_with_new_heads(materials, run))
        cost = read_json(run.path / "training_cost.json")
        trained, heads = trained_parameters(run)
        tasks = materials.lm_eval_tasks
    second = {} if materials.forgetting is None else {"forgetting": materials.forgetting}
    task, processor, placed = materials.task, materials.tokenizer, placement(materials.config)
    with model.disable_adapter():
        held_out = {f"{name}_before": examples for name, examples in (materials.held_out | second).items()}
        before = measure_metrics(model, held_out, task, processor, **placed)
    held_out = materials.held_out | {f"{name}_after": examples for name, examples in second.items()}
    after = measure_metrics(model, held_out, task, processor, **placed)
    results = {
        **before.metrics,
        **after.metrics,
        "trainable_parameters": trained,
        "head_parameters": heads,
        "adapter_bytes": disk_bytes(run.adapter, [name for name in ADAPTER_FILES if (run.adapter / name).is_file()]),
        "train_steps": cost["steps"],
        "train_seconds_per_step": cost["seconds_per_step"],
        "train_peak_memory_bytes": cost["peak_memory_bytes"],
        "learning_rate": cost["learning_rate"],
    }
    with processes.together():
        if processes.first:
            run.write_outputs(before.written["test_before"], after.written["test"])
            write_json(run.results, results)
            add_results(run.adapter, results)
    if tasks:
        measured = measure_lm_eval(materials, model)
        with processes.together():
            if measured is not None:
                write_json(run.lm_eval, dataclasses.asdict(measured))
    return results


def trained_parameters(run: RunDirectory) -> tuple[int, int]:
    """How many parameters the run trained, and how many of new heads."""
    if run.method.is_file():
        record = read_json(run.method)
        return record["trainable_parameters"], record["head_parameters"]
    plan = Plan.load(run.plan)
    return plan.parameters, plan.head_parameters


def measure_lm_eval(materials: ModelMaterials, tuned: Any) -> LMEvalRecord | None:
    """What lm-evaluation-harness says of the base and the tuned model; of several processes the first one is told."""
    config = materials.config
    settings: dict[str, Any] = {
        "batch_size": config.lm_eval_batch_size,
        "limit": config.lm_eval_limit,
        "apply_chat_template": config.lm_eval_apply_chat_template,
    }
    scores = lm_evaluation.evaluate(
        tuned,
        materials.tokenizer,
        materials.lm_eval_tasks,
        str(materials.task.peft_task_type),
        num_fewshot=config.lm_eval_num_fewshot,
        **settings,
    )
    return LMEvalRecord(metadata.version("lm_eval"), scores=scores, **settings) if scores is not None else None


def check_export(config: RunConfig, task: Task, to: str) -> None:
    """Raise InputError where the run's model cannot be written in a form, before it is loaded."""
    if to in IN_GGUF:
        if task.name not in CONTINUING:
            raise InputError(
                f"--to {to} is for language models that go on with a text ({', '.join(CONTINUING)}), and this run's task is {task.name}; use --to merged."
            )
        check_architecture(config.model_name_or_path)
        if not config.model_name_or_path.endswith(".gguf"):
            check_tokenizer(task.saved_tokenizer(config.model_name_or_path))


def export(
    materials: ModelMaterials,
    run: RunDirectory,
    to: str,
    output_dir: str,
    server: str | None = None,
    gguf_type: str = "f16",
) -> Path:
    """Write the tuned model in one of ``names.EXPORT_FORMS``, a LoRA adapter for one of ``names.SERVERS`` if any, the matrices of a GGUF
    file in one of ``names.GGUF_TYPES``."""
    check_destination(output_dir)
    model = load_tuned(materials, run)
    asked = asked_in(materials.task, materials.tokenizer, run)
    if to == "lora":

        def complete(path: Path) -> None:
            materials.saved_tokenizer().save_pretrained(str(path))
            describe_lora(path, materials.config, run, materials.task, asked)

        return exporting.to_lora(model, output_dir, one_rank=server == "vllm", complete=complete)
    tokenizer = materials.saved_tokenizer()
    if to == "merged":
        described = partial(describe_merged, config=materials.config, run=run, task=materials.task, asked_in=asked)
        return exporting.to_merged(model, tokenizer, output_dir, described)
    if to in IN_GGUF:
        name = materials.config.model_name_or_path

        def modelfile(path: Path) -> None:
            if to == "ollama" and (said := write_modelfile(path, f"model-{gguf_type}.gguf", model, tokenizer, asked)):
                note(said)

        of_file = name if name.endswith(".gguf") else None
        file = exporting.to_gguf(model, tokenizer, output_dir, gguf_type, of_file, modelfile)
        return file if to == "gguf" else file.parent
    raise ValueError(f"nothing writes the form {to!r}.")
