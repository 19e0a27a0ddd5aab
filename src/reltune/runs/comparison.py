"""Baselines beside reltune's selection: the same data, head, seed and training path, each with its own learning rate."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_file, save_model
from torch import nn

from reltune.files import disk_bytes, write_json
from reltune.layers.inventory import take_inventory
from reltune.plan.plan import Plan
from reltune.report.record import MethodResult
from reltune.runs import training
from reltune.runs.directory import RunDirectory
from reltune.runs.evaluation import evaluate, inference_ms_per_text
from reltune.runs.materials import Materials, placement
from reltune.runs.stages import load_tuned, model_with_new_heads


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A way of training that a user could pick by hand: which parameters of the plain model require a gradient."""

    name: str
    rates: str  # key of training.LEARNING_RATES
    trained: Callable[[Materials, nn.Module], list[str]]  # prefixes of parameter names, the heads left out


def _top_layer(materials: Materials, model: nn.Module) -> list[str]:
    blocks = [info.layer for info in take_inventory(model, materials.new_heads).modules if info.in_block]
    return [blocks[-1] + "."]


BASELINES = (
    Baseline("head only", "head", lambda materials, model: []),
    Baseline("top encoder layer", "layer", _top_layer),
    Baseline("full fine-tuning", "full", lambda materials, model: [""]),
)


def compare(materials: Materials, run: RunDirectory, results: dict[str, Any]) -> list[MethodResult]:
    """Train every baseline, measure all methods' inference in turns, and write ``comparison.json``.

    ``results`` are the selection's, from the evaluate stage.
    """
    rows: list[MethodResult] = []
    with tempfile.TemporaryDirectory() as scratch:
        # Trained models wait on disk, so that the next method's peak memory is its own.
        for baseline in BASELINES:
            rows.append(_train(materials, run, baseline, Path(scratch)))
        timed = {baseline.name: materials.base.take() for baseline in BASELINES}
        for name, model in timed.items():
            load_model(model, Path(scratch) / f"{name}.safetensors")
    timed["base"] = materials.base.take()
    timed["adapter"] = load_tuned(materials, run)
    timed["merged"] = load_tuned(materials, run).merge_and_unload()
    device = materials.arguments("full").device
    milliseconds = inference_ms_per_text(
        {name: model.to(device) for name, model in timed.items()}, materials.test, materials.collator
    )
    for row in rows:
        row.inference_ms_per_text = milliseconds[row.method]
    plan = Plan.load(run.plan)
    rows.insert(
        -1,
        MethodResult(
            method=f"reltune: {', '.join(plan.granularity)} by {plan.criterion}, {plan.budget}",
            trainable_parameters=plan.parameters,
            head_parameters=plan.head_parameters,
            metrics=task_metrics(materials, results),
            loss=results["test_loss"],
            seconds_per_step=results["train_seconds_per_step"],
            peak_memory_bytes=results["train_peak_memory_bytes"],
            disk_bytes=results["adapter_bytes"],
            inference_ms_per_text=milliseconds["adapter"],
            inference_ms_per_text_merged=milliseconds["merged"],
            learning_rate=results["learning_rate"],
            note="trained with an evaluation and a checkpoint every epoch, which the others were spared",
        ),
    )
    notes = [
        f"Inference per text: base {milliseconds['base']:.2f} ms, adapter {milliseconds['adapter']:.2f} ms, "
        f"merged {milliseconds['merged']:.2f} ms.",
        "Every method starts from the head that was trained before the analysis, and "
        + (
            "all have the learning rate that was given."
            if "learning_rate" in materials.config.training
            else "has its method's default learning rate (docs/learning_rates.md)."
        ),
    ]
    if device.type == "cpu":
        notes.append("Peak memory is the resident memory of the whole process, libraries and data included.")
    write_json(run.path / "comparison.json", {"methods": [dataclasses.asdict(row) for row in rows], "notes": notes})
    return rows


def task_metrics(materials: Materials, results: dict[str, Any]) -> dict[str, float]:
    """The task's own metrics on test data, those that were measured."""
    names = materials.task.metrics
    return {name: results[f"test_{name}"] for name in names if f"test_{name}" in results}


def _train(materials: Materials, run: RunDirectory, baseline: Baseline, scratch: Path) -> MethodResult:
    model = model_with_new_heads(materials, run)
    prefixes = tuple(baseline.trained(materials, model))
    heads = tuple(f"{head}." for head in materials.new_heads)
    chosen = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith((*heads, *prefixes)))
        if parameter.requires_grad:
            chosen[name] = parameter
    args = materials.arguments(
        baseline.rates, save_strategy="no", eval_strategy="no", eval_on_start=False, load_best_model_at_end=False
    )
    _, cost = training.train(
        model,
        args,
        materials.task,
        materials.tokenizer,
        materials.train,
        description=baseline.name,
    )
    metrics = evaluate(
        model,
        {"test": materials.test},
        materials.task,
        materials.tokenizer,
        **placement(materials.config),
    ).metrics
    save_model(model, str(scratch / f"{baseline.name}.safetensors"))
    save_file({k: v.detach().cpu().contiguous() for k, v in chosen.items()}, scratch / "trained.safetensors")
    head = sum(p.numel() for name, p in chosen.items() if name.startswith(heads))
    return MethodResult(
        method=baseline.name,
        trainable_parameters=sum(p.numel() for p in chosen.values()) - head,
        head_parameters=head,
        metrics=task_metrics(materials, metrics),
        loss=metrics["test_loss"],
        seconds_per_step=cost.seconds_per_step,
        peak_memory_bytes=cost.peak_memory_bytes,
        disk_bytes=disk_bytes(scratch, ["trained.safetensors"]),
        inference_ms_per_text=None,
        learning_rate=args.learning_rate,
    )
