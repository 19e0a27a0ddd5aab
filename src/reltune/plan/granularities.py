"""Which granularities, and which spread, go together. Light to import: it is asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from reltune.errors import InputError, nearest
from reltune.names import SPREADS

# Granularities
WHOLE = ("layer", "module", "norm")  # that take everything a module has, in the place of its parts,
BESIDE_ELEMENTS = ("element", "bias", "norm")  # that share no weight with elements,
EVEN = ("column", "row", "element", "direction")  # of which every module can have its share,
ALONE = "direction"  # and whose relevance cannot be compared with that of others.


def check_together(granularities: Sequence[str], spread: str = "global") -> None:
    """Raise InputError for granularities, or a spread, that do not go together."""
    if spread not in SPREADS:
        raise InputError(f"spread {spread!r} is unknown; {nearest(str(spread), SPREADS)}")
    others = [word for word in granularities if word != ALONE]
    if ALONE in granularities and others:
        raise InputError(
            f"granularity {ALONE} cannot compete with {others[0]}, whose relevance is no singular value; name one of them."
        )
    if spread == "columns" and list(granularities) != ["element"]:
        raise InputError(
            f"spread columns is for granularity element alone, and not for {', '.join(granularities)}; spread it evenly or globally."
        )
    larger = [word for word in granularities if word not in BESIDE_ELEMENTS]
    if "element" in granularities and larger:
        raise InputError(
            f"granularity element cannot compete with {larger[0]}, whose best single weights would always come first; name "
            "one of them."
        )
    whole = [word for word in granularities if word not in EVEN]
    if spread == "even" and whole:
        raise InputError(
            f"spread even is for {', '.join(EVEN)}, and not every module has a share of granularity {whole[0]}; spread it "
            "globally."
        )
