"""What the commands print: sentences and tables, from the first process of a launcher only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reltune.cli.launcher import first

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from reltune.relevance.scores import RelevanceScores
    from reltune.report.record import ComparisonRecord, LMEvalRecord, RunRecord
    from reltune.report.several import NamedRun
    from reltune.runs.estimate import Estimate
    from reltune.runs.forecast import Forecast
    from reltune.runs.preview import Preview


def say(*lines: str) -> None:
    for line in lines if first() else ():
        print(line, flush=True)


def show(renderable: Any, width: int = 0) -> None:
    """Print a table as wide as the terminal, or ``width`` columns wide where the terminal is narrower."""
    if not first():
        return
    from rich.console import Console

    console = Console()
    console.width = max(console.width, width)
    console.print(renderable)


def show_relevance(relevance: RelevanceScores) -> None:
    from reltune.report.terminal import heatmap

    show(heatmap(relevance.heatmap()))
    say(relevance.depth_sentence())


def show_sweep(record: dict[str, Any]) -> None:
    """The trials of a sweep (``sweep.json``), and the values of the best one."""
    from reltune.report.terminal import sweep_table
    from reltune.runs.sweep import in_words

    show(sweep_table(record))
    say(f"Best on validation data: {in_words(record['best']['values'])}.")


def show_metrics(metrics: dict[str, float]) -> None:
    from reltune.report.terminal import metrics_table

    show(metrics_table(metrics))


def show_lm_eval(record: LMEvalRecord | None) -> None:
    if record is not None:
        from reltune.report.terminal import lm_eval_table

        show(lm_eval_table(record), width=80)


def show_comparison(record: ComparisonRecord) -> None:
    """The tables of ways to train, and what is to be said of them."""
    from reltune.report.comparison import terminal_tables

    for table in terminal_tables(record):
        show(table, width=80)
    say(*record.notes)


def show_estimate(found: Estimate, form: str) -> None:
    """As a table with a sentence below it, or as JSON."""
    if form == "json":
        import json

        say(json.dumps(found.to_dict(), indent=1))
        return
    from reltune.report.terminal import estimate_sentences, estimate_table

    values = found.to_dict()
    show(estimate_table(values))
    say(*estimate_sentences(values))


def show_preview(found: Preview, form: str) -> None:
    """The data of a run as lines, or as JSON."""
    if form == "json":
        import json

        say(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
        return
    from reltune.report.preview import preview_lines

    say(*preview_lines(found.to_dict()))


def show_runs(runs: Sequence[NamedRun]) -> None:
    """Runs side by side, and what keeps their numbers from being compared."""
    from reltune.report.several import notes, terminal_tables

    show(terminal_tables(runs), width=80)
    say(*notes(runs))


def show_forecast(found: Forecast, form: str) -> None:
    """What a run would train, and what it would take: in words and tables, or as JSON."""
    values = found.to_dict()
    if form == "json":
        import json

        say(json.dumps(values, indent=1))
        return
    from reltune.report.terminal import estimate_sentences, estimate_table, layers_table

    say(*found.describe())
    if values["parameters_by_layer"]:
        show(layers_table(values), width=80)
    show(estimate_table(values["estimate"]))
    say(*estimate_sentences(values["estimate"]))
    say("A dry run: nothing was written.")


def show_record(record: RunRecord, report: Path) -> None:
    """What the report of a run shows, as far as a terminal can, and where it was written."""
    from reltune.report.terminal import heatmap, outputs, predicted_table

    if record.held_in:
        say(f"The base model's linear layers are held in {record.held_in}.")
    if record.heatmaps:
        show(heatmap(record.heatmaps[0]))
    else:
        say(*record.plan_lines)
    if record.ways is not None:
        show_comparison(record.ways)
    else:
        show_metrics(record.metrics)
    if record.predicted:
        show(predicted_table(record.predicted))
    if record.outputs:
        show(outputs(record.outputs))
    show_lm_eval(record.lm_eval)
    say(*filter(None, [record.depth_sentence]), *record.notes, f"Report: {report}")
