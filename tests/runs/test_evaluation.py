"""The clock of inference: which rounds count, in which order models run, and what a text is charged."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from reltune.runs import evaluation


class OnAClock(nn.Module):
    """A model whose passes move a clock: in each round by the next of its seconds, spread over its batches."""

    def __init__(self, name: str, seconds: list[float], batches: int, clock: SimpleNamespace) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seconds = [second / batches for second in seconds for _ in range(batches)]
        self.name, self.clock = name, clock

    def forward(self, x: torch.Tensor) -> None:
        assert not self.training and not torch.is_grad_enabled()
        self.clock.now += self.seconds.pop(0)
        self.clock.passes.append((self.name, len(x)))


def test_the_median_round_counts_after_one_that_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, passes=[])
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    # With the first round the median of the first model would be 3 seconds, and the second's mean is not its median.
    models = {"first": OnAClock("first", [9, 1, 2, 4], 3, clock), "second": OnAClock("second", [9, 3, 1, 8], 3, clock)}
    texts = [{"x": torch.tensor([float(i)]), "labels": torch.tensor(0)} for i in range(12)]
    found = evaluation.inference_ms_per_text(models, texts, None, texts=10, batch_size=4, rounds=3)
    assert found == pytest.approx({"first": 2000 / 10, "second": 3000 / 10})
    one_turn = [(name, size) for name in models for size in (4, 4, 2)]
    assert clock.passes == 4 * one_turn
