"""What a report shows of a run, as plain dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from reltune.relevance.heatmap import Heatmap


@dataclasses.dataclass
class MethodResult:
    """One row of the comparison table: what a way of training cost and what it reached.

    Units: seconds, bytes, milliseconds. ``None`` means "does not apply" or "could not be measured here".
    """

    method: str
    trainable_parameters: int  # without the head
    head_parameters: int
    metrics: dict[str, float]  # the task's own, on test data, the main one first
    loss: float
    seconds_per_step: float | None
    peak_memory_bytes: int | None
    disk_bytes: int | None
    inference_ms_per_text: float | None
    inference_ms_per_text_merged: float | None = None
    learning_rate: float | None = None
    note: str = ""


@dataclasses.dataclass
class LMEvalScore:
    """One metric of one task of lm-evaluation-harness, for the base model and for the tuned one.

    ``None`` where the harness gives no finite number, or does not say.
    """

    task: str
    version: str  # the task's, as its file has it
    metric: str
    filter: str  # what the harness does to an answer before it is judged
    higher_is_better: bool | None
    num_fewshot: int | None
    samples: int
    base: float | None
    base_stderr: float | None
    tuned: float | None
    tuned_stderr: float | None


@dataclasses.dataclass
class LMEvalRecord:
    """``lm_eval.json``: what lm-evaluation-harness measured, and how it was asked to."""

    lm_eval_version: str
    limit: int | None  # examples per task, at most
    batch_size: int
    apply_chat_template: bool
    scores: list[LMEvalScore]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LMEvalRecord:
        return cls(**{**values, "scores": [LMEvalScore(**score) for score in values["scores"]]})


@dataclasses.dataclass
class Output:
    """What two models wrote for one test example, and what they should have: a line of ``outputs.jsonl``."""

    prompt: str
    reference: str
    base: str  # the base model, before training
    tuned: str


@dataclasses.dataclass
class RunRecord:
    """What the report shows of a run; assembled from the artefacts, never from memory of the training process."""

    title: str
    config: dict[str, Any]
    heatmaps: list[Heatmap]
    depth_sentence: str  # where relevance lies by depth, in one line
    plan_lines: list[str]  # the plan in words: counts, predicted cost, where the backward pass ends
    selected_by_layer: dict[str, int]  # layer name -> trainable parameters chosen there
    metrics: dict[str, float]  # all_results.json
    history: list[dict[str, Any]]  # log_history of trainer_state.json
    comparison: list[MethodResult]  # empty when no baselines were run
    notes: list[str]  # data licence, hardware, what was not measured
    outputs: list[Output] = field(default_factory=list)  # the first ones
    sweep: dict[str, Any] | None = None  # sweep.json
    lm_eval: LMEvalRecord | None = None
    held_in: str = ""  # what the base's linear layers are held in, such as "8 bits"; "" where as in the checkpoint
