"""Choose the most relevant units that a budget allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from reltune.errors import InputError, nearest
from reltune.layers.inventory import Inventory, ModuleInfo, choose
from reltune.names import GRANULARITIES, SPREADS
from reltune.plan.budget import parse_budget
from reltune.plan.plan import TRAINABLE, WITH_ELEMENTS, ModulePlan, Plan
from reltune.plan.threshold import above, largest
from reltune.relevance.criteria.contract import granularities_of
from reltune.relevance.criteria.registry import CRITERIA
from reltune.relevance.scores import RelevanceScores

WHOLE = ("layer", "module", "norm")  # kinds that take everything a module has, in the place of its parts
BESIDE_ELEMENTS = ("element", "bias", "norm")  # kinds that share no weight with elements
EVEN = ("column", "row", "element")  # kinds of which every module can have its share


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
) -> Plan:
    """Take units in the order of relevance per trainable parameter until the budget is used.

    This is the greedy rule for the knapsack problem (Dantzig 1957): relevance adds up over units, a unit that no
    longer fits is passed over and smaller ones behind it may still be taken. Ties go to the earlier module and the
    lower index, so equal scores give equal plans. Units with a negative score (criteria that are signed) are never taken.

    Modules outside the layers (BERT's pooler, a final norm) compete only when ``target_modules`` names them. They stand
    next to the new head and get the largest gradients while it is still learning: left in, the pooler took most of a
    0.5% budget and cost 2.5 points of accuracy on movie reviews (docs/learning_rates.md).

    Args:
        budget: "0.5%" of the base model's parameters, or a count of trainable parameters.
        granularity: one or several of layer, module, head, column, row, element, bias, norm. A head (layers/attention_heads.py)
            becomes rows of the query, key and value projections and columns of the output projection. An element is a
            single weight of a matrix (not of a bias or norm), and goes with bias and norm only: of any larger unit the
            best single weights would come first.
        criterion: which of the measured criteria decides; the first by default.
        spread: "global" lets all modules compete; "even" gives each module the share of the budget that it has of the
            weights, for columns, rows and elements. Where a column is too large for a module's share it gets none, and
            what is left over is not spent.

    Raises InputError for a budget that is no number or too small for the smallest unit, an unknown granularity or
    criterion, a granularity that the model has no unit of, and patterns that match nothing.
    """
    kinds = [granularity] if isinstance(granularity, str) else list(dict.fromkeys(granularity))
    for kind in kinds:
        if kind not in GRANULARITIES:
            raise InputError(f"granularity {kind!r} is unknown; {nearest(kind, GRANULARITIES)}")
    if not kinds:
        raise InputError(f"no granularity was named; choose from {', '.join(GRANULARITIES)}.")
    check_together(kinds, spread)
    criterion = relevance.criterion(criterion)
    check_scored(kinds, criterion)
    inventory = relevance.inventory
    limit = parse_budget(budget, inventory.base_parameters)
    named = choose(inventory, target_modules, exclude_modules)
    packed = [name for name in named if inventory[name].kind == "quantised"]
    whole = [kind for kind in kinds if kind in ("layer", "module", "element")]
    if packed and whole:
        raise InputError(
            f"{packed[0]} is quantised, and of a quantised module columns, rows, heads and biases can be trained and no "
            f"{whole[0]}; choose another granularity, or leave such modules out by exclude_modules."
        )
    allowed = {name for name in named if inventory[name].kind in TRAINABLE}
    if not target_modules and any(inventory[name].in_block for name in allowed):
        allowed = {name for name in allowed if inventory[name].in_block}

    candidates = _candidates(relevance, criterion, kinds, allowed)
    elements: dict[str, Tensor] = {}
    if "element" in kinds:
        scored = relevance.by("element", criterion)
        elements = {n: of for n, of in scored.items() if n in allowed and inventory[n].kind in WITH_ELEMENTS}
        if not scored:
            raise InputError(
                f"{criterion} was measured without single weights here; analyze again with elements (--elements)."
            )
    if not candidates.places and not elements:
        measured_only = [f"{name} ({inventory[name].kind})" for name in named if name not in allowed]
        why = f" ({measured_only[0]} can be measured and not trained)" if measured_only and not allowed else ""
        if "head" in kinds and not why:
            why = _why_no_heads(inventory)
        raise InputError(
            f"no module that may be chosen has a unit of granularity {', '.join(kinds)} scored by {criterion}{why}; name "
            "another one."
        )
    positive = [int(candidates.price[candidates.worth >= 0].min())] if (candidates.worth >= 0).any() else []
    if any(bool((of >= 0).any()) for of in elements.values()):
        positive.append(1)
    if not positive:
        raise InputError(
            f"{criterion} gives every {' and '.join(kinds)} a negative score; select by another criterion."
        )
    if min(positive) > limit:
        raise InputError(
            f"budget {budget} allows {limit:,} parameters, and the smallest {' or '.join(kinds)} has {min(positive):,}; "
            "raise the budget or choose a finer granularity."
        )
    if spread == "even":
        sizes = {name: inventory[name].weight_parameters for name in {n for _, n in candidates.places} | {*elements}}
        chosen: dict[str, ModulePlan] = {}
        for name, size in sizes.items():
            own = candidates.only(name)
            of_module = {name: elements[name]} if name in elements else {}
            chosen |= _greedy(inventory, kinds, own, of_module, limit * size // sum(sizes.values()))
        if not chosen:
            raise InputError(
                f"budget {budget} spread evenly allows less than one {' or '.join(kinds)} in each of {len(sizes)} modules; "
                "raise it, name fewer modules, choose a finer granularity, or spread globally."
            )
    else:
        chosen = _greedy(inventory, kinds, candidates, elements, limit)

    for module in chosen.values():
        module.columns.sort()
        module.rows.sort()
    ordered = {
        info.name: dataclasses.replace(chosen[info.name], groups=info.groups)
        for info in inventory.modules
        if info.name in chosen
    }
    plan = Plan(
        modules=ordered,
        budget=str(budget),
        budget_parameters=limit,
        base_parameters=inventory.base_parameters,
        fingerprint=relevance.fingerprint,
        criterion=criterion,
        granularity=kinds,
        spread=spread,
        model_name_or_path=model_name_or_path or str(relevance.provenance.get("model", "")),
        task_type=task_type,
        always_trained=relevance.always_trained,
        head_parameters=inventory.head_parameters,
    )
    plan.check()
    return plan


def check_scored(kinds: Sequence[str], criterion: str) -> None:
    """Raise InputError for granularities that the criterion never scores."""
    known = CRITERIA.get(criterion)
    scored = GRANULARITIES if known is None else granularities_of(known)
    missing = [kind for kind in kinds if kind not in scored]
    if missing:
        raise InputError(
            f"{criterion} scores no {' or '.join(missing)}, only {', '.join(scored)}; choose that granularity, or select by "
            "another criterion."
        )


def check_together(kinds: Sequence[str], spread: str = "global") -> None:
    """Raise InputError for granularities, or a spread, that do not go together."""
    if spread not in SPREADS:
        raise InputError(f"spread {spread!r} is unknown; {nearest(str(spread), SPREADS)}")
    larger = [kind for kind in kinds if kind not in BESIDE_ELEMENTS]
    if "element" in kinds and larger:
        raise InputError(
            f"granularity element cannot compete with {larger[0]}, whose best single weights would always come first; name "
            "one of them."
        )
    whole = [kind for kind in kinds if kind not in EVEN]
    if spread == "even" and whole:
        raise InputError(
            f"spread even is for {', '.join(EVEN)}, and not every module has a share of granularity {whole[0]}; spread it "
            "globally."
        )


@dataclasses.dataclass
class _Candidates:
    """Units but elements, as parallel arrays: a large model has millions of columns."""

    places: list[tuple[str, str]]  # (kind, layer or module name)
    at: np.ndarray  # of each unit: its place,
    of: np.ndarray  # its index there,
    price: np.ndarray
    worth: np.ndarray

    def only(self, name: str) -> _Candidates:
        """Those of one module."""
        mine = [i for i, (_, of) in enumerate(self.places) if of == name]
        starts, ends = np.searchsorted(self.at, mine), np.searchsorted(self.at, mine, "right")  # it is ascending
        where = np.concatenate([np.empty(0, int), *(np.arange(a, b) for a, b in zip(starts, ends, strict=True))])
        return _Candidates(self.places, self.at[where], self.of[where], self.price[where], self.worth[where])


def _candidates(
    relevance: RelevanceScores, criterion: str, kinds: Sequence[str], allowed: Collection[str]
) -> _Candidates:
    places: list[tuple[str, str]] = []
    place, index, cost, relevant = [np.empty(0, int)], [np.empty(0, int)], [np.empty(0, int)], [np.empty(0)]
    for kind in kinds:
        if kind == "element":
            continue
        for name, scores in relevance.by(kind, criterion).items():
            pieces = _pieces(relevance.inventory, kind, name, 0)
            if not pieces or not all(piece.info.name in allowed for piece in pieces):
                continue
            values = scores.reshape(-1).double().numpy()
            places.append((kind, name))
            place.append(np.full(len(values), len(places) - 1))
            index.append(np.arange(len(values)))
            cost.append(np.full(len(values), sum(piece.cost for piece in pieces)))
            relevant.append(values)
    return _Candidates(places, *(np.concatenate(part) for part in (place, index, cost, relevant)))


def _greedy(
    inventory: Inventory, kinds: Sequence[str], candidates: _Candidates, elements: dict[str, Tensor], limit: int
) -> dict[str, ModulePlan]:
    """What ``select`` says, of these units and elements."""
    chosen: dict[str, ModulePlan] = {}
    held: dict[str, int] = {}  # trainable parameters of each chosen module, kept up to date
    taken: dict[tuple[str, str], set[int]] = {}  # columns and rows of each chosen module
    used = 0
    worth, price, places = candidates.worth, candidates.price, candidates.places
    smallest = int(price.min()) if len(price) else 0
    before = _elements_before(kinds, candidates, elements)
    for candidate in np.argsort(-(worth / price), kind="stable"):
        if (limit - used < smallest and len(kinds) == 1) or worth[candidate] < 0:
            break
        kind, name = places[candidates.at[candidate]]
        pieces = [
            piece.without(taken.get((piece.info.name, piece.kind), ()))
            for piece in _pieces(inventory, kind, name, int(candidates.of[candidate]))
            if not _covered(chosen.get(piece.info.name), piece.kind)
        ]
        pieces = [piece for piece in pieces if piece.indices]
        added = [p.cost - (held.get(p.info.name, 0) if p.kind in WHOLE else 0) for p in pieces]
        if not pieces or int(before[candidate]) + used + sum(added) > limit:
            continue
        for piece, more in zip(pieces, added, strict=True):
            of_module = piece.info.name
            _take(chosen.setdefault(of_module, ModulePlan(piece.info.shape)), piece)
            held[of_module] = held.get(of_module, 0) + more
            taken.setdefault((of_module, piece.kind), set()).update(piece.indices)
        used += sum(added)
    if elements and limit > used:
        for name, index in largest(elements, limit - used).items():
            chosen.setdefault(name, ModulePlan(inventory[name].shape)).take_elements(index)
    return chosen


def _elements_before(kinds: Sequence[str], candidates: _Candidates, elements: dict[str, Tensor]) -> np.ndarray:
    """How many elements come before each candidate: those worth more, or as much where their kind was named first."""
    before = np.zeros(len(candidates.price), dtype=np.int64)
    if not elements:
        return before
    ratio = candidates.worth / candidates.price
    later = np.array([kinds.index(kind) > kinds.index("element") for kind, _ in candidates.places], dtype=bool)
    for equal in (False, True):
        where = later[candidates.at] == equal if len(later) else np.zeros(0, bool)
        if where.any():
            thresholds, inverse = np.unique(ratio[where], return_inverse=True)
            before[where] = above(elements, torch.from_numpy(thresholds), equal).numpy()[inverse]
    return before


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What a unit takes of one module: columns or rows, the bias, or (the kinds of WHOLE) everything."""

    info: ModuleInfo
    kind: str
    indices: Sequence[int]

    @property
    def cost(self) -> int:
        if self.kind == "column":
            return len(self.indices) * self.info.column_parameters
        if self.kind == "row":
            return len(self.indices) * self.info.row_parameters
        return self.info.bias_parameters + (self.info.weight_parameters if self.kind in WHOLE else 0)

    def without(self, taken: Collection[int]) -> _Piece:
        if not taken or self.kind not in ("column", "row"):
            return self
        return dataclasses.replace(self, indices=[index for index in self.indices if index not in taken])


def _pieces(inventory: Inventory, kind: str, name: str, index: int) -> list[_Piece]:
    """What the unit ``index`` of a kind under ``name`` takes of each module."""
    if kind == "layer":
        inside = [info for info in inventory.modules if info.layer == name and info.in_block]
        return [_Piece(info, kind, [0]) for info in inside if info.kind in TRAINABLE]
    if kind == "head":
        group = next(group for group in inventory.heads if group.name == name)
        rows = [_Piece(inventory[module], "row", own) for module, own in group.rows(index).items()]
        return [*rows, _Piece(inventory[group.output], "column", group.output_columns(index))]
    return [_Piece(inventory[name], kind, [index])]


def _covered(module: ModulePlan | None, kind: str) -> bool:
    """Whether what is chosen of a module already holds its next unit of that kind."""
    return module is not None and (module.bias if kind == "bias" else module.weight)


def _take(module: ModulePlan, piece: _Piece) -> None:
    """Add what the unit takes; a whole weight takes the place of its columns and rows."""
    if piece.kind in WHOLE:
        module.columns, module.rows, module.weight, module.bias = [], [], True, piece.info.bias
    elif piece.kind == "bias":
        module.bias = True
    else:
        (module.columns if piece.kind == "column" else module.rows).extend(piece.indices)


def _why_no_heads(inventory: Inventory) -> str:
    """A remark in brackets, or nothing, on why no head can be chosen."""
    return next((f" ({name}: {reason})" for name, reason in inventory.without_heads.items()), "")
