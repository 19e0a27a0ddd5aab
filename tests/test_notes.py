"""What was assumed or left out: said once, and collected for the report."""

from __future__ import annotations

import pytest

from reltune.notes import Note, collecting, note


def test_notes_are_collected_once_and_in_order() -> None:
    with collecting() as outer:
        note("first")
        with collecting() as inner:
            note("inner")
        note("second")
        note("first")
    assert (outer, inner) == (["first", "second"], ["inner"])


def test_a_note_that_nobody_collects_is_a_warning() -> None:
    with collecting(), pytest.raises(ValueError):
        raise ValueError
    with pytest.warns(Note, match="the column 'id' is left out"):
        note("the column 'id' is left out")
