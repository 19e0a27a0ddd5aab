"""Relevance, comparison and metrics for the console."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from reltune.markup import CIVIDIS
from reltune.relevance.heatmap import Heatmap
from reltune.report import numbers
from reltune.report.record import LMEvalRecord, Output, Predicted

WIDTH = 80
CELL = 6
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would act upon
HEAD = CELL - 1  # one blank between heads


def heatmap(h: Heatmap) -> RenderableType:
    """Layers down, deepest first; modules across; each cell its share of all relevance in percent.

    Never wider than 80 columns: more modules than fit continue in a table below.
    """
    cells = numbers.shares(h)
    spare = WIDTH - CELL * (len(h.columns) + 1)  # for labels, with every module and the layer's sum beside them
    labels, numbered = numbers.layer_labels(h.rows, width=min(max(spare, 16), 20))
    heads = _abbreviate(h.columns)
    label_width = max([len("layer"), *map(len, labels)])
    across = max(1, (WIDTH - label_width - CELL) // CELL)
    known = [value for row in cells for value in row if value is not None]
    end = numbers.scale_end(h)  # a cell beyond it has the last colour
    least, most = max(min([*known, 0.0]), -end), min(max(known, default=0.0), end)

    tables = []
    for start in range(0, max(len(h.columns), 1), across):
        table = Table(box=None, padding=0, pad_edge=False, header_style="bold")
        table.add_column("layer", width=label_width, justify="right", no_wrap=True)
        for head in heads[start : start + across]:
            table.add_column(Text(head), width=CELL, justify="right", no_wrap=True)
        table.add_column("all", width=CELL, justify="right", no_wrap=True, style="bold")
        for i in reversed(range(len(h.rows))):
            row = [_cell(value, least, most) for value in cells[i][start : start + across]]
            table.add_row(Text(labels[i]), *row, numbers.share(h.share_by_layer[i]))
        tables.append(table)

    scale = (
        Text(f"{numbers.share(least)} " if least else "0 ").append_text(_scale()).append(f" {numbers.share(most)} %")
    )
    if numbers.beyond_scale(h):
        scale.append("   colours span the layers")
    legend = [f"{head} {name}" for head, name in zip(heads, h.columns, strict=True) if head != name]
    if any(value is None for row in cells for value in row):
        legend.append("blank: no such module")
    if not h.adds_up:
        legend.append("all: the layer's own score")
    if numbered:
        legend.append(f"N {numbered}")
    return Group(
        Text(
            f"{h.criterion} relevance: share of {numbers.of_what(h) if not h.adds_up else 'the total'}, %", style="bold"
        ),
        Text("deepest layer at the top, input at the bottom", style="dim"),
        *tables,
        _Coloured(scale),
        Columns([Text(entry, style="dim") for entry in legend], padding=(0, 2), width=36),
    )


@dataclasses.dataclass
class _Coloured:
    """A text that means nothing without its colours: nothing where there are none."""

    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if console.color_system and not console.no_color:
            yield self.text


def lm_eval_table(record: LMEvalRecord) -> Table:
    """One row per task and metric; at most 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("lm-evaluation-harness", overflow="fold", max_width=22)
    table.add_column("metric", overflow="fold", max_width=20)
    for head in ("base", "tuned", "examples", "few-\nshot"):
        table.add_column(head, justify="right", no_wrap=True)
    for score in record.scores:
        task, metric, *cells = numbers.lm_eval_cells(score)
        # The error has a line of its own.
        table.add_row(Text(task), Text(metric), *(Text(cell.replace(" ± ", "\n± ")) for cell in cells))
    return table


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Every metric by name, in the order given, beside the same before training where that was measured."""
    rows = numbers.before_and_after(metrics)
    compared = any(before is not None for _, before, _ in rows)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in ("metric", "before", "after") if compared else ("metric", "value"):
        table.add_column(head, justify="left" if head == "metric" else "right", overflow="fold")
    for name, *values in rows:
        if not compared or values[0] is None:
            cells = ["", numbers.metric(name, values[1])]
        else:
            cells = [numbers.metric(name, value) for value in values]
        table.add_row(Text(name), *map(Text, cells[0 if compared else 1 :]))
    return table


def predicted_table(predicted: Sequence[Predicted]) -> Table:
    """What the training was predicted to take beside what it took."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in ("training", "predicted", "measured", "difference"):
        table.add_column(head, justify="left" if head == "training" else "right")
    for cells in numbers.predicted_rows(predicted):
        table.add_row(*map(Text, cells))
    return table


