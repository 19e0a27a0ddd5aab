"""Where the attention heads of one attention module lie in its projections."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from reltune.layers.units import ModuleInfo, Parts


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """The attention heads of one attention module.

    Args:
        name: the attention module's name.
        layer: the block that it belongs to.
        heads: how many heads there are.
        head_size: how many rows of a projection, and columns of the output projection, belong to one head.
        output: the name of the output projection. Head h has its columns from ``h · head_size`` on.
        projections: the names of the query, key and value projections, with the rows at which head 0 begins: one
            start, or several where one module holds several projections. Head h begins ``h · head_size`` rows further on.
    """

    name: str
    layer: str
    heads: int
    head_size: int
    output: str
    projections: dict[str, list[int]]

    @property
    def modules(self) -> list[str]:
        """Every module that holds a part of a head."""
        return [*self.projections, self.output]

    def output_columns(self, head: int) -> range:
        return range(head * self.head_size, (head + 1) * self.head_size)

    def rows(self, head: int) -> dict[str, list[int]]:
        """The head's rows of each query, key and value projection."""
        return {
            name: [start + row for start in starts for row in self.output_columns(head)]
            for name, starts in self.projections.items()
        }

    def add_up(self, parts: Mapping[str, Parts]) -> Tensor | None:
        """The sums (heads,) over what each head holds of the modules' rows and columns.

        None where a module has no numbers for rows or columns.
        """
        blocks = [
            (parts.get(name, {}).get("row"), start) for name, starts in self.projections.items() for start in starts
        ]
        blocks.append((parts.get(self.output, {}).get("column"), 0))
        total: Tensor | None = None
        for values, start in blocks:
            if values is None:
                return None
            own = values[start : start + self.heads * self.head_size].reshape(self.heads, self.head_size).sum(1)
            total = own if total is None else total + own
        return total

    def check(self, modules: Mapping[str, ModuleInfo]) -> None:
        """Raise ValueError unless the heads lie inside these modules."""
        end = self.heads * self.head_size
        sizes = [(name, start, 0) for name, starts in self.projections.items() for start in starts]
        if self.heads < 1 or self.head_size < 1:
            raise ValueError(f"{self.name} has {self.heads} heads of size {self.head_size}")
        for name, start, side in [*sizes, (self.output, 0, 1)]:
            if name not in modules or start < 0 or start + end > modules[name].shape[side]:
                raise ValueError(f"the heads of {self.name} do not lie in {name}")
