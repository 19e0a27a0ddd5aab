"""docs/reliability.md says what the records say; and what benchmarks/mutation.py reads of a file."""

import ast
import json

import pytest

import core_coverage
import mutation
from reliability_page import PAGE, page, wilson


def test_the_page_is_made_from_the_records():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_the_records_keep_what_was_promised():
    files = json.loads(core_coverage.RECORD.read_text(encoding="utf-8"))["files"].values()
    for part, whole in (("lines_run", "lines"), ("branches_taken", "branches")):
        assert sum(f[part] for f in files) >= 0.95 * sum(f[whole] for f in files)
    areas = json.loads(mutation.RECORD.read_text(encoding="utf-8"))["areas"].values()
    assert all(area["killed"] + len(area["survivors"]) == area["run"] for area in areas)
    effect = sum(area["run"] - sum(bool(one["without_effect"]) for one in area["survivors"]) for area in areas)
    assert sum(area["killed"] for area in areas) >= 0.85 * effect


def test_intervals_are_wilsons():
    """Of 90 in 100 (Newcombe 1998 has the formula); a sample of everything leaves nothing open."""
    assert wilson(90, 100, 10**9) == pytest.approx((0.82563, 0.94477), abs=1e-5)
    assert wilson(90, 100, 100) == (0.9, 0.9)
    low, high = wilson(90, 100, 200)
    assert 0.82563 < low < 0.9 < high < 0.94477


CODE = """\
LARGEST = 2


@dataclass(frozen=True)
class A:
    size: int | None = 1

    def f(self, a: int = 3,
          b=2) -> int | None:
        if (a and
                b):
            return zip(
                a, b, strict=True)
        return None
"""


def test_a_mutant_belongs_to_the_statement_that_it_is_in():
    found = mutation._statements(CODE)
    assert [line for line, lines in found.items() if not lines] == [1, 2, 3, 4, 5, 6, 7]  # run by import
    assert found[8] == found[9] == range(10, 11)  # what the function's defaults are for
    assert [found[line] for line in (10, 11, 12, 13, 14)] == [range(10, 12)] * 2 + [range(12, 14)] * 2 + [range(14, 15)]


def test_annotations_and_guards_are_found():
    lines = CODE.splitlines()
    annotations, guards = (
        [lines[a[0] - 1][a[1] : b[1]] for a, b in spans] for spans in mutation._spans(ast.parse(CODE))
    )
    assert sorted(annotations) == ["int", "int | None", "int | None"]
    assert guards == ["True", "True"]


def test_tests_are_taken_as_long_as_there_is_time():
    seconds = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert mutation.within(["a", "b", "c"], seconds, 3.0) == ["a", "b"]
    assert mutation.within(["c", "a"], seconds, 2.0) == ["c"]  # one in any case
    assert mutation.within([], seconds, 2.0) == []
