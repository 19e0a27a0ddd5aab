"""What a run is shown as, on the terminal and as a page; here, the numbers and labels of both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from reltune.metrics import METRICS, metric_of
from reltune.relevance.heatmap import Heatmap
from reltune.report.record import LMEvalScore, Predicted, Sample

MISSING = "—"
HEADS = "head_parameters"  # in all_results.json


def count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def short_count(value: int) -> str:
    """Exact below ten million, then in millions: at most ten characters up to a trillion."""
    return f"{value:,}" if value < 10_000_000 else f"{value / 1e6:,.1f} M"


def percent(value: float | None, digits: int = 2) -> str:
    """A share (0..1) in percent, without the sign."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}"


def fixed(value: float | None, decimals: int) -> str:
    """For columns of seconds, milliseconds and losses."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def hours(value: float | None) -> str:
    """With three decimals below a tenth, so that a minute is not 0."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value >= 0.1 or not value:
        return f"{value:,.2f}" if value else "0"
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def duration(seconds: float | None) -> str:
    """In seconds up to two minutes, in minutes up to two hours."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return MISSING
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def tokens(lengths: Sequence[int]) -> str:
    """How many a batch is long; of sources and targets both."""
    return " + ".join(map(count, lengths))


def metric(name: str, value: Any) -> str:
    """One entry of ``all_results.json``: shares in percent, sizes in binary units, the rest plain."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    known = metric_of(name)
    if known is not None and known.share and 0 <= value <= 1:
        return f"{percent(value)} %"
    if name.endswith("_bytes"):
        return size(value)
    if not math.isfinite(value):
        return MISSING
    if abs(value) < 1e12 and (abs(value) >= 1000 or float(value).is_integer()):
        return count(value)
    return f"{value:.4g}"


def before_and_after(metrics: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value before training, value) of each metric in the order given; None where it was not measured before.

    ``test_before_loss`` belongs to ``test_loss``, ``forgetting_before_loss`` to ``forgetting_after_loss``. Parameters of heads are those of
    new ones, and are left out where there are none: most language models have a head, which is no new one.
    """
    before: dict[str, str] = {}
    for name in metrics:
        data, found, rest = name.partition("_before_")
        after = [key for key in (f"{data}_{rest}", f"{data}_after_{rest}") if found and key in metrics]
        before |= dict.fromkeys(after, name)
    return [
        (f"{name} (new heads)" if name == HEADS else name, metrics[before[name]] if name in before else None, value)
        for name, value in metrics.items()
        if name not in before.values() and (name != HEADS or value)
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += flatten(value, f"{prefix}{key}.")
        elif value is None or value == [] or value == {}:
            lines.append((f"{prefix}{key}", MISSING))
        elif isinstance(value, list | tuple):
            lines.append((f"{prefix}{key}", ", ".join(map(str, value))))
        else:
            lines.append((f"{prefix}{key}", str(value)))
    return lines


def score(name: str, value: float | None) -> str:
    """A task's metric for a table whose head names its unit."""
    if value is None or not math.isfinite(value):
        return MISSING
    return percent(value) if METRICS[name].share else f"{value:.4g}"


def head(name: str, short: bool = False) -> str:
    """A metric's label and unit as the head of a column."""
    metric = METRICS[name]
    label = metric.short if short else metric.label
    if len(label) > 12 and not short:  # in two lines
        label = label.replace(" ", "\n", 1)
    return label + ((" %" if "\n" in label else "\n%") if metric.share else "")


def sweep_rows(record: Mapping[str, Any]) -> tuple[list[str], list[tuple[list[str], bool]]]:
    """The head and the rows of a table of ``sweep.json``, each row with whether it is the best trial's: the trial's number,
    its values, its metric on validation data or why it failed."""
    fields = list(record["sweep"])
    rows = []
    for trial in record["trials"]:
        values = [trial["values"][name] for name in fields]
        cells = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]
        result = f"failed: {trial['failed']}" if trial["failed"] else metric(record["metric"], trial["metric"])
        rows.append(([str(trial["number"]), *cells, result], trial == record["best"]))
    name = record["metric"]
    return ["trial", *fields, f"validation {METRICS[name].label if name in METRICS else name}"], rows


def measured(results: Iterable[Mapping[str, Any]], prefix: str = "") -> list[str]:
    """Names of the tasks' metrics that any of the results has behind the prefix, in the order found."""
    keys = dict.fromkeys(key for result in results for key in result)
    return [key.removeprefix(prefix) for key in keys if key.startswith(prefix) and key.removeprefix(prefix) in METRICS]


