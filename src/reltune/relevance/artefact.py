"""The files of a run's ``relevance/`` directory, as far as they can be read without torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from reltune.errors import InputError
from reltune.reading import Damaged, read_json, typed
from reltune.relevance.heatmap import Heatmap

FORMAT = "reltune-relevance-3"
SCORES = "scores.json"
PARTIAL = "partial.safetensors"  # intermediate results; a criterion's own have its name before this, and a dot


@dataclasses.dataclass
class Overview:
    """What people are shown of relevance scores.

    Attributes:
        provenance: the model, data and versions that the scores were measured with.
        layers: the layer of each module that was scored, from the input on.
        left_out: parameters that were not scored -> why.
        heatmaps: one per criterion.
        depth_sentence: where relevance lies by depth, in one line.
        fingerprint: of the base model.
    """

    provenance: dict[str, Any]
    layers: dict[str, str]
    left_out: dict[str, str]
    heatmaps: list[Heatmap]
    depth_sentence: str
    fingerprint: str = ""

    @property
    def criteria(self) -> list[str]:
        return [heatmap.criterion for heatmap in self.heatmaps]


def read_scores(directory: Path) -> dict[str, Any]:
    """What ``scores.json`` says.

    Raises InputError where there is none, or none of this format.
    """
    try:
        values = read_json(directory / SCORES)
    except FileNotFoundError as error:
        raise InputError(f"{directory} holds no relevance scores; run `reltune analyze` first.") from error
    except (OSError, Damaged) as error:
        raise InputError(f"{directory} holds relevance scores that cannot be read: {error}") from error
    form = values.get("format") if isinstance(values, dict) else None
    if form != FORMAT:
        raise InputError(f"{directory / SCORES} has format {form!r}, not {FORMAT!r}; analyze again.")
    return dict(values)


def read_overview(directory: Path) -> Overview | None:
    """What people are shown of the scores in a directory; None if an older version measured them, of which the tensors
    have to be read (``RelevanceScores.overview``).

    Raises InputError for scores that are missing or damaged.
    """
    values = read_scores(directory)
    if "overview" not in values:
        return None
    try:
        return Overview(
            provenance=typed(dict[str, Any], values["provenance"], "provenance"),
            layers={typed(str, module["name"]): typed(str, module["layer"]) for module in values["modules"]},
            left_out=typed(dict[str, str], values["left_out"], "left_out"),
            heatmaps=[
                _checked(heatmap) for heatmap in typed(list[Heatmap], values["overview"]["heatmaps"], "heatmaps")
            ],
            depth_sentence=typed(str, values["overview"]["depth_sentence"], "depth_sentence"),
            fingerprint=typed(str, values["fingerprint"], "fingerprint"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory} holds relevance scores that do not fit together ({error}); analyze again."
        ) from error


def _checked(heatmap: Heatmap) -> Heatmap:
    """The heatmap; ValueError where its table has not the size that its names say."""
    rows, columns = len(heatmap.rows), len(heatmap.columns)
    if len(heatmap.values) != rows or len(heatmap.share_by_layer) != rows or {*map(len, heatmap.values)} - {columns}:
        raise ValueError(f"the heatmap of {heatmap.criterion} has not {rows} rows and {columns} columns")
    return heatmap


def interrupted_in(directory: Path) -> bool:
    """Whether an analysis was interrupted here and can go on."""
    return (directory / PARTIAL).is_file() or any(directory.glob(f"*.{PARTIAL}"))
