"""What a criterion is told beside a module's weights and statistics."""

from __future__ import annotations

import dataclasses

from reltune.ops.singular_vectors import Decompositions


@dataclasses.dataclass(frozen=True)
class Context:
    """``examples`` were measured (0 when no criterion looked at data); ``seed`` is the user's; ``decompositions`` gives a
    weight's singular vectors, made once for all criteria."""

    examples: int
    seed: int
    decompositions: Decompositions = dataclasses.field(default_factory=Decompositions, repr=False, compare=False)
