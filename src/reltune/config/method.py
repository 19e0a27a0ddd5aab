"""The way to train: its name, its own fields, and which of the other fields it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from reltune.config.fields import Subject, about
from reltune.config.recipes import parameters_of

RANKINGS = ("relevance",)
CHOSEN = ("budget", "criteria", "granularity", "spread")  # what units are chosen by
MEASURED = (
    "head_epochs",
    "analysis_examples",
    "analysis_batch_size",
    "max_trials",
    "probe_steps",
    "probe_step_size",
    "probe_directions",
    "elements",
)
PLACES = ("target_modules", "exclude_modules")
RANKS = ("lora_r", "lora_alpha")


@dataclasses.dataclass(frozen=True)
class Way:
    """What a config knows of a method; the rest is in methods/.

    Attributes:
        meaning: what it trains, for the help.
        defaults: its own fields and what they are where none is given; ``lora_alpha`` None is twice ``lora_r``.
        takes: the other fields that it takes, of those that not every method takes.
        granularity: what alone it chooses of, where its name says so.
    """

    meaning: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    takes: tuple[str, ...] = ()
    granularity: str = ""


PLANNED = (*CHOSEN, *MEASURED, *PLACES, "frozen_dtype")
SIZED = ("budget", *PLACES)
LOW_RANK = {"lora_r": 8, "lora_alpha": None, "lora_dropout": 0.0, "rank_by": None}

METHODS = {
    "weights": Way("single weights chosen by relevance, or the units that --granularity names", {}, PLANNED),
    "columns": Way("columns chosen by relevance", {}, PLANNED, "column"),
    "rows": Way("rows chosen by relevance", {}, PLANNED, "row"),
    "directions": Way("fixed directions of each linear map's input, chosen by relevance", {}, PLANNED, "direction"),
    "lora": Way("low-rank adapters on every linear map", LOW_RANK, SIZED),
    "rslora": Way("the same, scaled by alpha / √r", LOW_RANK, SIZED),
    "dora": Way("the same, with magnitudes trained apart", LOW_RANK, SIZED),
    "shira": Way("single weights drawn at random, as many as LoRA would have", {"lora_r": 8}, SIZED),
    "bitfit": Way("every bias", {}, ("budget",)),
    "layers": Way("the top layer, or the layers and modules that --target_modules names", {}, SIZED),
    "head": Way("the task's head alone", {}, ("budget",)),
    "full": Way("every weight", {}, ("budget",)),
}


@dataclasses.dataclass(kw_only=True)
class MethodConfig(Subject):
    """The way to train, and the fields of those ways that are not a choice of units."""

    method: str = field(
        default="weights",
        metadata=about(
            "How to train. " + "; ".join(f"{name}: {way.meaning}" for name, way in METHODS.items()) + ".",
            "METHOD",
            tuple(METHODS),
        ),
    )
    lora_r: int | None = field(
        default=None,
        metadata=about(
            "For lora, rslora and dora: the rank. For shira: the rank of the LoRA that would train as many numbers. If not "
            f"given: {LOW_RANK['lora_r']}.",
            "N",
            least=1,
        ),
    )
    lora_alpha: float | None = field(
        default=None,
        metadata=about(
            "For lora, rslora and dora: alpha. What is trained counts alpha / r times (rslora: alpha / √r). If not given: twice "
            "the rank.",
            "N",
            above=0,
        ),
    )
    lora_dropout: float | None = field(
        default=None,
        metadata=about(
            "For lora, rslora and dora: the share of inputs that dropout sets to 0 before the adapter. If not given: 0.",
            "N",
            least=0,
            most=0.99,
        ),
    )
    rank_by: str | None = field(
        default=None,
        metadata=about(
            "For lora, rslora and dora: relevance gives each module the rank with which it trains as many numbers as a selection "
            "under --budget would choose of it, and other modules none. If not given: every linear map has the rank --lora_r.",
            "HOW",
            RANKINGS,
        ),
    )

    @property
    def way(self) -> Way:
        return METHODS[self.method]

    @property
    def needs_plan(self) -> bool:
        """Whether units are measured and chosen before anything is trained."""
        return "criteria" in self.taken

    @property
    def taken(self) -> tuple[str, ...]:
        """The fields that the method takes, of those that not every method takes."""
        if self.rank_by is None:
            return (*self.way.defaults, *self.way.takes)
        return (*(name for name in self.way.defaults if name not in RANKS), *CHOSEN, *MEASURED, *PLACES)

    def fill(self) -> None:
        """Give the method's own fields that are None their defaults."""
        for name, value in self.way.defaults.items():
            if name in self.taken and getattr(self, name) is None and not (name == "lora_r" and self.rank_from_budget):
                setattr(self, name, value)
        if "lora_alpha" in self.taken and self.lora_alpha is None and self.lora_r is not None:
            self.lora_alpha = 2.0 * self.lora_r

    @property
    def rank_from_budget(self) -> bool:
        """Whether the rank follows from how many parameters the budget allows."""
        return not self.needs_plan and bool(parameters_of(getattr(self, "budget", None) or ""))
