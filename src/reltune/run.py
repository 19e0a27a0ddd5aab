"""A run: its directory and the stages that read one artefact and write the next.

config.yaml ─analyze▶ relevance/ ─select▶ plan/ ─tune▶ adapter/ ─evaluate▶ all_results.json ─report▶ report.html
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, set_seed

from reltune import export as exporting
from reltune import training
from reltune.evaluation import evaluate as measure_metrics
from reltune.layers.fingerprint import fingerprint
from reltune.layers.float8 import convertible
from reltune.layers.inventory import head_modules, take_inventory
from reltune.plan.budget import parse_budget
from reltune.plan.plan import Plan
from reltune.plan.selection import check_scored, check_together
from reltune.plan.selection import select as choose_units
from reltune.records import InputError, MethodResult, RunConfig, RunRecord, write_json, write_text
from reltune.relevance.measure import analyze as measure_relevance
from reltune.relevance.parallel import Processes
from reltune.relevance.partial import interrupted_in
from reltune.relevance.plugins import find_criteria
from reltune.relevance.scores import RelevanceScores
from reltune.relevance.streaming import analyze_checkpoint
from reltune.report import METRICS, measured, metric
from reltune.tasks.corpora import CORPORA
from reltune.tasks.registry import TASKS
from reltune.tasks.splits import Splits, bad_rows, encode, in_words, read_data, warn_of
from reltune.tasks.task import Examples, Task
from reltune.tuner.config import ReltuneConfig

WITHOUT_HEADS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # PEFT's task types that train no head by themselves
ARTEFACTS = {  # in the order of the stages; writing one makes those after it out of date
    "analyze": ("relevance", "bad_rows.json"),
    "select": ("plan",),
    "tune": ("adapter", "trainer_state.json", "training_cost.json"),
    "evaluate": ("all_results.json", "comparison.json"),
    "report": ("report.html",),
}


class RunDirectory:
    """Where a run keeps its artefacts."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.relevance = self.path / "relevance"
        self.head = self.relevance / "head.safetensors"
        self.plan = self.path / "plan"
        self.adapter = self.path / "adapter"
        self.results = self.path / "all_results.json"
        self.report = self.path / "report.html"
        self.log = self.path / "train_log.jsonl"

    @classmethod
    def open(cls, path: str | os.PathLike) -> tuple[RunDirectory, RunConfig]:
        """An existing run and its config."""
        run = cls(path)
        if not run.config_file.is_file():
            raise InputError(f"{path} holds no run (no config.yaml); make one with `reltune run` or `reltune analyze`.")
        config = RunConfig.load(run.config_file)
        config.output_dir = str(path)  # the directory may have been moved
        return run, config

    def check_new(self, overwrite: bool) -> None:
        """Raise InputError unless a new run may be written here. Creates nothing."""
        exporting.check_writable(self.path)
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        try:  # others call their files config.yaml too, and have checkpoints beside it
            RunConfig.load(self.config_file)
        except InputError as error:
            raise InputError(
                f"output_dir {self.path} is not empty and holds no run of reltune; name a new directory."
            ) from error
        if not overwrite:
            raise InputError(
                f"output_dir {self.path} already holds a run; name another directory or pass --overwrite_output_dir."
            )

    def continues(self, config: RunConfig) -> bool:
        """Whether an analysis with this config was interrupted here: with sums to go on from, or before there were any."""
        try:
            finished = (self.relevance / "scores.json").exists() and not interrupted_in(self.relevance)
            saved = RunConfig.load(self.config_file)
            if config.task is None:
                saved.task = None  # it was read off the columns
            return not finished and saved == config
        except (InputError, OSError):  # a name that is too long, say: check_new has the words for it
            return False

    def check_stage(self, stage: str, overwrite: bool) -> None:
        """Raise InputError if the stage was done already and may not be done again."""
        done = [name for name in ARTEFACTS[stage] if (self.path / name).exists()]
        if done and not overwrite:
            raise InputError(
                f"{self.path} already holds {done[0]}; pass --overwrite_output_dir to make it and what follows from it anew."
            )

    def create(self, config: RunConfig) -> None:
        """Make the directory and save the config, over an earlier run's if there is one."""
        exporting.make_directory(self.path)
        self.clear("analyze")
        config.save(self.config_file)

    def record_bad_rows(self, materials: Materials) -> None:
        """Write down which rows were skipped, if any were."""
        if record := bad_rows(materials.splits):
            write_json(self.path / "bad_rows.json", record)

    def clear(self, stage: str, checkpoints: bool = True) -> None:
        """Remove the artefacts of the stage and of those after it; of training's checkpoints too, unless told otherwise."""
        stages = list(ARTEFACTS)
        for later in stages[stages.index(stage) :]:
            for name in ARTEFACTS[later]:
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if checkpoints and stages.index(stage) <= stages.index("tune"):
            self.log.unlink(missing_ok=True)
            for checkpoint in self.path.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)

    def checkpoint(self, wanted: str) -> str:
        """A checkpoint of this run by its path, by its name (checkpoint-30), or the newest (true)."""
        if wanted.lower() == "true":
            found = get_last_checkpoint(str(self.path)) or ""
        else:
            found = next((str(place) for place in (Path(wanted), self.path / wanted) if place.is_dir()), "")
        if not (Path(found) / "trainer_state.json").is_file():
            raise InputError(
                f"resume_from_checkpoint {wanted!r} names no checkpoint of {self.path}; look there for checkpoint-N."
            )
        return found


