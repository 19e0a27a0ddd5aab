"""Ways to train side by side: the cells of their tables, for the console and for the page."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from reltune import markup
from reltune.metrics import METRICS, largest_is_best
from reltune.report import numbers
from reltune.report.record import ComparisonRecord, Difference, WayResult, WayTable

WIDTH = 80


def terminal_tables(record: ComparisonRecord) -> Iterator[RenderableType]:
    """Each table twice: what was reached, and what it took. At most 80 columns wide."""
    for table in record.tables:
        made = []
        for (heads, rows), width in ((quality(record, table), 18), (cost(record, table), 13)):
            drawn = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
            drawn.add_column(heads[0], overflow="fold", max_width=width)
            for head in heads[1:]:
                drawn.add_column(head, justify="right", no_wrap=True)
            for row, cells in rows:
                lines = [cell.replace(" [", "\n[") for cell in cells]  # an interval has a line of its own
                drawn.add_row(*map(Text, lines), style="dim" if row.failed or not row.method else "")
            made.append(drawn)
        failures = [Text(f"{row.label} failed: {row.failed}") for row in table.rows if row.failed]
        yield Group(Text(table.title, style="bold"), *made, *failures)


def notebook_tables(record: ComparisonRecord) -> Iterator[str]:
    """Each table twice, as HTML."""
    for table in record.tables:
        yield markup.paragraphs([table.title])
        for heads, rows in (quality(record, table), cost(record, table)):
            yield markup.table([head.replace("\n", " ") for head in heads], [cells for _, cells in rows])
        yield markup.paragraphs(f"{row.label} failed: {row.failed}" for row in table.rows if row.failed)
    yield markup.paragraphs(record.notes)


def quality(record: ComparisonRecord, table: WayTable) -> tuple[list[str], list[tuple[WayResult, list[str]]]]:
    """Head and rows of the table of what each method reached."""
    references = [name for name in ("lora", "full") if any(name in row.differences for row in table.rows)]
    heads = ["method", "trained", f"{label(record.metric)}, test", *(f"− {name}" for name in references)]
    rows = []
    for row in table.rows:
        cells = [
            row.label,
            numbers.MISSING if row.trainable_parameters is None else numbers.short_count(row.trainable_parameters),
        ]
        cells.append("failed" if row.failed and not row.metrics else mean(record.metric, row))
        cells += [in_words(record.metric, row.differences.get(name)) for name in references]
        rows.append((row, cells))
    return heads, rows


def cost(record: ComparisonRecord, table: WayTable) -> tuple[list[str], list[tuple[WayResult, list[str]]]]:
    """Head and rows of the table of what each method took."""
    trained = [row for row in table.rows if row.method and row.metrics]
    forgetting = next((name for row in trained for name in row.forgetting), None)
    heads = ["method", "rate", "steps", "s /\nstep", "analysis", "in all", "peak", "saved"]
    heads += [f"forgets\n{short(forgetting)}"] if forgetting else []
    rows = []
    for row in trained:
        cells = [
            row.label,
            numbers.MISSING if row.learning_rate is None else f"{row.learning_rate:.2g}{'*' if row.edge else ''}",
            numbers.count(row.steps),
            numbers.MISSING if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}",
            numbers.duration(row.analysis_seconds),
            numbers.duration(row.seconds),
            numbers.size(row.peak_memory_bytes),
            numbers.size(row.adapter_bytes),
        ]
        if forgetting:
            cells.append(signed(forgetting, row.forgetting.get(forgetting)))
        rows.append((row, cells))
    return heads, rows


def label(metric: str) -> str:
    """The metric with its unit, and a mark where less is better."""
    known = METRICS.get(metric)
    if known is None:
        return metric if largest_is_best(metric) else f"{metric} ↓"
    return f"{known.label}{' %' if known.share else ''}{'' if known.largest_is_best else ' ↓'}"


def short(metric: str) -> str:
    return numbers.head(metric, short=True) if metric in METRICS else metric


def scale_of(metric: str) -> tuple[float, int]:
    """What a metric is multiplied by to be shown, and its decimals."""
    known = METRICS.get(metric)
    return (100.0, 2) if known is not None and known.share else (1.0, 4)


def mean(metric: str, row: WayResult) -> str:
    """The mean, and the standard deviation between seeds."""
    value, between = row.metrics.get(metric), row.deviations.get(metric)
    scale, digits = scale_of(metric)
    if value is None:
        return numbers.MISSING
    return f"{scale * value:.{digits}f}" + ("" if between is None else f" ± {scale * between:.{digits}f}")


def signed(metric: str, value: float | None) -> str:
    scale, digits = scale_of(metric)
    return numbers.MISSING if value is None else f"{scale * value:+.{digits}f}"


def in_words(metric: str, difference: Difference | None) -> str:
    """A difference with its interval."""
    if difference is None:
        return ""
    if difference.low is None or difference.high is None:
        return signed(metric, difference.mean)
    low, high = signed(metric, difference.low), signed(metric, difference.high)
    return f"{signed(metric, difference.mean)} [{low}, {high}]"
