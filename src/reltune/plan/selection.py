"""Choose the most relevant units that a budget allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reltune.layers.inventory import ModuleInfo, choose
from reltune.plan.budget import parse_budget
from reltune.plan.plan import TRAINABLE, ModulePlan, Plan
from reltune.records import GRANULARITIES, InputError, nearest
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
    lower index, so equal scores give equal plans.

    Modules outside the layers (BERT's pooler, a final norm) compete only when ``target_modules`` names them. They stand
    next to the new head and get the largest gradients while it is still learning: left in, the pooler took most of a
    0.5% budget and cost 2.5 points of accuracy on movie reviews (docs/learning_rates.md).

    Args:
        budget: "0.5%" of the base model's parameters, or a count of trainable parameters.
        granularity: one or several of layer, module, column, row, bias, norm.
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
    members: dict[str, list[ModuleInfo]] = {}
    for info in inventory.modules:
        if info.in_block and info.kind in TRAINABLE:
            members.setdefault(info.layer, []).append(info)
    for kind in kinds:
        for name, scores in relevance.by(kind, criterion).items():
            infos = members.get(name, []) if kind == "layer" else [inventory[name]]
            if not infos or not all(info.name in allowed for info in infos):
                continue
            values = scores.reshape(-1).double().numpy()
            places.append((kind, name))
            place.append(np.full(len(values), len(places) - 1))
            index.append(np.arange(len(values)))
            cost.append(np.full(len(values), sum(_cost(info, kind) for info in infos)))
            relevant.append(values)
    if not places:
        measured_only = [f"{name} ({inventory[name].kind})" for name in named if name not in allowed]
        why = f" ({measured_only[0]} can be measured and not trained)" if measured_only and not allowed else ""
        raise InputError(
            f"no module that may be chosen has a unit of granularity {', '.join(kinds)} scored by {criterion}{why}; name "
            "another one."
        )
    at, of, price, worth = (np.concatenate(part) for part in (place, index, cost, relevant))
    if price.min() > limit:
        raise InputError(
            f"budget {budget} allows {limit:,} parameters, and the smallest {' or '.join(kinds)} has {price.min():,}; "
            "raise the budget or choose a finer granularity."
        )

    chosen: dict[str, ModulePlan] = {}
    held: dict[str, int] = {}  # trainable parameters of each chosen module, kept up to date
    used = 0
    smallest = int(price.min())
    for candidate in np.argsort(-(worth / price), kind="stable"):
        if limit - used < smallest and len(kinds) == 1:
            break
        kind, name = places[at[candidate]]
        infos = members[name] if kind == "layer" else [inventory[name]]
        infos = [info for info in infos if not _covered(chosen.get(info.name), kind)]
        added = {info.name: _cost(info, kind) - (held.get(info.name, 0) if kind in WHOLE else 0) for info in infos}
        if not infos or used + sum(added.values()) > limit:
            continue
        for info in infos:
            _take(chosen.setdefault(info.name, ModulePlan(info.shape)), info, kind, int(of[candidate]))
            held[info.name] = held.get(info.name, 0) + added[info.name]
        used += sum(added.values())

    for module in chosen.values():
        module.columns.sort()
        module.rows.sort()
    ordered = {info.name: chosen[info.name] for info in inventory.modules if info.name in chosen}
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


def _cost(info: ModuleInfo, kind: str) -> int:
    if kind == "column":
        return info.shape[0]
    if kind == "row":
        return info.shape[1]
    if kind == "bias":
        return info.bias_parameters
    return info.weight_parameters + info.bias_parameters


def _covered(module: ModulePlan | None, kind: str) -> bool:
    """Whether what is chosen of a module already holds its next unit of that kind."""
    return module is not None and (module.bias if kind == "bias" else module.weight)


def _take(module: ModulePlan, info: ModuleInfo, kind: str, index: int) -> None:
    """Add the unit; a whole weight takes the place of its columns and rows."""
    if kind in WHOLE:
        module.columns, module.rows, module.weight, module.bias = [], [], True, info.bias
    elif kind == "bias":
        module.bias = True
    else:
        (module.columns if kind == "column" else module.rows).append(index)
