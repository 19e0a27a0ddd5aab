"""Criteria that installed packages offer by entry points, looked up by name without importing them."""

from __future__ import annotations

from importlib import metadata

from reltune.errors import InputError
from reltune.names import CRITERIA

CRITERIA_GROUP = "reltune.criteria"  # entry points of installed packages with criteria of their own


def criterion_of_package(name: str) -> metadata.EntryPoint | None:
    """The entry point of an installed package's criterion, which this does not import; None for reltune's own criteria and
    unknown names.

    Raises InputError for a name that two packages, or a package and reltune, offer: nobody could tell which one measures.
    """
    offers = list(dict.fromkeys(metadata.entry_points(group=CRITERIA_GROUP, name=name)))
    owners = (["reltune itself"] if name in CRITERIA else []) + sorted(map(owner_of, offers))
    if len(owners) > 1:
        raise InputError(
            f"criterion {name!r} comes from {' and from '.join(owners)}; uninstall one, or have it renamed in its package."
        )
    return offers[0] if offers else None


def owner_of(point: metadata.EntryPoint) -> str:
    """A phrase for the package and the place that an entry point names."""
    return f"the package {point.dist.name} ({point.value})" if point.dist else point.value


def known_criteria() -> list[str]:
    """The names of reltune's own criteria, then those of installed packages, which this does not import."""
    return list(dict.fromkeys([*CRITERIA, *sorted(metadata.entry_points(group=CRITERIA_GROUP).names)]))
