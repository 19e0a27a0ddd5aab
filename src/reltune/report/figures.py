"""The charts of the report, as Plotly's figures in plain dictionaries: relevance, what was chosen, and the training's curves."""

from __future__ import annotations

import base64
import html
import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from reltune.metrics import METRICS
from reltune.relevance.heatmap import Heatmap
from reltune.relevance.profiles import Profiles
from reltune.report import comparison, numbers
from reltune.report.record import ComparisonRecord, WayResult

ROW = 22  # pixels per layer
# Pixels around the cells. Heat map and bars share TOP, so that their rows line up.
TOP, BOTTOM, LEFT = 84, 10, 48
# Okabe and Ito 2008: told apart with colour-vision deficiencies, 3:1 or better against both backgrounds.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
RUNS = (BLUE, VERMILLION, GREEN, "#CC79A7", "#E69F00", "#56B4E9")  # one after another
SYMBOLS = ("circle", "square", "diamond", "x")
GRID = "rgba(128,128,128,.25)"


SCALES = ("linear", "log", "rank")  # what a cell's colour stands for


def _signed_scale() -> list[list[Any]]:
    """Negative values blue, positive ones vermillion, none pale."""
    return [[0, BLUE], [0.5, "#f2f2f2"], [1, VERMILLION]]


def _sequential_scale() -> list[list[Any]]:
    """Cividis (Nuñez, Anderton and Renslow 2018): lighter with the value, the same with colour-vision deficiencies."""
    from plotly.colors import get_colorscale

    return list(get_colorscale("Cividis"))


def heatmap_figure(h: Heatmap, scale: str = "linear") -> dict[str, Any]:
    """Layer × module, coloured by the share of all relevance, by its logarithm or by its rank.

    The colours span the modules within the layers; what lies outside them and holds more has the last colour.
    """
    parts = numbers.shares(h)
    known = [value for row in parts for value in row if value is not None]
    signed = min(known, default=0.0) < 0
    end = numbers.scale_end(h)
    decimals = 1 if end > 0.02 else 2
    place, ticks = _places(known, end, scale)
    falling = sorted(map(abs, known), reverse=True)
    ranks = [[None if value is None else 1 + falling.index(abs(value)) for value in row] for row in parts]
    of_rank = "rank by absolute value" if signed else "rank"
    titles = {"linear": f"share of {numbers.of_what(h)}, %", "rank": f"{of_rank}, of {len(known)}"}
    lines = [_two_lines(name) for name in h.columns]
    below = 32 + 5.6 * max((len(line) for pair in lines for line in pair), default=0)
    return {
        "data": [
            {
                "type": "heatmap",
                "z": [[None if value is None else place(value) for value in row] for row in parts],
                "zmin": -1 if signed else 0,
                "zmax": 1,
                "text": [["" if rank is None else str(rank) for rank in row] for row in ranks]
                if scale == "rank"
                else [[numbers.share(value, decimals) for value in row] for row in parts],
                "texttemplate": "%{text}",
                "textfont": {"size": 10},
                "customdata": [
                    [
                        ""
                        if value is None or part is None
                        else f"{_plain(row)}<br>{_plain(column)}<br>relevance {value:.6g}<br>"
                        f"{100 * part:.4g} % of {numbers.of_what(h)}<br>{of_rank} {rank} of {len(known)}"
                        for column, value, part, rank in zip(h.columns, *cells, strict=True)
                    ]
                    for row, cells in zip(h.rows, zip(h.values, parts, ranks, strict=True), strict=True)
                ],
                "hovertemplate": "%{customdata}<extra></extra>",
                "hoverongaps": False,
                "xgap": 1,
                "ygap": 1,
                "colorscale": _signed_scale() if signed else _sequential_scale(),
                "colorbar": {
                    "orientation": "h",
                    "title": {"text": titles.get(scale, titles["linear"] + ", log"), "side": "top"},
                    "thickness": 10,
                    "len": 1,
                    "x": 0,
                    "xanchor": "left",
                    "y": 1,
                    "yanchor": "bottom",
                    "ypad": 4,
                    "xpad": 0,
                    "outlinewidth": 0,
                    "ticklabeloverflow": "allow",
                    **_ticks(ticks, signed, "" if scale == "rank" else "−"),
                },
            }
        ],
        "layout": _layout(
            len(h.rows) * ROW + TOP + below,
            margin={"t": TOP, "b": below, "l": LEFT, "r": 14},
            xaxis={
                **_named_ticks(["<br>".join(map(_plain, pair)) for pair in lines]),
                "tickangle": -90,
                "tickfont": {"size": 10},  # two lines in a cell's width on a phone
            },
            yaxis=_layer_axis(h.rows),
            annotations=[LAYER_TITLE, _title("module", x=0.5, y=0, yanchor="bottom", yshift=-below)],
        ),
    }


