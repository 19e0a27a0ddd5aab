"""What notebooks show of an object: small HTML without a script, every text escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

# Cividis (Nuñez, Anderton and Renslow 2018, CC0): lighter with the value, the same with colour-vision deficiencies.
CIVIDIS = (
    *("#00224e", "#123570", "#3b496c", "#575d6d", "#707173"),
    *("#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"),
)
DARK = 5  # so many of them want white letters
SIGNED = ("#0072b2", "#f2f2f2", "#d55e00")  # from Okabe and Ito 2008, for values below and above 0


def paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p style='margin:0 0 .3em'>{escape(line)}</p>" for line in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], styles: Iterable[Sequence[str]] = ()) -> str:
    """A table that scrolls where it is wide; its first column names the rows.

    Args:
        styles: by row, the CSS of each cell but the first.
    """
    heads = "".join(f"<th style='text-align:right;vertical-align:bottom'>{_head(name)}</th>" for name in head)
    body = []
    looks = iter(styles)
    for name, *cells in rows:
        look = next(looks, None) or [""] * len(cells)
        drawn = "".join(
            f"<td style='text-align:right;white-space:pre;{style}'>{escape(cell)}</td>"
            for cell, style in zip(cells, look, strict=True)
        )
        body.append(f"<tr><th style='text-align:left'>{escape(name)}</th>{drawn}</tr>")
    # A class, that of pandas' tables, keeps documentation sites from wrapping and restyling it.
    return (
        "<div style='overflow-x:auto'><table class='dataframe' cellpadding='4' style='font-size:smaller'>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _head(name: str) -> str:
    """Names of modules are long, and a column is narrow: a line may end after a dot or an underscore."""
    return re.sub(r"(?<=[._])(?=\w)", "<wbr>", escape(name))


def shade(place: float, signed: bool) -> str:
    """The CSS of a cell at a place on the scale of colours: 0..1, or -1..1 where ``signed``."""
    if signed:
        return f"background:{_mixed(SIGNED[1], SIGNED[0 if place < 0 else 2], min(1.0, abs(place)))};color:#000"
    step = min(len(CIVIDIS) - 1, max(0, int(place * len(CIVIDIS))))
    return f"background:{CIVIDIS[step]};color:{'#fff' if step < DARK else '#000'}"


def _mixed(one: str, other: str, share: float) -> str:
    """A colour between two of the form #rrggbb."""
    pairs = ((int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)