@dataclasses.dataclass
class Materials:
    """What a config names, read and checked: the task, its data, the model with its new heads."""

    config: RunConfig
    task: Task
    tokenizer: Any  # or what else makes the model's inputs
    model: nn.Module | None  # until fresh_model has handed it out
    new_heads: list[str]
    not_tuned: list[str]  # modules that the task's Trainer cannot train parts of
    train: Any  # Examples, or an iterable data set where rows are streamed
    validation: Examples
    test: Examples
    sample: Examples  # of training: relevance is measured on them, and new heads are trained on them
    splits: Splits
    forgetting: Examples | None = None  # a second set for the same task

    @property
    def collator(self) -> Any:
        return self.task.collator(self.tokenizer)

    @property
    def held_out(self) -> dict[str, Examples]:
        """Examples by the prefix of their metrics."""
        return {"eval": self.validation, "test": self.test}

    def arguments(self, method: str, **forced: Any) -> TrainingArguments:
        """Training arguments of the run for a method."""
        given = self.config.training
        if self.config.early_stopping_patience is not None:
            given = {"load_best_model_at_end": True, **given}
        return training.arguments(self.config.output_dir, method, self.config.seed, given, self.task, **forced)

    def fresh_model(self) -> nn.Module:
        """The base model for the caller to change; its head starts from the same seed every time."""
        if self.model is None:
            set_seed(self.config.seed)
            return self.task.load_model(self.config.model_name_or_path, **quantisation(self.config))[0]
        model, self.model = self.model, None  # no second copy in memory while this one is trained
        return model

    def check_training(self, model: nn.Module | None = None) -> None:
        """Raise InputError for training fields that cannot work with the model (the base model if none is given)."""
        model = model or self.model or self.fresh_model()
        training.check_arguments(model, self.arguments("selection"), self.sample, self.collator)


def prepare(config: RunConfig) -> Materials:
    """Read the data and load the model. Raises InputError for whatever is wrong with either; writes nothing.

    A task that the config does not name is read off the columns and entered there.
    """
    config.check()
    config.check_data()
    task, splits = read_data(config)
    config.task = task.name
    tokenizer = task.load_tokenizer(config.model_name_or_path)
    set_seed(config.seed)
    model, missing = task.load_model(config.model_name_or_path, **quantisation(config))
    data = encode(task, splits, tokenizer, config)
    warn_of(splits)
    new_heads = head_modules(model, missing)
    inventory = take_inventory(model, new_heads)
    not_tuned = [name for name in task.not_tuned(model) if name in inventory]
    return Materials(
        config,
        task,
        tokenizer,
        model,
        new_heads,
        not_tuned,
        data.train,
        data.validation,
        data.test,
        sample=data.sample,
        splits=splits,
        forgetting=data.forgetting,
    )


