"""docs/behaviour.md says what the records say."""

from pathlib import Path

from behaviour_agreement import table


def test_the_table_is_made_from_the_records():
    assert table() in (Path(__file__).parents[2] / "docs" / "behaviour.md").read_text(encoding="utf-8")
