"""What the page shows of runs, as HTML tables and the report's own figures. Every name from a model or from data is escaped."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from reltune.relevance.heatmap import Heatmap
from reltune.report import comparison, figures, numbers, several
from reltune.report.page import key_figures
from reltune.report.preview import lengths_sentence, visible
from reltune.report.record import ComparisonRecord, RunRecord
from reltune.runs.directory import RunDirectory
from reltune.runs.summary import read_record
from reltune.studio.budget import Choice
from reltune.studio.data import Looked
from reltune.studio.jobs import Job
from reltune.studio.places import DAMAGE, Found, history_of
from reltune.studio.words import Words

CLASSES, TOKENS = 40, 160  # that are shown
NUMERIC = re.compile(r"[−+—.-]|\d+(?!\d*-\d)")  # how numbers begin, other than dates, and what stands for none


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """A column of numbers stands to the right, with its head."""
    lines = [[str(cell) for cell in row] for row in rows]
    marks = [
        " class=n" if any(column) and all(NUMERIC.match(cell) for cell in column if cell) else ""
        for column in (zip(*lines, strict=True) if lines else [()] * len(heads))
    ]
    head = "".join(f"<th scope='col'{mark}>{escape(str(name))}</th>" for name, mark in zip(heads, marks, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{mark}>{escape(cell)}</td>' for cell, mark in zip(line, marks, strict=True))}</tr>"
        for line in lines
    )
    caption = f"<h3>{escape(title)}</h3>" if title else ""
    return f"{caption}<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def facts(pairs: Iterable[tuple[str, str, str]]) -> str:
    """(name, value, remark) side by side, as large figures. A long module name may break after its dots."""
    made = "".join(
        f"<div class='fact'><div class='name'>{escape(name)}</div><div class='value'>{escape(value).replace('.', '.<wbr>')}</div>"
        f"<div class='remark'>{escape(remark)}</div></div>"
        for name, value, remark in pairs
    )
    return f"<div class='facts'>{made}</div>"


def problem(sentence: str) -> str:
    return f"<p class='problem' role='alert'>{escape(sentence)}</p>" if sentence else ""


def remark(sentence: str) -> str:
    return f"<p class='remark'>{escape(sentence)}</p>" if sentence else ""


def command(line: str, words: Words) -> str:
    """A command line, which breaks between its words and not behind their hyphens."""
    shown = " ".join(f"<span>{escape(word)}</span>" for word in line.split(" "))
    return f"<div class='command'><div class='name'>{escape(words('same_command'))}</div><pre>{shown}</pre></div>"


def listed(items: Sequence[str], title: str) -> str:
    return f"<h3>{escape(title)}</h3><ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


# -- runs ------------------------------------------------------------------------------------------------------------


def runs(found: Sequence[Found], words: Words) -> str:
    if not found:
        return remark(words("no_runs"))
    rows = []
    for one in found:
        state = words("next_is", stage=words(f"stage_{one.stage}")) if one.stage else words("finished")
        if one.kind == "damaged":
            rows.append((one.name, words("kind_damaged"), one.problem, "", "", "", ""))
        else:
            model = one.model.rstrip("/").rpartition("/")[2]
            rows.append((one.name, words(f"kind_{one.kind}"), state, one.result, one.trained, one.method, model))
    heads = [words(key) for key in ("run", "kind", "state", "result", "trained", "method", "model")]
    return table(heads, rows)


def of_run(run: RunDirectory, name: str, words: Words) -> tuple[str, RunRecord | None]:
    """A run in words and tables, and its record; None where there is too little of it."""
    link = ""
    if run.report.is_file():
        link = f"<p><a href='/report/{escape(quote(name))}' target='_blank' rel='noopener'>{escape(words('open_report'))}</a></p>"
    try:
        record = read_record(RunDirectory.open(run.path)[1], run)
    except DAMAGE as error:
        return f"<h2>{escape(name)}</h2>{problem(str(error))}{link}", None
    figures_of = [
        (label, f"{value} {unit}".strip(), f"{words('before')} {before}" if before else "")
        for label, value, unit, before in key_figures(record)
    ]
    parts = [
        f"<h2>{escape(name)}</h2>",
        remark(record.title),
        facts(figures_of),
        link,
        remark(record.depth_sentence),
        listed(record.plan_lines, words("plan")),
    ]
    if record.metrics:
        rows = [
            (metric, "" if before is None else numbers.metric(metric, before), numbers.metric(metric, after))
            for metric, before, after in numbers.before_and_after(record.metrics)
        ]
        parts.append(table([words("metric"), words("before"), words("after")], rows, words("metrics")))
    if record.ways is not None:
        for one in record.ways.tables:
            heads, ways = comparison.quality(record.ways, one)
            parts.append(table(heads, [cells for _, cells in ways], one.title))
    if record.outputs:
        written = [[numbers.opening(text)[0] for text in vars(output).values()] for output in record.outputs[:5]]
        parts.append(table(list(vars(record.outputs[0])), written, words("outputs")))
    parts.append(listed([note for note in record.notes if note], words("notes")))
    settings = table([words("config"), ""], numbers.flatten(record.config))
    parts.append(f"<details><summary>{escape(words('config'))}</summary>{settings}</details>")
    return "".join(parts), record


def of_comparison(record: Any, name: str, words: Words) -> str:
    parts = [f"<h2>{escape(name)}</h2>"]
    for one in record.tables:
        for heads, ways in (comparison.quality(record, one), comparison.cost(record, one)):
            parts.append(table(heads, [cells for _, cells in ways], one.title))
    return "".join(parts) + listed(record.notes, words("notes"))


def side_by_side(records: Mapping[str, RunRecord], words: Words) -> str:
    """Several runs as ``reltune report`` compares them."""
    runs = [several.NamedRun(name, record) for name, record in records.items()]
    (reached, results), (took, costs), (settings, differences) = (
        several.reached(runs),
        several.took(runs),
        several.differences(runs),
    )
    tables = table(reached, results, words("metrics"))
    tables += table(took, costs, words("took"))
    return (
        tables
        + (table(settings, differences, words("differs")) if differences else "")
        + listed(several.notes(runs), words("notes"))
    )


def plot(figure: Mapping[str, Any] | None) -> Any:
    """A figure of the report for the page; None where there is none."""
    if figure is None:
        return None
    from plotly.graph_objects import Figure

    return Figure({"data": figure["data"], "layout": figure["layout"]}, skip_invalid=True)


def heatmap(record: RunRecord | None, criterion: str | None, scale: str) -> Any:
    if record is None or not record.heatmaps:
        return None
    h = next((h for h in record.heatmaps if h.criterion == criterion), record.heatmaps[0])
    return plot(figures.heatmap_figure(h, scale))


def layers(heatmaps: Sequence[Heatmap], criterion: str | None, chosen: Mapping[str, int]) -> Any:
    """Relevance by layer, by a criterion, beside the trainable parameters chosen there."""
    if not heatmaps:
        return plot(figures.layers_figure(list(chosen), None, chosen)) if chosen else None
    h = next((h for h in heatmaps if h.criterion == criterion), heatmaps[0])
    names = [*h.rows, *(name for name in chosen if name not in h.rows)]
    shares = h.share_by_layer + [0.0] * (len(names) - len(h.rows))
    return plot(figures.layers_figure(names, shares, chosen, h.adds_up, h.outside()))


def ways(record: ComparisonRecord | None) -> Any:
    return plot(figures.ways_figures(record).get("ways-parameters")) if record is not None else None


def curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures of one or several runs' training, "loss" and "scores"; of several, each curve bears its run's name and colour."""
    drawn: dict[str, dict[str, Any]] = {}
    dashes = ("solid", "dash", "dot")
    for place, (name, history) in enumerate(histories.items()):
        for kind, figure in figures.curve_figures(history).items():
            if len(histories) > 1:
                color = figures.RUNS[place % len(figures.RUNS)]
                for dash, trace in zip(dashes, figure["data"], strict=False):
                    trace["name"] = f"{escape(name, quote=False)}: {trace['name']}"
                    trace["line"] = {**trace["line"], "color": color, "dash": dash}
                    trace["marker"] = {**trace["marker"], "color": color}
                    trace["hovertemplate"] = escape(name, quote=False) + " " + trace["hovertemplate"]
            if kind in drawn:
                drawn[kind]["data"] += figure["data"]
            else:
                drawn[kind] = figure
    return {kind: plot(figure) for kind, figure in drawn.items()}


