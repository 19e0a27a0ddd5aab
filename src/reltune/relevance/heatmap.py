"""Relevance by layer and module, as a table to draw."""

from __future__ import annotations

import dataclasses
import math

from reltune import markup

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

    def shares(self) -> list[list[float | None]]:
        """Each cell's share of all relevance (0..1), or, where it may be negative, of the sum of absolute values (−1..1);
        zeros when there is none."""
        total = math.fsum(abs(value) for row in self.values for value in row if value is not None) or 1.0
        return [[None if value is None else value / total for value in row] for row in self.values]

    def scale_end(self) -> float:
        """The largest share, without its sign, of a module within the layers: where a scale of colours ends.

        One module outside them, such as a pooler, may hold most of all relevance and would leave the layers one colour.
        """
        outside = self.outside()
        within = [row for name, row in zip(self.rows, self.shares(), strict=True) if name not in outside]
        return max((abs(value) for row in within for value in row if value is not None), default=0.0)

    def _repr_html_(self) -> str:
        """Layers down, deepest first, modules across: each cell its share in percent."""
        shares, end = self.shares(), self.scale_end() or 1.0
        signed = any(value is not None and value < 0 for row in shares for value in row)
        rows, styles = [], []
        for name, cells, share in reversed(list(zip(self.rows, shares, self.share_by_layer, strict=True))):
            rows.append([name, *("" if cell is None else f"{100 * cell:.2f}" for cell in cells), f"{100 * share:.1f}"])
            styles.append(["" if cell is None else markup.shade(cell / end, signed) for cell in cells] + [""])
        of_what = "all relevance" if self.adds_up else "the sum of absolute values"
        return markup.paragraphs([f"{self.criterion}: share of {of_what}, %"]) + markup.table(
            ["", *self.columns, "all"], rows, styles
        )
