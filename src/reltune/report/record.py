"""What a report shows of a run, as plain dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any

from reltune.reading import typed
from reltune.relevance.heatmap import Heatmap

if TYPE_CHECKING:  # it takes numpy
    from reltune.relevance.profiles import Profiles


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
        return typed(cls, values)


@dataclasses.dataclass
class Output:
    """What two models wrote or predicted for one test example, and what they should have: a line of ``outputs.jsonl``."""

    prompt: str
    reference: str
    base: str  # the base model, before training
    tuned: str


@dataclasses.dataclass
class Sample:
    """What a model answered to a fixed prompt while it was trained: a line of ``samples.jsonl``."""

    step: int  # optimizer steps by then
    epoch: float
    prompt: str
    answer: str


@dataclasses.dataclass
class Difference:
    """A mean difference over pairs of trainings with the same seed, and its 95% interval; of one pair there is none."""

    mean: float
    low: float | None
    high: float | None


@dataclasses.dataclass
class WayResult:
    """One row of a comparison of ways to train: a method at a size. ``None`` means "does not apply" or "was not measured".

    Attributes:
        label: the method and its size.
        metrics: means over the seeds on test data, the main one first; ``deviations`` theirs between seeds.
        differences: of the main metric to the method of that name.
        edge: whether the best rate is the smallest or the largest that was tried.
        seconds: of one training in all, its analysis included.
        forgetting: change of a metric of the second set, from before training to after it.
        failed: why there are no results, or fewer than there are seeds.
    """

    label: str
    method: str
    trainable_parameters: int | None = None
    head_parameters: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    deviations: dict[str, float | None] = field(default_factory=dict)
    seeds: int = 0
    differences: dict[str, Difference] = field(default_factory=dict)
    learning_rate: float | None = None
    edge: bool = False
    steps: int | None = None
    seconds_per_step: float | None = None
    peak_memory_bytes: int | None = None
    adapter_bytes: int | None = None
    analysis_seconds: float | None = None
    seconds: float | None = None
    forgetting: dict[str, float] = field(default_factory=dict)
    failed: str = ""


@dataclasses.dataclass
class WayTable:
    """Ways to train that have something in common: equal sizes, their usual sizes, equal total cost."""

    name: str
    title: str
    rows: list[WayResult]


@dataclasses.dataclass
class ComparisonRecord:
    """``comparison.json``: ways to train side by side."""

    metric: str  # the main one, by which differences are given
    chosen_by: str  # the metric on validation data by which rates were chosen
    seeds: list[int]
    tables: list[WayTable]
    notes: list[str]

    def _repr_html_(self) -> str:
        """The tables, each twice: what was reached, and what it took."""
        from reltune.report import comparison

        return "".join(comparison.notebook_tables(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ComparisonRecord:
        own = {
            each.name: values[each.name] for each in dataclasses.fields(cls)
        }  # a comparison's file has its config beside these
        return typed(cls, own)


@dataclasses.dataclass
class Predicted:
    """What a training was predicted to take, and what it took; None where one of them is not known."""

    name: str
    predicted: float | None
    measured: float | None

    @property
    def difference(self) -> float | None:
        """Of the prediction, as a share of what was measured."""
        return (self.predicted - self.measured) / self.measured if self.predicted and self.measured else None


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
    notes: list[str]  # data licence, hardware, what was not measured
    facts: list[tuple[str, str]] = field(default_factory=list)  # model, data and versions, by what they are
    commands: list[str] = field(default_factory=list)  # that made the run, in their order
    outputs: list[Output] = field(default_factory=list)  # the first ones
    profiles: list[Profiles] = field(default_factory=list)  # of each heat map's criterion, or none
    samples: list[Sample] = field(default_factory=list)  # by step, and at each in the order of the prompts
    sweep: dict[str, Any] | None = None  # sweep.json
    lm_eval: LMEvalRecord | None = None
    held_in: str = ""  # what the base's linear layers are held in, such as "8 bits"; "" where as in the checkpoint
    predicted: list[Predicted] = field(default_factory=list)
    ways: ComparisonRecord | None = None  # where other methods were trained beside
