"""All criteria by name: reltune's own, those of installed packages, and objects that are handed over directly.

Add a criterion of reltune's own as a file beside this one, in ``CRITERIA`` below and in ``names.CRITERIA``. A package offers
one by an entry point, whose name is the criterion's:

    [project.entry-points."reltune.criteria"]
    snip = "my_package.snip"

It is imported only when somebody asks for it by that name. ``examples/snip_criterion`` is a whole such package, and
``contract.py`` says which members a criterion has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from reltune.errors import InputError, nearest
from reltune.layers.units import ModuleInfo, directions_in, part_shapes
from reltune.relevance.criteria import (
    ablation,
    activation,
    correlation,
    depth,
    fisher,
    fisher_true,
    gradient,
    gradient_snr,
    magnitude,
    movement,
    principal,
    random,
    relative_gradient,
    spectral_snr,
    taylor,
)
from reltune.relevance.criteria.contract import Criterion, ScoresByName, check_criterion, granularities_of
from reltune.relevance.entry_points import criterion_of_package, known_criteria, owner_of

CRITERIA: dict[str, Criterion] = {
    "fisher": fisher,
    "fisher_true": fisher_true,
    "gradient": gradient,
    "taylor": taylor,
    "relative_gradient": relative_gradient,
    "gradient_snr": gradient_snr,
    "activation": activation,
    "magnitude": magnitude,
    "spectral_snr": spectral_snr,
    "principal": principal,
    "ablation": ablation,
    "correlation": correlation,
    "movement": movement,
    "random": random,
    "depth": depth,
}


def find_criteria(wanted: str | Criterion | Sequence[str | Criterion], elements: bool = False) -> dict[str, Criterion]:
    """The wanted criteria by name, in the order given; ``elements``: each must score single weights.

    Raises InputError for an unknown name, for a name that two criteria have, and for a criterion that cannot be
    imported or lacks a member.
    """
    criteria: dict[str, Criterion] = {}
    for one in [wanted] if isinstance(wanted, str) or not isinstance(wanted, Collection) else wanted:
        name, criterion = (one, _named(one)) if isinstance(one, str) else _passed(one)
        if criteria.get(name, criterion) is not criterion:
            raise InputError(f"two different criteria are called {name!r}; rename one.")
        if elements and "element" not in granularities_of(criterion):
            raise InputError(
                f"criterion {name!r} has no number for single weights; leave out elements or the criterion."
            )
        criteria[name] = criterion
    if not criteria:
        raise InputError(f"no criterion was named; choose from {', '.join(known_criteria())}.")
    return criteria


def _named(name: str) -> Criterion:
    entry_point = criterion_of_package(name)
    if entry_point is None and name in CRITERIA:
        return CRITERIA[name]
    if entry_point is None:
        raise InputError(f"criterion {name!r} is unknown; {nearest(name, known_criteria())}")
    owner = owner_of(entry_point)
    try:
        criterion = entry_point.load()
    except Exception as error:  # a package may fail in any way while it is imported
        raise InputError(
            f"criterion {name!r} of {owner} cannot be imported ({type(error).__name__}: {error}); mend or uninstall it."
        ) from error
    return check_criterion(name, criterion, f"of {owner}")


def _passed(criterion: Any) -> tuple[str, Criterion]:
    """The name of a criterion that was handed over (``fisher`` for the module ….criteria.fisher, ``Snip`` for an object
    of a class Snip), and the criterion, checked."""
    name = getattr(criterion, "__name__", type(criterion).__name__).rpartition(".")[2]
    if name in CRITERIA and criterion is not CRITERIA[name]:
        raise InputError(f"a criterion called {name!r} was passed, and reltune has one of that name; rename yours.")
    return name, check_criterion(name, criterion, "that was passed")


def check_scores(scores: Mapping[str, ScoresByName], modules: Sequence[ModuleInfo]) -> None:
    """Raise InputError where a criterion that is not reltune's own gave numbers that could not be saved or selected by.

    ``scores`` has each criterion's scores under its name.
    """
    for criterion, by_module in scores.items():
        shapes = {i.name: part_shapes(i, directions_in(by_module.get(i.name, {}))) for i in modules}
        if criterion in CRITERIA:
            continue
        if not any(by_module.values()):
            raise InputError(
                f"criterion {criterion!r} scored nothing; its quantities(…) must give one number per unit."
            )
        for module, part, value in ((m, p, v) for m in shapes for p, v in by_module.get(m, {}).items()):
            shape = shapes[module].get(part)
            if shape is None or value.shape != shape:
                mend = f"of shape {shape}" if shape is not None else f"one of {', '.join(shapes[module])}"
                raise InputError(
                    f"criterion {criterion!r} gave {part} of shape {tuple(value.shape)} for {module}; it must be {mend}."
                )
            if not value.is_floating_point() or not torch.isfinite(value).all():
                raise InputError(
                    f"criterion {criterion!r} gave {part} of {module} that is not finite floating-point numbers."
                )
