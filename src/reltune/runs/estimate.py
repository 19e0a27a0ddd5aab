"""What a training would take, told from the model's config alone: parameters, memory, the time of a step, hours.

The model is made on the meta device, where tensors have shapes and no numbers; the method prepares it as it does for training;
and one step is counted (cost/). Nothing is loaded, so that a 70B model takes as long as a small one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from reltune.config.recipes import CHOICE
from reltune.config.run_config import RunConfig
from reltune.config.training_fields import DEFAULTS, checked_training_fields, training_field_names
from reltune.cost import memory, stand_ins
from reltune.cost.blocks import shorten
from reltune.cost.calibration import Calibration, calibrated
from reltune.cost.devices import Card, calibration_of, card
from reltune.cost.profile import Chosen, Profile
from reltune.cost.step import AREAS, Conditions, StepCount, base_of, count_step, counting
from reltune.cost.timing import step_time
from reltune.errors import InputError, first_line, nearest
from reltune.files import model_directory
from reltune.layers.inventory import Inventory, choose, take_inventory
from reltune.layers.registry import layer_type
from reltune.methods.contract import Base
from reltune.methods.planned import Planned
from reltune.methods.registry import METHODS
from reltune.names import CONTINUING
from reltune.plan.budget import parse_budget, read_budget
from reltune.plan.plan import ModulePlan, Plan
from reltune.pretrained import HEADS, load_config
from reltune.runs.duration import Prefix, course
from reltune.runs.preflight import check_estimate
from reltune.runs.sizes import GROUPED, IN_ORDER, NOT_KNOWN, Sizes, multiple_for

# task -> transformers' Auto class, and the mapping of what it knows.
CLASSES = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "multilabel_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "preference": "AutoModelForCausalLM",
    "image_classification": "AutoModelForImageClassification",
}
TASK_DEFAULTS = {"preference": {"per_device_train_batch_size": 16}}  # as in tasks/preference.py
BESIDE = ("lora", "full")  # the methods that stand beside the one that is asked for
WHOLE = ("layer", "module", "norm", "bias")  # granularities whose units are whole tensors
HOLES = "holes of malloc's heap"  # a row of what memory is for
LARGEST_BATCH, TRIES = 65536, 8
# Fields that the methods beside do not share with the one that is asked for; None gives them their defaults.
OF_ITS_METHOD = ("lora_r", "lora_alpha", "lora_dropout", "rank_by", *CHOICE)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one method would take.

    Attributes:
        trained: numbers that are trained, without those of new heads; ``head``: those.
        memory: bytes by what they are for, when most are held; their sum is ``total``.
        fits: whether the device has as much; None where its memory is not known.
        seconds: of a step, with all its batches; None where the device's speed is not known.
        hours: of the whole run, ``hours_by_part`` summed; None where the number of steps or the device's speed is not known.
        prefix: what it does to keep the results of frozen layers, where there are any.
        left_out: what the hours leave out because it is not known, as a phrase.
        error: why there is no row, in a sentence; everything else is then empty.
    """

    method: str
    trained: int = 0
    head: int = 0
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fits: bool | None = None
    seconds: float | None = None
    hours: float | None = None
    hours_by_part: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prefix: Prefix | None = None
    left_out: str = ""
    error: str = ""

    @property
    def total(self) -> int:
        return sum(self.memory.values())


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a training would take, beside LoRA and full fine-tuning of the same model, batch and length.

    Attributes:
        rows: the method that was asked for first.
        largest_batch: the largest per_device_train_batch_size that fits, for the first row; 0 if none does.
        device: its name, and ``device_memory`` in bytes.
        steps: of the whole training, or None.
        length: tokens of the longest batch, by which memory is told.
        padded: tokens of batches as the data at hand are: the "longest" one, the mean of "training", by which time is told, and that of
            "evaluation"; of sources and targets both. None where texts are taken to be as long as ``max_length``.
        chosen: a sentence for each setting that a budget made necessary.
    """

    model: str
    parameters: int
    task: str
    batch_size: int
    length: int
    steps: int | None
    device: str
    device_memory: int
    rows: list[Row]
    largest_batch: int | None
    padded: Mapping[str, tuple[int, ...]] | None = None
    chosen: Sequence[str] = ()

    def _repr_html_(self) -> str:
        """What each method takes, and what is to be said of it."""
        from reltune import markup
        from reltune.report import numbers
        from reltune.report.terminal import estimate_sentences

        rows = [row for row in self.rows if not row.error]
        lines: dict[str, list[str]] = {
            "trained parameters": [numbers.short_count(row.trained) for row in rows],
            "share of the model, %": [numbers.percent(row.trained / self.parameters) for row in rows],
            "memory at most": [numbers.size(row.total) for row in rows],
            "fits": [{None: numbers.MISSING, True: "yes", False: "no"}[row.fits] for row in rows],
            "seconds per step": [numbers.fixed(row.seconds, 3) for row in rows],
        }
        table = markup.table(["", *(row.method for row in rows)], [[name, *cells] for name, cells in lines.items()])
        return table + markup.paragraphs(estimate_sentences(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        values = dataclasses.asdict(self)
        for row, values_of_row in zip(self.rows, values["rows"], strict=True):
            values_of_row["total"] = row.total
        return values


def estimate(
    model_name_or_path: str,
    *,
    device: str | None = None,
    examples: int | None = None,
    plan: Plan | None = None,
    eval_examples: int | None = None,
    **fields: Any,
) -> Estimate:
    """Tell what a training would take, from the model's config alone.

    Args:
        model_name_or_path: a model's directory, its config.json, or an id on the Hub; its weights are not needed.
        device: a card's name ("h100-80gb"), a size of memory ("24GiB"), "cpu", or None for what this machine has.
        examples: rows of training data, for the number of steps.
        plan: what a method that chooses units trains; None spreads the budget evenly over the model, as far as it fits.
        eval_examples: rows of validation and test data together, for hours; None takes as many as a run splits off.
        fields: of a run's config: ``method``, ``budget``, ``max_length``, ``per_device_train_batch_size``, …

    Raises InputError for values that no training could have, and for a budget in which nothing fits.
    """
    config = _config(model_name_or_path, device, fields)
    return estimate_run(config, device, Sizes.of(examples, eval_examples), plan)


def profile(model_name_or_path: str, *, device: str | None = None, **fields: Any) -> Profile:
    """What each unit and each depth of a model costs, for ``reltune.select`` under a budget of memory or time.

    Arguments and errors as of ``estimate``.
    """
    config = _config(model_name_or_path, device, fields)
    config.training = checked_training_fields(config.training)
    _, calibration = place_of(device)
    return Subject(config, None, is_cuda(calibration)).profile(calibration)


def _config(model_name_or_path: str, device: str | None, fields: Mapping[str, Any]) -> RunConfig:
    known = [field.name for field in dataclasses.fields(RunConfig)]
    for name in fields:
        if name not in (every := [*known, *training_field_names()]):
            raise InputError(f"{name!r} is no field of a run; {nearest(name, every)}")
    training = {**fields.get("training", {}), **{name: v for name, v in fields.items() if name not in known}}
    own = {name: value for name, value in fields.items() if name in known and name != "training"}
    config = RunConfig(model_directory(model_name_or_path), ".", training=training, **own)
    check_estimate(config, device)
    return config


def estimate_run(
    config: RunConfig, device: str | None = None, sizes: Sizes = NOT_KNOWN, plan: Plan | None = None
) -> Estimate:
    """``estimate`` of a run's config and of as much data."""
    if config.budget is not None and (read_budget(config.budget).is_limited or not config.needs_plan):
        from reltune.runs.forecast import forecast  # which is made of what is here

        found = forecast(config, plan=plan, device=device, sizes=sizes)
        return dataclasses.replace(found.estimate, chosen=found.settings.describe())
    config.training = checked_training_fields(config.training)
    place, calibration = place_of(device)
    subject = Subject(config, plan, is_cuda(calibration), sizes=sizes)
    return beside(subject, place, calibration, analysed=plan is not None)


