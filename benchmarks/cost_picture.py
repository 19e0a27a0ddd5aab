"""docs/cost_sweep.svg: predicted against measured, memory and seconds of a step, from the record of cost_sweep.py, which draws it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from results_picture import Axis

# Kinds of architectures, by how the names of their models begin.
KINDS = {
    "encoder": ("bert", "minilm", "distilbert"),
    "decoder": ("llama", "gpt2", "qwen2-small"),
    "encoder–decoder": ("t5", "bart"),
    "ViT": ("vit",),
    "mixture of experts": ("mixtral", "qwen2-moe"),
}
COLOURS = dict(zip(KINDS, ("#1d4ed8", "#c2410c", "#15803d", "#7c3aed", "#a16207"), strict=True))
SIDE, LEFT, TOP, GAP, FOOT = 400, 70, 46, 90, 110
LIMITS = {"memory": 0.05, "time": 0.15}
TITLES = {"memory": "peak memory, MiB", "time": "time of a step, ms"}
AGAIN = ("", "another ", "a third ", "a fourth ")
Errors = Callable[[Mapping[str, Any]], Mapping[str, float]]


def kind_of(model: str) -> str:
    return next(kind for kind, names in KINDS.items() if model.startswith(names))


def picture(record: Mapping[str, Any], errors: Errors) -> str:
    """A row for each device, with a diagram of memory and one of time."""
    height = len(record["sweeps"]) * (TOP + SIDE + FOOT) + 30
    width = LEFT + 2 * SIDE + GAP + 24
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="13">',
        "<style>text{fill:#374151}.title{font-weight:600;fill:#111827;font-size:15px}.grid{stroke:#e5e7eb}</style>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    devices = [sweep["device"] for sweep in record["sweeps"]]
    for number, sweep in enumerate(record["sweeps"]):
        name = sweep["device"].removeprefix("NVIDIA ")
        device = AGAIN[devices[:number].count(sweep["device"])] + name
        y = number * (TOP + SIDE + FOOT) + TOP
        for column, what in enumerate(("memory", "time")):
            points = [(each, *_pair(each, what)) for each in sweep["cases"] if what in errors(each)]
            if points:
                out += _panel(LEFT + column * (SIDE + GAP), y, f"{device}: {TITLES[what]}", points, LIMITS[what])
    x = float(LEFT)
    for kind, colour in COLOURS.items():
        out.append(f'<circle cx="{x:.0f}" cy="{height - 24}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{x + 10:.0f}" y="{height - 20}">{escape(kind)}</text>')
        x += 40 + 8 * len(kind)
    out.append(f'<circle cx="{x:.0f}" cy="{height - 24}" r="4" fill="#ffffff" stroke="#374151" stroke-width="2"/>')
    out.append(f'<text x="{x + 10:.0f}" y="{height - 20}">held out: drawn when the model was finished</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _pair(entry: Mapping[str, Any], what: str) -> tuple[float, float]:
    """Measured and predicted."""
    if what == "memory":
        return entry["memory"]["peak_bytes"] / 2**20, entry["predicted"]["peak_bytes"] / 2**20
    return 1000 * min(entry["time"]["seconds"]), 1000 * sum(entry["predicted"]["seconds"].values())


def _panel(x: float, y: float, title: str, points: list[tuple[Any, float, float]], limit: float) -> list[str]:
    values = [value for _, *pair in points for value in pair]
    across, up = Axis(values, x, x + SIDE, log=True), Axis(values, y + SIDE, y, log=True)
    low, high = 10**across.low, 10**across.high
    out = [f'<text x="{x}" y="{y - 14}" class="title">{escape(title)}</text>']
    marks = [mark * 10**power for power in range(-3, 7) for mark in (1, 2, 5) if low <= mark * 10**power <= high]
    written = -math.inf  # where the last number below the diagram ends
    for mark in marks:
        out.append(f'<line x1="{x}" x2="{x + SIDE}" y1="{up(mark):.1f}" y2="{up(mark):.1f}" class="grid"/>')
        out.append(f'<line x1="{across(mark):.1f}" x2="{across(mark):.1f}" y1="{y}" y2="{y + SIDE}" class="grid"/>')
        out.append(f'<text x="{x - 8}" y="{up(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
        half = 4.5 * len(f"{mark:g}")
        if across(mark) - half > written:
            written = across(mark) + half
            out.append(f'<text x="{across(mark):.1f}" y="{y + SIDE + 18}" text-anchor="middle">{mark:g}</text>')
    out.append(f'<text x="{x + SIDE / 2}" y="{y + SIDE + 38}" text-anchor="middle">measured (predicted upwards)</text>')
    for off, style in ((0.0, ""), (limit, ' stroke-dasharray="4 4"'), (-limit, ' stroke-dasharray="4 4"')):
        # A line of equal ratio, cut off where it leaves the diagram.
        start, end = max(low, low / (1 + off)), min(high, high / (1 + off))
        out.append(
            f'<line x1="{across(start):.1f}" y1="{up(start * (1 + off)):.1f}" x2="{across(end):.1f}" y2="{up(end * (1 + off)):.1f}" '
            f'stroke="#9ca3af"{style}/>'
        )
    out.append(
        f'<text x="{x + SIDE / 2}" y="{y + SIDE + 56}" text-anchor="middle">broken lines: {limit:.0%} off</text>'
    )
    for entry, measured, predicted in points:
        colour = COLOURS[kind_of(entry["case"]["model"])]
        fill = f'fill="#ffffff" stroke="{colour}" stroke-width="2"' if entry["held_out"] else f'fill="{colour}"'
        label = escape(f"{_words(entry['case'])}: {measured:.4g} measured, {predicted:.4g} predicted")
        out.append(
            f'<circle cx="{across(measured):.1f}" cy="{up(predicted):.1f}" r="4" {fill}><title>{label}</title></circle>'
        )
    return out


def _words(case: Mapping[str, Any]) -> str:
    return f"{case['model']} {case['method']} {case['batch']}×{case['length']} {case['dtype']}"