def quantisation(config: RunConfig) -> dict[str, Any]:
    """What ``from_pretrained`` is told to hold the base model in few bits."""
    if not (config.load_in_4bit or config.load_in_8bit):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("load_in_4bit and load_in_8bit need bitsandbytes; run: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": nf4}


def check_choice(materials: Materials, select: bool = True) -> None:
    """Raise InputError for patterns that match no module and budgets that no unit fits, before hours are spent.

    Select on relevance that looks at no data: whatever fails here would fail after the analysis. Without ``select``
    the patterns alone are checked.
    """
    config = materials.config
    find_criteria(config.criteria, config.scores_elements)
    assert materials.model is not None, "checked before it is changed"
    if select:
        check_scored(config.granularity, config.criteria[0])
        check_together(config.granularity, config.spread)
    relevance = measure_relevance(
        materials.model,
        criteria=["depth"],
        target_modules=config.target_modules,
        exclude_modules=[*config.exclude_modules, *materials.not_tuned],
        always_trained=materials.new_heads,
        progress=False,
    )
    if config.frozen_dtype is not None:
        convertible(materials.model, materials.new_heads)
    if select:
        relevance.provenance |= restrictions(config)
        if "element" in config.granularity:
            # One weight always fits, wherever a column could be chosen; a number for every weight would be made for nothing.
            parse_budget(config.budget, relevance.inventory.base_parameters)
            config = dataclasses.replace(config, granularity=["column"], spread="global", budget="100%")
        choose(config, relevance)


# -- stages ---------------------------------------------------------------------------------------------------------


def analyze(materials: Materials, run: RunDirectory) -> RelevanceScores:
    """Train the new heads briefly, then measure relevance: before the head means something, no gradient does.

    Of several processes the first one's heads count, and the first one writes.
    """
    config, model, processes = materials.config, materials.fresh_model(), Processes.joined()
    if materials.new_heads and interrupted_in(run.relevance) and run.head.is_file():
        model = model_with_heads(materials, run)  # the interrupted analysis was of this head
    elif materials.new_heads:
        train_heads(materials, model, config.head_epochs)
        processes.take_from_first(model.get_submodule(name) for name in materials.new_heads)
        with processes.together():
            if processes.first:
                run.relevance.mkdir(parents=True, exist_ok=True)
                save_file(head_state(model, materials.new_heads), run.head)
    examples = min(config.analysis_examples, len(materials.sample))
    chosen = torch.randperm(len(materials.sample), generator=torch.Generator().manual_seed(config.seed))[:examples]
    loader = DataLoader(
        Subset(materials.sample, chosen.tolist()), batch_size=config.analysis_batch_size, collate_fn=materials.collator
    )
    model.to(materials.arguments("head").device)
    relevance = measure_relevance(
        model,
        loader,
        materials.task.loss,
        config.criteria,
        elements=config.scores_elements,
        target_modules=config.target_modules,
        exclude_modules=[*config.exclude_modules, *materials.not_tuned],
        always_trained=materials.new_heads,
        seed=config.seed,
        resume_directory=run.relevance if processes.count == 1 else None,
        options={name: given for name, given in options_of(config).items() if name in config.criteria},
    )
    relevance.provenance |= restrictions(config)
    with processes.together():
        if processes.first:
            relevance.save(run.relevance)
    return relevance


