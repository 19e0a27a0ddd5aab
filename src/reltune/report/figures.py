"""The charts of the report, as Plotly's figures in plain dictionaries: relevance, what was chosen, and the training's curves."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from reltune.metrics import METRICS
from reltune.relevance.heatmap import Heatmap
from reltune.report import comparison, numbers
from reltune.report.record import ComparisonRecord, WayResult

ROW = 22  # pixels per layer
# Pixels around the cells. Heat map and bars share TOP, so that their rows line up.
TOP, BOTTOM, LEFT = 84, 10, 48
# Okabe and Ito 2008: told apart with colour-vision deficiencies, 3:1 or better against both backgrounds.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
GRID = "rgba(128,128,128,.25)"


def _square_root_scale() -> list[list[Any]]:
    """Viridis by the square root of the value: one module that holds most of it leaves the others apart still."""
    from plotly.colors import sample_colorscale

    roots = [i / 20 for i in range(21)]
    return [[root**2, color] for root, color in zip(roots, sample_colorscale("Viridis", roots), strict=True)]


def _signed_scale() -> list[list[Any]]:
    """Negative values blue, positive ones vermillion, none pale: by the square root, as above, on both sides."""
    from plotly.colors import sample_colorscale

    roots = [i / 10 for i in range(-10, 11)]
    colors = sample_colorscale([[0, BLUE], [0.5, "#f2f2f2"], [1, VERMILLION]], [(1 + root) / 2 for root in roots])
    return [[(1 + root * abs(root)) / 2, color] for root, color in zip(roots, colors, strict=True)]


def heatmap_figure(h: Heatmap) -> dict[str, Any]:
    """Layer × module, coloured by the share of all relevance in percent."""
    parts = numbers.shares(h)
    cells = [[None if value is None else 100 * value for value in row] for row in parts]
    known = [value for row in cells for value in row if value is not None]
    signed = min(known, default=0.0) < 0
    most = max(map(abs, known), default=0.0)
    lines = [_two_lines(name) for name in h.columns]
    below = 32 + 5.6 * max((len(line) for pair in lines for line in pair), default=0)
    return {
        "data": [
            {
                "type": "heatmap",
                "z": cells,
                "zmin": -most if signed else 0,
                "zmax": most or 1,
                "text": [[numbers.share(value) for value in row] for row in parts],
                "texttemplate": "%{text}",
                "textfont": {"size": 10},
                "customdata": [
                    [
                        f"{_plain(row)}<br>{_plain(column)}<br>relevance {0 if value is None else value:.4g}"
                        for column, value in zip(h.columns, values, strict=True)
                    ]
                    for row, values in zip(h.rows, h.values, strict=True)
                ],
                "hovertemplate": "%{customdata}<br>%{z:.3f} % of " + numbers.of_what(h) + "<extra></extra>",
                "hoverongaps": False,
                "xgap": 1,
                "ygap": 1,
                "colorscale": _signed_scale() if signed else _square_root_scale(),
                "colorbar": {
                    "orientation": "h",
                    "title": {"text": f"share of {numbers.of_what(h)}, %", "side": "top"},
                    "thickness": 10,
                    "len": 1,
                    "x": 0,
                    "xanchor": "left",
                    "y": 1,
                    "yanchor": "bottom",
                    "ypad": 4,
                    "xpad": 0,
                    "nticks": 5,
                    "outlinewidth": 0,
                },
            }
        ],
        "layout": _layout(
            len(h.rows) * ROW + TOP + below,
            margin={"t": TOP, "b": below, "l": LEFT, "r": 8},
            xaxis={
                **_named_ticks(["<br>".join(map(_plain, pair)) for pair in lines]),
                "tickangle": -90,
                "tickfont": {"size": 10},  # two lines in a cell's width on a phone
            },
            yaxis=_layer_axis(h.rows),
            annotations=[LAYER_TITLE, _title("module", x=0.5, y=0, yanchor="bottom", yshift=-below)],
        ),
    }


def layers_figure(
    names: Sequence[str], by_layer: Sequence[float] | None, selected: Mapping[str, int], adds_up: bool = True
) -> dict[str, Any]:
    """Relevance by layer and, beside it, the trainable parameters chosen there."""
    places = list(range(len(names)))
    sides: list[tuple[Sequence[float], str, str, str, str]] = []
    if by_layer is not None:
        percents = [100 * value for value in by_layer]
        title, what = "share of all<br>relevance, %", "all relevance"
        if not adds_up:
            title, what = "the layer's own<br>score, share, %", "the layers' absolute values"
        sides.append((percents, title, BLUE, "%{x:.2f} % of " + what, ""))
    if selected:
        chosen = [selected.get(name, 0) for name in names]
        sides.append((chosen, "trainable<br>parameters", VERMILLION, "%{x:,} trainable parameters", "~s"))
    axes: dict[str, Any] = {}
    bars = []
    for i, (values, title, color, hover, tickformat) in enumerate(sides):
        suffix = "" if i == 0 else str(i + 1)
        width = 1 / len(sides)
        axes["xaxis" + suffix] = {
            "domain": [i * width + (0.04 if i else 0), (i + 1) * width - (0.04 if i + 1 < len(sides) else 0)],
            "title": {"text": title, "standoff": 6},
            "side": "top",
            "range": [1.05 * min([0, *values]), 1.05 * max([0, *values]) or 1],
            "nticks": 3,
            "tickangle": 0,
            "tickformat": tickformat,
            "gridcolor": GRID,
            "zeroline": min([0, *values]) < 0,
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
    return {
        "data": bars,
        "layout": _layout(
            len(names) * ROW + TOP + BOTTOM,
            margin={"t": TOP, "b": BOTTOM, "l": LEFT, "r": 14},
            yaxis=_layer_axis(names),
            annotations=[LAYER_TITLE],
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
    axis = {"gridcolor": GRID, "zeroline": False, "fixedrange": True, "ticklabelstandoff": 4}
    for name, curves, x, y in (
        ("loss", losses, "optimizer step", "loss"),
        ("scores", scores, "epoch", "validation score, %" if in_percent else "validation score"),
    ):
        drawn = [curve for curve in curves if curve["x"]]
        if drawn:
            figures[name] = {
                "data": drawn,
                "layout": _layout(
                    300,
                    margin={"t": 36, "b": 48, "l": 0, "r": 14},
                    xaxis={**axis, "title": {"text": x, "standoff": 8}},
                    yaxis={
                        **axis,
                        "title": {"text": y, "standoff": 12},
                        "rangemode": "tozero" if name == "loss" else "normal",
                        "automargin": "left",
                    },
                    showlegend=True,
                    legend={"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
                    hovermode="x",
                ),
            }
    return figures


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
    """Ticks at 1, 2 and 5 of each decade, over many decades at 1 alone, as short words."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low < 3 else (1,)
    places = [step * 10.0**decade for decade in range(low - 1, high + 1) for step in steps]
    words = []
    for place in places:
        size, letter = next((unit for unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if place >= unit[0]), (1, ""))
        words.append(f"{place / size:g}{letter}")
    return {"tickmode": "array", "tickvals": places, "ticktext": words}


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
    labels, _ = numbers.layer_labels(names, width=10)
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
