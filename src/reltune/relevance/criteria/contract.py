"""What a criterion is: a module, or any other object, with the members of one of two protocols.

- ``StatisticalCriterion``: computes relevance from a module's weights and from sums over the examples. One pass over
  the data adds up the sums that all statistical criteria of an analysis need.
- ``BehaviourCriterion``: runs the model itself, as often as it likes: with units perturbed, or along a path of training
  steps.

``check_criterion`` compares an object with them and says what it lacks.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import Tensor

from reltune.errors import InputError, nearest
from reltune.layers.per_example import STATISTICS
from reltune.layers.units import ModuleInfo, Parts
from reltune.names import GRANULARITIES
from reltune.relevance.criteria.context import Context

if TYPE_CHECKING:
    from reltune.relevance.behaviour.experiment import Experiment

KNOWN_STATISTICS = ("inputs", *STATISTICS, *(f"sampled_{name}" for name in STATISTICS))

ScoresByName = dict[str, dict[str, Tensor]]  # name of a module, layer or attention module -> part -> scores
ModuleSums = Mapping[str, Mapping[str, Tensor]]  # statistic -> part -> sum over the examples, of one module


@runtime_checkable
class StatisticalCriterion(Protocol):
    """Relevance from weights and sums over the examples, one module at a time."""

    @property
    def NEEDS(self) -> Sequence[str]:
        """The statistics that ``quantities`` reads: those of ``layers/per_example.py``, ``inputs`` (Σ x² per input
        feature), or, with ``sampled_`` before the name, of labels drawn from the model. Empty: it looks at no data."""

    def quantities(
        self, info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context
    ) -> tuple[Parts, ...]:
        """One or several numbers per unit of the module, each of which adds up over units: columns to matrices, modules
        to layers. With no ``combine`` the first one is the relevance.

        ``weights`` has ``weight`` in its canonical shape (``layers/units.py``) and perhaps ``bias``; each result has
        some of the parts that ``units.part_shapes`` lists, or none where the criterion does not score such a module.
        """


@runtime_checkable
class CombiningCriterion(StatisticalCriterion, Protocol):
    """A statistical criterion whose relevance is no plain sum, such as a ratio of two sums."""

    @property
    def combine(self) -> Callable[..., Tensor]:
        """``combine(*quantities)`` gives the relevance. It is applied after the quantities are added up over a unit."""


@runtime_checkable
class ElementCriterion(StatisticalCriterion, Protocol):
    """A statistical criterion that can score single weights too."""

    @property
    def ELEMENT_NEEDS(self) -> Sequence[str]:
        """The statistics that ``elements`` reads."""

    def elements(self, info: ModuleInfo, weights: Mapping[str, Tensor], sums: ModuleSums, context: Context) -> Parts:
        """One number per weight, under ``weight`` and ``bias``; nothing where it does not score such a module."""


@runtime_checkable
class BehaviourCriterion(Protocol):
    """Relevance from running the model: by trying (``ablation``), or along a path of training steps (``movement``).

    One that shares the data between several processes has an attribute ``SHARES_DATA`` that is true; of the others, an
    analysis in several processes is refused.
    """

    @property
    def SCORES(self) -> Sequence[str]:
        """The granularities that it scores."""

    def measure(self, experiment: Experiment) -> tuple[ScoresByName, dict[str, Any]]:
        """Run the model as often as needed; give the scores, and facts to keep in the provenance.

        The model comes in evaluation mode with no weight requiring a gradient, with the batches in ``experiment``.
        Whatever this does to the model is undone when it returns or raises. The scores are, under a module's name, the
        parts of ``units.part_shapes``; ``layer`` () under a layer's name; ``head`` (heads,) under an attention
        module's. The ends of a score's interval are in parts named after its own, with ``_low`` and ``_high``. Who scores input
        directions gives ``direction`` (k,), as many as it likes, with their vectors ``direction_vectors`` (k, in).
        """


@runtime_checkable
class CriterionWithOptions(BehaviourCriterion, Protocol):
    """A behaviour criterion that the user can adjust."""

    @property
    def Options(self) -> type:
        """A frozen dataclass with a default for each field, which raises InputError for values that are impossible.
        ``experiment.options`` is an object of it."""


Criterion = StatisticalCriterion | BehaviourCriterion


def needs_data(criterion: Criterion) -> bool:
    return isinstance(criterion, BehaviourCriterion) or bool(criterion.NEEDS)


def statistics_of(criterion: StatisticalCriterion, elements: bool) -> set[str]:
    """The statistics that the criterion reads; ``elements``: also those for single weights."""
    needed = set(criterion.NEEDS)
    return needed | set(criterion.ELEMENT_NEEDS) if elements and isinstance(criterion, ElementCriterion) else needed


def granularities_of(criterion: Criterion) -> Sequence[str]:
    """The granularities that the criterion scores."""
    if isinstance(criterion, BehaviourCriterion):
        return criterion.SCORES
    if isinstance(criterion, ElementCriterion):
        return [granularity for granularity in GRANULARITIES if granularity != "direction"]
    return [granularity for granularity in GRANULARITIES if granularity not in ("element", "direction")]


def options_of(criteria: Mapping[str, Criterion], given: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """The ``Options`` object of each criterion that has options, from what the user gave.

    Raises InputError for options of a criterion that is not asked for or has none, and for unknown option names.
    """
    adjustable = {name: one for name, one in criteria.items() if isinstance(one, CriterionWithOptions)}
    for name in given or {}:
        if name not in adjustable:
            mend = nearest(str(name), adjustable) if adjustable else "leave them out."
            raise InputError(
                f"options are given for {name!r}, but no criterion of that name in this analysis has options; {mend}"
            )
    options = {}
    for name, criterion in adjustable.items():
        known = [field.name for field in dataclasses.fields(criterion.Options)]
        values = (given or {}).get(name, {})
        if not isinstance(values, Mapping):
            raise InputError(
                f"the options of {name} are of type {type(values).__name__}; give a mapping of {', '.join(known)}."
            )
        for key in values:
            if key not in known:
                raise InputError(f"{name} has no option {key!r}; {nearest(str(key), known)}")
        options[name] = criterion.Options(**values)
    return options


# -- checks ---------------------------------------------------------------------------------------------------------

MODULE_ARGUMENTS = ("info", "weights", "sums", "context")


def check_criterion(name: str, criterion: object, origin: str) -> Criterion:
    """The criterion, if it has all members of its protocol; else InputError says what it lacks.

    ``origin`` is a phrase for the messages: where the criterion comes from.
    """
    subject = f"criterion {name!r} {origin}"
    if not re.fullmatch(r"[\w.-]+", name):
        raise InputError(f"{subject} has a name that files cannot carry; use letters, digits, dots, - and _.")
    words: dict[str, Sequence[str]]
    functions: dict[str, tuple[str, ...]]
    if hasattr(criterion, "measure") or hasattr(criterion, "SCORES"):
        words, functions = {"SCORES": GRANULARITIES}, {"measure": ("experiment",)}
    else:
        words, functions = {"NEEDS": KNOWN_STATISTICS}, {"quantities": MODULE_ARGUMENTS}
        if hasattr(criterion, "elements") or hasattr(criterion, "ELEMENT_NEEDS"):
            words, functions = words | {"ELEMENT_NEEDS": KNOWN_STATISTICS}, functions | {"elements": MODULE_ARGUMENTS}
    missing = [f"no {key}" for key in words if getattr(criterion, key, None) is None]
    missing += [
        f"no function {key}({', '.join(arguments)})"
        for key, arguments in functions.items()
        if not callable(getattr(criterion, key, None))
    ]
    if missing:
        raise InputError(
            f"{subject} has {' and '.join(missing)}; add what is missing (reltune/relevance/criteria/contract.py describes it)."
        )
    for key, arguments in functions.items():
        if not _takes(getattr(criterion, key), len(arguments)):
            raise InputError(f"the function {key} of {subject} must take the arguments ({', '.join(arguments)}).")
    for key, known in words.items():
        _check_words(f"{key} of {subject}", getattr(criterion, key), known)
    if hasattr(criterion, "combine") and not callable(criterion.combine):
        raise InputError(f"combine of {subject} is no function; it must give the relevance of the quantities.")
    if hasattr(criterion, "Options") and "measure" in functions:
        _check_options(subject, criterion.Options)
    return cast(Criterion, criterion)


def _takes(function: Any, count: int) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some built-in functions it is not known
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _check_words(subject: str, words: Any, known: Sequence[str]) -> None:
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise InputError(f"{subject} is {words!r}; it must be a tuple of names such as {known[0]!r}.")
    for word in words:
        if word not in known:
            raise InputError(f"{subject} has {word!r}; {nearest(str(word), known)}")


def _check_options(subject: str, options: Any) -> None:
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        raise InputError(f"Options of {subject} is no dataclass; make it one, with a default for each field.")
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    for field in dataclasses.fields(options):
        if (field.default, field.default_factory) == unset:
            raise InputError(f"Options of {subject} has no default for {field.name}; add one.")
