"""Relevance by layer and module, as a table to draw."""

from __future__ import annotations

import dataclasses

OUTSIDE = "(outside the layers)"  # the column of modules that belong to no layer, such as embeddings and a pooler


@dataclasses.dataclass
class Heatmap:
    """Relevance by place: ``values[i][j]`` belongs to layer ``rows[i]`` and module ``columns[j]``.

    ``None`` where a layer has no such module. ``share_by_layer[i]`` is the layer's share of all relevance (0..1). Where
    relevance does not add up (``adds_up``), shares are of the sum of absolute values, with the sign of the value, and a
    layer's is that of its own score, 0 for modules outside the layers.
    """

    criterion: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]
    share_by_layer: list[float]
    adds_up: bool = True

    def outside(self) -> list[str]:
        """The rows that are no layers, but modules outside them; none where nothing else was measured."""
        place = self.columns.index(OUTSIDE) if OUTSIDE in self.columns else None
        rows = (
            []
            if place is None
            else [row for row, v in zip(self.rows, self.values, strict=True) if v[place] is not None]
        )
        return rows if len(rows) < len(self.rows) else []