def history(run: RunDirectory) -> list[dict[str, Any]]:
    try:
        return history_of(run)
    except DAMAGE:
        return []


# -- budget ----------------------------------------------------------------------------------------------------------


def choice(found: Choice, words: Words) -> str:
    pairs = [
        (words("trained_parameters"), numbers.count(found.parameters), f"{found.share:.4%} {words('of_the_model')}"),
        (words("backward_ends"), found.ends_at or numbers.MISSING, ""),
    ]
    if found.memory is not None:
        of_device = (
            words("of_device", size=numbers.size(found.device_memory), device=found.device)
            if found.device_memory
            else found.device
        )
        pairs.append((words("memory"), numbers.size(found.memory), f"{of_device}{_long(found, 'longest', words)}"))
    if found.seconds is not None:
        hint = f"{found.device}{_long(found, 'training', words)}"
        pairs.append((words("step_time"), f"{found.seconds:.3g} s", hint))
    if found.expected:
        pairs.append((words("expected"), found.expected.rpartition(": ")[2], found.expected.rpartition(": ")[0]))
    return facts(pairs) + "".join(map(remark, found.settings)) + remark(found.unknown) + problem(found.problem)


def _long(found: Choice, which: str, words: Words) -> str:
    """How long batches are that something is told for."""
    return words("batches_long", tokens=numbers.tokens(found.padded[which])) if found.padded else ""


