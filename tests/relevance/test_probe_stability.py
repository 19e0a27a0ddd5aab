"""The sample by which a probe knows that its choice has settled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reltune.relevance.probe import stability
from reltune.relevance.probe.moving_weights import MovingWeight
from reltune.relevance.probe.stability import WatchedSample


def made(*votes: Tensor) -> list[MovingWeight]:
    return [MovingWeight(str(i), [], torch.zeros(v.shape), v, torch.float32) for i, v in enumerate(votes)]


def test_large_weights_are_sampled_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = made(
        torch.zeros(3000, dtype=torch.int8), torch.zeros(10, 700, dtype=torch.int8), torch.zeros(1, dtype=torch.int8)
    )
    whole = WatchedSample(weights, 0)
    assert [at.tolist() for at in whole.places.values()] == [list(range(n)) for n in (3000, 7000, 1)]
    monkeypatch.setattr(stability, "SAMPLE", 10_001)
    assert len(WatchedSample(weights, 0).places[weights[0]]) == 3000  # as many as there are
    monkeypatch.setattr(stability, "SAMPLE", 100)
    some = WatchedSample(weights, 0)
    first, second, last = some.places.values()
    assert 27 <= len(first) <= 30 and 66 <= len(second) <= 70 and last.tolist() == [0]  # of 30 and 70 drawn, some twice
    assert int(first.max()) > 2000 and int(second.max()) > 5000
    for at in (first, second):
        assert bool((at.diff() > 0).all()) and all(
            t.shape == at.shape for w, t in some.sums.items() if some.places[w] is at
        )
    assert all(a.equal(b) for a, b in zip(some.places.values(), WatchedSample(weights, 0).places.values(), strict=True))
    assert not first.equal(WatchedSample(weights, 1).places[weights[0]])


def test_agreement_is_the_part_of_the_choice_that_stays() -> None:
    """Of 300 weights 1% are three, by votes of either sign and then by summed gradients."""
    a, b = torch.zeros(200, dtype=torch.int8), torch.zeros(10, 10, dtype=torch.int8)
    weights = made(a, b)
    sample = WatchedSample(weights, 0)
    a[5], a[6], b[3, 4] = 9, -8, 7
    assert sample.check() == 0.0
    assert sample.chosen is not None and sample.chosen.tolist() == [5, 6, 234]
    a[5], a[7] = 0, 3
    assert sample.check() == pytest.approx(2 / 3) and sample.agreement == pytest.approx(2 / 3)
    gradient = torch.zeros(200)
    gradient[[8, 9]] = torch.tensor([-0.5, 0.4])
    for weight, g in ((weights[0], gradient), (weights[0], gradient), (weights[1], torch.zeros(10, 10))):
        sample.note(weight, g)
    a.zero_()
    b.zero_()
    a[7] = 1
    sample.check()
    assert sample.chosen.tolist() == [7, 8, 9] and sample.sums[weights[0]][8] == -1.0
    other = WatchedSample(weights, 0)
    other.load({name: tensor.clone() for name, tensor in sample.state().items()}, sample.agreement)
    assert other.agreement == sample.agreement == pytest.approx(1 / 3) and other.check() == 1.0
    sample.start()
    assert sample.state().keys() == {"sample/0", "sample/1"} and sample.agreement == 0.0
    assert not sample.sums[weights[0]].any() and sample.check() == 0.0