def options_of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What the config says about single criteria."""
    return {"correlation": {"max_trials": config.max_trials}, "movement": {"steps": config.probe_steps}}


def analyze_weights(config: RunConfig, run: RunDirectory, overwrite: bool = False) -> RelevanceScores:
    """Measure relevance by criteria that look at no data, tensor by tensor, with no model in memory.

    The run's directory is made when everything is measured.
    """
    run.check_new(overwrite)
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


def restrictions(config: RunConfig) -> dict[str, Any]:
    """What keeps modules out of the analysis and, later, out of the choice."""
    return {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}


def train_heads(materials: Materials, model: nn.Module, epochs: float) -> training.TrainingCost | None:
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
    # Of several processes, as many steps on the same texts as one takes; dropout alone differs.
    args.per_device_train_batch_size = max(1, args.per_device_train_batch_size // args.world_size)
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


def head_state(model: nn.Module, heads: Sequence[str]) -> dict[str, torch.Tensor]:
    """The heads' tensors under their names in the model."""
    return {
        k: v.detach().cpu().clone()
        for k, v in model.state_dict().items()
        if k.startswith(tuple(f"{h}." for h in heads))
    }


def model_with_heads(materials: Materials, run: RunDirectory) -> nn.Module:
    """The base model with the heads that the relevance was measured with."""
    model = materials.fresh_model()
    if materials.new_heads:
        if not run.head.is_file():
            raise InputError(f"{run.head} is missing; run `reltune analyze` again.")
        model.load_state_dict(load_file(run.head), strict=False)
    return model


def select(config: RunConfig, run: RunDirectory) -> Plan:
    """Choose units under the budget from the saved relevance. Of several processes the first one chooses."""
    processes = Processes.joined()
    with processes.together():
        if processes.first:
            plan = choose(config, RelevanceScores.load(run.relevance), config.criteria[0])
            run.clear("tune")
            plan.save(run.plan)
    return Plan.load(run.plan)


def choose(config: RunConfig, relevance: RelevanceScores, criterion: str | None = None) -> Plan:
    """The plan for a config. Patterns that the analysis has followed already are not matched again: it kept only what
    they allow, so that nothing is left for ``exclude_modules`` to match."""
    wanted = restrictions(config)
    for name, patterns in wanted.items():
        if patterns and patterns == relevance.provenance.get(name):
            measured = [info.name for info in relevance.inventory.modules]
            wanted[name] = measured if name == "target_modules" else []
    task_type = TASKS[config.task].peft_task_type if config.task else None
    if not relevance.always_trained and task_type not in WITHOUT_HEADS:
        task_type = None
    return choose_units(
        relevance,
        config.budget,
        config.granularity,
        criterion=criterion,
        spread=config.spread,
        model_name_or_path=config.model_name_or_path,
        task_type=task_type,
        **wanted,
    )


def tune(materials: Materials, run: RunDirectory, resume_from_checkpoint: str | None = None) -> PeftModel:
    """Train what the plan names and save the adapter, with the tokenizer beside it.

    Whatever can be wrong with the plan, the training fields or the checkpoint is found before anything of an earlier
    adapter is removed. Of several processes the first one writes.
    """
    processes = Processes.joined()
    with processes.together():
        checkpoint = run.checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        plan = Plan.load(run.plan)
        if sorted(plan.always_trained) != sorted(materials.new_heads):
            heads = ", ".join(materials.new_heads) or "nothing"
            raise InputError(
                f"plan: always_trained must name this model's new heads ({heads}); they cannot be left out."
            )
        model = model_with_heads(materials, run)
        plan.check_model(take_inventory(model, materials.new_heads), fingerprint(model, materials.new_heads))
        model = get_peft_model(model, ReltuneConfig(plan=plan, frozen_dtype=materials.config.frozen_dtype))
        materials.check_training(model)
        # Whole matrices want a lower rate than columns and rows do.
        whole = any(module.weight and len(module.shape) == 2 for module in plan.modules.values())
        args = materials.arguments("layer" if whole else "selection")
    callbacks: list[TrainerCallback] = [training.LogFile(run.log)]
    if materials.config.early_stopping_patience is not None:
        callbacks.append(training.stops_early(materials.config.early_stopping_patience))
    with processes.together():
        if processes.first:
            run.clear("tune", checkpoints=checkpoint is None)
            materials.config.save(run.config_file)
    trainer, cost = training.train(
        model,
        args,
        materials.task,
        materials.tokenizer,
        materials.train,
        materials.validation,
        checkpoint,
        "tune",
        callbacks,
    )
    state = training.gathered_state(trainer)
    with processes.together():
        if processes.first:
            trainer.save_state()
            facts = {**dataclasses.asdict(cost), "learning_rate": args.learning_rate}
            write_json(run.path / "training_cost.json", facts)
            run.record_bad_rows(materials)  # of streamed rows more are known by now
            model.save_pretrained(str(run.adapter), state_dict=state)
            materials.tokenizer.save_pretrained(str(run.adapter))
            write_text(run.adapter / "README.md", model_card(plan))
    return model


