"""report.html: a run on one page, in one file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from reltune.errors import InputError
from reltune.files import write_text
from reltune.metrics import METRICS
from reltune.relevance.heatmap import Heatmap
from reltune.relevance.profiles import Profiles
from reltune.report import comparison, numbers, several
from reltune.report.figures import (
    SCALES,
    curve_figures,
    heatmap_figure,
    heatmap_views,
    layers_figure,
    runs_figures,
    ways_figures,
    zoom_map,
)
from reltune.report.record import Output, RunRecord
from reltune.report.several import NamedRun

LARGEST = 6_000_000  # bytes of a page


def write_report(path: str | os.PathLike, record: RunRecord) -> None:
    """Write the page to ``path``, whole or not at all. Needs plotly and jinja2."""
    _check_libraries()
    figures: dict[str, dict[str, Any]] = {}
    views: dict[str, dict[str, Any]] = {}  # of the heat maps, by scale
    profiles: dict[str, dict[str, Any]] = {}  # of the heat maps with columns to zoom into
    panels = []
    by_column = record.profiles or [Profiles([], []) for _ in record.heatmaps]
    for i, (h, columns) in enumerate(zip(record.heatmaps, by_column, strict=True)):
        names = [*h.rows, *(name for name in record.selected_by_layer if name not in h.rows)]
        by_layer = h.share_by_layer + [0.0] * (len(names) - len(h.rows))
        figures[f"heatmap-{i}"] = heatmap_figure(h)
        views[f"heatmap-{i}"] = heatmap_views(h)
        if columns.cells:
            profiles[f"heatmap-{i}"] = zoom_map(h, columns)
        figures[f"layers-{i}"] = layers_figure(names, by_layer, record.selected_by_layer, h.adds_up, h.outside())
        panels.append(
            {
                "criterion": h.criterion,
                "of_what": numbers.of_what(h),
                "adds_up": h.adds_up,
                "numbered": numbers.layer_labels(h.rows)[1],
                "columns": h.columns,
                "zooms": _zooms(h, columns),
                "leading": columns.leading,
                "beyond": numbers.beyond_scale(h),
                "width": 170 + 32 * len(h.columns),  # pixels, below which it scrolls
                "rows": list(reversed(list(zip(h.rows, numbers.shares(h), h.share_by_layer, strict=True)))),
            }
        )
    if not record.heatmaps and record.selected_by_layer:
        figures["layers"] = layers_figure(list(record.selected_by_layer), None, record.selected_by_layer)
    figures.update(curve_figures(record.history))
    ways = []
    if record.ways is not None:
        figures.update(ways_figures(record.ways))
        ways = [
            (table, comparison.quality(record.ways, table), comparison.cost(record.ways, table))
            for table in record.ways.tables
        ]

    metrics = numbers.before_and_after(record.metrics)
    page = _rendered(
        "page.html",
        record.title,
        figures,
        views,
        profiles,
        record=record,
        key_figures=key_figures(record),
        metrics=metrics,
        compared=any(before is not None for _, before, _ in metrics),
        samples=[
            (numbers.opening(prompt), [(answer.step, *numbers.opening(answer.answer)) for answer in answers], count)
            for prompt, answers, count in numbers.by_prompt(record.samples)
        ],
        outputs=[_cells_of(output) for output in record.outputs],
        output_heads=[field.name for field in dataclasses.fields(Output)],
        alone=record.ways is not None and not record.metrics,
        ways=ways,
        panels=panels,
        config=list(numbers.flatten(record.config)),
        predicted=numbers.predicted_rows(record.predicted),
        sweep=numbers.sweep_rows(record.sweep) if record.sweep else None,
        lm_eval_rows=[numbers.lm_eval_cells(score) for score in record.lm_eval.scores] if record.lm_eval else [],
        scales=SCALES,
        history=numbers.history_rows(record.history),
    )
    write_text(path, page)


def write_runs_report(path: str | os.PathLike, runs: Sequence[NamedRun]) -> None:
    """Write a page with runs side by side to ``path``, whole or not at all. Needs plotly and jinja2."""
    _check_libraries()
    figures = runs_figures([(run.name, run.record.history) for run in runs])
    maps = []
    for i, run in enumerate(runs):
        if run.record.heatmaps:
            h = run.record.heatmaps[0]
            figures[f"heatmap-{i}"] = heatmap_figure(h)
            maps.append((f"heatmap-{i}", f"{run.name}: {h.criterion}", 170 + 32 * len(h.columns)))
    page = _rendered(
        "runs.html",
        f"reltune: {len(runs)} runs side by side",
        figures,
        {},
        {},
        tables=[several.reached(runs), several.took(runs)],
        base=several.prefix(runs),
        curves=[name for name in figures if not name.startswith("heatmap")],
        maps=maps,
        differences=several.differences(runs),
        notes=several.notes(runs),
    )
    write_text(path, page)


def _check_libraries() -> None:
    for name in ("jinja2", "plotly"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"the report needs {name}, which is not installed; run: pip install {name}")


def _zooms(h: Heatmap, columns: Profiles) -> list[tuple[str, list[tuple[int, str]]]]:
    """What can be zoomed into, by what it is: places in the heat map, with names."""
    if not columns.cells:
        return []
    labels = numbers.layer_labels(h.rows, width=40)[0]
    rows, places = ({getattr(cell, name) for cell in columns.cells} for name in ("row", "column"))
    return [
        ("layer", [(i, label) for i, label in enumerate(labels) if i in rows]),
        ("module", [(i, name) for i, name in enumerate(h.columns) if i in places]),
    ]


def _rendered(
    template: str,
    title: str,
    figures: Mapping[str, Any],
    views: Mapping[str, Any],
    profiles: Mapping[str, Any],
    **values: Any,
) -> str:
    """A page of a template beside this file. ``views`` are those of the heat maps, by scale."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=numbers.count, percent=numbers.percent, metric=numbers.metric)
    render = partial(
        environment.get_template(template).render,
        title=title,
        figures=figures,
        # "<" as an escape: no string in the data can close the script element.
        **{
            name: Markup(json.dumps(found, allow_nan=False).replace("<", "\\u003c"))
            for name, found in (("figures_json", figures), ("views_json", views), ("profiles_json", profiles))
        },
        wbr=Markup(".<wbr>"),  # a long module name may break after its dots
        **values,
    )
    library = get_plotlyjs() if figures else ""
    page = render(plotlyjs=Markup(library), packed="")
    if (
        len(page.encode()) > LARGEST
    ):  # maps of many criteria of a deep model; unpacking takes a moment, and a newer browser
        page = render(plotlyjs="", packed=base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode())
    return page


def _cells_of(output: Output) -> list[tuple[str, str, bool]]:
    """(start, rest, whether a model has written the reference) of each text in the outputs' table."""
    wanted = output.reference.strip()
    return [
        (*numbers.opening(text), name in ("base", "tuned") and text.strip() == wanted)
        for name, text in vars(output).items()
    ]


def key_figures(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """(name, value, unit, value before training) of what a reader looks for first; those that the run has."""
    figures = []
    for prefix, split in (("test", "Test"), ("eval", "Validation")):
        for name in numbers.measured([record.metrics], f"{prefix}_"):
            value = numbers.score(name, record.metrics[f"{prefix}_{name}"])
            before = record.metrics.get(f"{prefix}_before_{name}")
            unit = "%" if METRICS[name].share else ""
            earlier = "" if before is None else f"{numbers.score(name, before)} {unit}".strip()
            figures.append((f"{split} {METRICS[name].label}", value, unit, earlier))
        if figures:
            break
    trainable = record.metrics.get("trainable_parameters")
    if trainable is None and record.selected_by_layer:
        trainable = sum(record.selected_by_layer.values())
    if trainable is not None:
        figures.append(("Trainable parameters", numbers.count(trainable), "", ""))
    return figures
