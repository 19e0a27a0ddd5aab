"""A report in each of its forms (``REPORT_FORMS``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reltune.files import write_text
from reltune.report.markdown import run_markdown, runs_markdown
from reltune.report.page import write_report, write_runs_report
from reltune.report.picture import run_picture, runs_picture, write_png
from reltune.report.record import RunRecord
from reltune.report.several import NamedRun


def write_run(path: Path, record: RunRecord, form: str) -> None:
    """Write the report of a run, whole or not at all."""
    if form == "html":
        write_report(path, record)
    elif form == "png":
        write_png(path, run_picture(record))
    else:
        write_text(path, run_markdown(record) if form == "md" else run_picture(record))


def write_runs(path: Path, runs: Sequence[NamedRun], form: str) -> None:
    """Write a report of several runs side by side, whole or not at all."""
    if form == "html":
        write_runs_report(path, runs)
    elif form == "png":
        write_png(path, runs_picture(runs))
    else:
        write_text(path, runs_markdown(runs) if form == "md" else runs_picture(runs))