def heatmap_views(h: Heatmap) -> dict[str, dict[str, Any]]:
    """By each scale, what differs between the heat maps of all scales."""
    traces = {scale: heatmap_figure(h, scale)["data"][0] for scale in SCALES}
    return {scale: {name: trace[name] for name in ("z", "text", "colorbar")} for scale, trace in traces.items()}


PARTS = ("means", "peaks", "offsets")  # of a profile, in the order of their bytes


def zoom_map(h: Heatmap, profiles: Profiles) -> dict[str, Any]:
    """What zoom.js draws the columns of a heat map's cells from. The numbers are bytes: all means and all peaks as float32, then all
    offsets as uint32, one after another."""
    cells = profiles.cells
    means, peaks, offsets = ([value for cell in cells for value in getattr(cell, name)] for name in PARTS)
    count = len(means)
    return {
        "rows": [_plain(name) for name in h.rows],
        "columns": [_plain(name) for name in h.columns],
        "labels": [_plain(label) for label in numbers.layer_labels(h.rows, width=22)[0]],
        "total": math.fsum(abs(value) for row in h.values for value in row if value is not None) if h.adds_up else None,
        "colors": _signed_scale() if min(peaks) < 0 else _sequential_scale(),
        "positive": VERMILLION,
        "negative": BLUE,  # and of what has no sign
        "grid": GRID,
        "layout": _layout(0),
        "cells": [[cell.row, cell.column, cell.columns, cell.modules, len(cell.means)] for cell in cells],
        "data": base64.b64encode(struct.pack(f"<{2 * count}f{count}I", *means, *peaks, *offsets)).decode(),
    }


def _places(known: Sequence[float], end: float, scale: str) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """What puts a share on a scale of colours (0..1, with the sign of the share), and (place, label) of its ticks."""
    sizes = sorted(map(abs, known))
    if scale == "rank" and sizes:
        count = len(sizes)
        middle = (count + 1) // 2
        ticks = [((count - rank + 1) / count, str(rank)) for rank in sorted({1, middle, count}, reverse=True)]
        return lambda value: math.copysign(bisect_right(sizes, abs(value)) / count, value), ticks
    if end == 0:
        return lambda value: 0.0, [(0, "0")]
    if scale == "linear":
        unit = 10.0 ** math.floor(math.log10(end))
        step = next(part * unit for part in (0.2, 0.5, 1, 2) if end <= 5 * part * unit)
        ticks = [(i * step / end, f"{100 * i * step:.3g}") for i in range(int(1.001 * end / step) + 1)]
        return lambda value: max(-1.0, min(1.0, value / end)), ticks
    least = next((size for size in sizes if size > 0), end)
    decades = min(max(math.ceil(math.log10(end / least)) if least < end else 1, 1), 4)

    def place(value: float) -> float:
        if value == 0:
            return 0.0
        size = 1 + math.log10(abs(value) / end) / decades
        return math.copysign(max(0.0, min(1.0, size)), value)

    powers = range(math.floor(math.log10(end)) - decades, math.floor(math.log10(end)) + 1)
    rounds = [part * 10.0**power for power in powers for part in ((1, 2, 5) if decades < 3 else (1,))]
    return place, [(place(size), f"{100 * size:.2g}") for size in rounds if end / 10**decades < size <= end]


def _ticks(ticks: Sequence[tuple[float, str]], signed: bool, minus: str) -> dict[str, Any]:
    if signed:  # fewer, on either side
        apart = [(place, text) for place, text in ticks if place > 0.3]
        ticks = [
            *((-place, minus + text) for place, text in reversed(apart)),
            *[tick for tick in ticks if tick not in apart][:1],
            *apart,
        ]
    return {"tickmode": "array", "tickvals": [place for place, _ in ticks], "ticktext": [text for _, text in ticks]}