def is_cuda(calibration: Calibration | None) -> bool:
    """Whether what is calibrated, or only known by its memory, is a GPU."""
    return calibration is None or calibration.device == "cuda"


def beside(
    subject: Subject,
    place: Card,
    calibration: Calibration | None,
    others: Sequence[str] = BESIDE,
    analysed: bool = True,
) -> Estimate:
    """The estimate of a subject's method, with the others beside. ``analysed``: whether the relevance that the method needs is there."""
    config = subject.config
    subject.counted(config.method)  # what cannot be counted here is an error, and beside it only said

    def row(method: str) -> Row:
        try:
            count = subject.counted(method)
        except InputError as error:
            return Row(method, error=str(error))
        held = memory_of(count)
        seconds = hours = prefix = None
        by_part: dict[str, float] = {}
        left_out = ""
        if calibration is not None:
            seconds = subject.seconds(subject.counted(method, subject.usual), calibration)
            own = method == config.method
            whole = course(subject, method, calibration, analysed or not (own and config.needs_plan))
            by_part = {part: value / 3600 for part, value in whole.parts.items()}
            prefix, left_out = whole.prefix, whole.left_out
            hours = None if subject.steps is None else whole.seconds / 3600
        fits = None if not place.memory else sum(held.values()) <= place.memory
        heads = subject.head_parameters
        return Row(method, count.trained - heads, heads, held, fits, seconds, hours, by_part, prefix, left_out)

    found = [row(config.method), *(row(method) for method in others if method != config.method)]
    return Estimate(
        config.model_name_or_path,
        subject.parameters,
        subject.task,
        subject.batch_size,
        subject.longest[0],
        subject.steps,
        place.name,
        place.memory,
        found,
        _largest_batch(subject, config.method, place.memory) if place.memory else None,
        subject.padded,
    )