# -- data ------------------------------------------------------------------------------------------------------------


def data(found: Looked, words: Words) -> str:
    """A file as a run would work with it: what ``reltune data`` shows, and the first rows."""
    values = found.preview
    parts = [problem(found.problem)]
    if values is not None:
        splits = [one for one in ("train", "validation", "test") if values["rows"].get(one) is not None]
        total = sum(values["rows"][one] for one in splits)
        counts = words("splits", **{one: f"{values['rows'][one]:,}" for one in splits}) if len(splits) == 3 else ""
        parts.append(facts([(words("rows"), f"{total:,}", counts), (words("task"), values["task"], "")]))
        parts.append(remark(lengths_sentence(values)) if values["lengths"] else "")
        uses = [(name, use or words("not_used")) for name, use in values["columns"].items()]
        parts.append(table([words("column"), words("role")], uses, words("columns")))
        if values["classes"]:
            ordered = sorted(values["classes"].items(), key=lambda pair: -pair[1].get("train", 0))[:CLASSES]
            rows = [(label, *(f"{of.get(one, 0):,}" for one in splits)) for label, of in ordered]
            parts.append(table([words("label"), *(words(f"split_{one}") for one in splits)], rows, words("classes")))
        for name, tokens in values["example"].items():
            parts.append(f"<h3>{escape(words('as_seen'))} ({escape(name)})</h3><p class='tokens'>{_tokens(tokens)}</p>")
        parts.append(
            f"<p><span class='name'>{escape(words('wanted'))}</span> <b>{escape(values['wanted'])}</b></p>"
            if values["wanted"]
            else ""
        )
    if found.columns:
        parts.append(
            table(
                [words("line"), *found.columns],
                [(str(line), *cells) for line, cells in found.first],
                words("first_rows"),
            )
        )
    return "".join(parts) + listed(values["notes"] if values else (), words("notes"))


def _tokens(tokens: Sequence[Mapping[str, Any]]) -> str:
    """Tokens with a frame: special ones pale, those that the loss is taken of coloured."""
    marks = [
        f"<span class='{'learned' if token['learned'] else 'special' if token['special'] else 'token'}'>"
        f"{escape(visible(token['text']) + _tag(token))}</span>"
        for token in tokens[:TOKENS]
    ]
    return " ".join(marks) + (" …" if len(tokens) > TOKENS else "")


def _tag(token: Mapping[str, Any]) -> str:
    return f"={token['tag']}" if token["tag"] else ""


def estimate(values: Mapping[str, Any], words: Words) -> str:
    """What ``reltune estimate`` says."""
    rows = []
    for row in values["rows"]:
        if row["error"]:
            rows.append((row["method"], row["error"], "", "", "", ""))
            continue
        fits = "" if row["fits"] is None else words("fits" if row["fits"] else "does_not_fit")
        seconds = numbers.MISSING if row["seconds"] is None else f"{row['seconds']:.3g} s"
        hours = numbers.MISSING if row["hours"] is None else numbers.duration(3600 * row["hours"])
        rows.append((row["method"], numbers.count(row["trained"]), numbers.size(row["total"]), fits, seconds, hours))
    heads = [words(key) for key in ("method", "trained", "memory", "fits", "step_time", "hours")]
    batch = values["largest_batch"]
    below = "" if batch is None else words("largest_batch", device=values["device"], count=batch)
    padded = values["padded"] and {name: numbers.tokens(lengths) for name, lengths in values["padded"].items()}
    return table(heads, rows) + remark(words("told_for", **padded) if padded else "") + remark(below)


# -- jobs ------------------------------------------------------------------------------------------------------------


def jobs(found: Sequence[Job], words: Words) -> str:
    if not found:
        return remark(words("no_jobs"))
    rows = [
        (
            job.name,
            words(f"state_{job.state}"),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.began)),
            job.command,
        )
        for job in found
    ]
    return table([words(key) for key in ("job", "state", "began", "what_to_start")], rows)


def output(text: str) -> str:
    return f"<pre class='output'>{escape(text)}</pre>"


def answer(values: Mapping[str, Any]) -> str:
    """What a model says of a row, with the probability of each label as a bar."""
    parts = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            for label, share in value.items():
                part = float(share) if isinstance(share, int | float) else 0.0
                parts.append(
                    f"<div class='bar'><span>{escape(str(label))}</span><div><i style='width:{100 * min(1.0, max(0.0, part)):.1f}%'></i></div>"
                    f"<b>{part:.3f}</b></div>"
                )
        else:
            parts.append(f"<p><span class='name'>{escape(name)}</span> <b>{escape(str(value))}</b></p>")
    return "".join(parts)
