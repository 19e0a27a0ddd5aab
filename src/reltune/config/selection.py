"""The selection: the budget, and the units that may be chosen under it."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from reltune.config.fields import BY_RECIPE, Subject, about
from reltune.config.recipes import BEST, COLUMNS
from reltune.names import FIXABLE, GRANULARITIES, SPREADS


@dataclasses.dataclass(kw_only=True)
class SelectionConfig(Subject):
    """The selection: the budget, and the units that may be chosen under it."""

    budget: str = field(
        default=BY_RECIPE,
        metadata=about(
            "What training may take: parameters, as a share of the base model (0.5%) or a number (100k), new heads not counted; memory=12GiB; "
            "time=0.5, of a step of full fine-tuning; hours=2; or several of these (docs/budgets.md). If not "
            f"given: {BEST.budget}, and {COLUMNS.budget} where a granularity or another criterion than {BEST.criterion} is named.",
            "BUDGET",
        ),
    )
    fixed: list[str] = field(
        default_factory=list,
        metadata=about(
            "What a budget of memory may not change. Else it makes activations again (gradient_checkpointing) or splits a batch into "
            "several that are accumulated (per_device_train_batch_size) where that is what fits.",
            "NAMES",
            FIXABLE,
        ),
    )
    granularity: list[str] = field(
        default=BY_RECIPE,
        metadata=about(
            f"What kinds of unit to choose: one or several of {', '.join(GRANULARITIES)}. element means single weights, and "
            f"goes together with bias and norm only; direction means fixed directions of a linear map's input, and goes with nothing else. "
            f"Directions, columns and rows can become a LoRA file. If not given: {BEST.granularity}, and {COLUMNS.granularity} where other "
            f"criteria than {BEST.criterion} alone are named.",
            "NAMES",
            GRANULARITIES,
            least=1,
        ),
    )
    spread: str = field(
        default=BY_RECIPE,
        metadata=about(
            f"Where to choose. {'; '.join(f'{name}: {meaning}' for name, meaning in SPREADS.items())} (single weights only). Even is, of "
            f"directions, the same number. If not given: {BEST.spread} for single weights and directions by {BEST.criterion}, else "
            f"{COLUMNS.spread}.",
            "HOW",
            tuple(SPREADS),
        ),
    )
    target_modules: list[str] = field(
        default_factory=list,
        metadata=about(
            "Use these modules only: parts of their names (query, layer.5), or regular expressions that match whole names.",
            "NAMES",
        ),
    )
    exclude_modules: list[str] = field(
        default_factory=list,
        metadata=about(
            "Leave these modules out: parts of their names (query, layer.5), or regular expressions that match whole names.",
            "NAMES",
        ),
    )
