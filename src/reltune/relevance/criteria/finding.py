"""Criteria by name: reltune's own, those of installed packages, and objects handed over directly.

A criterion is a module, or any object, with what ``relevance/criteria/registry.py`` lists: ``NEEDS`` and ``quantities``, and for
single weights ``ELEMENT_NEEDS`` and ``elements``. A package offers one by an entry point, whose name is the criterion's:

    [project.entry-points."reltune.criteria"]
    snip = "my_package.snip"

It is imported when it is asked for by that name, and only then. ``examples/snip_criterion`` is a whole such package.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from reltune.errors import InputError, nearest
from reltune.layers.per_example import STATISTICS
from reltune.layers.units import ModuleInfo, Parts, part_shapes
from reltune.relevance.criteria.context import Context
from reltune.relevance.criteria.registry import CRITERIA
from reltune.relevance.entry_points import criterion_of_package, known_criteria, owner_of

KNOWN_NEEDS = ("inputs", *STATISTICS, *(f"sampled_{name}" for name in STATISTICS))


@runtime_checkable
class Criterion(Protocol):
    """What every criterion has."""

    NEEDS: Sequence[str]

    def quantities(
        self,
        info: ModuleInfo,
        weights: Mapping[str, Tensor],
        sums: Mapping[str, Mapping[str, Tensor]],
        context: Context,
    ) -> tuple[Parts, ...]: ...


def find_criteria(wanted: str | Criterion | Sequence[str | Criterion], elements: bool = False) -> dict[str, Any]:
    """Criteria by name, in the order given.

    Raises InputError for an unknown name, for a name that two criteria have, and for a package's criterion that cannot
    be imported or lacks something.
    """
    found: dict[str, Any] = {}
    for one in [wanted] if isinstance(wanted, str) or not isinstance(wanted, Collection) else wanted:
        name = one if isinstance(one, str) else _name(one)
        if isinstance(one, str):
            criterion, where = _by_name(name)
        else:
            criterion, where = one, f"{name} as it was passed"
            if name in CRITERIA and one is not CRITERIA[name]:
                raise InputError(f"a criterion called {name!r} was passed, and reltune has one itself; rename yours.")
        if found.get(name, criterion) is not criterion:
            raise InputError(f"two different criteria are called {name!r}; rename one.")
        if criterion is not CRITERIA.get(name):
            _check(name, criterion, where)
        _check_elements(name, criterion, elements)
        found[name] = criterion
    if not found:
        raise InputError(f"no criterion was named; choose from {', '.join(known_criteria())}.")
    return found


def needs_data(criterion: Any) -> bool:
    return hasattr(criterion, "measure") or bool(criterion.NEEDS)


def check_parts(parts: Mapping[str, Mapping[str, Parts]], modules: Sequence[ModuleInfo]) -> None:
    """Raise InputError where a criterion that is not reltune's own gave numbers that could not be saved or selected by."""
    shapes = {info.name: part_shapes(info) for info in modules}
    for name, of in parts.items():
        if name in CRITERIA:
            continue
        if not any(of.values()):
            raise InputError(f"criterion {name!r} scored nothing; its quantities(…) must give one number per unit.")
        for module, part, value in ((m, p, v) for m in shapes for p, v in of.get(m, {}).items()):
            wanted = shapes[module].get(part)
            if wanted is None or value.shape != wanted:
                fit = f"of shape {wanted}" if wanted is not None else f"one of {', '.join(shapes[module])}"
                raise InputError(
                    f"criterion {name!r} gave {part} of shape {tuple(value.shape)} for {module}; it must be {fit}."
                )
            if not value.is_floating_point() or not torch.isfinite(value).all():
                raise InputError(
                    f"criterion {name!r} gave {part} of {module} that is not finite floating-point numbers."
                )


def _name(criterion: object) -> str:
    """fisher for the module reltune.relevance.criteria.fisher, Snip for an object of a class Snip."""
    return getattr(criterion, "__name__", type(criterion).__name__).rpartition(".")[2]


def _by_name(name: str) -> tuple[Any, str]:
    point = criterion_of_package(name)
    if point is None and name in CRITERIA:
        return CRITERIA[name], ""
    if point is None:
        raise InputError(f"criterion {name!r} is unknown; {nearest(name, known_criteria())}")
    where = owner_of(point)
    try:
        return point.load(), where
    except Exception as error:  # a package may fail in any way while it is imported
        raise InputError(
            f"criterion {name!r} of {where} cannot be imported ({type(error).__name__}: {error}); mend or uninstall it."
        ) from error


def _check_elements(name: str, criterion: Any, elements: bool) -> None:
    """Raise InputError where single weights are wanted of a criterion that has no number for them."""
    has = "element" in criterion.SCORES if hasattr(criterion, "measure") else hasattr(criterion, "elements")
    if elements and not has:
        raise InputError(f"criterion {name!r} has no number for single weights; leave out elements or the criterion.")


def _check(name: str, criterion: Any, where: str) -> None:
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(
            f"criterion {name!r} of {where} has a name that files cannot carry; use letters, digits and _."
        )
    if hasattr(criterion, "measure"):  # passes of its own
        wanted = {"SCORES": False, "measure": True}
    else:
        wanted = {"NEEDS": False, "quantities": True}
        wanted |= {"ELEMENT_NEEDS": False, "elements": True} if hasattr(criterion, "elements") else {}
    for attribute, function in wanted.items():
        value = getattr(criterion, attribute, None)
        if value is None or (function and not callable(value)):
            raise InputError(
                f"criterion {name!r} of {where} has no {'function ' if function else ''}{attribute}; add it."
            )
        for need in () if function else cast(Sequence[str], value):
            if isinstance(value, str) or (need not in KNOWN_NEEDS and attribute != "SCORES"):
                word = value if isinstance(value, str) else need
                raise InputError(
                    f"{attribute} of criterion {name!r} of {where} must be a tuple of statistics and has {word!r}; "
                    f"{nearest(str(word), KNOWN_NEEDS)}"
                )
