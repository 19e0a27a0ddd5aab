"""report.html: a run on one page, in one file that loads nothing from anywhere."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reltune.errors import InputError
from reltune.files import write_text
from reltune.metrics import METRICS
from reltune.relevance.heatmap import Heatmap
from reltune.report import numbers
from reltune.report.record import MethodResult, Output, RunRecord

ROW = 22  # pixels per layer
# Pixels around the cells. Heat map and bars share TOP, so that their rows line up.
TOP, BOTTOM, LEFT = 84, 10, 48
# Okabe and Ito 2008: told apart with colour-vision deficiencies, 3:1 or better against both backgrounds.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
GRID = "rgba(128,128,128,.25)"


def write_report(path: str | os.PathLike, record: RunRecord) -> None:
    """Write the page to ``path``, whole or not at all. Needs plotly and jinja2."""
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(
            f"the report needs {error.name}, which is not installed; run: pip install {str(error.name).partition('.')[0]}"
        ) from error
    figures: dict[str, dict[str, Any]] = {}
    panels = []
    for i, h in enumerate(record.heatmaps):
        names = [*h.rows, *(name for name in record.selected_by_layer if name not in h.rows)]
        by_layer = h.share_by_layer + [0.0] * (len(names) - len(h.rows))
        figures[f"heatmap-{i}"] = heatmap_figure(h)
        figures[f"layers-{i}"] = layers_figure(names, by_layer, record.selected_by_layer, h.adds_up)
        panels.append(
            {
                "criterion": h.criterion,
                "of_what": numbers.of_what(h),
                "adds_up": h.adds_up,
                "numbered": numbers.layer_labels(h.rows)[1],
                "columns": h.columns,
                "width": 84 + 28 * len(h.columns),  # pixels, below which it scrolls
                "rows": list(reversed(list(zip(h.rows, numbers.shares(h), h.share_by_layer, strict=True)))),
            }
        )
    if not record.heatmaps and record.selected_by_layer:
        figures["layers"] = layers_figure(list(record.selected_by_layer), None, record.selected_by_layer)
    figures.update(curve_figures(record.history))

    columns, metrics = comparison_columns(record.comparison), numbers.before_and_after(record.metrics)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=numbers.count, percent=numbers.percent, metric=numbers.metric)
    page = environment.from_string(PAGE).render(
        record=record,
        key_figures=key_figures(record),
        metrics=metrics,
        compared=any(before is not None for _, before, _ in metrics),
        outputs=[_cells_of(output) for output in record.outputs],
        output_heads=[field.name for field in dataclasses.fields(Output)],
        comparison_heads=[head for head, _ in columns],
        comparison_rows=[(row, [text(row) for _, text in columns]) for row in record.comparison],
        panels=panels,
        figures=figures,
        config=list(flatten(record.config)),
        sweep=numbers.sweep_rows(record.sweep) if record.sweep else None,
        lm_eval_rows=[numbers.lm_eval_cells(score) for score in record.lm_eval.scores] if record.lm_eval else [],
        # "<" as an escape: no string in the data can close the script element.
        figures_json=Markup(json.dumps(figures, allow_nan=False).replace("<", "\\u003c")),
        wbr=Markup(".<wbr>"),  # a long module name may break after its dots
        plotlyjs=Markup(get_plotlyjs()) if figures else "",
    )
    write_text(path, page)


def comparison_columns(results: Sequence[MethodResult]) -> list[tuple[str, Callable[[MethodResult], str]]]:
    """Head and text of each column: the sizes, the task's own metrics, the cost."""
    scores: list[tuple[str, Callable[[MethodResult], str]]] = [
        (numbers.head(name), lambda row, name=name: numbers.score(name, row.metrics.get(name)))  # type: ignore[misc]
        for name in numbers.measured(row.metrics for row in results)
    ]
    return [*SIZES, *scores, *COSTS]


SIZES: tuple[tuple[str, Callable[[MethodResult], str]], ...] = (
    ("trainable\nparameters", lambda row: numbers.count(row.trainable_parameters)),
    ("head\nparameters", lambda row: numbers.count(row.head_parameters)),
)
COSTS: tuple[tuple[str, Callable[[MethodResult], str]], ...] = (
    ("loss", lambda row: numbers.fixed(row.loss, 4)),
    ("s / step", lambda row: numbers.fixed(row.seconds_per_step, 4)),
    ("peak\nmemory", lambda row: numbers.size(row.peak_memory_bytes)),
    ("on disk", lambda row: numbers.size(row.disk_bytes)),
    ("ms / text", lambda row: numbers.fixed(row.inference_ms_per_text, 2)),
    ("ms / text,\nmerged", lambda row: numbers.fixed(row.inference_ms_per_text_merged, 2)),
    ("learning\nrate", lambda row: numbers.MISSING if row.learning_rate is None else f"{row.learning_rate:g}"),
)


