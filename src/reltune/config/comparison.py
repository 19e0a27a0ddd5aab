"""A comparison of ways to train: which ones, at which sizes, on how many seeds; and what all of them share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from reltune.config.fields import Subject, about, checked_fields
from reltune.config.method import METHODS, MethodConfig
from reltune.config.recipes import BEST
from reltune.config.run_config import FIELDS, OF_SOME_METHODS, RunConfig
from reltune.config.training_fields import training_field_names
from reltune.errors import InputError
from reltune.files import write_text
from reltune.reading import Damaged, read_yaml

SIZES = ("equal", "usual", "both")
LEAST_TRIALS = 4
# Fields of a run that a comparison decides itself, or has no use for.
NOT_SHARED = (
    *("method", "sweep", "sweep_trials", "early_stopping_patience", "export", "elements", "report_examples"),
    "sample_prompts",
    *("cache_frozen_prefix", "cache_size"),
    *(each.name for each in FIELDS if each.name.startswith("lm_eval_")),
)
SHARED_FIELDS = tuple(each for each in FIELDS if each.name not in NOT_SHARED)
DECIDED = ("learning_rate", "eval_strategy", "save_strategy", "load_best_model_at_end", "resume_from_checkpoint")


@dataclasses.dataclass(kw_only=True)
class ComparisonConfig(Subject):
    """Which ways to train are compared, and how. ``shared`` holds the given fields of a run, which all methods share."""

    methods: list[str] = field(
        default_factory=list,
        metadata=about(
            "The ways to train that are compared. If not given: all that the task and the base model can take.",
            "NAMES",
            tuple(METHODS),
        ),
    )
    sizes: str = field(
        default="both",
        metadata=about(
            "At which sizes. equal: each method trains as nearly as it can the number of parameters that --budget says; usual: each "
            f"as it comes; both. A method that has one size only is in every table. --budget is {BEST.budget} if not given.",
            "WHICH",
            SIZES,
        ),
    )
    seeds: int = field(
        default=3,
        metadata=about(
            "With how many seeds each method is trained at its best rate: --seed and those after it. The splits are the same for all.",
            "N",
            least=1,
            most=1000,
        ),
    )
    rate_trials: int = field(
        default=LEAST_TRIALS,
        metadata=about(
            "How many learning rates each method is tried with, in steps of half a decade around its default; at least "
            f"{LEAST_TRIALS}. Where the best of them is the smallest or the largest, up to two more are tried. 1: every method "
            "takes its default rate.",
            "N",
            least=1,
            most=12,
        ),
    )
    equal_cost: bool = field(
        default=True,
        metadata=about(
            "Also train the methods that need no analysis for as many more steps as the longest analysis took, for a table at "
            "equal total cost."
        ),
    )
    max_hours: float | None = field(
        default=None,
        metadata=about(
            "Measure a few steps of each method first, and leave out what does not fit into so many hours.",
            "HOURS",
            above=0,
        ),
    )
    jobs: int | None = field(
        default=None,
        metadata=about(
            "How many runs share the machine, each in a process of its own. If not given: 1 on a CPU, and on an accelerator as many "
            "as should fit in its memory, 4 at most.",
            "N",
            least=1,
            most=256,
        ),
    )
    shared: dict[str, Any] = field(
        default_factory=dict, metadata=about("Fields of a run, which hold for all methods that take them.")
    )

    @property
    def output_dir(self) -> Path:
        return Path(self.shared["output_dir"])

    @property
    def seed(self) -> int:
        return int(self.shared.get("seed", RunConfig.seed))

    @property
    def all_seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.seeds)]

    @property
    def names(self) -> list[str]:
        """The methods compared, each once."""
        return list(dict.fromkeys(self.methods)) or list(METHODS)

    @property
    def budget(self) -> str:
        """What "equal" means."""
        return str(self.shared.get("budget") or BEST.budget)

    def of(self, method: str, **fields: Any) -> RunConfig:
        """The config of a run of the method: the shared fields that it takes, with these beside or in their place."""
        way = METHODS[method]
        rank_by = self.shared.get("rank_by") if "rank_by" in way.defaults else None
        taken = MethodConfig(method=method, rank_by=rank_by).taken
        given = {
            name: value
            for name, value in self.shared.items()
            if (name not in OF_SOME_METHODS or name in taken)
            and name != "budget"
            and not (name == "granularity" and way.granularity)
        }
        # Steps are timed as they are in a first pass, whatever the method.
        return RunConfig(**{**given, "cache_frozen_prefix": "off", "method": method, **fields})

    def check(self) -> None:
        """Raise InputError for values that contradict one another. Looks at no file."""
        super().check()
        if 1 < self.rate_trials < LEAST_TRIALS:
            raise InputError(
                f"rate_trials is {self.rate_trials}; take {LEAST_TRIALS} or more, or 1 for every method's default rate."
            )
        if self.sizes == "usual" and self.shared.get("budget") is not None:
            raise InputError(
                "budget is given, and says what equal sizes are; leave it out, or take sizes equal or both."
            )
        training = self.shared.get("training", {})
        for name in DECIDED:
            if name in training:
                why = (
                    "a comparison finds each method's own rate on validation data"
                    if name == "learning_rate"
                    else "a comparison decides it for all methods"
                )
                raise InputError(f"{name} is given, and {why}; leave it out.")
        for name in OF_SOME_METHODS:
            if name in self.shared and name not in ("budget", "head_epochs") and not self._is_taken(name):
                takers = [method for method, way in METHODS.items() if name in (*way.defaults, *way.takes)]
                raise InputError(
                    f"{name} is given, and none of the methods compared uses it; leave it out, or add one of {', '.join(takers)}."
                )
        if self.seed + self.seeds > 2**32:
            raise InputError(f"seed is {self.seed}, and {self.seeds} seeds from there on end above 4294967295.")

    def _is_taken(self, name: str) -> bool:
        ranked = self.shared.get("rank_by") is not None
        return any(
            name
            in MethodConfig(
                method=method, rank_by="relevance" if ranked and "rank_by" in METHODS[method].defaults else None
            ).taken
            for method in self.names
        )

    def difference(self, other: ComparisonConfig, training: bool = True) -> str:
        """How another comparison's data, model or training differ, in words; empty where its runs can be used in this one.

        Without ``training``, its fields are not looked at, which may be words still.
        """
        mine, theirs = self._decisive(training), other._decisive(training)
        changed = [name for name in mine if mine[name] != theirs[name]]
        if not changed:
            return ""
        name = changed[0]
        more = f", and {len(changed) - 1} more fields differ" if len(changed) > 1 else ""
        return f"{name} is {_shown(theirs[name])} there and {_shown(mine[name])} here{more}"

    def _decisive(self, training: bool) -> dict[str, Any]:
        """What decides the numbers of a single run: not which methods, sizes, seeds or processes there are."""
        values = {}
        for each in SHARED_FIELDS:
            default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
            values[each.name] = self.shared.get(each.name, None if default is dataclasses.MISSING else default)
        fields = self.shared.get("training", {}) if training else {}
        for name in ("output_dir", "budget", "training"):
            del values[name]
        return {
            **values,
            "rate_trials": self.rate_trials,
            **{name: fields.get(name) for name in training_field_names()},
        }

    def save(self, path: str | os.PathLike) -> None:
        own = {each.name: getattr(self, each.name) for each in OWN_FIELDS}
        write_text(path, yaml.safe_dump({**self.shared, **own}, sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | os.PathLike) -> ComparisonConfig:
        """Raises InputError for a file that cannot be read as a comparison's."""
        try:
            return comparison_config(checked_fields(read_yaml(path), COMPARISON_FIELDS))
        except (OSError, Damaged, AttributeError, TypeError) as error:
            raise InputError(f"{path} cannot be read as a comparison's config: {error}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


OWN_FIELDS = tuple(each for each in dataclasses.fields(ComparisonConfig) if each.name != "shared")
COMPARISON_FIELDS = (*SHARED_FIELDS, *OWN_FIELDS)


def comparison_config(values: Mapping[str, Any]) -> ComparisonConfig:
    """The config of a comparison from fields of a run and its own, side by side."""
    own = {each.name: values[each.name] for each in OWN_FIELDS if each.name in values}
    rest = {name: value for name, value in values.items() if name not in own and name not in ("sweep", "sweep_trials")}
    for name, value in rest.items():
        if name in NOT_SHARED and value is not None:
            raise InputError(f"{name} is given, and a comparison does not use it; leave it out.")
    return ComparisonConfig(shared=rest, **own)


def _shown(value: Any) -> str:
    return (
        "not given"
        if value in (None, [], {})
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )
