"""Choose the most relevant units that a budget allows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reltune.cost.memory import tensors_within
from reltune.cost.profile import Chosen, Profile
from reltune.errors import InputError, nearest
from reltune.layers.inventory import Inventory, choose
from reltune.layers.registry import layer_type
from reltune.layers.units import ModuleInfo
from reltune.names import GRANULARITIES
from reltune.plan import search
from reltune.plan.budget import parse_budget, read_budget
from reltune.plan.granularities import ALONE, WHOLE, check_together
from reltune.plan.plan import WORDS, ModulePlan, Plan
from reltune.plan.search import Choice, Group, Limits, Search
from reltune.plan.shares import Shares
from reltune.plan.threshold import above, best_of_columns, largest
from reltune.relevance.criteria.contract import granularities_of
from reltune.relevance.criteria.registry import CRITERIA
from reltune.relevance.scores import RelevanceScores


def select(
    relevance: RelevanceScores,
    budget: str | int | float,
    granularity: str | Sequence[str] = "column",
    *,
    criterion: str | None = None,
    spread: str = "global",
    target_modules: Sequence[str] = (),
    exclude_modules: Sequence[str] = (),
    model_name_or_path: str = "",
    task_type: str | None = None,
    profile: Profile | None = None,
    limits: Limits | None = None,
) -> Plan:
    """Take units in the order of relevance per trainable parameter until the budget is used.

    This is the greedy rule for the knapsack problem (Dantzig 1957): relevance adds up over units, a unit that no
    longer fits is passed over and smaller ones behind it may still be taken. Ties go to the earlier module and the
    lower index, so equal scores give equal plans. Units with a negative score (criteria that are signed) are never taken.

    Modules outside the layers (BERT's pooler, a final norm) compete only when ``target_modules`` names them. They stand
    next to the new head and get the largest gradients while it is still learning: left in, the pooler took most of a
    0.5% budget and cost 2.5 points of accuracy on movie reviews (docs/learning_rates.md).

    Where the budget limits memory or time too, a unit costs what it and its depth take, and the best cut-off below which nothing is
    trained is searched for (plan/search.py; of single weights and even spreads plan/shares.py).

    Args:
        budget: "0.5%" of the base model's parameters, a count of trainable parameters, "memory=12GiB", "time=0.5" (of a step of full
            fine-tuning), or several with blanks between.
        granularity: one or several of layer, module, head, column, row, element, direction, bias, norm. A head is an attention head
            (layers/attention_heads.py) and becomes rows of the query, key and value projections and columns of the output
            projection. An element is a single weight of a matrix (not of a bias or norm), and goes with bias and norm
            only: of any larger unit the best single weights would come first. A direction of a linear map's input goes with nothing
            else: its relevance is a singular value and no sum over weights. ``reltune run`` takes element, spread evenly, where
            nothing is named.
        criterion: which of the measured criteria decides; the first by default.
        spread: "global" lets all modules compete; "even" gives each module the share of the budget that it has of the
            weights, for columns, rows and elements, and for directions the same number of them. Where a column is too large for a
            module's share it gets none, and what is left over is not spent. "columns", for elements alone, is "even" with, in each
            module, the best element of every column before the second best of any.
        profile: what units cost, for a budget of memory or time: ``reltune.profile`` makes one.
        limits: what the budget allows, in the profile's terms, for a caller that knows more than it; by default they follow from the budget.

    Raises InputError for a budget that is no number or too small for the smallest unit, an unknown granularity or
    criterion, a granularity that the model has no unit of, and patterns that match nothing.
    """
    asked = _ask(relevance, granularity, criterion, spread, target_modules, exclude_modules)
    allowed = parse_budget(budget, relevance.inventory.base_parameters)
    if limits is None:
        limits = limits_of(budget, allowed, profile)
    if limits.is_parameters_alone:
        asked.check_smallest(budget, limits.parameters)
        chosen = asked.choose(limits.parameters)
    else:
        assert profile is not None, "limits of memory and time are in a profile's terms"
        ways = _Ways(asked, profile)
        choices = ways.at_cut_offs(limits)
        lowest = search.best(choices)
        if lowest is None:
            least, lowest = ways.search.smallest()
            plan = asked.plan(
                ways.chosen(least, lowest),
                str(budget),
                relevance.inventory.base_parameters,
                model_name_or_path,
                task_type,
            )
            raise Unaffordable(
                f"budget {budget}: no unit fits; the cheapest choice takes {least.cost.memory / 2**20:,.1f} MiB of tensors and "
                f"{least.cost.seconds:.3g} s a step.",
                plan,
            )
        choice = choices[lowest]
        assert choice is not None, "best has found it"
        chosen = ways.chosen(choice, lowest)
    return asked.plan(chosen, str(budget), min(limits.parameters, allowed), model_name_or_path, task_type)


def limits_of(budget: str | int | float, parameters: int, profile: Profile | None) -> Limits:
    """What a budget allows in a profile's terms, with so many parameters.

    Raises InputError for a budget of memory or time without a profile, one of time without a speed, and one of hours.
    """
    parts = read_budget(budget)
    if not parts.is_limited:
        return Limits(parameters)
    if profile is None:
        raise InputError(
            f"budget {budget!r}: what units take of memory and time is not known here; pass profile=reltune.profile(model, …)."
        )
    if parts.hours is not None:
        raise InputError(
            f"budget {budget!r}: hours depend on the data, which are not known here; give time, or use the command line."
        )
    memory, seconds = math.inf, math.inf
    if parts.memory is not None:
        memory = tensors_within(parts.memory, profile.conditions.cuda)
    if parts.time is not None:
        if profile.calibration is None:
            raise InputError(
                f"budget {budget!r}: the speed of the device is not known; name a card, or leave time out."
            )
        seconds = parts.time * profile.cost({name: Chosen(weight=True) for name in profile.modules}).seconds
    return Limits(parameters, memory, seconds)


class Unaffordable(InputError):
    """A budget of memory or time in which no unit fits; ``plan`` is the cheapest that there is."""

    def __init__(self, message: str, plan: Plan) -> None:
        super().__init__(message)
        self.plan = plan


@dataclasses.dataclass(frozen=True)
class CutOff:
    """A row of the frontier: the best choice with nothing trained below a block.

    Attributes:
        lowest: the block, counted from 0, and ``layer`` its name.
        memory: bytes that tensors hold at most; ``seconds`` of a step, nan where the speed is not known.
        share: of the relevance that the same number of parameters has where they may be anywhere.
        counts: units of each module.
    """

    lowest: int
    layer: str
    parameters: int
    memory: int
    seconds: float
    share: float
    counts: Mapping[str, Chosen]


def frontier(
    relevance: RelevanceScores,
    limits: Limits,
    profile: Profile,
    granularity: str | Sequence[str] = "column",
    *,
    criterion: str | None = None,
    spread: str = "global",
    target_modules: Sequence[str] = (),
    exclude_modules: Sequence[str] = (),
) -> list[CutOff]:
    """What each cut-off costs and keeps, from the lowest on, of those at which anything fits. Arguments and errors as of ``select``."""
    ways = _Ways(_ask(relevance, granularity, criterion, spread, target_modules, exclude_modules), profile)
    anywhere = ways.at_cut_off(0, Limits(limits.parameters))
    rows: list[CutOff] = []
    for choice in ways.at_cut_offs(limits):
        if choice is None or (rows and rows[-1].lowest == choice.cost.lowest):
            continue
        cost = choice.cost
        share = choice.worth / anywhere.worth if anywhere is not None and anywhere.worth else 0.0
        rows.append(
            CutOff(
                cost.lowest,
                profile.names[cost.lowest],
                cost.trained,
                cost.memory,
                cost.seconds,
                share,
                ways.plan(choice),
            )
        )
    return rows


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What is to be chosen from, and how."""

    relevance: RelevanceScores
    granularities: list[str]
    criterion: str
    spread: str
    candidates: Candidates
    elements: dict[str, Tensor]

    def check_smallest(self, budget: str | int | float, limit: int) -> None:
        """Raise InputError for a budget that no unit fits."""
        smallest = _smallest(self.candidates, self.elements)
        assert smallest is not None, "_ask has seen to it"
        if smallest > limit:
            raise InputError(
                f"budget {budget} allows {limit:,} parameters, and the smallest {' or '.join(self.granularities)} has {smallest:,}; "
                "raise the budget or choose a finer granularity."
            )

    def choose(self, limit: int) -> dict[str, ModulePlan]:
        inventory = self.relevance.inventory
        return SPREAD_OUT[self.spread](inventory, self.granularities, self.candidates, self.elements, limit)

    def only(self, names: Collection[str]) -> _Asked:
        """The units of these modules alone."""
        places = [i for i, (_, name) in enumerate(self.candidates.places) if name in names]
        elements = {name: scores for name, scores in self.elements.items() if name in names}
        return dataclasses.replace(self, candidates=self.candidates.within(places), elements=elements)

    def plan(
        self, chosen: dict[str, ModulePlan], budget: str, limit: int, model_name_or_path: str, task_type: str | None
    ) -> Plan:
        relevance, inventory = self.relevance, self.relevance.inventory
        vectors = relevance.directions(self.criterion) if ALONE in self.granularities else {}
        for name, module in chosen.items():
            module.vectors = vectors[name].numpy() if name in vectors else None
        plan = Plan(
            modules=_in_order(inventory, chosen),
            budget=budget,
            budget_parameters=limit,
            base_parameters=inventory.base_parameters,
            fingerprint=relevance.fingerprint,
            architecture=str(relevance.provenance.get("architecture", "")),
            weights=str(relevance.provenance.get("weights", "")),
            criterion=self.criterion,
            granularity=self.granularities,
            spread=self.spread,
            model_name_or_path=model_name_or_path or str(relevance.provenance.get("model", "")),
            task_type=task_type,
            always_trained=relevance.always_trained,
            head_parameters=inventory.head_parameters,
        )
        plan.check()
        return plan


def _ask(
    relevance: RelevanceScores,
    granularity: str | Sequence[str],
    criterion: str | None,
    spread: str,
    target_modules: Sequence[str],
    exclude_modules: Sequence[str],
) -> _Asked:
    granularities, criterion, candidates, elements = units_to_choose(
        relevance, granularity, criterion, spread, target_modules, exclude_modules
    )
    if _smallest(candidates, elements) is None:
        raise InputError(
            f"{criterion} gives every {' and '.join(granularities)} a negative score; select by another criterion."
        )
    return _Asked(relevance, granularities, criterion, spread, candidates, elements)


class _Ways:
    """What may be chosen at each cut-off depth, under limits of memory and time."""

    def __init__(self, asked: _Asked, profile: Profile) -> None:
        self.asked, self.profile = asked, profile
        check_alone(asked.granularities)
        unknown = [
            piece.info.name
            for granularity, name in [*asked.candidates.places, *(("element", name) for name in asked.elements)]
            for piece in _pieces(asked.relevance.inventory, granularity, name, 0)
            if piece.info.name not in profile.modules
        ]
        if unknown:
            raise InputError(
                f"what units of {unknown[0]} take of memory and time is not known; leave it out by exclude_modules, or budget parameters alone."
            )
        if asked.elements or asked.spread != "global":
            self.search: Search | Shares = self._shares()
        else:
            self.search = Search([self._group(i) for i in range(len(asked.candidates.places))], profile)

    def at_cut_off(self, lowest: int, limits: Limits) -> Choice | None:
        return self.search.at_cut_off(lowest, limits)

    def at_cut_offs(self, limits: Limits) -> list[Choice | None]:
        return [self.at_cut_off(lowest, limits) for lowest in range(len(self.profile.blocks))]

    def plan(self, choice: Choice) -> Mapping[str, Chosen]:
        return self.search.plan(choice.counts)

    def _group(self, place: int) -> Group:
        candidates, inventory = self.asked.candidates, self.asked.relevance.inventory
        granularity, name = candidates.places[place]
        one: dict[str, Chosen] = {}
        for piece in _pieces(inventory, granularity, name, 0):
            count = len(piece.indices)
            if granularity in WHOLE:
                part = Chosen(weight=True, bias=piece.info.bias)
            elif piece.granularity == "bias":
                part = Chosen(bias=True)
            else:
                counted: dict[str, Any] = {f"{piece.granularity}s": count}
                part = Chosen(**counted)
            one[piece.info.name] = one.get(piece.info.name, Chosen()) + part
        return Group(one, candidates.worth[candidates.place == place])

    def _shares(self) -> Shares:
        asked, inventory = self.asked, self.asked.relevance.inventory
        groups = [self._group(i) for i in range(len(asked.candidates.places))]
        groups += [
            Group({name: Chosen(elements=1)}, scores.numpy().reshape(-1)) for name, scores in asked.elements.items()
        ]
        sizes = [share_size(inventory[next(iter(group.one))], asked.granularities) for group in groups]
        return Shares(groups, sizes, self.profile, together=asked.spread == "global")

    def chosen(self, choice: Choice, lowest: int) -> dict[str, ModulePlan]:
        """The units of a choice that was made for a cut-off."""
        if isinstance(self.search, Shares):
            open_ = self.search.names(lowest)
            return self.asked.only(open_).choose(self.search.limit(choice))
        candidates, inventory = self.asked.candidates, self.asked.relevance.inventory
        chosen: dict[str, ModulePlan] = {}
        for place, count in enumerate(choice.counts):
            granularity, name = candidates.places[place]
            order = np.argsort(-candidates.worth[candidates.place == place], kind="stable")
            for unit in order[:count].tolist():
                for piece in _pieces(inventory, granularity, name, unit):
                    _take(chosen.setdefault(piece.info.name, ModulePlan(piece.info.shape)), piece)
        return chosen


def check_alone(granularities: Sequence[str]) -> None:
    """Raise InputError for granularities that share weights, whose costs under limits of memory and time do not add up."""
    if len(granularities) > 1 and not set(granularities) <= {"column", "row", "bias"}:
        raise InputError(
            f"a budget of memory or time takes one granularity, or column, row and bias, and not {', '.join(granularities)}; name one of "
            "them, or budget parameters alone."
        )


def units_to_choose(
    relevance: RelevanceScores,
    granularity: str | Sequence[str],
    criterion: str | None,
    spread: str,
    target_modules: Sequence[str],
    exclude_modules: Sequence[str],
) -> tuple[list[str], str, Candidates, dict[str, Tensor]]:
    """The granularities, the criterion, and the units that compete under any budget: single weights apart. The arguments, and what is
    raised, are those of ``select``."""
    granularities = [granularity] if isinstance(granularity, str) else list(dict.fromkeys(granularity))
    _check_known(granularities)
    check_together(granularities, spread)
    criterion = relevance.criterion(criterion)
    check_scored(granularities, criterion)
    inventory = relevance.inventory
    named = choose(inventory, target_modules, exclude_modules)
    _check_whole(inventory, named, granularities)
    allowed = _allowed(inventory, named, everywhere=bool(target_modules))
    candidates = _candidates(relevance, criterion, granularities, allowed)
    elements = _elements(relevance, criterion, allowed) if "element" in granularities else {}
    if not candidates.places and not elements:
        raise InputError(
            f"no module that may be chosen has a unit of granularity {', '.join(granularities)} scored by {criterion}"
            f"{_why_none(inventory, named, allowed, granularities)}; name another one."
        )
    return granularities, criterion, candidates, elements


def check_scored(granularities: Sequence[str], criterion: str) -> None:
    """Raise InputError for granularities that the criterion never scores."""
    known = CRITERIA.get(criterion)
    scored = GRANULARITIES if known is None else granularities_of(known)
    missing = [word for word in granularities if word not in scored]
    if missing:
        raise InputError(
            f"{criterion} scores no {' or '.join(missing)}, only {', '.join(scored)}; choose that granularity, or select by "
            "another criterion."
        )


def check_share(limit: int, modules: int) -> None:
    """Raise InputError for a budget that, spread evenly, is less than one single weight for each module."""
    if limit < modules:
        raise InputError(
            f"a budget of {limit:,} parameters spread evenly allows less than one single weight in each of {modules:,} modules; "
            f"raise it to {modules:,} at least, name fewer modules, or spread globally."
        )


def modules_with_elements(inventory: Inventory, everywhere: bool = False) -> list[str]:
    """The modules whose single weights may be chosen: of those in layers alone, where there are any, unless ``everywhere``."""
    allowed = _allowed(inventory, [info.name for info in inventory.modules], everywhere)
    return [info.name for info in inventory.modules if info.name in allowed and "element" in _trains(info)]


def _check_known(granularities: Sequence[str]) -> None:
    if not granularities:
        raise InputError(f"no granularity was named; choose from {', '.join(GRANULARITIES)}.")
    for word in granularities:
        if word not in GRANULARITIES:
            raise InputError(f"granularity {word!r} is unknown; {nearest(word, GRANULARITIES)}")


# -- what may be chosen ------------------------------------------------------------------------------------------------


def _trains(info: ModuleInfo) -> frozenset[str]:
    return layer_type(info.layer_type).trains


def _check_whole(inventory: Inventory, named: Sequence[str], granularities: Sequence[str]) -> None:
    """Raise InputError where whole weights are wanted of modules that have no trainable numbers."""
    wanted = [word for word in granularities if word in ("layer", "module")]
    for name in named if wanted else ():
        info = inventory[name]
        if _trains(info) and "weight" not in _trains(info):
            can = ", ".join(word for part, word in WORDS.items() if part in _trains(info))
            raise InputError(
                f"{name} is {info.layer_type}, and of such modules no whole {wanted[0]} can be trained, only {can}; choose another "
                "granularity, or leave them out by exclude_modules."
            )


def _allowed(inventory: Inventory, named: Sequence[str], everywhere: bool) -> set[str]:
    """The named modules that can be trained; of those in layers alone, where there are any, unless ``everywhere``."""
    trainable = {name for name in named if _trains(inventory[name])}
    inside = {name for name in trainable if inventory[name].in_block}
    return trainable if everywhere or not inside else inside


def _elements(relevance: RelevanceScores, criterion: str, allowed: Collection[str]) -> dict[str, Tensor]:
    """The scores of single weights, by module, of the modules whose single weights can be trained."""
    scored = relevance.by("element", criterion)
    if not scored:
        raise InputError(
            f"{criterion} was measured without single weights here; analyze again with elements (--elements)."
        )
    inventory = relevance.inventory
    return {n: scores for n, scores in scored.items() if n in allowed and "element" in _trains(inventory[n])}


def _why_none(
    inventory: Inventory, named: Sequence[str], allowed: Collection[str], granularities: Sequence[str]
) -> str:
    """A remark in brackets, or nothing, on why there is nothing to choose."""
    measured_only = [f"{name} ({inventory[name].layer_type})" for name in named if name not in allowed]
    if measured_only and not allowed:
        return f" ({measured_only[0]} can be measured and not trained)"
    if "head" not in granularities:
        return ""
    return next((f" ({name}: {reason})" for name, reason in inventory.without_attention_heads.items()), "")


# -- units with their prices -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a unit takes of one module: columns or rows, the bias, or everything (of a granularity in ``WHOLE``)."""

    info: ModuleInfo
    granularity: str
    indices: Sequence[int]

    @property
    def cost(self) -> int:
        if self.granularity == "column":
            return len(self.indices) * self.info.column_parameters
        if self.granularity == "row":
            return len(self.indices) * self.info.row_parameters
        if self.granularity == "direction":
            return len(self.indices) * self.info.rows  # the direction itself is fixed
        return self.info.bias_parameters + (self.info.weight_parameters if self.granularity in WHOLE else 0)

    @property
    def can_be_trained(self) -> bool:
        return ("weight" if self.granularity in WHOLE else self.granularity) in _trains(self.info)

    def without(self, taken: Collection[int]) -> _Piece:
        if not taken or self.granularity not in ("column", "row"):
            return self
        return dataclasses.replace(self, indices=[index for index in self.indices if index not in taken])


def _pieces(inventory: Inventory, granularity: str, name: str, index: int) -> list[_Piece]:
    """What the unit ``index`` of a granularity under ``name`` takes of each module."""
    if granularity == "layer":
        inside = [info for info in inventory.modules if info.layer == name and info.in_block]
        return [_Piece(info, granularity, [0]) for info in inside if _trains(info)]
    if granularity == "head":
        group = next(group for group in inventory.attention_heads if group.name == name)
        rows = [_Piece(inventory[module], "row", own) for module, own in group.rows(index).items()]
        return [*rows, _Piece(inventory[group.output], "column", group.output_columns(index))]
    return [_Piece(inventory[name], granularity, [index])]


@dataclasses.dataclass
class Candidates:
    """All units to choose from except single weights, as parallel arrays: a large model has millions of columns."""

    places: list[tuple[str, str]]  # granularity, and the name of the layer or module
    place: np.ndarray  # of each unit: which of the places it is in,
    index: np.ndarray  # its number there,
    price: np.ndarray  # its trainable parameters,
    worth: np.ndarray  # and its relevance

    def within(self, places: Sequence[int]) -> Candidates:
        """Those in these places alone."""
        where = np.isin(self.place, places)
        renumbered = np.searchsorted(places, self.place[where])
        named = [self.places[i] for i in places]
        return Candidates(named, renumbered, self.index[where], self.price[where], self.worth[where])

    def only(self, name: str) -> Candidates:
        """Those of one module."""
        mine = [i for i, (_, place) in enumerate(self.places) if place == name]
        starts, ends = np.searchsorted(self.place, mine), np.searchsorted(self.place, mine, "right")  # it is ascending
        where = np.concatenate([np.empty(0, int), *(np.arange(a, b) for a, b in zip(starts, ends, strict=True))])
        return Candidates(self.places, self.place[where], self.index[where], self.price[where], self.worth[where])


def _candidates(
    relevance: RelevanceScores, criterion: str, granularities: Sequence[str], allowed: Collection[str]
) -> Candidates:
    places: list[tuple[str, str]] = []
    place, index, price, worth = [np.empty(0, int)], [np.empty(0, int)], [np.empty(0, int)], [np.empty(0)]
    for granularity in granularities:
        if granularity == "element":
            continue
        for name, scores in relevance.by(granularity, criterion).items():
            pieces = _pieces(relevance.inventory, granularity, name, 0)
            if not pieces or not all(piece.info.name in allowed and piece.can_be_trained for piece in pieces):
                continue
            values = scores.reshape(-1).double().numpy()
            places.append((granularity, name))
            place.append(np.full(len(values), len(places) - 1))
            index.append(np.arange(len(values)))
            price.append(np.full(len(values), sum(piece.cost for piece in pieces)))
            worth.append(values)
    return Candidates(places, *(np.concatenate(part) for part in (place, index, price, worth)))


def _smallest(candidates: Candidates, elements: Mapping[str, Tensor]) -> int | None:
    """The lowest price of a unit with a score that is not negative; None where every score is negative."""
    prices = candidates.price[candidates.worth >= 0].tolist()
    if any(bool((scores >= 0).any()) for scores in elements.values()):
        prices.append(1)
    return min(prices, default=None)


# -- choosing ----------------------------------------------------------------------------------------------------------


