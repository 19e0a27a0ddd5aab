"""Baselines beside reltune's selection: the same data, head, seed and training path, each with its own learning rate."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

from reltune.files import disk_bytes, write_json
from reltune.methods.contract import Trainable
from reltune.methods.registry import METHODS
from reltune.plan.plan import Plan
from reltune.report.record import MethodResult
from reltune.runs import training
from reltune.runs.directory import RunDirectory
from reltune.runs.evaluation import evaluate, inference_ms_per_text
from reltune.runs.materials import Materials, placement
from reltune.runs.stages import base_of, load_tuned, model_with_new_heads

# What a comparison calls a method that a user could pick by hand.
BASELINES = {"head only": "head", "top encoder layer": "layers", "full fine-tuning": "full"}


def prepared(materials: Materials, run: RunDirectory, method: str) -> Trainable:
    """The base model with the new heads that relevance was measured with, ready for a method that needs no plan."""
    config = dataclasses.replace(materials.config, method=method, target_modules=[], exclude_modules=[])
    base = dataclasses.replace(base_of(materials, model_with_new_heads(materials, run), None), config=config)
    return METHODS[method].prepare(base)


def compare(materials: Materials, run: RunDirectory, results: dict[str, Any]) -> list[MethodResult]:
    """Train every baseline, measure all methods' inference in turns, and write ``comparison.json``.

    ``results`` are the selection's, from the evaluate stage.
    """
    rows: list[MethodResult] = []
    with tempfile.TemporaryDirectory() as scratch:
        # Trained models wait on disk, so that the next method's peak memory is its own.
        for name in BASELINES:
            rows.append(_train(materials, run, name, Path(scratch)))
        timed = {name: materials.base.take() for name in BASELINES}
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


def _train(materials: Materials, run: RunDirectory, name: str, scratch: Path) -> MethodResult:
    trainable = prepared(materials, run, BASELINES[name])
    model = trainable.model
    args = materials.arguments(
        trainable.rate, save_strategy="no", eval_strategy="no", eval_on_start=False, load_best_model_at_end=False
    )
    _, cost = training.train(
        *(model, args, materials.task, materials.tokenizer, materials.train),
        description=name,
        offload=materials.config.activation_offloading,
    )
    metrics = evaluate(
        model,
        {"test": materials.test},
        materials.task,
        materials.tokenizer,
        **placement(materials.config),
    ).metrics
    save_model(model, str(scratch / f"{name}.safetensors"))
    METHODS[BASELINES[name]].save(model, scratch)
    return MethodResult(
        method=name,
        trainable_parameters=trainable.parameters,
        head_parameters=trainable.head_parameters,
        metrics=task_metrics(materials, metrics),
        loss=metrics["test_loss"],
        seconds_per_step=cost.seconds_per_step,
        peak_memory_bytes=cost.peak_memory_bytes,
        disk_bytes=disk_bytes(scratch, ["trained.safetensors"]),
        inference_ms_per_text=None,
        learning_rate=args.learning_rate,
    )
