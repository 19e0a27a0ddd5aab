"""The report of a comparison, from its record. Needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from reltune.files import read_json
from reltune.report.page import write_report
from reltune.report.record import ComparisonRecord, RunRecord
from reltune.runs.comparison.directory import ComparisonDirectory


def report(directory: ComparisonDirectory) -> ComparisonRecord:
    """Draw ``report.html``, and give what it shows."""
    values = read_json(directory.record)
    record, config = ComparisonRecord.from_json(values), values["config"]
    data = config.get("dataset_name") or Path(str(config.get("train_file"))).name
    page = RunRecord(
        title=f"reltune: ways to train, on {data}",
        config=config,
        heatmaps=[],
        depth_sentence="",
        plan_lines=[],
        selected_by_layer={},
        metrics={},
        history=[],
        notes=[],
        ways=record,
    )
    write_report(directory.report, page)
    return record
