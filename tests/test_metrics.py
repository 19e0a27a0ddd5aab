"""Metrics: every task's have a name, a label and a direction, and results find theirs."""

from __future__ import annotations

import pytest

from reltune.metrics import METRICS, largest_is_best, metric_of
from reltune.report import numbers
from reltune.tasks.registry import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_measured_by_known_metrics(name: str) -> None:
    assert set(TASKS[name].metrics) <= set(METRICS) and TASKS[name].metrics


def test_every_metric_is_some_task_s() -> None:
    assert set(METRICS) == {metric for task in TASKS.values() for metric in task.metrics}


def test_results_find_their_metric() -> None:
    assert metric_of("test_f1") is METRICS["f1"] and metric_of("eval_before_f1_macro") is METRICS["f1_macro"]
    assert metric_of("token_accuracy") is METRICS["token_accuracy"]  # not accuracy, which it ends with too
    assert metric_of("test_loss") is None and metric_of("inaccuracy") is None


def test_directions() -> None:
    for name in ("loss", "eval_loss", "mse", "test_mse", "perplexity", "eval_perplexity", "some_loss"):
        assert not largest_is_best(name), name
    for name in ("accuracy", "eval_f1_macro", "pearson", "reward_margin", "gain"):
        assert largest_is_best(name), name


@pytest.mark.parametrize("name", METRICS)
def test_shares_alone_are_shown_in_percent(name: str) -> None:
    shown = numbers.metric(f"test_{name}", 0.25)
    assert shown == ("25.00 %" if METRICS[name].share else "0.25")
    for short in (False, True):
        assert ("%" in numbers.head(name, short)) == METRICS[name].share
    assert max(map(len, METRICS[name].short.split("\n"))) <= 8