class PlanCosts:
    """What plans for a run's model would take, one after another at once: the model is counted once, and a plan is a sum
    (cost/profile.py): memory within a few percent of ``estimate_run``, time within about a tenth.

    Attributes:
        device: its name, and ``device_memory`` in bytes.
        blocks: the names of the model's blocks, from the input on.
        padded: as ``Estimate`` has it.
    """

    def __init__(self, config: RunConfig, device: str | None = None, sizes: Sizes = NOT_KNOWN) -> None:
        """Raises InputError for a model that cannot be counted."""
        config = dataclasses.replace(config, training=checked_training_fields(config.training))
        if device is None and config.training.get("use_cpu"):
            device = "cpu"
        place, self.calibration = place_of(device)
        self.device, self.device_memory = place.name, place.memory
        self.cuda = is_cuda(self.calibration)
        subject = Subject(config, None, self.cuda, sizes=sizes)
        self.accumulation, self.padded = subject.accumulation, subject.padded
        self.profile = subject.profile(self.calibration)
        # Of what tensors hold beyond the model, how much malloc's heap has in holes: as with units that are spread evenly.
        self.model_bytes, self.holes = 0, 0.0
        if not self.cuda and (count := subject.counted_or_none(config.method)) is not None:
            self.model_bytes = model_of(count)
            self.holes = count.holes / (count.bytes - self.model_bytes)

    @property
    def blocks(self) -> list[str]:
        return self.profile.names

    def of(self, plan: Mapping[str, Chosen]) -> tuple[int, float | None, int] | None:
        """Bytes that the device, or the process, is asked for; seconds of a step, None where the speed is not known; and the lowest block
        that the backward pass reaches. None for units of modules that the model does not have, or that are not counted."""
        if not all(name in self.profile.modules for name in plan):
            return None
        cost = self.profile.cost(plan)
        held = memory.on_card(cost) if self.cuda else memory.resident_on_cpu(cost)
        held += int(self.holes * max(0, cost.bytes - self.model_bytes))
        seconds = None if math.isnan(cost.seconds) else cost.seconds * self.accumulation
        return held, seconds, cost.lowest


