"""The relevance map and the curves of one run or of several as a picture: SVG, drawn here, and PNG through the package resvg_py."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from reltune.errors import InputError
from reltune.files import whole_file
from reltune.markup import shade
from reltune.metrics import METRICS
from reltune.relevance.heatmap import Heatmap
from reltune.report import comparison, numbers
from reltune.report.figures import BLUE, RUNS, VERMILLION
from reltune.report.record import RunRecord
from reltune.report.several import NamedRun

WIDTH, EDGE = 960, 24
CELL, ROW = 64, 20  # a cell's width at most, and its height
LETTER = 6.2  # the width of a letter of 11 pixels, about
CHART = 230  # the height of a chart's frame
Point = tuple[float, float]
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # not allowed in XML


class Drawing:
    """Elements from the top down. ``y`` is where the next one begins."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.y = float(EDGE)

    def text(self, x: float, y: float, words: str, anchor: str = "start", size: int = 11, more: str = "") -> None:
        said = escape(CONTROL.sub("�", words))
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{more}>{said}</text>'
        )

    def heading(self, words: str, size: int = 14) -> None:
        self.text(EDGE, self.y + size, words, size=size, more=' font-weight="600"')
        self.y += size + 12

    def map(self, h: Heatmap) -> None:
        """Layers down, deepest first; modules across; each cell its share in percent."""
        shares, end = h.shares(), h.scale_end() or 1.0
        signed = any(value is not None and value < 0 for row in shares for value in row)
        labels, numbered = numbers.layer_labels(h.rows)
        left = EDGE + LETTER * max(map(len, [*labels, "layer"])) + 8
        width = min(CELL, (WIDTH - EDGE - left) / (len(h.columns) + 1))
        size = 10 if width >= 34 else 8
        self.heading(f"{h.criterion}: share of {numbers.of_what(h)}, %")
        top = self.y
        for i, row in enumerate(reversed(range(len(h.rows)))):
            y = top + i * ROW
            self.text(left - 6, y + 14, labels[row], "end")
            for j, value in enumerate(shares[row]):
                if value is None:
                    continue
                fill, _, letters = shade(value / end, signed).removeprefix("background:").partition(";color:")
                x = left + j * width
                self.parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="{ROW - 1}" style="fill:{fill}">'
                    f"<title>{escape(CONTROL.sub('�', f'{h.rows[row]} {h.columns[j]}'))}: {100 * value:.4g} %</title></rect>"
                )
                if width >= 24:
                    self.text(x + width / 2, y + 14, numbers.share(value), "middle", size, f' fill="{letters}"')
            self.text(
                left + (len(h.columns) + 1) * width - 4, y + 14, numbers.share(h.share_by_layer[row]), "end", size
            )
        self.y = top + len(h.rows) * ROW + 6
        for j, name in enumerate([*h.columns, "all"]):
            x = left + (j + 0.5) * width + 4
            self.text(x, self.y, name, "end", 10, f' transform="rotate(-60 {x:.1f} {self.y:.1f})"')
        self.y += 0.75 * LETTER * max(map(len, h.columns), default=0) + 14
        said = [
            f"Layer N is {numbered}." if numbered else "",
            "Colours span the layers; an empty cell: no such module.",
        ]
        self.text(EDGE, self.y + 8, " ".join(filter(None, said)), more=' class="soft"')
        self.y += 34

    def chart(
        self, title: str, below: str, lines: Sequence[tuple[str, str, Sequence[Point]]], x: float, width: float
    ) -> None:
        """Lines of (name, colour, points) in a frame; a point alone is a dot. Leaves ``y`` where it is."""
        points = [point for _, _, line in lines for point in line]
        low_x, high_x = min(px for px, _ in points), max(px for px, _ in points)
        low_y, high_y = min(py for _, py in points), max(py for _, py in points)
        rows = math.ceil(len(lines) / 2)
        left, top = x + 52, self.y + 24 + 16 * rows
        right, bottom = x + width, top + CHART

        def place(px: float, py: float) -> Point:
            across = (px - low_x) / (high_x - low_x) if high_x > low_x else 0.5
            up = (py - low_y) / (high_y - low_y) if high_y > low_y else 0.5
            return left + 8 + across * (right - left - 16), bottom - 8 - up * (CHART - 16)

        self.text(x, self.y + 14, title, size=13, more=' font-weight="600"')
        for i, (name, color, _) in enumerate(lines):
            at = x + (i % 2) * width / 2, self.y + 34 + 16 * (i // 2)
            self.parts.append(f'<rect x="{at[0]:.1f}" y="{at[1] - 8:.1f}" width="10" height="10" fill="{color}"/>')
            self.text(at[0] + 14, at[1] + 1, _shortened(name, int(width / 2 / LETTER) - 4))
        self.parts.append(f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#9aa4af"/>')
        for value in ticks(low_y, high_y):
            y = place(low_x, value)[1]
            self.parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#d5dae0"/>')
            self.text(left - 6, y + 4, f"{value:g}", "end")
        for value in ticks(low_x, high_x):
            self.text(place(value, low_y)[0], bottom + 16, f"{value:g}", "middle")
        self.text((left + right) / 2, bottom + 34, below, "middle")
        for _, color, line in lines:
            drawn = [place(*point) for point in line]
            if len(drawn) > 1:
                path = " ".join(f"{px:.1f},{py:.1f}" for px, py in drawn)
                self.parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
            if len(drawn) < 40:
                self.parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}"/>' for px, py in drawn]

    def charts(self, all_of: Iterable[tuple[str, str, Sequence[tuple[str, str, Sequence[Point]]]]]) -> None:
        """Two in a row, those that have a point."""
        with_points = [(title, below, [line for line in lines if line[2]]) for title, below, lines in all_of]
        shown = [chart for chart in with_points if chart[2]]
        width = (WIDTH - 3 * EDGE) / 2
        for pair in (shown[i : i + 2] for i in range(0, len(shown), 2)):
            for i, chart in enumerate(pair):
                self.chart(*chart, EDGE + i * (width + EDGE), width)
            self.y += 24 + 16 * max(math.ceil(len(lines) / 2) for _, _, lines in pair) + CHART + 56

    def svg(self) -> str:
        height = math.ceil(self.y)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
                'font-family="system-ui, sans-serif" fill="#1b1f24">',
                "<style>.soft { fill: #59636e; }</style>",
                f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def run_picture(record: RunRecord) -> str:
    """The map of each criterion, and the training's curves."""
    drawing = Drawing()
    drawing.heading(record.title, 18)
    for h in record.heatmaps:
        drawing.map(h)
    history = record.history
    scores = numbers.measured(history, "eval_")[:1]
    both = [
        ("training", BLUE, _points(history, "loss")),
        ("validation", VERMILLION, _points(history, "eval_loss")),
    ]
    drawing.charts(
        [("loss", "optimizer step", both)]
        + [
            (f"validation {comparison.label(s)}", "optimizer step", [(s, BLUE, _points(history, f"eval_{s}"))])
            for s in scores
        ]
    )
    return drawing.svg()


def runs_picture(runs: Sequence[NamedRun]) -> str:
    """The curves of all runs together, and the map of each by its first criterion."""
    drawing = Drawing()
    drawing.heading(f"reltune: {len(runs)} runs side by side", 18)
    scores = numbers.measured([entry for run in runs for entry in run.record.history], "eval_")[:1]
    kinds = [("loss", "training loss"), ("eval_loss", "validation loss")]
    kinds += [(f"eval_{s}", f"validation {comparison.label(s)}") for s in scores]
    drawing.charts(
        (
            title,
            "optimizer step",
            [(run.name, RUNS[i % len(RUNS)], _points(run.record.history, key)) for i, run in enumerate(runs)],
        )
        for key, title in kinds
    )
    for run in runs:
        for h in run.record.heatmaps[:1]:
            drawing.heading(run.name)
            drawing.map(h)
    return drawing.svg()


def write_png(path: str | os.PathLike, svg: str) -> None:
    """Write a picture in pixels, twice as many as it has units, whole or not at all."""
    check_png()
    import resvg_py

    with whole_file(path) as unfinished:
        unfinished.write_bytes(bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=2)))


def check_png() -> None:
    """Raise InputError where nothing can draw PNG."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise InputError(
            'a picture as PNG needs resvg_py, which is not installed; run: pip install "reltune[png]", or take --format svg.'
        ) from error


def _points(history: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """A curve of the trainer's log, by step; shares in percent."""
    known = METRICS.get(key.removeprefix("eval_"))
    scale = 100.0 if known is not None and known.share else 1.0
    found = [(entry["step"], scale * entry[key]) for entry in history if "step" in entry and key in entry]
    return [(x, y) for x, y in found if math.isfinite(y)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two others."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    step = min((s * 10 ** math.floor(math.log10(rough)) for s in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _shortened(name: str, letters: int) -> str:
    return name if len(name) <= letters else "…" + name[1 - letters :]