def layers_figure(
    names: Sequence[str],
    by_layer: Sequence[float] | None,
    selected: Mapping[str, int],
    adds_up: bool = True,
    outside: Collection[str] = (),
) -> dict[str, Any]:
    """Relevance by layer and, beside it, the trainable parameters chosen there.

    The axes span the layers; a longer bar of a module outside them is cut at the edge and says its value.
    """
    places = list(range(len(names)))
    sides: list[tuple[Sequence[float], str, str, str, str, Callable[[float], str]]] = []
    if by_layer is not None:
        percents = [100 * value for value in by_layer]
        title, what = "share of all<br>relevance, %", "all relevance"
        if not adds_up:
            title, what = "the layer's own<br>score, share, %", "the layers' absolute values"
        sides.append((percents, title, BLUE, "%{x:.4g} % of " + what, "", "{:.1f}".format))
    if selected:
        chosen = [selected.get(name, 0) for name in names]
        sides.append(
            (chosen, "trainable<br>parameters", VERMILLION, "%{x:,} trainable parameters", "~s", numbers.count)
        )
    axes: dict[str, Any] = {}
    bars, cut = [], []
    for i, (values, title, color, hover, tickformat, text) in enumerate(sides):
        suffix = "" if i == 0 else str(i + 1)
        width = 1 / len(sides)
        within = [value for name, value in zip(names, values, strict=True) if name not in outside]
        within = [0, *(within if any(within) else values)]
        low, high = 1.05 * min(within), 1.05 * max(within) or 1
        axes["xaxis" + suffix] = {
            "domain": [i * width + (0.04 if i else 0), (i + 1) * width - (0.04 if i + 1 < len(sides) else 0)],
            "title": {"text": title, "standoff": 6},
            "side": "top",
            "range": [low, high],
            "nticks": 3,
            "tickangle": 0,
            "tickformat": tickformat,
            "gridcolor": GRID,
            "zeroline": low < 0,
            "fixedrange": True,
        }
        bars.append(
            {
                "type": "bar",
                "orientation": "h",
                "x": values,
                "y": places,
                "xaxis": "x" + suffix,
                "yaxis": "y",
                "marker": {"color": color},
                "customdata": [_plain(name) for name in names],
                "hovertemplate": "%{customdata}<br>" + hover + "<extra></extra>",
            }
        )
        cut += [
            {
                **_title(
                    f"{text(value)} ▸", x=high, xref="x" + suffix, xanchor="right", y=y, yref="y", yanchor="middle"
                ),
                "font": {"size": 11, "color": "#fff"},
                "bgcolor": color,
                "borderpad": 1,
            }
            for y, value in enumerate(values)
            if value > high
        ]
    return {
        "data": bars,
        "layout": _layout(
            len(names) * ROW + TOP + BOTTOM,
            margin={"t": TOP, "b": BOTTOM, "l": LEFT, "r": 14},
            yaxis=_layer_axis(names),
            annotations=[LAYER_TITLE, *cut],
            bargap=0.25,
            showlegend=False,
            **axes,
        ),
    }


