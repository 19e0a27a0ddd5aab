"""Choose the most relevant units that a budget allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from reltune.layers.inventory import Inventory, ModuleInfo, choose
from reltune.plan.budget import parse_budget
from reltune.plan.plan import TRAINABLE, ModulePlan, Plan
from reltune.records import GRANULARITIES, InputError, nearest
from reltune.relevance import CRITERIA
from reltune.relevance.scores import RelevanceScores

WHOLE = ("layer", "module", "norm")  # kinds that take everything a module has, in the place of its parts


def select(
    relevance: RelevanceScores,
    budget: str | int | float,
    granularity: str | Sequence[str] = "column",
    *,
    criterion: str | None = None,
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
        granularity: one or several of layer, module, head, column, row, bias, norm. A head (layers/heads.py) becomes rows
            of the query, key and value projections and columns of the output projection.
        criterion: which of the measured criteria decides; the first by default.

    Raises InputError for a budget that is no number or too small for the smallest unit, an unknown granularity or
    criterion, a granularity that the model has no unit of, and patterns that match nothing.
    """
    kinds = [granularity] if isinstance(granularity, str) else list(dict.fromkeys(granularity))
    for kind in kinds:
        if kind not in GRANULARITIES:
            raise InputError(f"granularity {kind!r} is unknown; {nearest(kind, GRANULARITIES)}")
    if not kinds:
        raise InputError(f"no granularity was named; choose from {', '.join(GRANULARITIES)}.")
    criterion = relevance.criterion(criterion)
    check_scored(kinds, criterion)
    inventory = relevance.inventory
    limit = parse_budget(budget, inventory.base_parameters)
    named = choose(inventory, target_modules, exclude_modules)
    packed = [name for name in named if inventory[name].kind == "quantised"]
    if packed and set(kinds) != {"norm"}:
        raise InputError(
            f"{packed[0]} is quantised, and units of quantised modules can be measured but not trained yet; select for the "
            "model before quantisation, or leave such modules out by exclude_modules."
        )
    allowed = {name for name in named if inventory[name].kind in TRAINABLE}
    if not target_modules and any(inventory[name].in_block for name in allowed):
        allowed = {name for name in allowed if inventory[name].in_block}

    # Candidates as parallel arrays: a large model has millions of columns.
    places: list[tuple[str, str]] = []  # (kind, layer or module name)
    place, index, cost, relevant = [], [], [], []
    for kind in kinds:
        for name, scores in relevance.by(kind, criterion).items():
            pieces = _pieces(inventory, kind, name, 0)
            if not pieces or not all(piece.info.name in allowed for piece in pieces):
                continue
            values = scores.reshape(-1).double().numpy()
            places.append((kind, name))
            place.append(np.full(len(values), len(places) - 1))
            index.append(np.arange(len(values)))
            cost.append(np.full(len(values), sum(piece.cost for piece in pieces)))
            relevant.append(values)
    if not places:
        measured_only = [f"{name} ({inventory[name].kind})" for name in named if name not in allowed]
        why = f" ({measured_only[0]} can be measured and not trained)" if measured_only and not allowed else ""
        if "head" in kinds and not why:
            why = _why_no_heads(inventory)
        raise InputError(
            f"no module that may be chosen has a unit of granularity {', '.join(kinds)} scored by {criterion}{why}; name "
            "another one."
        )
    at, of, price, worth = (np.concatenate(part) for part in (place, index, cost, relevant))
    if worth.max() < 0:
        raise InputError(
            f"{criterion} gives every {' and '.join(kinds)} a negative score; select by another criterion."
        )
    if price[worth >= 0].min() > limit:
        raise InputError(
            f"budget {budget} allows {limit:,} parameters, and the smallest {' or '.join(kinds)} has {price[worth >= 0].min():,}; "
            "raise the budget or choose a finer granularity."
        )

    chosen: dict[str, ModulePlan] = {}
    held: dict[str, int] = {}  # trainable parameters of each chosen module, kept up to date
    taken: dict[tuple[str, str], set[int]] = {}  # columns and rows of each chosen module
    used = 0
    smallest = int(price.min())
    for candidate in np.argsort(-(worth / price), kind="stable"):
        if (limit - used < smallest and len(kinds) == 1) or worth[candidate] < 0:
            break
        kind, name = places[at[candidate]]
        pieces = [
            piece.without(taken.get((piece.info.name, piece.kind), ()))
            for piece in _pieces(inventory, kind, name, int(of[candidate]))
            if not _covered(chosen.get(piece.info.name), piece.kind)
        ]
        pieces = [piece for piece in pieces if piece.indices]
        added = [p.cost - (held.get(p.info.name, 0) if p.kind in WHOLE else 0) for p in pieces]
        if not pieces or used + sum(added) > limit:
            continue
        for piece, more in zip(pieces, added, strict=True):
            of_module = piece.info.name
            _take(chosen.setdefault(of_module, ModulePlan(piece.info.shape)), piece)
            held[of_module] = held.get(of_module, 0) + more
            taken.setdefault((of_module, piece.kind), set()).update(piece.indices)
        used += sum(added)

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
        model_name_or_path=model_name_or_path or str(relevance.provenance.get("model", "")),
        task_type=task_type,
        always_trained=relevance.always_trained,
        head_parameters=inventory.head_parameters,
    )
    plan.check()
    return plan


def check_scored(kinds: Sequence[str], criterion: str) -> None:
    """Raise InputError for granularities that the criterion never scores."""
    scored = getattr(CRITERIA.get(criterion), "SCORES", GRANULARITIES)
    missing = [kind for kind in kinds if kind not in scored]
    if missing:
        raise InputError(
            f"{criterion} scores no {' or '.join(missing)}, only {', '.join(scored)}; choose that granularity, or select by "
            "another criterion."
        )


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
