"""The largest of many numbers without sorting, against sorting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reltune.plan import threshold
from reltune.plan.threshold import Counts, above, best_of_columns, largest

NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, 5e-324, 3e38, float("inf"), float("nan")]),
    st.floats(-2, 2, width=32),
    st.floats(width=64, allow_nan=False),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(NUMBERS, max_size=12), min_size=1, max_size=4), st.integers(1, 40), st.booleans())
def test_the_largest_are_those_of_a_stable_sort(lists, count, double):
    scores = {str(i): torch.tensor(of, dtype=torch.float64) for i, of in enumerate(lists)}
    if not double:
        scores = {name: of.float() for name, of in scores.items()}
    ranked = sorted(
        ((name, i) for name, of in scores.items() for i, v in enumerate(of.tolist()) if v >= 0),
        key=lambda place: -scores[place[0]][place[1]].item(),
    )[:count]
    wanted = {name: sorted(i for n, i in ranked if n == name) for name in scores}
    found = largest(scores, count)
    assert {name: index.tolist() for name, index in found.items()} == {n: of for n, of in wanted.items() if of}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_blocks(monkeypatch, dtype):
    monkeypatch.setattr(threshold, "BLOCK", 7)
    g = torch.Generator().manual_seed(0)
    scores = {name: torch.randint(-3, 9, (5, 6), generator=g).to(dtype) for name in "abc"}
    joined = torch.cat([of.flatten() for of in scores.values()])
    for count in (1, 10, 33, 59, 90):
        best = joined.float().argsort(descending=True, stable=True)[:count]
        best = best[joined[best] >= 0].sort().values
        found = largest(scores, count)
        assert torch.cat([found[n] + 30 * i for i, n in enumerate("abc") if n in found]).equal(best)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 3000), st.sets(st.sampled_from("abcd"), max_size=4))
def test_counts_are_those_of_the_largest_to_within_a_step(seed, count, without):
    g = torch.Generator().manual_seed(seed)
    scores = {
        "a": torch.randn(20, 40, generator=g),
        "b": torch.rand(700, generator=g).bfloat16(),
        "c": torch.randint(-2, 4, (500,), generator=g).double(),
        "d": torch.full((3,), -1.0),
    }
    found = Counts(scores).at(count, without)
    kept = {name: of for name, of in scores.items() if name not in without}
    exact = {name: len(index) for name, index in largest(kept, count).items()} if kept else {}
    assert sum(found.values()) == sum(exact.values()) and set(found) <= set(kept) and 0 not in found.values()
    joined = sorted((v for of in kept.values() for v in of.flatten().tolist() if v >= 0), reverse=True)
    if len(joined) <= count:
        assert found == exact
        return
    least = joined[count - 1]
    width = 2.0 ** (math.frexp(least)[1] - 1) / 128 if least else 0.0
    low = math.floor(least / width) * width if width else 0.0
    for name, of in kept.items():
        inside = int(((of >= low) & (of < low + width)).sum()) if width else len(of.flatten())
        assert abs(found.get(name, 0) - exact.get(name, 0)) <= inside


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.booleans())
def test_how_many_lie_above(numbers, thresholds, equal):
    scores = {"a": torch.tensor(numbers[:7], dtype=torch.float32), "b": torch.tensor(numbers[7:], dtype=torch.float32)}
    thresholds = sorted(set(thresholds))
    wanted = [sum(v > t or (equal and v == t) for v in numbers) for t in thresholds]
    assert above(scores, torch.tensor(thresholds, dtype=torch.float64), equal).tolist() == wanted


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 30), st.integers(1, 40))
def test_the_best_of_columns_by_the_rule(seed, rows, columns, count, block):
    """Place in the column first, then size, then the index; small whole numbers, so that ties and negative ones are common."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 5, (rows, columns), generator=g).float()
    values = scores.tolist()
    ranked = []
    for j in range(columns):
        order = sorted(range(rows), key=lambda i: -values[i][j])
        ranked += [(place, -values[i][j], i * columns + j) for place, i in enumerate(order) if values[i][j] >= 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "BLOCK", block)
        found = best_of_columns(scores, count)
    assert found.tolist() == sorted(index for *_, index in sorted(ranked)[:count])
