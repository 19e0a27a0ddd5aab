"""The benchmark of the report runs from end to end on a small model."""

import json
import sys

import report_page


def test_a_report_is_timed(tmp_path, monkeypatch):
    sizes = ["--layers", "2", "--hidden", "256", "--intermediate", "512", "--vocab", "100", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["report_page", *sizes, "--commit", "abc", "--output_dir", str(tmp_path)])
    assert report_page.main() == 0
    found = json.loads((tmp_path / "report_page.json").read_text())
    assert (found["linear_maps"], found["columns"]) == (14, 2 * (6 * 256 + 512) + 2 * 256)  # with embeddings and head
    (run,) = found["runs"]
    assert run["seconds"] > 0 and run["processor_seconds"] > 0 and run["bytes"] > 4_000_000
    assert all(check["passed"] for check in found["checks"]) and len(found["checks"]) == 3