def outputs(written: Sequence[Output], few: int = 3) -> RenderableType:
    """The first few outputs, each as prompt, reference, base and tuned model's text, one below the other."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold", max_width=WIDTH - 12)
    for output in written[:few]:
        for name, text in vars(output).items():
            start, rest = numbers.opening(CONTROL.sub("\ufffd", text))
            table.add_row(name, Text(f"{start} …" if rest else start), end_section=name == "tuned")
        table.add_row()
    return Group(Text("Outputs for the first test examples", style="bold"), table)


def sweep_table(record: Mapping[str, Any]) -> Table:
    """One row per trial of ``sweep.json``, the best one marked."""
    heads, rows = numbers.sweep_rows(record)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in (*heads, ""):
        # A long name breaks after its underscores.
        lines = textwrap.wrap(head.replace("_", "_ "), 13)
        table.add_column("\n".join(line.replace("_ ", "_") for line in lines), justify="right", overflow="fold")
    for cells, best in rows:
        table.add_row(*map(Text, cells), "best" if best else "", style="bold" if best else "")
    return table


# Parts of a run, as a table of hours calls them.
HOURS = {
    "analysis": "hours of the analysis",
    "training": "hours of {steps} steps",
    "evaluation": "hours of evaluation",
    "writing": "hours of writing texts in it",
}


def estimate_table(values: Mapping[str, Any]) -> Table:
    """What ``reltune estimate`` found: methods across, what they take down."""
    rows = [row for row in values["rows"] if not row["error"]]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", max_width=32)
    for row in rows:
        table.add_column(row["method"], justify="right", no_wrap=True)

    def add(name: str, cells: Sequence[str], style: str = "") -> None:
        table.add_row(name, *cells, style=style)

    add("trained parameters", [numbers.short_count(row["trained"]) for row in rows])
    if any(row["head"] for row in rows):
        add("parameters of new heads", [numbers.short_count(row["head"]) for row in rows])
    add("share of the model", [f"{numbers.percent(row['trained'] / values['parameters'])} %" for row in rows])
    table.add_section()
    fullest_first = sorted(rows, key=lambda row: -len(row["memory"]))  # whose order is that of all kinds
    for kind in dict.fromkeys(kind for row in fullest_first for kind in row["memory"]):
        add(kind, [numbers.size(row["memory"].get(kind, 0)) for row in rows], "dim")
    add("memory at most", [numbers.size(row["total"]) for row in rows], "bold")
    if rows[0]["fits"] is not None:
        add("fits", ["yes" if row["fits"] else "no" for row in rows])
    table.add_section()
    add("seconds per step", [numbers.fixed(row["seconds"], 3) for row in rows])
    if values["steps"]:
        for part, words in HOURS.items():
            if any(part in row["hours_by_part"] for row in rows):
                cells = [numbers.hours(row["hours_by_part"].get(part, 0.0)) for row in rows]
                add(words.format(steps=f"{values['steps']:,}"), cells, "dim")
        add("hours", [numbers.hours(row["hours"]) for row in rows], "bold")
    return table


def layers_table(values: Mapping[str, Any]) -> Table:
    """What a plan takes of each layer, the deepest at the top, and what each cut-off depth costs and keeps beside it, if that is known."""
    layers = list(values["parameters_by_layer"])
    labels, _ = numbers.layer_labels(layers)
    frontier = {row["layer"]: row for row in values["frontier"]}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column("chosen", overflow="fold", max_width=24)
    table.add_column("parameters", justify="right", no_wrap=True)
    if frontier:
        for head in ("if all below\nis frozen:\nrelevance %", "seconds\nper step", "memory of\ntensors"):
            table.add_column(head, justify="right", no_wrap=True)
        table.caption, table.caption_justify = (
            "The relevance that a depth keeps does not tell how much quality it costs.",
            "left",
        )
    for label, layer in reversed(list(zip(labels, layers, strict=True))):
        units = ", ".join(f"{count:,} {kind}" for kind, count in values["units_by_layer"][layer].items())
        parameters = values["parameters_by_layer"][layer]
        row = frontier.get(layer)
        if not parameters and row is None:
            continue
        cells = [label, units, numbers.short_count(parameters) if parameters else ""]
        if frontier:
            cells += (
                ["", "", ""]
                if row is None
                else [numbers.share(row["share"]), numbers.fixed(row["seconds"], 3), numbers.size(row["memory"])]
            )
        table.add_row(*map(Text, cells))
    return table


def estimate_sentences(values: Mapping[str, Any]) -> list[str]:
    """What stands below that table."""
    task = values["task"].replace("_", " ")
    long = f" × {values['length']} tokens" if values["length"] and not values["padded"] else ""
    lines = [
        *values["chosen"],
        f"{values['model']}: {values['parameters']:,} parameters, {task}, batches of {values['batch_size']}{long}.",
    ]
    if padded := values["padded"]:
        lines.append(
            f"By the texts at hand a batch is {numbers.tokens(padded['training'])} tokens long on average, which the time is told for, and "
            f"{numbers.tokens(padded['longest'])} at most, which the memory is told for."
        )
    memory = numbers.size(values["device_memory"])
    if values["largest_batch"] is not None:
        name, largest = values["rows"][0]["method"], values["largest_batch"]
        found = f"the largest batch that fits is {largest:,}" if largest else "not even a batch of 1 fits"
        lines.append(f"{values['device']} has {memory}: with {name}, {found}.")
    if values["rows"][0]["seconds"] is None:
        lines.append("A size of memory says nothing of speed; name a card for the time of a step.")
    first = values["rows"][0]
    if first["prefix"] is not None:
        lines.append(prefix_sentence(first["prefix"], first["seconds"]))
    if first["left_out"] and values["steps"]:
        lines.append(f"The hours leave out {first['left_out']}, which cannot be told before.")
    lines += [f"{row['method']}: {row['error']}" for row in values["rows"] if row["error"]]
    return lines


def prefix_sentence(prefix: Mapping[str, Any], seconds: float) -> str:
    """What it would do to keep what frozen layers give, and whether this run does."""
    size = "" if prefix["bytes"] is None else f" in {numbers.size(prefix['bytes'])}"
    line = (
        f"The {prefix['layers']} lowest of {prefix['of']} layers are frozen: with what they give kept{size} (--cache_frozen_prefix), a step "
        f"of later passes takes {numbers.fixed(prefix['seconds'], 3)} s and not {numbers.fixed(seconds, 3)} s. "
    )
    return line + ("This is done." if prefix["kept"] else f"It is not done: {prefix['why']}.")


def _abbreviate(names: Sequence[str]) -> list[str]:
    """Heads of at most HEAD characters, no two the same: attention.self.query -> as.q."""
    heads: list[str] = []
    for name in names:
        *outer, last = name.split(".")
        if name.startswith("("):
            head = "other"
        else:
            first = "".join(part if part.isdigit() else part[:1] for part in outer)
            words = re.findall(r"[A-Z]?[a-z]+|[A-Z]|\d+", last) or [last]
            head = (f"{first}." if first else "") + "".join(word[0] for word in words)
        unique, n = head[-HEAD:], 1
        while unique in heads:
            n += 1
            unique = head[: HEAD - len(str(n))] + str(n)
        heads.append(unique)
    return heads


def _cell(value: float | None, least: float, most: float) -> Text:
    if value is None:
        return Text(" " * CELL)
    red, green, blue = _cividis((value - least) / (most - least) if most > least else 0.0)
    # Relative luminance decides which of black and white is easier to read (WCAG 2: above 0.179 black).
    r, g, b = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in (red, green, blue))
    light = 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179
    style = f"{'#000000' if light else '#ffffff'} on #{red:02x}{green:02x}{blue:02x}"
    return Text(f"{numbers.share(value):>{HEAD}} ", style=style)


def _scale(steps: int = 20) -> Text:
    colors = [_cividis(i / (steps - 1)) for i in range(steps)]
    return Text.assemble(*[(" ", f"on #{red:02x}{green:02x}{blue:02x}") for red, green, blue in colors])


def _cividis(position: float) -> tuple[int, int, int]:
    """Colour at 0..1, linear between the anchors."""
    anchors = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in CIVIDIS]
    place = min(max(position, 0.0), 1.0) * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 2)
    mixed = [round(a + (b - a) * (place - low)) for a, b in zip(anchors[low], anchors[low + 1], strict=True)]
    return mixed[0], mixed[1], mixed[2]
