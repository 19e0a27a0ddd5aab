"""What a criterion is told beside a module's weights and statistics."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Context:
    """``examples`` were measured (0 when no criterion looked at data); ``seed`` is the user's."""

    examples: int
    seed: int
