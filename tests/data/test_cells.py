"""Lists and objects that stand as text in a cell: what their writers wrote is what is read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reltune.data.cells import looks_structured, structure_in

SCALARS = st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(st.characters(codec="utf-8"))
VALUES = st.lists(
    st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
)


@given(VALUES)
def test_what_python_and_json_write_is_read_back(value: list[Any]) -> None:
    assert structure_in(repr(value)) == value
    assert structure_in(f" {json.dumps(value)}\n") == value


@given(st.lists(st.integers(-99, 99) | st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_what_numpy_writes_is_read_back(numbers: list[float]) -> None:
    array = np.array(numbers)
    found = structure_in(str(array))
    assert found is not None and np.allclose(found, array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("['a' 'b']", ["a", "b"]),  # Python itself would join them
        ("['B-PER' 'O'\n 'O']", ["B-PER", "O", "O"]),
        ("[\"it's\" 'so']", ["it's", "so"]),
        ("[[0 1]\n [1 -1]]", [[0, 1], [1, -1]]),
        ("[0.  -1.5 1e-05]", [0.0, -1.5, 1e-05]),
        (
            "{'text': array(['a b'], dtype=object), 'answer_start': array([515])}",
            {"text": ["a b"], "answer_start": [515]},
        ),
        ("[array([1, 2]), array([3])]", [[1, 2], [3]]),
        ("[(0, 5, 'PER')]", [(0, 5, "PER")]),
        ("[]", []),
    ],
)
def test_other_forms(text: str, value: Any) -> None:
    assert structure_in(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "[toxic, obscene]",
        "[ see below ]",
        "[INST] hi [/INST]",
        "['a', 'b'",
        "[1 2 ... 3]",
        "[1-2]",
        "[f(1)]",
        "{'a', 'b'}",
        "[nan]",
        "[" * 50_000 + "]" * 50_000,
        "['a' + 'b']",
        "[1 if 2 else 3]",
        "plain",
        "[",
        "",
    ],
)
def test_what_spells_no_list(text: str) -> None:
    assert structure_in(text) is None


def test_what_looks_like_one() -> None:
    assert looks_structured(" [a] ") and looks_structured("{}")
    assert not any(map(looks_structured, ("[", "[a", "(a)", "[a}", "")))
