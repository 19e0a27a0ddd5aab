"""A report in Markdown: what the page shows, without its charts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from reltune.report import comparison, numbers, several
from reltune.report.record import Output, RunRecord
from reltune.report.several import NamedRun


def run_markdown(record: RunRecord) -> str:
    return "\n\n".join(_parts(record)) + "\n"


def runs_markdown(runs: Sequence[NamedRun]) -> str:
    """Runs side by side."""
    parts = [f"# reltune: {len(runs)} runs side by side", *map(plain, several.notes(runs))]
    parts += [table(*cells) for cells in (several.reached(runs), several.took(runs))]
    heads, rows = several.differences(runs)
    parts += ["## Settings that differ", table(heads, rows, counts=False) if rows else "None."]
    return "\n\n".join(parts) + "\n"


def _parts(record: RunRecord) -> Iterator[str]:
    yield f"# {plain(record.title)}"
    if record.depth_sentence:
        yield plain(record.depth_sentence)
    for h in record.heatmaps:
        yield f"## {plain(h.criterion)}: share of {numbers.of_what(h)}, %"
        layers = reversed(list(zip(h.rows, h.shares(), h.share_by_layer, strict=True)))
        yield table(
            ["layer", *h.columns, "all"],
            [
                [name, *(numbers.share(cell, 2) for cell in cells), numbers.share(share, 2)]
                for name, cells, share in layers
            ],
        )
    if record.plan_lines:
        yield "## Plan"
        yield "\n".join(f"- {plain(line)}" for line in record.plan_lines)
    if record.ways is not None:
        yield "## Comparison"
        for one in record.ways.tables:
            yield f"### {plain(one.title)}"
            for heads, ways in (comparison.quality(record.ways, one), comparison.cost(record.ways, one)):
                yield table(heads, [cells for _, cells in ways])
        yield "\n".join(f"- {plain(note)}" for note in record.ways.notes)
    if record.lm_eval is not None:
        yield "## lm-evaluation-harness"
        lm_eval = [numbers.lm_eval_cells(score) for score in record.lm_eval.scores]
        yield table(["task", "metric", "base", "tuned", "examples", "few-shot"], lm_eval)
    if record.sweep is not None:
        heads, trials = numbers.sweep_rows(record.sweep)
        yield "## Sweep"
        yield table([*heads, "best"], [[*cells, "yes" if best else ""] for cells, best in trials])
    heads, rows = numbers.history_rows(record.history)
    if rows or record.predicted:
        yield "## Training"
    if record.predicted:
        yield table(["", "predicted", "measured", "difference"], numbers.predicted_rows(record.predicted))
    if rows:
        yield table(heads, rows)
    if record.outputs:
        yield "## Outputs"
        texts = [[_opening(text) for text in vars(output).values()] for output in record.outputs]
        yield table([field.name for field in dataclasses.fields(Output)], texts, counts=False)
    if record.samples:
        yield "## Answers while it trained"
        rows = [
            [prompt, numbers.count(answer.step), answer.answer]
            for prompt, answers, _ in numbers.by_prompt(record.samples)
            for answer in answers
        ]
        yield table(
            ["prompt", "step", "answer"],
            [[_opening(prompt), step, _opening(text)] for prompt, step, text in rows],
            False,
        )
    if record.metrics:
        yield "## Metrics"
        lines = numbers.before_and_after(record.metrics)
        yield table(
            ["", "before", "after"],
            [
                [name, "" if before is None else numbers.metric(name, before), numbers.metric(name, value)]
                for name, before, value in lines
            ],
        )
    if record.config:
        yield "## Configuration"
        yield table(["", ""], numbers.flatten(record.config))
    if record.facts or record.commands:
        yield "## How it was made"
        if record.facts:
            yield table(["", ""], record.facts, counts=False)
        if record.commands:
            yield "\n".join(f"    {line}" for command in record.commands for line in command.splitlines())
    if record.notes:
        yield "## Notes"
        yield "\n".join(f"- {plain(note)}" for note in record.notes)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], counts: bool = True) -> str:
    """A table whose first column names the rows; the others are right-aligned where they hold ``counts``."""
    rules = ["---", *(["--:" if counts else "---"] * (len(heads) - 1))]
    lines = [[_cell(head) for head in heads], rules, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _opening(text: str) -> str:
    start, rest = numbers.opening(text)
    return f"{start} …" if rest else start


def _cell(text: str) -> str:
    return plain(" ".join(text.split()))


def plain(text: str) -> str:
    """Text whose characters stand for themselves in Markdown, in which HTML may stand."""
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", escape(text, quote=False))
