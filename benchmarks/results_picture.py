"""docs/results.svg: quality against the trained share of the model and against steps, from the records of the phase proof and proof_decoder.

results_page.py draws it beside the page. The steps are training steps and those of the probe or the warm-up before them. What lies below
all of COMPARED would press the others together: it stands at the lower edge as a triangle, with its figure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

COLOURS = {
    "weights": "#c2410c",
    "LoRA": "#1d4ed8",
    "full": "#111827",
    "random": "#9ca3af",
    "NeuroAda": "#15803d",
    "SMT": "#a16207",
    "directions": "#7c3aed",
    "columns": "#0891b2",
}
WIDTH, HEIGHT, LEFT, GAP, TOP, FOOT = 460, 250, 52, 70, 46, 52
COMPARED = ("weights", "random", "LoRA", "full")  # a diagram reaches down to the lowest of these
LINE = 14  # between words that stand one above the other
Point = tuple[float, float, str]  # across, up, and the words beside it


class Axis:
    """Numbers onto a length of the picture, by their logarithm where ``log``."""

    def __init__(self, values: Iterable[float], start: float, end: float, log: bool = False, beyond: float = 0.06):
        self.value = math.log10 if log else float
        found = [self.value(v) for v in values]
        length = max(found) - min(found) or 1
        self.low, self.high = min(found) - 0.06 * length, max(found) + beyond * length
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.value(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two others."""
    rough = (high - low) / count
    step = min((s * 10 ** math.floor(math.log10(rough)) for s in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def panel(
    x: float, y: float, title: str, below: str, lines: dict[str, Sequence[Point]], marks: Sequence[float], log: bool
) -> list[str]:
    """One diagram: a line per family through its points, and beside the points their words, where they have any."""
    points = [point for line in lines.values() for point in line]
    words = [(point, family) for family, line in lines.items() for point in line if point[2]]
    across = Axis((px for px, *_ in points), x, x + WIDTH, log, beyond=0.3 if words else 0.06)
    deep = min(py for family, line in lines.items() if family in COMPARED for _, py, _ in line)
    up = Axis((max(py, deep) for _, py, _ in points), y + HEIGHT, y)
    out = [f'<text x="{x}" y="{y - 12}" class="title">{escape(title)}</text>']
    for value in ticks(up.low, up.high):
        at = up(value)
        out.append(f'<line x1="{x}" x2="{x + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        out.append(f'<text x="{x - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in marks:
        if across.low <= across.value(value) <= across.high:
            label = f"{value:g}%" if log else f"{value:g}"
            out.append(f'<text x="{across(value):.1f}" y="{y + HEIGHT + 18}" text-anchor="middle">{label}</text>')
    out.append(f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT + 38}" text-anchor="middle">{escape(below)}</text>')
    for family, line in lines.items():
        colour = COLOURS[family]
        for px, py, _ in (point for point in line if point[1] < deep):
            at, foot = across(px), y + HEIGHT
            out.append(f'<path d="M{at - 5:.1f} {foot - 10}h10l-5 9z" fill="{colour}"/>')
            out.append(f'<text x="{at:.1f}" y="{foot - 15}" text-anchor="middle" font-size="11">{py:.1f}</text>')
        ordered = sorted(point for point in line if point[1] >= deep)
        if len({px for px, *_ in ordered}) > 1:
            path = " ".join(f"{across(px):.1f},{up(py):.1f}" for px, py, _ in ordered)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{across(px):.1f}" cy="{up(py):.1f}" r="4" fill="{colour}"/>' for px, py, _ in ordered]
    words.sort(key=lambda one: -one[0][1])
    for ((px, _, text), family), at in zip(words, apart([up(py) for (_, py, _), _ in words]), strict=True):
        style = f'font-size="12" style="fill:{COLOURS[family]}"'
        out.append(f'<text x="{across(px) + 10:.1f}" y="{at + 4:.1f}" {style}>{escape(text)}</text>')
    return out


def apart(heights: Sequence[float]) -> list[float]:
    """The heights, which rise, moved as little as leaves LINE between them."""
    groups: list[list[float]] = []  # of heights that touch: their wishes, each less the lines before it in the group
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2]) + LINE * len(groups[-2]) > _top(groups[-1]):
            last = groups.pop()
            groups[-1] += [wish - LINE * len(groups[-1]) for wish in last]
    return [_top(group) + LINE * i for group in groups for i in range(len(group))]


def _top(group: Sequence[float]) -> float:
    return sum(group) / len(group)


def picture(rows: Sequence[tuple[str, dict[str, Sequence[Point]], dict[str, Sequence[Point]]]]) -> str:
    """A row per model: its name, and by family the points of quality against share in percent, and against steps."""
    row_height = TOP + HEIGHT + FOOT
    width, height = 2 * (LEFT + WIDTH) + GAP + 24, len(rows) * row_height + 34
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" font-size="13">',
        "<style>text{fill:#374151}.title{font-weight:600;fill:#111827;font-size:15px}.grid{stroke:#e5e7eb}</style>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (name, by_share, by_steps) in enumerate(rows):
        y = number * row_height + TOP
        out += panel(
            LEFT,
            y,
            f"{name}: mean test figure",
            "trained share of the model, at equal training steps",
            by_share,
            (0.05, 0.2, 1, 5, 20, 100),
            True,
        )
        steps = sorted({px for line in by_steps.values() for px, *_ in line})
        out += panel(
            2 * LEFT + WIDTH + GAP,
            y,
            f"{name}: mean test figure",
            "steps, the probe's included",
            by_steps,
            steps,
            False,
        )
    x = float(LEFT)
    families = dict.fromkeys(family for _, *panels in rows for lines in panels for family in lines)
    for family in families:
        out.append(f'<circle cx="{x:.0f}" cy="{height - 18}" r="5" fill="{COLOURS[family]}"/>')
        out.append(f'<text x="{x + 10:.0f}" y="{height - 14}">{escape(family)}</text>')
        x += 40 + 8 * len(family)
    return "\n".join([*out, "</svg>"]) + "\n"
