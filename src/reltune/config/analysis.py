"""The analysis: by which criteria relevance is measured, and on how much data."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from reltune.config.fields import BY_RECIPE, Subject, about
from reltune.config.recipes import BEST, COLUMNS
from reltune.names import CRITERIA


@dataclasses.dataclass(kw_only=True)
class AnalysisConfig(Subject):
    """The analysis: by which criteria relevance is measured, and on how much data."""

    criteria: list[str] = field(
        default=BY_RECIPE,
        metadata=about(
            f"How relevance is measured: one or several of {', '.join(CRITERIA)}, or a criterion of an installed package. "
            f"Units are chosen by the first one. If not given: {BEST.criterion} for single weights, which is the default, and for "
            f"directions, and {COLUMNS.criterion} for every other granularity.",
            "NAMES",
            least=1,
        ),
    )
    head_epochs: float = field(
        default=1.0,
        metadata=about("How many epochs a new head is trained for before relevance is measured.", "N", least=0),
    )
    analysis_examples: int = field(
        default=1024, metadata=about("Measure relevance on at most this many training examples.", "N", least=1)
    )
    analysis_batch_size: int = field(
        default=32, metadata=about("How many examples the analysis puts in one batch.", "N", least=1)
    )
    max_trials: int = field(
        default=200,
        metadata=about("For the criterion correlation: at most this many trials per kind of unit.", "N", least=4),
    )
    probe_steps: int | str = field(
        default=100,
        metadata=about(
            "For the criterion movement: how many steps the probe takes, or auto: until the choice has settled. The model's weights are "
            "the same afterwards.",
            "N",
            least=1,
            most=2**15 - 1,
        ),
    )
    probe_step_size: float = field(
        default=1e-4,
        metadata=about("For the criterion movement: how far a weight moves in each of these steps.", "X", above=0),
    )
    probe_directions: int = field(
        default=64,
        metadata=about(
            "For the criterion movement: how many input directions of each linear map are kept, of which `select --granularity "
            "direction` chooses.",
            "N",
            least=0,
        ),
    )
    elements: bool = field(
        default=False,
        metadata=about(
            "Also score every single weight, which `select --granularity element` needs. Stores one number per weight and "
            "criterion."
        ),
    )
