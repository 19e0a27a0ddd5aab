"""docs/speed.md says what the records say."""

import json
import sys

import pytest

import step_profile
from speed_tables import PAGE, page


def test_the_page_is_made_from_the_records():
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.slow
def test_a_step_is_profiled(tmp_path, monkeypatch):
    command = ["step_profile", "--tiny", "--methods", "columns", "--threads", "1", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path)])
    assert step_profile.main() == 0
    values = json.loads((tmp_path / "step_profile.json").read_text())["values"]
    assert values["floor"]["step"] > 0 and values["columns, r = 4"]["kernels"]