def model_card(plan: Plan) -> str:
    """What a reader of the adapter's directory must know, in place of PEFT's empty form."""
    facts = "\n".join(f"- {line}" for line in plan.describe())
    return f"""---
base_model: {plan.model_name_or_path}
library_name: peft
tags:
- reltune
---

# Adapter for {plan.model_name_or_path}

{facts}

PEFT loads it once reltune is imported (without, it says `KeyError: 'RELTUNE'`):

```python
import reltune
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this directory")
```

An adapter of columns and rows (no single weights) becomes a standard LoRA adapter, which needs no reltune, by `reltune export RUN --to lora`; any
adapter becomes a plain model by `--to merged`.
"""


def load_tuned(materials: Materials, run: RunDirectory) -> PeftModel:
    """The base model with the run's adapter, both from disk."""
    if not (run.adapter / "adapter_config.json").is_file():
        raise InputError(f"{run.path} holds no adapter; run `reltune tune` first.")
    return PeftModel.from_pretrained(materials.fresh_model(), str(run.adapter))


def evaluate(materials: Materials, run: RunDirectory) -> dict[str, float]:
    """Metrics of the saved adapter on validation and test data, written to ``all_results.json``.

    Several processes, each with the whole model, share the data, and the first one writes.
    """
    processes = Processes.joined()
    with processes.together():
        model = load_tuned(materials, run)
        plan = Plan.load(run.plan)
        cost = _read_json(run.path / "training_cost.json")
    metrics = measure_metrics(
        model, materials.held_out, materials.task, materials.tokenizer, **placement(materials.config)
    )
    if materials.forgetting is not None:
        metrics |= measure_forgetting(materials, run, model)
    results = {
        **metrics,
        "trainable_parameters": plan.parameters,
        "head_parameters": plan.head_parameters,
        "adapter_bytes": disk_bytes(run.adapter, ("adapter_model.safetensors", "adapter_config.json")),
        "train_steps": cost["steps"],
        "train_seconds_per_step": cost["seconds_per_step"],
        "train_peak_memory_bytes": cost["peak_memory_bytes"],
        "learning_rate": cost["learning_rate"],
    }
    with processes.together():
        if processes.first:
            write_json(run.results, results)
    return results


def measure_forgetting(materials: Materials, run: RunDirectory, tuned: nn.Module) -> dict[str, float]:
    """Metrics on the second set: of the base model with the head that was trained before the analysis, and of the tuned."""
    assert materials.forgetting is not None
    found: dict[str, float] = {}
    for prefix, model in (("forgetting_before", model_with_heads(materials, run)), ("forgetting_after", tuned)):
        found |= measure_metrics(
            model,
            {prefix: materials.forgetting},
            materials.task,
            materials.tokenizer,
            **placement(materials.config),
        )
    return found