def curve_figures(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Loss by step and evaluation scores by epoch, from the trainer's log; whichever was logged."""
    figures = {}
    losses = [
        _curve(history, "loss", "step", "training loss", BLUE, "circle", "lines"),
        _curve(history, "eval_loss", "step", "validation loss", VERMILLION, "square", "lines+markers"),
    ]
    names = numbers.measured(history, "eval_")
    in_percent = [name for name in names if METRICS[name].share]
    shown = in_percent or names[:1]  # the others' scales differ
    looks = ((BLUE, "circle"), (GREEN, "diamond"), (VERMILLION, "square"))
    scores = [
        _curve(history, f"eval_{name}", "epoch", METRICS[name].label, *look, "lines+markers", 100 if in_percent else 1)
        for name, look in zip(shown, looks, strict=False)
    ]
    for name, curves, x, y in (
        ("loss", losses, "optimizer step", "loss"),
        ("scores", scores, "epoch", "validation score, %" if in_percent else "validation score"),
    ):
        drawn = [curve for curve in curves if curve["x"]]
        if drawn:
            figures[name] = _curves(drawn, x, y, from_zero=name == "loss")
    return figures


def runs_figures(histories: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """The curves of several runs together: training loss, validation loss, and the first metric on validation data."""
    names = numbers.measured([entry for _, history in histories for entry in history], "eval_")[:1]
    kinds = [
        ("training-loss", "loss", "training loss", "lines"),
        ("validation-loss", "eval_loss", "validation loss", "lines+markers"),
    ]
    kinds += [("scores", f"eval_{name}", f"validation {comparison.label(name)}", "lines+markers") for name in names]
    figures = {}
    for figure, key, title, mode in kinds:
        scale = 100 if key.removeprefix("eval_") in METRICS and METRICS[key.removeprefix("eval_")].share else 1
        drawn = [
            _curve(
                history,
                key,
                "step",
                _plain(name),
                RUNS[i % len(RUNS)],
                SYMBOLS[i // len(RUNS) % len(SYMBOLS)],
                mode,
                scale,
            )
            for i, (name, history) in enumerate(histories)
        ]
        drawn = [curve for curve in drawn if curve["x"]]
        if drawn:
            figures[figure] = _curves(drawn, "optimizer step", title, from_zero=scale == 1 and key.endswith("loss"))
    return figures


def _curves(drawn: list[dict[str, Any]], x: str, y: str, from_zero: bool) -> dict[str, Any]:
    axis = {"gridcolor": GRID, "zeroline": False, "fixedrange": True, "ticklabelstandoff": 4}
    return {
        "data": drawn,
        "layout": _layout(
            300,
            margin={"t": 36, "b": 48, "l": 0, "r": 14},
            xaxis={**axis, "title": {"text": x, "standoff": 8}},
            yaxis={
                **axis,
                "title": {"text": y, "standoff": 12},
                "rangemode": "tozero" if from_zero else "normal",
                "automargin": "left",
            },
            showlegend=True,
            legend={"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
            hovermode="x",
        ),
    }


WAYS = {  # colour, symbol and name of each table's points
    "equal": (BLUE, "circle", "equal size"),
    "usual": (GREEN, "diamond", "usual size"),
    "equal_cost": (VERMILLION, "square", "equal total cost"),
}


def ways_figures(record: ComparisonRecord) -> dict[str, dict[str, Any]]:
    """Quality against the time of a training with its analysis, and against its trainable parameters. A point is a method at a size,
    its bar the standard deviation between seeds."""
    axis = {"gridcolor": GRID, "zeroline": False, "fixedrange": True, "ticklabelstandoff": 4}
    figures = {}
    for name, title, field in (
        ("ways-seconds", "seconds of a training with its analysis", "seconds"),
        ("ways-parameters", "trainable parameters", "trainable_parameters"),
    ):
        drawn: set[str] = set()  # a method of one size is in several tables
        traces = []
        for table in record.tables:
            rows = [row for row in table.rows if row.method and getattr(row, field) and record.metric in row.metrics]
            rows = [row for row in rows if table.name == "equal_cost" or row.label not in drawn]
            if field == "trainable_parameters" and table.name == "equal_cost":
                continue  # the same sizes again
            drawn |= {row.label for row in rows}
            if rows:
                traces.append(_ways(record.metric, rows, field, *WAYS[table.name]))
        if traces:
            figures[name] = {
                "data": traces,
                "layout": _layout(
                    380,
                    margin={"t": 36, "b": 48, "l": 0, "r": 24},
                    xaxis={
                        **axis,
                        "title": {"text": title, "standoff": 8},
                        "type": "log",
                        **_log_ticks([x for trace in traces for x in trace["x"]]),
                    },
                    yaxis={
                        **axis,
                        "title": {"text": f"{comparison.label(record.metric)}, test", "standoff": 12},
                        "automargin": "left",
                    },
                    showlegend=True,
                    legend={"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
                ),
            }
    return figures


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 of each decade, over many decades at 1 alone, as short words; at other round numbers where the values lie close
    together."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low < 3 else (1,)
    places = [step * 10.0**decade for decade in range(low - 1, high + 1) for step in steps]
    if sum(min(values) <= place <= max(values) for place in places) < 2:
        places = _round_numbers(min(values), max(values))
    words = []
    for place in places:
        size, letter = next((unit for unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if place >= unit[0]), (1, ""))
        words.append(f"{place / size:g}{letter}")
    return {"tickmode": "array", "tickvals": places, "ticktext": words}


def _round_numbers(low: float, high: float) -> list[float]:
    """Two to five multiples of the largest 1, 2 or 5 times a power of ten that has so many from ``low`` to ``high``; low's first digits
    where both are one."""
    if low == high:
        return [float(f"{low:.2g}")]
    power = math.floor(math.log10(high - low))
    for unit in (step * 10.0**decade for decade in (power + 1, power, power - 1) for step in (5, 2, 1)):
        multiples = [unit * k for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]
        if len(multiples) >= 2:
            break
    return multiples


def _ways(metric: str, rows: Sequence[WayResult], field: str, color: str, symbol: str, name: str) -> dict[str, Any]:
    scale, _ = comparison.scale_of(metric)
    around = ["top center", "bottom center"]  # names of neighbours on either side
    order = sorted(range(len(rows)), key=lambda i: getattr(rows[i], field))
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": name,
        "x": [getattr(row, field) for row in rows],
        "y": [scale * row.metrics[metric] for row in rows],
        "error_y": {
            "type": "data",
            "array": [scale * (row.deviations.get(metric) or 0.0) for row in rows],
            "thickness": 1,
            "width": 3,
            "color": color,
        },
        "text": [_plain(row.method) for row in rows],
        "textposition": [around[order.index(i) % 2] for i in range(len(rows))],
        "textfont": {"size": 11},
        "customdata": [_plain(row.label) for row in rows],
        "hovertemplate": "%{customdata}<br>%{y:.4g}<br>%{x:,.4~g}<extra></extra>",
        "marker": {"color": color, "symbol": symbol, "size": 9},
        "cliponaxis": False,
    }


def _curve(
    history: Sequence[Mapping[str, Any]],
    key: str,
    axis: str,
    name: str,
    color: str,
    symbol: str,
    mode: str,
    scale: float = 1,
) -> dict[str, Any]:
    points = [(entry[axis], entry[key]) for entry in history if axis in entry and key in entry]
    points = [(x, scale * y) for x, y in points if math.isfinite(y)]
    return {
        "type": "scatter",
        "name": name,
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "mode": "markers" if len(points) == 1 else mode,
        "line": {"color": color, "width": 2},
        "marker": {"color": color, "symbol": symbol, "size": 8},
        "hovertemplate": f"{name} %{{y:.4g}}<br>{axis} %{{x}}<extra></extra>",
    }


def _layout(height: float, **fields: Any) -> dict[str, Any]:
    return {
        "height": round(height),
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {"bgcolor": "#1b1f24", "bordercolor": "#1b1f24", "font": {"color": "#fff"}},
        "dragmode": False,  # a finger on a chart scrolls the page
        **fields,
    }


def _title(text: str, **place: Any) -> dict[str, Any]:
    """An axis title where Plotly puts none: clear of turned labels, or above labels to spare width."""
    return {"text": text, "showarrow": False, "xref": "paper", "yref": "paper", "font": {"size": 13}, **place}


LAYER_TITLE = _title("layer", x=0, xanchor="right", xshift=-10, y=1, yanchor="bottom")


def _layer_axis(names: Sequence[str]) -> dict[str, Any]:
    labels, _ = numbers.layer_labels(names, width=22)
    return {**_named_ticks([_plain(label) for label in labels]), "automargin": "left"}


def _named_ticks(labels: Sequence[str]) -> dict[str, Any]:
    """One tick per place; numbers below, names shown, so that equal names do not fall together."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(labels))),
        "ticktext": list(labels),
        "range": [-0.5, len(labels) - 0.5],
        "fixedrange": True,
        "ticks": "",
        "ticklabelstandoff": 4,
        "showgrid": False,
        "zeroline": False,
    }


def _two_lines(name: str) -> list[str]:
    """A long module name in two lines, broken after its last dot, underscore or blank."""
    for mark in "._ ":
        parent, separator, last = name.rpartition(mark)
        if separator and len(name) > 14:
            return [parent + separator, last]
    return [name]


def _plain(text: str) -> str:
    """Plotly reads its text as simple HTML."""
    return html.escape(text, quote=False)