def history_rows(history: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of the trainer's log: steps and epochs, the losses, the tasks' metrics on validation data."""
    entries = [entry for entry in history if "loss" in entry or any(key.startswith("eval_") for key in entry)]
    names = [name for name in ("loss", "eval_loss") if any(name in entry for entry in entries)]
    names += [f"eval_{name}" for name in measured(entries, "eval_")]
    heads = {"loss": "training\nloss", "eval_loss": "validation\nloss"}
    heads |= {
        name: f"validation\n{head(name.removeprefix('eval_'), short=True)}" for name in names if name not in heads
    }
    rows = []
    for entry in entries:
        cells = [count(entry.get("step")), fixed(entry.get("epoch"), 2)]
        for name in names:
            value = entry.get(name)
            cells.append(
                "" if value is None else fixed(value, 4) if name in ("loss", "eval_loss") else score(name[5:], value)
            )
        rows.append(cells)
    return ["step", "epoch", *(heads[name] for name in names)], rows if names else []


def predicted_rows(predicted: Iterable[Predicted]) -> list[list[str]]:
    """Rows of a table of predictions: name, predicted, measured, the difference as a share of what was measured."""
    rows = []
    for one in predicted:
        sizes = "memory" in one.name
        cells = [size(v) if sizes else fixed(v, 3) for v in (one.predicted, one.measured)]
        rows.append([one.name, *cells, MISSING if one.difference is None else f"{100 * one.difference:+.1f} %"])
    return rows


def lm_eval_cells(score: LMEvalScore) -> tuple[str, ...]:
    """Task, metric (with what is done to an answer, and which way is better), base, tuned, examples, few-shot examples."""
    direction = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
    metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
    return (
        score.task,
        metric + direction,
        _with_error(score.base, score.base_stderr),
        _with_error(score.tuned, score.tuned_stderr),
        count(score.samples),
        count(score.num_fewshot),
    )


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def shares(h: Heatmap) -> list[list[float | None]]:
    """Each cell's share of all relevance (0..1), or, where it may be negative, of the sum of absolute values (−1..1);
    zeros when there is none."""
    return h.shares()


def scale_end(h: Heatmap) -> float:
    return h.scale_end()


def beyond_scale(h: Heatmap) -> list[tuple[str, float]]:
    """(name, share) of the modules outside the layers that lie beyond the end of the scale, the largest first."""
    end, outside = scale_end(h), h.outside()
    found = [
        (name, value)
        for name, row in zip(h.rows, shares(h), strict=True)
        for value in row
        if name in outside and value is not None and abs(value) > end
    ]
    return sorted(found, key=lambda pair: -abs(pair[1]))


def share(value: float | None, decimals: int = 1) -> str:
    """A cell's share in percent with as many decimals, so that a column lines up; at most five characters with one."""
    if value is None:
        return ""
    least = 10.0**-decimals
    if 0 < abs(value) < least / 200:
        return f"<{least:g}" if value > 0 else f">-{least:g}"
    return f"{100 * value:.{decimals}f}"


def of_what(h: Heatmap) -> str:
    """What the shares are shares of."""
    return "all relevance" if h.adds_up else "the sum of absolute values"


def opening(text: str, characters: int = 200, lines: int = 4) -> tuple[str, str]:
    """A text without the space around it, cut in two: what is shown of it at once, and the rest."""
    text = text.strip()
    end = len("\n".join(text.split("\n")[:lines]))
    if end > characters:
        space = text.rfind(" ", characters - 40, characters)
        end = space if space > 0 else characters
    return text[:end], text[end:].lstrip()


def by_prompt(samples: Iterable[Sample], most: int = 12) -> list[tuple[str, list[Sample], int]]:
    """Of each prompt what was answered to it, and how often. Of more than ``most`` answers the first, the last and some between."""
    answers: dict[str, list[Sample]] = {}
    for sample in samples:
        answers.setdefault(sample.prompt, []).append(sample)
    found = []
    for prompt, every in answers.items():
        count = len(every)
        shown = range(count) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]
        found.append((prompt, [every[i] for i in shown], count))
    return found


def layer_labels(rows: Sequence[str], width: int = 20) -> tuple[list[str], str]:
    """Short row labels, and what a bare number among them stands for (``encoder.layer.N``, or nothing).

    A numbered layer keeps only what sets it apart: ``11``, or ``decoder.11`` beside ``encoder.11``. Another name keeps
    its last two parts, or the last one where both are wider than ``width``. Labels are for reading: they need not
    differ from each other.
    """
    numbered = {tuple(name.split(".")[:-1]) for name in rows if name.rpartition(".")[2].isdigit()}
    lead = _shared(numbered)
    tail = _shared({parts[lead:][::-1] for parts in numbered})
    labels = []
    for name in rows:
        *parts, last = name.split(".")
        if tuple(parts) in numbered and last.isdigit():
            label = ".".join([*parts[lead : len(parts) - tail], last])
        else:
            label = ".".join([*parts[-1:], last])
            label = label if len(label) <= width else last
        if len(label) > width:  # cut before a word, where there is one
            end = label[1 - width :]
            label = "…" + (end.partition("_")[2] or end)
        labels.append(label)
    prefix = ".".join(numbered.pop()) if len(numbered) == 1 else ""
    return labels, f"{prefix}.N" if prefix else ""


def _shared(paths: set[tuple[str, ...]]) -> int:
    """How many leading parts all paths have in common."""
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