def placement(config: RunConfig) -> dict[str, Any]:
    """The training fields that evaluation follows too."""
    values = {**config.training, "use_cpu": True} if training.launched_on_cpus() else config.training
    return {key: values[key] for key in ("use_cpu", "per_device_eval_batch_size") if key in values}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); run the stage that writes it again.") from error


def disk_bytes(directory: Path, names: Sequence[str]) -> int:
    return sum((directory / name).stat().st_size for name in names)


def export(materials: Materials, run: RunDirectory, to: str, output_dir: str) -> Path:
    """Write the adapter as a LoRA adapter or merged into a plain model."""
    exporting.check_destination(output_dir)
    model = load_tuned(materials, run)
    if to == "lora":
        return exporting.to_lora(model, output_dir)
    return exporting.to_merged(model, materials.tokenizer, output_dir)


def report(config: RunConfig, run: RunDirectory) -> RunRecord:
    """Assemble the record of a run from its artefacts and write ``report.html``."""
    from reltune.report.html import write_report

    record = read_record(config, run)
    write_report(run.report, record)
    return record


def read_record(config: RunConfig, run: RunDirectory) -> RunRecord:
    """The record of a run, from its artefacts. Needs relevance and a plan; shows what else is there."""
    relevance, plan = RelevanceScores.load(run.relevance), Plan.load(run.plan)

    def read(name: str, default: Any) -> Any:
        path = run.path / name
        return _read_json(path) if path.is_file() else default

    comparison = read("comparison.json", {"methods": [], "notes": []})
    notes = [*comparison["notes"], hardware()]
    if config.dataset_name in CORPORA:
        notes.append(CORPORA[config.dataset_name].note)
    notes += in_words(read("bad_rows.json", {}))
    notes += behaviour_notes(relevance)
    results = read("all_results.json", {})
    notes += forgetting_notes(config, results)
    if relevance.inventory.left_out:
        reasons = sorted(set(relevance.inventory.left_out.values()))
        notes.append(f"Not measured: {len(relevance.inventory.left_out)} parameter tensors ({'; '.join(reasons)}).")
    data = f" on {config.dataset_name or Path(str(config.train_file)).name}" if config.has_data else ", weights alone"
    return RunRecord(
        title=f"reltune: {relevance.provenance['architecture']}{data}",
        config=dataclasses.asdict(config),
        heatmaps=[relevance.heatmap(criterion) for criterion in relevance.criteria],
        depth_sentence=relevance.depth_sentence(),
        plan_lines=plan.describe(),
        selected_by_layer=plan.by_layer(relevance.inventory),
        metrics=results,
        history=read("trainer_state.json", {}).get("log_history", []),
        comparison=[MethodResult(**method) for method in comparison["methods"]],
        notes=notes,
    )


def forgetting_notes(config: RunConfig, results: dict[str, Any]) -> list[str]:
    """How the second set fared, metric by metric."""
    prefix = "forgetting_before_"
    changes = [
        f"{METRICS[name][0]} {metric(name, results[prefix + name])} before training, "
        f"{metric(name, results[f'forgetting_after_{name}'])} after"
        for name in measured([results], prefix)
    ]
    return [f"Forgetting, on {Path(str(config.forgetting_file)).name}: {'; '.join(changes)}."] if changes else []


def behaviour_notes(relevance: RelevanceScores) -> list[str]:
    """What scores measured from behaviour are changes of, and how many trials stand behind them."""
    notes = []
    for criterion in relevance.criteria:
        facts = relevance.provenance.get(criterion, {})
        if "metric" in facts:
            note = (
                f"{criterion} is measured by the {facts['metric']}, {facts['of_the_model']:.4g} for the untouched model"
            )
            trials = [
                f"{of['trials']} trials of {kind}s, ranking {'stable' if of['stable'] else 'not yet stable'}"
                for kind, of in facts.items()
                if isinstance(of, dict)
            ]
            notes.append("; ".join([note, *trials]) + ".")
    return notes


def hardware() -> str:
    """One line: where and with which versions this ran."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return (
        f"Run on {device}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}."
    )