def _evenly(
    inventory: Inventory,
    granularities: Sequence[str],
    candidates: Candidates,
    elements: Mapping[str, Tensor],
    limit: int,
) -> dict[str, ModulePlan]:
    """What each module gets for its share of the budget."""
    names = {name for _, name in candidates.places} | {*elements}
    sizes = {name: share_size(inventory[name], granularities) for name in names}
    if elements:
        check_share(limit, len(elements))
    check_kept(inventory, granularities, candidates, limit // sum(sizes.values()))
    chosen: dict[str, ModulePlan] = {}
    for name, size in sizes.items():
        own = {name: elements[name]} if name in elements else {}
        share = limit * size // sum(sizes.values())
        chosen |= _greedy(inventory, granularities, candidates.only(name), own, share)
    if not chosen:
        raise _too_small_evenly(limit, granularities, len(sizes))
    return chosen


def _too_small_evenly(limit: int, granularities: Sequence[str], modules: int) -> InputError:
    return InputError(
        f"a budget of {limit:,} parameters spread evenly allows less than one {' or '.join(granularities)} in each of "
        f"{modules} modules; raise it, name fewer modules, choose a finer granularity, or spread globally."
    )


def share_size(info: ModuleInfo, granularities: Sequence[str]) -> int:
    """What a module's even share is in proportion to: its weights, or what a direction of it costs."""
    return info.rows if ALONE in granularities else info.weight_parameters


def check_kept(inventory: Inventory, granularities: Sequence[str], candidates: Candidates, share: int) -> None:
    """Raise InputError where the share of every module is more directions than were kept of some that has more."""
    if ALONE not in granularities:
        return
    kept = np.bincount(candidates.place)
    most = int(kept.argmax())
    (_, name), count = candidates.places[most], int(kept[most])
    if count < min(share, *inventory[name].shape):
        raise InputError(
            f"the budget allows {share} directions of every module, and the analysis kept {count} of {name}; lower the budget, or "
            f"analyze again with more (--probe_directions {share})."
        )


def _over_columns(
    inventory: Inventory,
    granularities: Sequence[str],
    candidates: Candidates,
    elements: Mapping[str, Tensor],
    limit: int,
) -> dict[str, ModulePlan]:
    """Each module's share of the budget in single weights: the best of every column, then the second best, and so on."""
    check_share(limit, len(elements))
    sizes = {name: inventory[name].weight_parameters for name in elements}
    chosen: dict[str, ModulePlan] = {}
    for name, scores in elements.items():
        index = best_of_columns(scores, limit * sizes[name] // sum(sizes.values()))
        if len(index):
            chosen[name] = ModulePlan(inventory[name].shape)
            chosen[name].take_elements(index)
    if not chosen:
        raise _too_small_evenly(limit, granularities, len(sizes))
    return chosen


def _greedy(
    inventory: Inventory,
    granularities: Sequence[str],
    candidates: Candidates,
    elements: Mapping[str, Tensor],
    limit: int,
) -> dict[str, ModulePlan]:
    """Take these units, and single weights, in the order of worth per parameter, until the limit is reached."""
    chosen: dict[str, ModulePlan] = {}
    held: dict[str, int] = {}  # trainable parameters of each chosen module, kept up to date
    taken: dict[tuple[str, str], set[int]] = {}  # columns and rows of each chosen module
    used = 0
    worth, price, places = candidates.worth, candidates.price, candidates.places
    smallest = int(price.min()) if len(price) else 0
    before = _elements_before(granularities, candidates, elements)
    for candidate in np.argsort(-(worth / price), kind="stable"):
        if (limit - used < smallest and len(granularities) == 1) or worth[candidate] < 0:
            break
        granularity, name = places[candidates.place[candidate]]
        pieces = [
            piece.without(taken.get((piece.info.name, piece.granularity), ()))
            for piece in _pieces(inventory, granularity, name, int(candidates.index[candidate]))
            if piece.info.name not in chosen or not chosen[piece.info.name].weight
        ]
        pieces = [piece for piece in pieces if piece.indices]
        added = [p.cost - (held.get(p.info.name, 0) if p.granularity in WHOLE else 0) for p in pieces]
        if not pieces or int(before[candidate]) + used + sum(added) > limit:
            continue
        for piece, more in zip(pieces, added, strict=True):
            module = piece.info.name
            _take(chosen.setdefault(module, ModulePlan(piece.info.shape)), piece)
            held[module] = held.get(module, 0) + more
            taken.setdefault((module, piece.granularity), set()).update(piece.indices)
        used += sum(added)
    if elements and limit > used:
        for name, index in largest(elements, limit - used).items():
            chosen.setdefault(name, ModulePlan(inventory[name].shape)).take_elements(index)
    return chosen


SPREAD_OUT = {"global": _greedy, "even": _evenly, "columns": _over_columns}  # for each of names.SPREADS


def _elements_before(
    granularities: Sequence[str], candidates: Candidates, elements: Mapping[str, Tensor]
) -> np.ndarray:
    """How many single weights come before each candidate.

    These are the ones worth more, and those worth as much where elements were named first.
    """
    before = np.zeros(len(candidates.price), dtype=np.int64)
    if not elements:
        return before
    ratio = candidates.worth / candidates.price
    rank = granularities.index("element")
    later = np.array([granularities.index(word) > rank for word, _ in candidates.places], dtype=bool)
    for equal in (False, True):
        where = later[candidates.place] == equal if len(later) else np.zeros(0, bool)
        if where.any():
            thresholds, inverse = np.unique(ratio[where], return_inverse=True)
            before[where] = above(elements, torch.from_numpy(thresholds), equal).numpy()[inverse]
    return before


def _take(module: ModulePlan, piece: _Piece) -> None:
    """Add what the unit takes; a whole weight takes the place of its columns and rows."""
    if piece.granularity in WHOLE:
        module.columns, module.rows, module.weight, module.bias = [], [], True, piece.info.bias
    elif piece.granularity == "bias":
        module.bias = True
    else:
        into = {"column": module.columns, "row": module.rows, "direction": module.directions}
        into[piece.granularity].extend(piece.indices)


def _in_order(inventory: Inventory, chosen: Mapping[str, ModulePlan]) -> dict[str, ModulePlan]:
    """The chosen modules in the model's order, their columns, rows and directions ascending."""
    for module in chosen.values():
        module.columns.sort()
        module.rows.sort()
        module.directions.sort()
    return {
        info.name: dataclasses.replace(chosen[info.name], groups=info.groups)
        for info in inventory.modules
        if info.name in chosen
    }