def _cells_of(output: Output) -> list[tuple[str, str, bool]]:
    """(start, rest, whether a model has written the reference) of each text in the outputs' table."""
    wanted = output.reference.strip()
    return [
        (*numbers.opening(text), name in ("base", "tuned") and text.strip() == wanted)
        for name, text in vars(output).items()
    ]


def key_figures(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """(name, value, unit, value before training) of what a reader looks for first; those that the run has."""
    found = []
    for prefix, split in (("test", "Test"), ("eval", "Validation")):
        for name in numbers.measured([record.metrics], f"{prefix}_"):
            value = numbers.score(name, record.metrics[f"{prefix}_{name}"])
            before = record.metrics.get(f"{prefix}_before_{name}")
            unit = "%" if METRICS[name].share else ""
            earlier = "" if before is None else f"{numbers.score(name, before)} {unit}".strip()
            found.append((f"{split} {METRICS[name].label}", value, unit, earlier))
        if found:
            break
    trainable = record.metrics.get("trainable_parameters")
    if trainable is None and record.selected_by_layer:
        trainable = sum(record.selected_by_layer.values())
    if trainable is not None:
        found.append(("Trainable parameters", numbers.count(trainable), "", ""))
    return found


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
        found = [curve for curve in curves if curve["x"]]
        if found:
            figures[name] = {
                "data": found,
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


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text."""
    found = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += flatten(value, f"{prefix}{key}.")
        elif value is None or value == [] or value == {}:
            found.append((f"{prefix}{key}", numbers.MISSING))
        elif isinstance(value, list | tuple):
            found.append((f"{prefix}{key}", ", ".join(map(str, value))))
        else:
            found.append((f"{prefix}{key}", str(value)))
    return found


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
        parent, found, last = name.rpartition(mark)
        if found and len(name) > 14:
            return [parent + found, last]
    return [name]


def _plain(text: str) -> str:
    """Plotly reads its text as simple HTML."""
    return html.escape(text, quote=False)


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{{ record.title }}</title>
<style>
:root { --page: #fff; --text: #1b1f24; --soft: #59636e; --line: #d5dae0; --card: #f5f7f9; --accent: #0072B2; }
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --text: #e4e7eb; --soft: #9aa4af; --line: #333a42; --card: #1d2126; --accent: #56B4E9;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0; font-size: 28px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 48px 0 12px; padding-top: 16px; border-top: 1px solid var(--line); font-size: 20px; }
h3 { margin: 0 0 8px; font-size: 16px; }
p, ul { margin: 0 0 12px; max-width: 75ch; overflow-wrap: anywhere; }
ul { padding-left: 20px; }
.soft { color: var(--soft); font-size: 14px; }
.key { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0 0; }
.key div { flex: 1 1 130px; padding: 12px 16px; background: var(--card); border-radius: 8px; }
.key dt { color: var(--soft); font-size: 14px; }
.key dd { margin: 0; font-size: 26px; font-weight: 600; line-height: 1.25; }
.key small { font-size: 16px; font-weight: 400; }
.key .before { color: var(--soft); font-size: 14px; font-weight: 400; }
fieldset { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 16px; padding: 0; border: 0; }
legend { float: left; margin-right: 4px; color: var(--soft); }
input { accent-color: var(--accent); }
.pair { display: grid; grid-template-columns: minmax(0, 1fr); gap: 24px; align-items: start; }
@media (max-width: 600px) { main { padding: 24px 16px 48px; } }
.pair > :only-child { grid-column: 1 / -1; }
@media (min-width: 900px) {
  .key div { max-width: 260px; }
  .pair { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  .pair.maps { grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); }
}
.scroll { /* a shade at the right edge while there is more to see */
  overflow-x: auto;
  background:
    linear-gradient(to left, var(--page) 12px, transparent) 100% 0 / 24px 100% no-repeat local,
    linear-gradient(to left, var(--line), transparent) 100% 0 / 12px 100% no-repeat scroll;
}
.plot text:not(.heatmap-label text, .hoverlayer text) { fill: var(--text) !important; }
/* Plotly's dark grey is too pale on green. */
.heatmap-label text[style*="rgb(68, 68, 68)"] { fill: #000 !important; }
@media screen { fieldset ~ .panel h3 { display: none; } }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 16px 6px 0; border-bottom: 1px solid var(--line); }
th, td { text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
.number { text-align: right; white-space: pre; }
details th { white-space: normal; }
.facts { width: 100%; }
.facts td { text-align: right; overflow-wrap: anywhere; padding-right: 0; }
.facts td + td { padding-left: 16px; }
.texts { width: 100%; min-width: 640px; table-layout: fixed; }
.texts td { white-space: pre-wrap; overflow-wrap: anywhere; }
.texts details { margin: 0; }
.texts summary { color: inherit; font-size: inherit; list-style: none; }
.texts details:not([open]) summary::after { content: " … more"; color: var(--accent); }
.right { color: var(--soft); }
details, .scroll + p { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); font-size: 14px; }
/* Set by the script before printing: a page's width is not known to it, and charts do not shrink on paper. */
.print { width: 700px; }
.print .pair { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
.print .pair.maps { grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); }
@media print {
  main { max-width: none; padding: 0; }
  h2 { margin-top: 24px; }
  h2, h3 { break-after: avoid; }
  .panel, .plot, .key, tr { break-inside: avoid; }
  .scroll { overflow: visible; background: none; }
  table, td .soft, th .soft { font-size: 10px; }
  th, td { padding: 4px 8px 4px 0; }
  fieldset, details:not(.texts details) { display: none; }
}
</style>
</head>
<body>
<main>
<h1>{{ record.title }}</h1>
{% if record.config.model_name_or_path is defined %}
<p class="soft">{{ record.config.model_name_or_path }}</p>
{% endif %}
{% if key_figures %}
<dl class="key">
{% for name, value, unit, before in key_figures %}
<div><dt>{{ name }}</dt><dd>{{ value }}{% if unit %} <small>{{ unit }}</small>{% endif %}</dd>
{% if before %}
<dd class="before">before training {{ before }}</dd>
{% endif %}
</div>
{% endfor %}
</dl>
{% endif %}

<h2>Relevance</h2>
{% if record.depth_sentence %}
<p>{{ record.depth_sentence }}</p>
{% endif %}
{% if not panels %}
<p class="soft">No relevance was recorded.</p>
{% endif %}
{% if panels | length > 1 %}
<fieldset><legend>Criterion</legend>
{% for panel in panels %}
<label><input type="radio" name="criterion" value="panel-{{ loop.index0 }}" {{ "checked" if loop.first }}>
{{ panel.criterion }}</label>
{% endfor %}
</fieldset>
{% endif %}
{% for panel in panels %}
<section class="panel" id="panel-{{ loop.index0 }}">
<h3>{{ panel.criterion }}</h3>
<div class="pair maps">
<div class="scroll">
<div class="plot" id="heatmap-{{ loop.index0 }}" style="min-width: {{ panel.width }}px"></div>
</div>
<div>
<div class="plot" id="layers-{{ loop.index0 }}"></div>
<p class="soft">{% if panel.adds_up %}Shares are parts of all the relevance measured by {{ panel.criterion }}.
{% else %}Shares are parts of the sum of absolute values: {{ panel.criterion }} scores each layer and each module by itself, so
that a layer's score is no sum of its modules'.{% endif %}
{{ "Layer N is " ~ panel.numbered ~ "." if panel.numbered }} The input is at the bottom.
An empty cell means that the layer has no such module.</p>
</div>
</div>
<details><summary>{{ panel.criterion }} as a table, % of {{ panel.of_what }}</summary>
<div class="scroll"><table>
<thead><tr><th>layer</th>
{% for name in panel.columns %}
<th class="number">{{ name | replace(".", wbr) }}</th>
{% endfor %}
<th class="number">all</th>
{% if record.selected_by_layer %}
<th class="number">trainable parameters</th>
{% endif %}
</tr></thead>
<tbody>
{% for name, cells, share in panel.rows %}
<tr><th>{{ name }}</th>
{% for cell in cells %}
<td class="number">{{ cell | percent(3) }}</td>
{% endfor %}
<td class="number">{{ share | percent(3) }}</td>
{% if record.selected_by_layer %}
<td class="number">{{ record.selected_by_layer.get(name, 0) | count }}</td>
{% endif %}
</tr>
{% endfor %}
</tbody></table></div></details>
</section>
{% endfor %}
{% if "layers" in figures %}
<div class="plot" id="layers"></div>
{% endif %}

{% if record.plan_lines %}
<h2>Plan</h2>
<ul>
{% for line in record.plan_lines %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}

<h2>Comparison</h2>
{% if record.comparison %}
<div class="scroll"><table>
<thead><tr><th style="min-width: 170px">method</th>
{% for head in comparison_heads %}
<th class="number">{{ head }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for result, cells in comparison_rows %}
<tr><th>{{ result.method }}{% if result.note %}<div class="soft">{{ result.note }}</div>{% endif %}</th>
{% for cell in cells %}
<td class="number">{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Head parameters are trained by every method and are not counted as trainable parameters.
— means that it does not apply or was not measured.</p>
{% else %}
<p class="soft">No other methods were run for comparison.</p>
{% endif %}

{% if lm_eval_rows %}
<h2>lm-evaluation-harness</h2>
<div class="scroll"><table>
<thead><tr><th>task</th><th>metric</th>
{% for head in ("base", "tuned", "examples", "few-shot") %}
<th class="number">{{ head }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in lm_eval_rows %}
<tr><th>{{ row[0] }}</th><td>{{ row[1] }}</td>
{% for cell in row[2:] %}
<td class="number">{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">Base is the same model without the adapter. ± is the harness's standard error of a score by itself; both models
answered the same examples. lm_eval {{ record.lm_eval.lm_eval_version }}
{{- ", chat template applied" if record.lm_eval.apply_chat_template }}
{{- ", at most " ~ record.lm_eval.limit ~ " examples of each task" if record.lm_eval.limit }}.</p>
{% endif %}

<h2>Training</h2>
{% if "loss" in figures or "scores" in figures %}
<div class="pair">
{% for name in ("loss", "scores") if name in figures %}
<div class="plot" id="{{ name }}"></div>
{% endfor %}
</div>
{% else %}
<p class="soft">No training history was recorded.</p>
{% endif %}
{% if sweep %}
<h3>Sweep</h3>
<div class="scroll"><table>
<thead><tr>
{% for head in sweep[0] %}
<th class="number">{{ head }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for cells, best in sweep[1] %}
<tr>
{% for cell in cells %}
<td class="number">{% if best %}<strong>{{ cell }}</strong>{% else %}{{ cell }}{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">One training per row, compared on validation data; the run is the one in bold.</p>
{% endif %}

{% if outputs %}
<h2>Outputs</h2>
<p>What the base model and the tuned one write for the first test examples. ✓ marks what is the reference to the letter.</p>
<div class="scroll"><table class="texts">
<thead><tr>
{% for head in output_heads %}
<th>{{ head }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for cells in outputs %}
<tr>
{% for start, rest, right in cells %}
<td dir="auto">{% if rest %}<details><summary>{{ start }}</summary>{{ rest }}</details>{% else %}{{ start }}{% endif %}{% if right %} <span class="right" title="the reference">✓</span>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endif %}

<div class="pair">
<section>
<h2>Metrics</h2>
{% if metrics %}
<table class="facts">
{% if compared %}
<thead><tr><th></th><th class="number">before</th><th class="number">after</th></tr></thead>
{% endif %}
{% for name, before, value in metrics %}
<tr><th>{{ name }}</th>{% if compared %}<td>{{ name | metric(before) if before is not none }}</td>{% endif %}<td>{{ name | metric(value) }}</td></tr>
{% endfor %}
</table>
{% else %}
<p class="soft">No metrics were recorded.</p>
{% endif %}
</section>
<section>
<h2>Configuration</h2>
{% if not config %}
<p class="soft">No configuration was recorded.</p>
{% endif %}
<table class="facts">
{% for name, value in config %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
</section>
</div>

{% if record.notes %}
<h2>Notes</h2>
<ul>
{% for note in record.notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
</main>
<script type="application/json" id="figures">{{ figures_json }}</script>
<script>{{ plotlyjs }}</script>
<script>
const figures = JSON.parse(document.getElementById("figures").textContent);
const panels = [...document.querySelectorAll(".panel")];
const options = {displayModeBar: false, responsive: true};
// A chart in a hidden panel has no width, so charts are drawn when they are shown. They are drawn anew for
// paper, because Plotly.Plots.resize waits and printing does not.
function show(id) {
  for (const panel of panels) panel.hidden = id !== null && panel.id !== id;
  for (const [name, figure] of Object.entries(figures)) {
    const place = document.getElementById(name);
    if (place.offsetWidth) Plotly.newPlot(place, figure.data, structuredClone(figure.layout), options);
  }
}
const chosen = () => document.querySelector("input[name=criterion]:checked")?.value ?? null;
document.addEventListener("change", event => { if (event.target.name === "criterion") show(chosen()); });
// On paper there is nothing to choose: every criterion is shown, at the width of the page.
window.addEventListener("beforeprint", () => { document.body.classList.add("print"); show(null); });
window.addEventListener("afterprint", () => { document.body.classList.remove("print"); show(chosen()); });
show(chosen());
</script>
</body>
</html>
"""