def place_of(device: str | None) -> tuple[Card, Calibration | None]:
    """The device that is asked about, and how fast it is if that is known."""
    if device is None or device == "cpu":
        import psutil

        if device is None and torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            return Card(properties.name, properties.total_memory, 0, 0, 0), calibrated(torch.device("cuda"))
        found = calibrated(torch.device("cpu"))
        return Card(found.name, psutil.virtual_memory().total, 0, 0, 0), found
    named = card(device)
    return named, calibration_of(named)


def model_of(count: StepCount) -> int:
    """Bytes of what is in memory before the first step."""
    return count.peak.get("weights", 0) + count.peak.get("trained", 0)


def memory_of(count: StepCount) -> dict[str, int]:
    """Bytes by what they are for, in words."""
    held = {AREAS[area]: count.peak[area] for area in AREAS if count.peak[area]}
    if not count.conditions.cuda:
        held |= {HOLES: count.holes} if count.holes else {}
        return held | {"the allocator's slack": memory.resident_on_cpu(count) - count.bytes}
    return held | {
        "workspace of products": memory.WORKSPACE,
        "the allocator's slack": memory.reserved(count) - memory.allocated(count),
        "the CUDA context": memory.CONTEXT,
    }


def _largest_batch(subject: Subject, method: str, limit: int) -> int:
    """By counting: what a step holds grows evenly with its batch, but for what is rounded and who holds most.

    The largest of those that were tried, where these bends leave more to try than ``TRIES``.
    """
    held: dict[int, int] = {}

    def total(size: int) -> int:
        if size not in held:
            held[size] = sum(memory_of(subject.counted(method, batch_size=size)).values())
        return held[size]

    low, high = sorted((subject.batch_size, subject.batch_size // 2 or 2))
    fitting, failing = 0, LARGEST_BATCH + 1
    for size in (low, high):
        if total(size) <= limit:
            fitting = max(fitting, size)
        else:
            failing = min(failing, size)
    for _ in range(TRIES):
        if failing - fitting == 1:
            break
        slope = (total(high) - total(low)) / (high - low)
        guess = high + math.floor((limit - total(high)) / slope) if slope > 0 else LARGEST_BATCH
        guess = min(max(guess, fitting + 1), failing - 1)
        if total(guess) <= limit:
            fitting = guess
        else:
            failing = guess
        low, high = sorted(sorted(held, key=lambda size: abs(size - guess))[:2])  # the line through what is nearest
    return fitting


class Subject:
    """A model, its task and its batches, for as many counts as are wanted."""

    def __init__(
        self,
        config: RunConfig,
        plan: Plan | None,
        cuda: bool,
        new_heads: Sequence[str] | None = None,
        sizes: Sizes = NOT_KNOWN,
    ) -> None:
        """``new_heads``: the modules that no checkpoint has values for, where they are known; else they are guessed."""
        self.config, self.plan, self.cuda, self.sizes = config, plan, cuda, sizes
        self.settings: Any = load_config(config.model_name_or_path)
        own_head = sizes.adapt is None or sizes.adapt(self.settings)
        self.task = config.task or _task_of(self.settings, config.model_name_or_path)
        mapping = getattr(transformers, f"MODEL_FOR_{_mapping_of(self.task)}_MAPPING")
        if type(self.settings) not in mapping:
            raise InputError(
                f"{config.model_name_or_path} is a {self.settings.model_type!r} model, for which transformers has no head for "
                f"{self.task}; name another task with --task."
            )
        values = {**DEFAULTS, **TASK_DEFAULTS.get(self.task, {}), **config.training}
        self.values = values
        self.batch_size = int(values["per_device_train_batch_size"])
        self.eval_batch_size = int(values["per_device_eval_batch_size"])
        self.accumulation = int(values.get("gradient_accumulation_steps") or 1)
        if config.cuda_graphs and not cuda:
            raise InputError("cuda_graphs: steps are recorded on an NVIDIA GPU, and this is a CPU; leave it out.")
        if config.cuda_graphs and (self.task in CONTINUING or self.checkpoints):
            what = f"of {self.task}" if self.task in CONTINUING else "with gradient checkpointing"
            raise InputError(f"cuda_graphs: steps {what} cannot be recorded; leave it out.")
        self._set_lengths()
        autocast = torch.bfloat16 if values.get("bf16") else torch.float16 if values.get("fp16") else None
        self.conditions = Conditions(
            cuda,
            autocast,
            bool(values.get("use_liger_kernel")),
            str(values.get("optim") or "adamw_torch_fused"),
            self.accumulation > 1,
            memory.gives_back(config.budget is not None and read_budget(config.budget).memory is not None),
        )
        self._whole = self._from_config()
        self.new_heads = _new_heads(self._whole, self.settings, own_head) if new_heads is None else list(new_heads)
        self.inventory = take_inventory(self._whole, self.new_heads)
        self.parameters = self.inventory.base_parameters
        self.head_parameters = self.inventory.head_parameters
        self.itemsize = self._whole.dtype.itemsize  # bytes of a number
        self._counts: dict[tuple[str, tuple[int, ...], int], StepCount] = {}

    def _set_lengths(self) -> None:
        """Tokens of batches: of the ``longest``, which decides on memory, of ``usual`` ones in training and of ``evaluated`` ones, which
        decide on time. By the texts' own ``lengths``, or else all as long as a text may be."""
        positions = getattr(self.settings.get_text_config(), "max_position_embeddings", None)
        limit = self.config.max_length
        if isinstance(positions, int) and positions > 0:
            limit = min(limit, positions)
        if self.task == "image_classification":
            limit = 0
        multiple = multiple_for(self.settings) if self.config.cuda_graphs else 1
        whole: tuple[int, ...] = (-(-limit // multiple) * multiple,)
        self.longest = self.usual = self.evaluated = whole
        order = str(self.values.get("train_sampling_strategy"))
        grouped = order == GROUPED
        training, held_out = self.sizes.lengths, self.sizes.held_out_lengths
        if held_out is not None:
            held_out = held_out.cut(limit, multiple)
            self.evaluated = held_out.padded(self.eval_batch_size, GROUPED if grouped else IN_ORDER)
        self.lengths = None if training is None or self.config.packing else training.cut(limit, multiple)
        if self.lengths is not None:
            every = [self.lengths.longest] if held_out is None else [self.lengths.longest, held_out.longest]
            self.longest = tuple(map(max, zip(*every, strict=True)))
            self.usual = self.lengths.padded(self.batch_size, order, self.batch_size * self.accumulation)

    @property
    def padded(self) -> dict[str, tuple[int, ...]] | None:
        """As ``Estimate.padded``."""
        if self.lengths is None:
            return None
        return {"longest": self.longest, "training": self.usual, "evaluation": self.evaluated}

    def seconds(self, count: StepCount, calibration: Calibration) -> float:
        """Of a step with all its batches."""
        time = step_time(count, calibration, bool(self.config.cuda_graphs))
        return self.accumulation * (time.forward + time.backward) + time.optimizer

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole training."""
        most, examples = self.values.get("max_steps"), self.sizes.train
        if most and most > 0:
            return int(most)
        if examples is None:
            return None
        return math.ceil(math.ceil(examples / self.batch_size / self.accumulation) * self.values["num_train_epochs"])

    def _from_config(self) -> Any:
        settings = self.settings
        settings.use_cache = False
        dtype = getattr(settings, "dtype", None) or torch.float32
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        try:
            with torch.device("meta"):
                model = getattr(transformers, CLASSES[self.task]).from_config(settings, dtype=dtype)
        except (ValueError, ImportError, RuntimeError) as error:
            raise InputError(
                f"the model of {self.config.model_name_or_path} cannot be made from its config ({first_line(error)})."
            ) from error
        with contextlib.suppress(ValueError):  # where there are experts: the form that needs no look at the numbers
            model.set_experts_implementation("grouped_mm")
        return model

    def model(self) -> Any:
        """The model as its config says, to look at."""
        return self._whole

    def _model(self) -> Any:
        """A model for a method to change."""
        return copy.deepcopy(self._whole)

    @functools.cached_property
    def _short(self) -> tuple[Any, dict[str, int]]:
        """The model without the blocks that are like others, and how many each of the rest stands for."""
        model = self._model()
        return model, shorten(model)

    def _held_model(self, config: RunConfig, model: Any) -> Any:
        """The model as its weights are held: in few bits, if the config says so."""
        bits = 4 if config.load_in_4bit else 8 if config.load_in_8bit else 0
        if bits:
            output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            whole = [name for name, module in model.named_modules() if module is output]
            stand_ins.hold_in_few_bits(model, bits, [*whole, *self.new_heads])
        return model

    @property
    def checkpoints(self) -> bool:
        """Whether activations are made again in the backward pass."""
        return bool(self.values.get("gradient_checkpointing") or self.values.get("activation_checkpointing"))

    def profile(self, calibration: Calibration | None) -> Profile:
        """What each unit and each depth of the model costs with these batches."""
        model = self._held_model(self.config, self._model())
        if self.checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        longest, usual = (self._batch(self.batch_size, length) for length in (self.longest, self.usual))
        replayed = bool(self.config.cuda_graphs)
        return Profile(model, longest, self.conditions, self.inventory, calibration, usual, self.accumulation, replayed)

    def base(self, config: RunConfig) -> Base:
        """The model for a method to look at."""
        model = self._model()
        return Base(config, model, self.new_heads, self._not_tuned(model))

    def even_plan(self, blocks: Collection[str] | None = None, count: int | None = None) -> Plan:
        """The plan that a choice spread evenly over the model, or over some of its blocks, would give, before anything is measured.

        ``count``: how many parameters, if not as many as the budget allows.
        """
        inventory = self.inventory
        if blocks is not None:
            inventory = inventory.only({info.name for info in inventory.modules if info.layer in blocks})
        config = self.config if count is None else dataclasses.replace(self.config, budget=str(count))
        return self._spread_evenly(inventory, config, self._not_tuned(self._whole), blocks is not None)

    def counted(self, method: str, length: tuple[int, ...] = (), batch_size: int = 0) -> StepCount:
        """A step of a method, counted once: on a batch of the longest texts and of the config's size, if not told otherwise.

        Raises InputError for a method that cannot train the model.
        """
        key = (method, length or self.longest, batch_size or self.batch_size)
        if key not in self._counts:
            self._counts[key] = self._count_of(*key)
        return self._counts[key]

    def counted_or_none(self, method: str) -> StepCount | None:
        """None for a method that cannot train the model."""
        try:
            return self.counted(method, self.usual)
        except InputError:
            return None

    def _count_of(self, method: str, length: tuple[int, ...], batch_size: int) -> StepCount:
        config = self.config
        if method != config.method:
            others: dict[str, Any] = dict.fromkeys(OF_ITS_METHOD)
            config = dataclasses.replace(
                self.config, method=method, target_modules=[], exclude_modules=[], frozen_dtype=None, **others
            )
        METHODS[method].check_config(config)
        alike = self.plan is None and not [*config.target_modules, *config.exclude_modules]
        alike = alike and not set(config.granularity or ()) & set(WHOLE)
        model, repeats = self._short if alike else (self._whole, {})
        try:
            batch = self._batch(batch_size, length)
            return self._count(self._held_model(config, copy.deepcopy(model)), config, batch, repeats)
        except NotImplementedError as error:
            raise InputError(
                f"what the method {method} takes on {config.model_name_or_path} cannot be predicted: what one of its operations does "
                "depends on numbers, and there are none; choose another method, or run it without --dry_run and with a budget of "
                "parameters alone."
            ) from error

    def _count(self, model: Any, config: RunConfig, batch: Mapping[str, Tensor], repeats: dict[str, int]) -> StepCount:
        with counting(self.conditions):
            model = self._prepared(model, config)
            model.train()
            if self.checkpoints:
                base = base_of(model)
                base.gradient_checkpointing_enable({"use_reentrant": False})
                if config.method not in ("full", "layers", "head", "bitfit"):
                    base.enable_input_require_grads()
            return count_step(model, batch, self.conditions, repeats)

    def _not_tuned(self, model: Any) -> list[str]:
        """The modules that the task's Trainer cannot train parts of."""
        output = model.get_output_embeddings() if CLASSES[self.task] == "AutoModelForCausalLM" else None
        return [name for name, module in model.named_modules() if module is output] if output is not None else []

    def _prepared(self, model: Any, config: RunConfig) -> nn.Module:
        """The model as the method trains it."""
        not_tuned = self._not_tuned(model)
        base = Base(config, model, self.new_heads, not_tuned)
        method = METHODS[config.method]
        if config.rank_by is not None and self.plan is not None:
            base.plan = dataclasses.replace(self.plan, fingerprint="", task_type=None)
        elif config.rank_by is not None:
            raise InputError("rank_by gives ranks by what an analysis finds, and none is made here; leave it out.")
        if not isinstance(method, Planned):
            return method.prepare(base).model
        from peft import get_peft_model

        from reltune.tuner.config import ReltuneConfig

        plan = self.plan
        if plan is None:
            plan = self._spread_evenly(take_inventory(model, self.new_heads), config, not_tuned)
        plan = dataclasses.replace(plan, fingerprint="", task_type=None)
        return get_peft_model(model, ReltuneConfig(plan=plan, frozen_dtype=config.frozen_dtype))

    def _spread_evenly(
        self, inventory: Inventory, config: RunConfig, not_tuned: list[str], in_part: bool = False
    ) -> Plan:
        """A plan that keeps the budget with units of every module alike, or with whole tensors from the top."""
        budget = parse_budget(config.budget, self.parameters)
        (kind, *others) = config.granularity
        if others or kind == "head":
            raise InputError(
                f"granularity {', '.join(config.granularity)}: how such units are spread is known after an analysis only; name one "
                "granularity other than head, or give --plan."
            )
        need = {"layer": "weight", "module": "weight", "norm": "weight"}.get(kind, kind)

        def fits(info: Any) -> bool:
            vector = kind == "norm"
            return (
                need in layer_type(info.layer_type).trains and info.name not in not_tuned and info.is_vector == vector
            )

        names = choose(inventory, config.target_modules, config.exclude_modules)
        whole = [info for info in self.inventory.modules if fits(info)]
        infos = [inventory[name] for name in names if fits(inventory[name])]
        if kind == "bias":
            infos = [info for info in infos if info.bias]
        if kind not in WHOLE and any(info.in_block for info in infos):
            infos, whole = ([info for info in some if info.in_block] for some in (infos, whole))
        if not infos:
            raise InputError(f"granularity {kind}: the model has no such units in the modules that may be used.")
        modules: dict[str, ModulePlan] = {}
        if kind in WHOLE:
            for info in reversed(infos):
                planned = ModulePlan(info.shape, weight=kind != "bias", bias=kind == "bias", groups=info.groups)
                if not modules or sum(m.parameters for m in modules.values()) + planned.parameters <= budget:
                    modules[info.name] = planned
        else:
            chosen = infos if in_part or config.target_modules or config.exclude_modules else whole
            part = min(1.0, budget / sum(_size(info) for info in chosen))
            for info in infos:
                modules[info.name] = _units(info, kind, part, budget / len(chosen))
        order = [info.name for info in inventory.modules if info.name in modules]
        total = self.parameters + self.head_parameters
        return Plan({n: modules[n] for n in order}, "100%", total, total, "", always_trained=list(self.new_heads))

    def _batch(self, size: int, length: tuple[int, ...]) -> dict[str, Tensor]:
        """A batch of texts of that length on the meta device, as the task's collator makes it; targets may have one of their own."""
        task = self.task

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device="meta")

        if task == "image_classification":
            image = getattr(self.settings, "image_size", 224)
            height, width = image if isinstance(image, list | tuple) else (image, image)
            channels = getattr(self.settings, "num_channels", 3)
            pixels = torch.zeros(size, channels, height, width, device="meta")
            return {"pixel_values": pixels, "labels": numbers(size)}
        if task == "preference":
            size *= 2  # both answers
        batch = {"input_ids": numbers(size, length[0])}
        if not self.config.packing:
            batch["attention_mask"] = numbers(size, length[0])
        if task == "question_answering":
            return batch | {"start_positions": numbers(size), "end_positions": numbers(size)}
        if task in ("sequence_classification", "multilabel_classification", "regression"):
            several = getattr(self.settings, "num_labels", 2)
            if task == "sequence_classification":
                return batch | {"labels": numbers(size)}
            columns = several if task == "multilabel_classification" else 1
            return batch | {"labels": torch.zeros(size, columns, device="meta")}
        return batch | {"labels": numbers(size, length[-1])}


def _size(info: Any) -> int:
    return math.prod(info.shape)


def _units(info: Any, kind: str, part: float, each: float) -> ModulePlan:
    """That part of a module's units, at least one; of directions as many as ``each`` numbers hold."""
    planned = ModulePlan(info.shape, groups=info.groups)
    if kind == "element":
        planned.take_elements(torch.arange(max(1, int(part * _size(info)))))
    elif kind == "column":
        planned.columns = list(range(max(1, round(part * planned.column_count))))
    elif kind == "row":
        planned.rows = list(range(max(1, round(part * info.shape[0]))))
    else:
        count = max(1, min(info.shape[1], int(each / info.shape[0])))
        planned.directions = list(range(count))
        planned.vectors = np.zeros((count, info.shape[1]), dtype=np.float32)
    return planned


def _task_of(settings: Any, name: str) -> str:
    """The task that a model of this kind is mostly tuned for."""
    kinds = {
        "seq2seq": "SEQ_TO_SEQ_CAUSAL_LM",
        "image_classification": "IMAGE_CLASSIFICATION",
        "causal_lm": "CAUSAL_LM",
        "sequence_classification": "SEQUENCE_CLASSIFICATION",
    }
    masked = type(settings) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    for task, kind in kinds.items():
        if type(settings) in getattr(transformers, f"MODEL_FOR_{kind}_MAPPING") and not (
            masked and task == "causal_lm"
        ):
            return task
    raise InputError(
        f"{name} is a {settings.model_type!r} model, for which no task is known here; name one with --task."
    )


def _mapping_of(task: str) -> str:
    return {
        "AutoModelForSequenceClassification": "SEQUENCE_CLASSIFICATION",
        "AutoModelForTokenClassification": "TOKEN_CLASSIFICATION",
        "AutoModelForQuestionAnswering": "QUESTION_ANSWERING",
        "AutoModelForSeq2SeqLM": "SEQ_TO_SEQ_CAUSAL_LM",
        "AutoModelForCausalLM": "CAUSAL_LM",
        "AutoModelForMaskedLM": "MASKED_LM",
        "AutoModelForImageClassification": "IMAGE_CLASSIFICATION",
    }[CLASSES[task]]


def _new_heads(model: Any, settings: Any, own: bool) -> list[str]:
    """The modules for which the checkpoint has no values, as far as its config says: a head of another class than it was saved by, or
    one that is made anew because its ``own`` is for something else."""
    if own and type(model).__name__ in (getattr(settings, "architectures", None) or []):
        return []
    children = dict(model.named_children())
    if model.base_model_prefix not in children:
        return [] if own else [name for name in children if f"{name}." in HEADS]
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, child in children.items()
        if name != model.base_model_prefix and child is not output and any(True for _ in child.parameters())
    ]
