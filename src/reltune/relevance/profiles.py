"""How relevance lies along the columns of a module: in buckets that a page can hold, and the columns with the most of it.

Read without torch, one tensor at a time: scores of single weights, which may be as large as the model, are not touched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from reltune.errors import InputError
from reltune.reading import Damaged, read_header
from reltune.relevance.heatmap import OUTSIDE, Heatmap

BUCKETS = 24_000  # of all modules and criteria together
LEAST, MOST = 8, 512  # of one module
LEADING = 30  # columns
DTYPES = ("F16", "F32", "F64")  # of these numpy has


class Leading(NamedTuple):
    """One of the columns with the most relevance."""

    layer: str
    module: str
    column: int
    value: float


@dataclasses.dataclass
class Profile:
    """The columns of what a cell of a heat map stands for, in buckets of neighbours: bucket i of B begins at i · columns // B.

    Attributes:
        row, column: of the cell.
        columns: how many columns there are.
        modules: how many modules share the cell (the experts of a projection), whose columns of the same number are added up, or
            averaged where relevance does not add up.
        means: (B) of each bucket, as float32 has them.
        peaks: (B) the value in each bucket that is furthest from zero, as float32 has it.
        offsets: (B) how many columns after the bucket's first one that is.
    """

    row: int
    column: int
    columns: int
    modules: int
    means: list[float]
    peaks: list[float]
    offsets: list[int]


@dataclasses.dataclass
class Profiles:
    """Those of one criterion, by cell, and its leading columns."""

    cells: list[Profile]
    leading: list[Leading]


def read_profiles(directory: Path, heatmaps: Sequence[Heatmap], layers: Mapping[str, str]) -> list[Profiles]:
    """The profiles of each heat map's criterion, from ``scores.safetensors``; without cells where it scores no columns or the file
    is not there. ``layers``: the layer of each module.

    Raises InputError for a file that is damaged.
    """
    path = directory / "scores.safetensors"
    if not path.is_file():
        return [Profiles([], []) for _ in heatmaps]
    try:
        known = {name: shape for name, (dtype, shape) in read_header(path).tensors.items() if dtype in DTYPES}
        with safe_open(path, "np") as file:
            found = [_columns_by_cell(h, layers, known, file) for h in heatmaps]
    except (OSError, Damaged, SafetensorError) as error:
        raise InputError(f"{directory} holds relevance scores that cannot be read: {error}") from error
    count = min(MOST, max(LEAST, BUCKETS // max(1, sum(map(len, found)))))
    return [_profiles(h, cells, count) for h, cells in zip(heatmaps, found, strict=True)]


Cells = dict[
    tuple[int, int], tuple[np.ndarray, int]
]  # row and column of the cell -> its columns' scores, and how many modules


def _columns_by_cell(h: Heatmap, layers: Mapping[str, str], known: Mapping[str, Sequence[int]], file: Any) -> Cells:
    cells: Cells = {}
    odd = set()  # cells whose modules have different numbers of columns
    rows, columns = ({name: i for i, name in enumerate(names)} for names in (h.rows, h.columns))
    for module, layer in layers.items():
        key = f"{h.criterion}/column/{module}"
        place = columns.get(_place(module, layer, columns))
        if key not in known or len(known[key]) != 1 or not known[key][0] or layer not in rows or place is None:
            continue
        cell, scores = (rows[layer], place), file.get_tensor(key).astype(np.float64)
        before, count = cells.get(cell, (np.zeros_like(scores), 0))
        if len(before) != len(scores):
            odd.add(cell)
            continue
        cells[cell] = before + scores, count + 1
    if not h.adds_up:
        cells = {cell: (total / count, count) for cell, (total, count) in cells.items()}
    return {cell: held for cell, held in cells.items() if cell not in odd}


def _place(module: str, layer: str, columns: Mapping[str, int]) -> str:
    """The column of the heat map that a module belongs to: its name inside its layer, or, of an expert, that of the experts."""
    inside = module.removeprefix(f"{layer}.") if module != layer else ""
    return next((name for name in (inside, inside.rpartition(".")[0]) if name in columns), OUTSIDE)


def _profiles(h: Heatmap, cells: Cells, count: int) -> Profiles:
    leading = []
    for (row, column), (scores, _) in cells.items():
        most = np.argsort(-np.abs(scores), kind="stable")[:LEADING]
        leading += [Leading(h.rows[row], h.columns[column], int(i), float(scores[i])) for i in most]
    leading.sort(key=lambda one: -abs(one.value))
    return Profiles(
        [profile(*cell, scores, modules, count) for cell, (scores, modules) in sorted(cells.items())],
        leading[:LEADING],
    )


def profile(row: int, column: int, scores: np.ndarray, modules: int, most: int) -> Profile:
    """The scores (columns,) of a cell in ``most`` buckets, or in as many as there are columns."""
    count = min(most, len(scores))
    starts = np.arange(count) * len(scores) // count
    widths = np.diff(np.append(starts, len(scores)))
    order = np.lexsort((-np.abs(scores), np.repeat(np.arange(count), widths)))[starts]
    means = np.add.reduceat(scores, starts) / widths
    return Profile(
        row,
        column,
        len(scores),
        modules,
        means.astype(np.float32).tolist(),
        scores[order].astype(np.float32).tolist(),
        (order - starts).tolist(),
    )
