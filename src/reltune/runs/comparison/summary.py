"""The report of a comparison, from its record. Needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from reltune.errors import InputError
from reltune.files import read_json
from reltune.reading import Damaged
from reltune.report.forms import write_run
from reltune.report.record import ComparisonRecord, RunRecord
from reltune.runs.comparison.directory import ComparisonDirectory


def report(directory: ComparisonDirectory, path: Path | None = None, form: str = "html") -> ComparisonRecord:
    """Write the report, ``report.html`` unless told otherwise, and give what it shows. Raises InputError for a comparison that did not come to its end yet."""
    if not directory.record.is_file():
        raise InputError(
            f"the comparison in {directory.path} has no tables yet; the command that began it goes on with it."
        )
    try:
        values = read_json(directory.record)
        record, config = ComparisonRecord.from_json(values), values["config"]
    except (KeyError, TypeError, AttributeError, Damaged) as error:
        raise InputError(f"{directory.record} holds no tables; give the command that made them again.") from error
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
    write_run(path or directory.report, page, form)
    return record
