"""What a run would train under a budget, told at once: for a slider.

The units are looked up (plan/order.py), memory and time are a sum (cost/profile.py). ``reltune select`` makes the plan itself.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reltune.errors import InputError
from reltune.files import read_json
from reltune.names import GRANULARITIES, SPREADS
from reltune.plan.budget import parse_budget, read_budget
from reltune.plan.granularities import check_together
from reltune.report import numbers
from reltune.report.record import ComparisonRecord
from reltune.runs.directory import RunDirectory
from reltune.studio.places import DAMAGE

if TYPE_CHECKING:
    from reltune.config.run_config import RunConfig
    from reltune.cost.profile import Chosen
    from reltune.layers.units import ModuleInfo
    from reltune.plan.order import SelectionOrder
    from reltune.relevance.heatmap import Heatmap
    from reltune.runs.estimate import PlanCosts
    from reltune.runs.sizes import Sizes

STEPS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # of a decade of budgets
# The budgets of the slider: shares of the model in percent.
BUDGETS = [f"{step * 10.0**decade:.6g}%" for decade in range(-4, 2) for step in STEPS] + ["100%"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How is chosen: the fields of a run's config."""

    criterion: str
    granularity: tuple[str, ...]
    spread: str


@dataclasses.dataclass(frozen=True)
class ModuleRow:
    """What falls in of one module: ``units`` of the ``available`` ones, which are ``parameters`` trainable numbers."""

    name: str
    layer: str
    place: str
    used: bool
    units: int
    available: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a budget gives.

    Attributes:
        limit: parameters that it allows; where it limits memory or time, those that are chosen.
        ends_at: the lowest module that anything is chosen of: nothing below it is differentiated or kept.
        memory: bytes of the training step, ``seconds`` its time; None where they are not known, and ``unknown`` then says why.
        padded: the lengths of batches that both are told for, as ``Estimate`` has them.
        expected: what a comparison has measured near this size, in a sentence.
        settings: what a budget of memory or time changes beside the units, one sentence each.
        problem: why nothing could be chosen.
    """

    limit: int
    parameters: int
    share: float
    rows: list[ModuleRow]
    by_layer: dict[str, int]
    ends_at: str = ""
    memory: int | None = None
    seconds: float | None = None
    device: str = ""
    device_memory: int = 0
    unknown: str = ""
    padded: Mapping[str, Sequence[int]] | None = None
    expected: str = ""
    settings: tuple[str, ...] = ()
    problem: str = ""


class BudgetView:
    """The budgets of one run that was analyzed."""

    def __init__(self, run: Path, costs: Callable[[RunConfig], PlanCosts] | None = None) -> None:
        """Raises InputError for a run that was not analyzed, and for one that chooses nothing."""
        from reltune.relevance.scores import RelevanceScores
        from reltune.runs.preflight import check_chooses

        self.run, self.config = RunDirectory.open(run)
        check_chooses(self.config)
        self.relevance = RelevanceScores.load(self.run.relevance)
        self.inventory = self.relevance.inventory
        self._make_costs = costs
        self._orders: dict[Rule, SelectionOrder] = {}
        self._heatmaps: dict[str, Heatmap] = {}
        self._lock = threading.Lock()

    # -- what there is to choose from ---------------------------------------------------------------------------------

    @property
    def criteria(self) -> list[str]:
        return self.relevance.criteria

    def granularities(self, criterion: str) -> list[str]:
        """Those that the criterion has scores of; and what the run itself has, where that is several."""
        return [kind for kind in GRANULARITIES if self.relevance.by(kind, criterion)]

    @staticmethod
    def spreads(granularity: Collection[str]) -> list[str]:
        found = []
        for spread in SPREADS:
            try:
                check_together(list(granularity), spread)
            except InputError:
                continue
            found.append(spread)
        return found

    @property
    def rule(self) -> Rule:
        """That of the run's config."""
        named = (self.config.criteria or [""])[0]
        criterion = named if named in self.criteria else self.criteria[0]
        return Rule(criterion, tuple(self.config.granularity), self.config.spread)

    @cached_property
    def excluded(self) -> list[str]:
        """The modules that the run's config leaves out of what was measured."""
        from reltune.layers.inventory import choose

        everything = [info.name for info in self.inventory.modules]
        target, exclude = self.run.measured_modules()
        now = (self.config.target_modules, self.config.exclude_modules)
        wanted = [
            [] if patterns == earlier else patterns for patterns, earlier in zip(now, (target, exclude), strict=True)
        ]
        kept = choose(self.inventory, *wanted)
        return [name for name in everything if name not in kept]

    def heatmap(self, criterion: str) -> Heatmap:
        """Relevance by layer and module."""
        if criterion not in self._heatmaps:
            self._heatmaps[criterion] = self.relevance.heatmap(criterion)
        return self._heatmaps[criterion]

    def order(self, rule: Rule) -> SelectionOrder:
        from reltune.plan.order import SelectionOrder

        with self._lock:
            if rule not in self._orders:
                target, _ = self.run.measured_modules()
                self._orders[rule] = SelectionOrder(
                    self.relevance,
                    rule.granularity,
                    criterion=rule.criterion,
                    spread=rule.spread,
                    target_modules=[info.name for info in self.inventory.modules] if target else (),
                )
            return self._orders[rule]

    @cached_property
    def costs(self) -> PlanCosts | str:
        """What plans take, or why that is not known."""
        from reltune.runs.estimate import PlanCosts

        try:
            return self._make_costs(self.config) if self._make_costs else PlanCosts(self.config, sizes=self.sizes)
        except InputError as error:
            return str(error)
        except Exception as error:  # a model that cannot be counted is chosen from all the same
            return f"memory and time of this model cannot be predicted ({type(error).__name__})."

    @cached_property
    def sizes(self) -> Sizes:
        """Of the run's data; nothing is known of data that cannot be read any more."""
        from reltune.runs.flow import sizes_of_run
        from reltune.runs.sizes import NOT_KNOWN

        try:
            return sizes_of_run(dataclasses.replace(self.config), self.run)
        except InputError:
            return NOT_KNOWN

    # -- what a budget gives --------------------------------------------------------------------------------------------

    def choice(self, budget: str, rule: Rule, without: Collection[str] = ()) -> Choice:
        """Raises InputError for a budget that is no number or more than the model has. One of memory or time takes seconds."""
        limit = parse_budget(budget, self.inventory.base_parameters)
        order = self.order(rule)
        chosen: Mapping[str, Chosen] = {}
        more: dict[str, Any] = {}
        try:
            if read_budget(budget).is_limited:
                chosen, more = self._within(budget, rule, without)
            elif chosen := order.at(limit, without):
                more = self._predicted(chosen)
            else:
                units = " or ".join(rule.granularity)
                more["problem"] = (
                    f"a budget of {limit:,} parameters allows not one {units}; raise it, or use more modules."
                )
        except InputError as error:
            more = {"problem": str(error)}
        rows = [self._row(info, chosen.get(info.name), rule, info.name not in without) for info in self._infos(order)]
        by_layer = dict.fromkeys((info.layer for info in self._infos(order)), 0)
        for row in rows:
            by_layer[row.layer] += row.parameters
        parameters = sum(by_layer.values())
        if chosen:
            more |= {"ends_at": next(iter(chosen)), "expected": self._expected(parameters)}
        share = parameters / self.inventory.base_parameters
        return Choice(more.pop("limit", limit), parameters, share, rows, by_layer, **more)

    def _within(self, budget: str, rule: Rule, without: Collection[str]) -> tuple[Mapping[str, Chosen], dict[str, Any]]:
        """What keeps a budget of memory or time, as ``reltune select`` chooses it, and what that takes."""
        from reltune.plan.order import counted
        from reltune.runs.flow import forecast_selection

        fields = select_fields(self, budget, rule, without)
        fields |= {"criteria": fields["criteria"].split(","), "granularity": list(rule.granularity)}
        config = dataclasses.replace(self.config, **fields)
        if self.excluded and not without:  # as --every_module
            config.target_modules, config.exclude_modules = self.run.measured_modules()
        found = forecast_selection(config, self.run, relevance=self.relevance, sizes=self.sizes, shown=False)
        assert found.plan is not None
        estimate, (row, *_) = found.estimate, found.estimate.rows
        return {name: counted(module) for name, module in found.plan.modules.items()}, {
            "limit": found.plan.parameters,
            "memory": row.total,
            "seconds": row.seconds,
            "device": estimate.device,
            "device_memory": estimate.device_memory,
            "padded": estimate.padded,
            "settings": tuple(found.settings.describe()),
        }

    def _infos(self, order: SelectionOrder) -> list[ModuleInfo]:
        return [self.inventory[name] for name in order.modules]

    @staticmethod
    def _row(info: ModuleInfo, chosen: Chosen | None, rule: Rule, used: bool) -> ModuleRow:
        from reltune.plan.order import parameters_of

        whole = info.is_vector or {"layer", "module"} & set(rule.granularity)
        available = (
            1
            if whole
            else sum(
                {
                    "column": info.columns,
                    "row": info.rows,
                    "element": info.weight_parameters,
                    "direction": min(info.shape),
                    "bias": int(info.bias),
                    "head": info.rows + info.columns,
                }.get(kind, 0)
                for kind in rule.granularity
            )
        )
        if chosen is None:
            return ModuleRow(info.name, info.layer, info.place, used, 0, available, 0)
        units = chosen.columns + chosen.rows + chosen.elements + chosen.directions + int(chosen.weight or chosen.bias)
        return ModuleRow(info.name, info.layer, info.place, used, units, available, parameters_of(info, chosen))

    def _predicted(self, chosen: Mapping[str, Chosen]) -> dict[str, Any]:
        costs = self.costs
        if isinstance(costs, str):
            return {"unknown": costs}
        told = costs.of(chosen)
        if told is None:
            return {"unknown": "memory and time of these modules are not counted."}
        return {
            "memory": told[0],
            "seconds": told[1],
            "device": costs.device,
            "device_memory": costs.device_memory,
            "padded": costs.padded,
        }

    @cached_property
    def _measured(self) -> list[tuple[int, str, str]]:
        """(trainable parameters, method, result in words) of the ways to train that were compared beside this run."""
        from reltune.report.comparison import label, mean

        if not self.run.comparison.is_file():
            return []
        try:
            record = ComparisonRecord.from_json(read_json(self.run.comparison))
        except DAMAGE:
            return []
        rows = [
            row
            for table in record.tables
            for row in table.rows
            if row.trainable_parameters and record.metric in row.metrics
        ]
        return [
            (row.trainable_parameters or 0, row.label, f"{label(record.metric)} {mean(record.metric, row)}")
            for row in rows
        ]

    def _expected(self, parameters: int) -> str:
        """The compared way to train, of this run's method, whose size is nearest."""
        own = [one for one in self._measured if one[1].split()[0] == self.config.method]
        if not own or not parameters:
            return ""
        size, name, result = min(own, key=lambda one: max(one[0], parameters) / min(one[0], parameters))
        return f"{name}, {numbers.count(size)} trained: {result}"


def select_fields(view: BudgetView, budget: str, rule: Rule, without: Collection[str]) -> dict[str, Any]:
    """The fields that ``reltune select`` is given for a choice. A run's criteria stay, the one that decides comes first."""
    others = [name for name in view.config.criteria or () if name != rule.criterion]
    ordered = [info.name for info in view.inventory.modules if info.name in set(without)]
    return {
        "budget": budget,
        "criteria": ",".join([rule.criterion, *others]),
        "granularity": ",".join(rule.granularity),
        "spread": rule.spread,
        "exclude_modules": ordered,
    }
