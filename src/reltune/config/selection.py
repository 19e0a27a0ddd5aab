"""The selection: the budget, and the units that may be chosen under it."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from reltune.config.fields import Subject, about
from reltune.names import GRANULARITIES, SPREADS


@dataclasses.dataclass(kw_only=True)
class SelectionConfig(Subject):
    """The selection: the budget, and the units that may be chosen under it."""

    budget: str = field(
        default="0.5%",
        metadata=about(
            "How many parameters to train: a share of the base model (0.5%) or a number (100k). New heads are not counted.",
            "BUDGET",
        ),
    )
    granularity: list[str] = field(
        default_factory=lambda: ["column"],
        metadata=about(
            f"What kinds of unit to choose: one or several of {', '.join(GRANULARITIES)}. element means single weights, and "
            "goes together with bias and norm only.",
            "NAMES",
            GRANULARITIES,
            least=1,
        ),
    )
    spread: str = field(
        default="global",
        metadata=about(
            f"Where to choose. {SPREADS[0]}: the best units of the whole model; {SPREADS[1]}: the same share of every module.",
            "HOW",
            SPREADS,
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
