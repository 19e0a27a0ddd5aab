"""What a training will take under a budget, before it begins: the units, the settings that cost no quality, memory and time.

A budget of memory or time is kept by choosing, in this order: batches in parts, or activations made again, whichever is quicker, so that all
that the budget of parameters allows is trained; and where that is not enough, fewer units, or units in higher layers alone
(plan/search.py). What is chosen is counted once more as it will be trained (cost/step.py), and chosen again where the quick sum was
too low.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from reltune.config.run_config import RunConfig
from reltune.config.training_fields import checked_training_fields
from reltune.cost.calibration import Calibration
from reltune.cost.devices import Card
from reltune.cost.memory import allocated, tensors_within
from reltune.cost.profile import Chosen, Profile
from reltune.cost.step import StepCount
from reltune.errors import InputError
from reltune.methods.registry import METHODS
from reltune.plan.budget import Budget, parse_budget, read_budget
from reltune.plan.plan import Plan
from reltune.plan.search import Limits
from reltune.plan.selection import CutOff, Unaffordable, frontier
from reltune.plan.selection import select as choose_units
from reltune.relevance.scores import RelevanceScores
from reltune.runs.duration import course
from reltune.runs.estimate import Estimate, Subject, beside, is_cuda, memory_of, model_of, place_of
from reltune.runs.sizes import NOT_KNOWN, Sizes

ROUNDS = 8  # of choosing again where the count of what was chosen is above the budget
SPARED = 2  # times that what the count leaves of the budget is given to another choice, if it is more than MUCH of it
MUCH = 0.03
NEAR = 0.02  # by how much of the difference that a whole batch makes a part of it may seem too large and still be tried
# What a prediction depends on, beside the plan.
DECIDES = (
    *(
        "model_name_or_path",
        "task",
        "max_length",
        "packing",
        "load_in_4bit",
        "load_in_8bit",
        "method",
        "lora_r",
        "rank_by",
    ),
    *("budget", "fixed", "target_modules", "exclude_modules", "frozen_dtype", "cuda_graphs", "training"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a plan sets of a run's config: fields of the run and of its training."""

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, config: RunConfig) -> RunConfig:
        """The config with these settings."""
        return dataclasses.replace(config, **self.fields, training={**config.training, **self.training})

    def phrases(self) -> list[str]:
        """A few words for each thing that the plan chose so that it fits."""
        values, words = self.training, []
        if "per_device_train_batch_size" in values:
            words.append(f"batches of {values['per_device_train_batch_size']}")
        if values.get("gradient_checkpointing"):
            words.append("gradient_checkpointing")
        return words + [f"{name} {_word(value)}" for name, value in self.fields.items()]

    def describe(self) -> list[str]:
        """One sentence for each thing that the plan chose so that it fits."""
        values, lines = self.training, []
        if "per_device_train_batch_size" in values:
            lines.append(
                f"Chosen to fit: batches of {values['per_device_train_batch_size']}, of which {values['gradient_accumulation_steps']} are "
                "accumulated for a step; the same examples make a step as before."
            )
        if values.get("gradient_checkpointing"):
            lines.append("Chosen to fit: gradient_checkpointing, which makes activations again in the backward pass.")
        lines += [f"Chosen to fit the budget: {name} {_word(value)}." for name, value in self.fields.items()]
        return lines


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run will train, with what, and what that takes.

    Attributes:
        plan: of a method that chooses units.
        settings: what was chosen beside units so that the budget is kept.
        config: the run's, with the settings.
        estimate: the method beside LoRA and full fine-tuning.
        allocated: bytes of the step's tensors and the workspace of products, as ``torch.cuda.max_memory_allocated`` counts.
        held_before: of these, what is in memory before the first step: the model.
        holes: bytes of malloc's heap beside them, on a CPU.
        frontier: what each cut-off depth costs and keeps; empty where nothing was measured.
        layers: module -> layer.
        even: whether units are only spread evenly, because nothing was measured yet.
    """

    plan: Plan | None
    settings: Settings
    config: RunConfig
    estimate: Estimate
    allocated: int
    held_before: int
    holes: int
    frontier: list[CutOff]
    layers: Mapping[str, str]
    even: bool

    def describe(self) -> list[str]:
        """What was chosen, and where it comes from, one fact a line."""
        lines = list(self.plan.describe()) if self.plan is not None else []
        if self.even:
            lines = [line.replace(", by hand", "").partition(", budget ")[0] for line in lines]
            lines.insert(0, "Nothing is measured yet: the budget is spread evenly over the model, as far as it fits.")
        return [*lines, *self.settings.describe()]

    def prediction(self, digest: str) -> dict[str, Any]:
        """As ``prediction.json`` has it."""
        row = self.estimate.rows[0]
        median = None if row.prefix is None else row.prefix.median
        return {
            "of": digest,
            "fields": dict(self.settings.fields),
            "training": dict(self.settings.training),
            "memory_bytes": row.total,
            "allocated_bytes": self.allocated,
            "held_before_bytes": self.held_before,
            "holes_bytes": self.holes,
            "seconds_per_step": row.seconds if median is None else median,
            "padded": self.estimate.padded,
            "frozen_prefix_pays": None if row.prefix is None else row.prefix.pays,
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        by_layer = self.plan.by_layer(self.layers) if self.plan is not None else {}
        return {
            "method": self.config.method,
            "budget": self.config.budget,
            "evenly_spread": self.even,
            "parameters_by_layer": by_layer,
            "units_by_layer": units_by_layer(self.plan, self.layers) if self.plan is not None else {},
            "backward_ends_at": next(iter(self.plan.modules)) if self.plan is not None else None,
            "settings": {**self.settings.fields, **self.settings.training},
            "estimate": self.estimate.to_dict(),
            "frontier": [
                {
                    **{name: getattr(row, name) for name in ("lowest", "layer", "parameters", "memory", "share")},
                    "seconds": None if math.isnan(row.seconds) else row.seconds,
                }
                for row in self.frontier
            ],
        }


def units_by_layer(plan: Plan, layers: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """How many units of each kind the plan takes of each layer, from the input on."""
    found: dict[str, dict[str, int]] = {layer: {} for layer in layers.values()}
    for name, module in plan.modules.items():
        own = found.setdefault(layers.get(name, name), {})
        counts = {
            "columns": len(module.columns),
            "rows": len(module.rows),
            "single weights": len(module.elements),
            "directions": len(module.directions),
            "whole matrices": int(module.weight and len(module.shape) > 1),
            "norms": int((module.weight or module.bias) and len(module.shape) == 1),
            "biases": int(module.bias and len(module.shape) > 1),
        }
        for kind, count in counts.items():
            if count:
                own[kind] = own.get(kind, 0) + count
    return found


def digest_of(config: RunConfig, plan: str, sizes: Sizes) -> str:
    """Of what a prediction depends on; ``plan``: the digest of the plan's files."""
    values = {name: getattr(config, name) for name in DECIDES}
    words = json.dumps([values, plan, sizes.digest()], sort_keys=True, default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def forecast(
    config: RunConfig,
    *,
    relevance: RelevanceScores | None = None,
    plan: Plan | None = None,
    criterion: str | None = None,
    task_type: str | None = None,
    restricted: Mapping[str, Sequence[str]] | None = None,
    new_heads: Sequence[str] | None = None,
    device: str | None = None,
    sizes: Sizes = NOT_KNOWN,
    with_frontier: bool = True,
    with_others: bool = True,
) -> Forecast:
    """Choose what keeps the run's budget, and say what it takes.

    Args:
        relevance: what units are chosen by; without it and without a plan they are spread evenly.
        plan: the units, where they were chosen before; settings alone are then chosen.
        restricted: ``target_modules`` and ``exclude_modules`` of the choice, if not as in the config.
        new_heads: the modules that no checkpoint has values for, where that is known.
        device: as of ``estimate``; by default the one that this machine trains on.
        sizes: how many examples there are, for hours, and how long they are.
        with_frontier, with_others: whether what each depth costs, and LoRA and full fine-tuning beside, are wanted.

    Raises InputError for a budget in which nothing fits, naming what would.
    """
    config = dataclasses.replace(config, training=checked_training_fields(config.training))
    if device is None and config.training.get("use_cpu"):
        device = "cpu"
    fitting = _Fitting(config, relevance, plan, criterion, task_type, restricted, new_heads, device, sizes)
    found = fitting.found()
    depths: list[CutOff] = []
    if with_frontier and relevance is not None and config.needs_plan:
        depths = fitting.frontier(found)
    place = fitting.place
    if fitting.budget.memory is not None:
        memory = min(fitting.budget.memory, place.memory or fitting.budget.memory)
        place = dataclasses.replace(place, name=f"The budget on {place.name}", memory=memory)
    if with_others:
        estimate = beside(found.subject, place, fitting.calibration, analysed=fitting.analysed)
    else:
        estimate = fitting.alone(found, place)
    return Forecast(
        found.plan,
        found.settings,
        found.subject.config,
        estimate,
        allocated(found.count) if fitting.cuda else found.count.bytes,
        model_of(found.count),
        found.count.holes,
        depths,
        {info.name: info.layer for info in found.subject.inventory.modules},
        config.needs_plan and relevance is None and plan is None,
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    """A way to train that was counted."""

    settings: Settings
    subject: Subject
    plan: Plan | None
    count: StepCount

    def seconds(self, calibration: Calibration) -> float:
        """Of a step."""
        return self.subject.seconds(self.subject.counted(self.subject.config.method, self.subject.usual), calibration)


class _Fitting:
    """The search for settings and units that keep a budget."""

    def __init__(
        self,
        config: RunConfig,
        relevance: RelevanceScores | None,
        plan: Plan | None,
        criterion: str | None,
        task_type: str | None,
        restricted: Mapping[str, Sequence[str]] | None,
        new_heads: Sequence[str] | None,
        device: str | None,
        sizes: Sizes,
    ) -> None:
        self.config, self.relevance, self.given, self.sizes = config, relevance, plan, sizes
        self.analysed = relevance is not None or plan is not None or not config.needs_plan
        self.place: Card
        self.calibration: Calibration | None
        self.place, self.calibration = place_of(device)
        self.cuda = is_cuda(self.calibration)
        self.budget = read_budget(config.budget) if config.budget is not None else Budget()
        if relevance is not None:
            new_heads = relevance.always_trained
        elif plan is not None:
            new_heads = plan.always_trained
        self.new_heads = new_heads
        self.choosing: dict[str, Any] = {
            "criterion": criterion,
            "spread": config.spread,
            "target_modules": config.target_modules,
            "exclude_modules": config.exclude_modules,
            **(restricted or {}),
        }
        self.naming: dict[str, Any] = {"model_name_or_path": config.model_name_or_path, "task_type": task_type}
        self.subject = self._subject(Settings())
        if self.calibration is None and (self.budget.time is not None or self.budget.hours is not None):
            raise InputError(
                f"budget {config.budget}: a size of memory says nothing of speed; name a card for time and hours."
            )

    def _subject(self, settings: Settings, plan: Plan | None = None) -> Subject:
        return Subject(settings.of(self.config), plan, self.cuda, self.new_heads, self.sizes)

    # -- what is allowed -------------------------------------------------------------------------------------------

    @functools.cached_property
    def full_seconds(self) -> float:
        """Of a step of full fine-tuning with the batches as they are given."""
        assert self.calibration is not None
        return self.subject.seconds(self.subject.counted("full", self.subject.usual), self.calibration)

    @functools.cached_property
    def steps(self) -> int:
        """Of the whole training. Raises InputError where a budget of hours needs them and they are not known."""
        steps = self.subject.steps
        if steps is None:
            raise InputError(
                f"budget {self.config.budget}: how many steps there are is not known; give --max_steps or --examples."
            )
        return steps

    @functools.cached_property
    def seconds(self) -> float:
        """That a step may take by the budget's time."""
        return math.inf if self.budget.time is None else self.budget.time * self.full_seconds

    def hours_of(self, found: _Found) -> float:
        """Of the whole run."""
        assert self.calibration is not None
        return course(found.subject, self.config.method, self.calibration, self.analysed).seconds / 3600

    def over(self, found: _Found) -> tuple[float, float]:
        """By how many bytes and seconds a way is above what is allowed; below zero where it keeps it."""
        memory = -math.inf if self.budget.memory is None else sum(memory_of(found.count).values()) - self.budget.memory
        seconds = -math.inf
        if not math.isinf(self.seconds):
            assert self.calibration is not None
            seconds = found.seconds(self.calibration) - self.seconds
        if self.budget.hours is not None:  # what is too much of them, a step
            seconds = max(seconds, 3600 * (self.hours_of(found) - self.budget.hours) / self.steps)
        return memory, seconds

    def keeps(self, found: _Found) -> bool:
        return max(self.over(found)) <= 0

    # -- settings that cost no quality -----------------------------------------------------------------------------

    def settings(self) -> list[list[Settings]]:
        """In which parts batches can be computed, the largest first; without activations made again, and with them."""
        subject, fixed = self.subject, set(self.config.fixed)
        sizes = [subject.batch_size]
        if self.budget.memory is None:
            return [[Settings()]]
        while "per_device_train_batch_size" not in fixed and sizes[-1] % 2 == 0:
            sizes.append(sizes[-1] // 2)
        parts: list[dict[str, Any]] = [{}]
        parts += [
            {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": subject.accumulation * subject.batch_size // size,
            }
            for size in sizes[1:]
        ]
        ways = [[Settings(training=part) for part in parts]]
        given = self.config.training.get("gradient_checkpointing")
        may = given is None and "gradient_checkpointing" not in fixed and not self.config.cuda_graphs
        if may and not subject.checkpoints:
            ways.append([Settings(training={**part, "gradient_checkpointing": True}) for part in parts])
        return ways

    def found(self) -> _Found:
        """What keeps the budget."""
        if self.config.needs_plan and self.given is None:
            return self._with_plan()
        least: _Found | None = None
        for fields in [{}] if self.given is not None else self._sizes():
            fitting, tightest = self._quickest(fields, self.given)
            if fitting is not None:
                return fitting
            least = functools.reduce(self._less, tightest, least)
        raise self._impossible(least)

    def _quickest(self, fields: Mapping[str, Any], plan: Plan | None) -> tuple[_Found | None, list[_Found]]:
        """The quickest way that fits, each with as large parts of batches as fit; and, of ways that do not fit, those nearest to it."""
        there: list[_Found] = []
        near: list[_Found] = []
        for way in self.settings():
            found = self._largest_part([dataclasses.replace(settings, fields=fields) for settings in way], plan)
            if found is not None:
                (there if self.keeps(found) else near).append(found)
            if there and not there[0].settings.training:
                break
        return min(there, key=self._pace, default=None), near

    def _largest_part(self, way: Sequence[Settings], plan: Plan | None) -> _Found | None:
        """The first of these settings that fits into the memory, the last one if none does. What is held grows evenly with a batch."""
        first = self._counted(way[0], plan)
        if first is None or self.over(first)[0] <= 0 or len(way) == 1:
            return first
        last = self._counted(way[-1], plan)
        assert last is not None
        least, most = self.over(last)[0], self.over(first)[0]
        if least > 0:
            return last
        for settings in way[1:-1]:
            part = (settings.training["per_device_train_batch_size"] - last.subject.batch_size) / (
                first.subject.batch_size - last.subject.batch_size
            )
            if least + part * (most - least) > NEAR * (most - least):
                continue
            counted = self._counted(settings, plan)
            if counted is not None and self.over(counted)[0] <= 0:
                return counted
        return last

    def _pace(self, found: _Found) -> float:
        return 0.0 if self.calibration is None else found.seconds(self.calibration)

    def _counted(self, settings: Settings, plan: Plan | None = None) -> _Found | None:
        """A way as it would be trained; None where the model cannot make activations again."""
        plan = plan or self.given
        subject = self._subject(settings, plan)
        try:
            return _Found(settings, subject, plan, subject.counted(self.config.method))
        except (ValueError, AttributeError):
            if settings.training.get("gradient_checkpointing"):
                return None
            raise

    def _less(self, one: _Found | None, other: _Found | None) -> _Found | None:
        """The one that is less above what is allowed."""
        there = [found for found in (one, other) if found is not None]
        return min(there, key=lambda found: tuple(max(0.0, over) for over in self.over(found)), default=None)

    # -- methods with a size of their own --------------------------------------------------------------------------

    def _sizes(self) -> Iterator[dict[str, Any]]:
        """Fields that set the method's size, from the one that the budget of parameters allows down to the smallest."""
        method, config = METHODS[self.config.method], self.config
        if self.budget.parameters is None:
            yield {}
        if self.budget.parameters is None and not self.budget.is_limited:
            return
        base = self.subject.base(config)
        if config.rank_by is not None or method.nearest(base, 1) is None:
            return
        if self.budget.parameters is not None:
            count = parse_budget(self.budget.parameters, self.subject.parameters)
        else:
            own = self._counted(Settings())
            assert own is not None
            count = own.count.trained - self.subject.head_parameters - 1
        smallest = method.nearest(base, 1)
        assert smallest is not None
        if smallest.parameters > count and self.budget.parameters is not None:
            raise InputError(
                f"budget {config.budget} allows {count:,} parameters, and the smallest size of the method {method.name} "
                f"({smallest.words or 'one layer'}) has {smallest.parameters:,}; raise the budget or choose a finer method."
            )
        before = math.inf
        while count >= smallest.parameters:
            size = method.nearest(base, count)
            assert size is not None
            below, above = 1, count
            while size.parameters > count:  # the nearest is above: the largest that is not
                middle = (below + above) // 2
                tried = method.nearest(base, middle)
                assert tried is not None
                if tried.parameters > count:
                    above = middle
                else:
                    below = middle
                if above - below <= 1:
                    size = method.nearest(base, below)
                    assert size is not None
                    break
            if size.parameters < before:
                before = size.parameters
                yield dict(size.fields)
            count = min(count, size.parameters) // 2
        if before > smallest.parameters:
            yield dict(smallest.fields)

    # -- methods that choose units ---------------------------------------------------------------------------------

    def _with_plan(self) -> _Found:
        """All units that the budget of parameters allows, in the quickest way that fits; or the most relevance in the least memory."""
        whole = self._chosen(Limits(self._parameters()), None)
        fitting, tightest = self._quickest({}, whole)
        if fitting is not None:
            return fitting
        least: _Found | None = None
        fewer: list[_Found] = []
        for one in tightest:
            found, cheapest = self._fewer(one.settings)
            if found is not None:
                fewer.append(found)
            least = self._less(least, cheapest)
        if not fewer:
            raise self._impossible(least)
        return max(fewer, key=lambda found: self._relevance(found.plan))

    def _parameters(self) -> int:
        return parse_budget(self.config.budget, self.subject.parameters)

    def _limits(self, settings: Settings, profile: Profile, memory: float, seconds: float) -> Limits:
        """What is allowed in a profile's terms, less what the sum was found to be too low by."""
        most = math.inf if self.budget.memory is None else tensors_within(self.budget.memory, self.cuda) - memory
        pace = self.seconds
        if self.budget.hours is not None:
            pace = min(pace, 3600 * self.budget.hours / self.steps)
        if not math.isinf(pace):
            pace = (pace - seconds) / int(
                settings.training.get("gradient_accumulation_steps", self.subject.accumulation)
            )
        return Limits(self._parameters(), most, pace)

    def _chosen(self, limits: Limits, profile: Profile | None) -> Plan:
        """Units by relevance; where nothing was measured, spread evenly over the blocks down to the lowest at which they fit."""
        if self.relevance is not None:
            return choose_units(
                self.relevance,
                self.config.budget,
                self.config.granularity,
                **self.choosing,
                **self.naming,
                profile=profile,
                limits=limits,
            )
        if profile is None:
            return self.subject.even_plan()
        plan = self.subject.even_plan()
        for lowest in range(len(profile.names)):
            try:
                plan = self.subject.even_plan(profile.names[lowest:])
            except InputError:  # no such units up there
                break
            if limits.allow(profile.cost(counts_of(plan))):
                return plan
        count = plan.parameters
        while count > 1:
            count //= 2
            fewer = self.subject.even_plan(list(plan_layers(plan, self.subject)), count)
            if limits.allow(profile.cost(counts_of(fewer))):
                return fewer
            if fewer.parameters >= plan.parameters:
                break
            plan = fewer
        raise Unaffordable(f"budget {self.config.budget}: no unit fits.", plan)

    def _fewer(self, settings: Settings) -> tuple[_Found | None, _Found]:
        """The most relevance that keeps the budget with these settings, and what was tried last."""
        profile = self._subject(settings).profile(self.calibration)
        # By how much of memory and time the profile's sum is taken to be too low: so little that the count is above the budget, and
        # enough. Less than nothing where the sum was found to be too high.
        slack, low, high = np.zeros(2), None, None
        best: _Found | None = None
        counted: _Found | None = None
        for turn in range(ROUNDS):
            cheapest = False
            try:
                plan = self._chosen(self._limits(settings, profile, *slack), profile)
            except Unaffordable as error:
                plan, cheapest = error.plan, True
            counted = self._counted(settings, plan)
            assert counted is not None
            over = np.array(self.over(counted))
            if self.keeps(counted):
                if best is None or self._relevance(plan) >= self._relevance(best.plan):
                    best = counted
                high = slack
                spare = np.where(np.isfinite(over), np.maximum(0.0, -over), 0.0)
                if low is None and (turn >= SPARED or not self._is_worth(spare, plan)):
                    break
            elif cheapest:
                break
            else:
                low = slack
            if low is not None and high is not None:
                slack = (low + high) / 2
            else:
                slack = slack - spare if low is None else low + 1.05 * np.maximum(0.0, over)
        assert counted is not None
        return best, best or counted

    def _is_worth(self, spare: np.ndarray, plan: Plan) -> bool:
        """Whether what is left of memory and time may be enough for more units, where the budget of parameters allows more."""
        hours = math.inf if self.budget.hours is None else 3600 * self.budget.hours / self.steps
        allowed = np.array([self.budget.memory or math.inf, min(self.seconds, hours)])
        return plan.parameters < 0.98 * self._parameters() and bool((spare > MUCH * allowed).any())

    def _relevance(self, plan: Plan | None) -> float:
        """What a plan is worth, to compare it with others of the same run."""
        assert plan is not None
        return (
            float(plan.parameters)
            if self.relevance is None
            else worth_of(plan, self.relevance, self.choosing["criterion"])
        )

    def frontier(self, found: _Found) -> list[CutOff]:
        assert self.relevance is not None
        profile = found.subject.profile(self.calibration)
        rows = frontier(self.relevance, Limits(self._parameters()), profile, self.config.granularity, **self.choosing)
        return [dataclasses.replace(row, seconds=found.subject.accumulation * row.seconds) for row in rows]

    def alone(self, found: _Found, place: Card) -> Estimate:
        """The estimate of one method without others."""
        return beside(found.subject, dataclasses.replace(place, memory=0), self.calibration, ())

    def _impossible(self, least: _Found | None) -> InputError:
        """What cannot be kept, and what would fit."""
        config = self.config
        if least is None:
            return InputError(f"budget {config.budget}: nothing that {config.method} can train keeps it; raise it.")
        memory_over, seconds_over = self.over(least)
        wants: list[str] = []
        settings = ", ".join(least.settings.phrases())
        if memory_over > 0 and self.budget.memory is not None:
            # The least has room for a few weights alone: a little more is named.
            wants.append(f"memory={_size(1.01 * (self.budget.memory + memory_over))}")
        if seconds_over > 0:
            assert self.calibration is not None
            pace = least.seconds(self.calibration)
            if self.budget.time is not None and pace > self.budget.time * self.full_seconds:
                wants.append(f"time={math.ceil(100 * pace / self.full_seconds) / 100:g}")
            if self.budget.hours is not None and (hours := self.hours_of(least)) > self.budget.hours:
                wants.append(
                    f"hours={math.ceil(100 * hours) / 100:g}"
                    if hours >= 0.01
                    else f"hours={math.ceil(1e5 * hours) / 1e5:.5f}"
                )
        with_what = f" with {settings}" if settings else ""
        return InputError(
            f"budget {config.budget}: the least that {config.method} can train here{with_what} needs {' and '.join(wants)}; write that, or "
            f"more.{self._proposals(least, memory_over)}"
        )

    def _proposals(self, least: _Found, memory_over: float) -> str:
        """What changes quality and would fit: a base in few bits, shorter texts."""
        if memory_over <= 0 or self.budget.memory is None:
            return ""
        found: list[str] = []
        ways: list[tuple[str, dict[str, Any]]] = []
        config = least.subject.config
        if self.cuda and METHODS[config.method].few_bits and not (config.load_in_4bit or config.load_in_8bit):
            ways += [("--load_in_8bit", {"load_in_8bit": True}), ("--load_in_4bit", {"load_in_4bit": True})]
        longest = least.subject.longest[0]
        ways += [(f"--max_length {n}", {"max_length": n}) for n in (longest // 2, longest // 4) if n]
        for words, fields in ways:
            subject = Subject(dataclasses.replace(config, **fields), least.plan, self.cuda, self.new_heads, self.sizes)
            total = sum(memory_of(subject.counted(config.method)).values())
            if total <= self.budget.memory and words.split()[0] not in " ".join(found).split():
                found.append(words)
        return f" It would fit with {' or '.join(found)}, which changes what is learned." if found else ""


def plan_layers(plan: Plan, subject: Subject) -> set[str]:
    """The layers that a plan trains anything of."""
    return {subject.inventory[name].layer for name in plan.modules}


def counts_of(plan: Plan) -> dict[str, Chosen]:
    """How many units of each module a plan takes, as a profile counts them."""
    return {
        name: Chosen(
            len(module.columns),
            len(module.rows),
            len(module.elements),
            len(module.directions),
            module.weight,
            module.bias,
        )
        for name, module in plan.modules.items()
    }


def worth_of(plan: Plan, relevance: RelevanceScores, criterion: str | None) -> float:
    """The relevance of a plan's units together."""
    total = 0.0
    for word in plan.granularity:
        field = {"column": "columns", "row": "rows", "element": "elements", "direction": "directions"}.get(word)
        for name, scores in relevance.by(word, criterion).items():
            module = plan.modules.get(name)
            if field is not None and module is not None and len(getattr(module, field)):
                total += float(scores.reshape(-1)[module.index(field).long()].double().sum())
            elif field is None and module is not None and (module.weight or module.bias) and scores.numel() == 1:
                total += float(scores)
    return total


def _word(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _size(count: float) -> str:
    """Bytes as a budget is written, rounded up."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{math.ceil(100 * count / size) / 100:g}{unit}"
    return "1KiB"
