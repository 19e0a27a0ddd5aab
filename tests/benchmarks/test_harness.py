"""The benchmark harness, on methods whose costs are known: they move the clock and the memory gauge themselves."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch

import harness
from harness import Benchmark, Machine, Method, Timed, TimedLoader


class Gauges(Machine):
    """A clock and a peak of memory that only methods move."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.time, self.memory, self.highest = 100.0, 7, 7

    def ready(self):
        self.highest = self.memory

    def now(self):
        return self.time

    def held(self):
        return self.memory

    def peak(self):
        return self.highest

    def spend(self, seconds, memory=0):
        self.time += seconds
        self.highest = max(self.highest, self.memory + memory)


@pytest.fixture
def gauges():
    return Gauges()


@pytest.fixture
def bench(gauges):
    return Benchmark("known", {"repeats": 3}, {"commit": "abc", "dirty": False}, gauges)


def saved(bench, directory):
    return json.loads(bench.save(directory).read_text())


def test_methods_take_turns_after_a_warm_up_each_and_all_repeats_are_kept(bench, gauges, tmp_path):
    order = []

    def costing(name, seconds, memory):
        def run():
            order.append(name)
            gauges.spend(seconds * len(order), memory)

        return Method(name, run, config={"step": name})

    bench.measure("case", {"size": 1}, [costing("A", 1.0, 100), costing("B", 2.0, 10)], repeats=3)
    assert order == ["A", "B"] * 4
    found = saved(bench, tmp_path)
    first, second = found["cases"][0]["methods"]
    assert first["seconds"] == [3.0, 5.0, 7.0] and second["seconds"] == [8.0, 12.0, 16.0]  # the first turn is left out
    assert first["peak_bytes"] == [107] * 3 and second["peak_bytes"] == [17] * 3 and second["held_bytes"] == [7] * 3
    assert found["cases"][0]["config"] == {"size": 1} and first["config"] == {"step": "A"}
    assert bench.ratio("case", "B", "A") == 12 / 5 and bench.ratio("case", "B", "A", "peak_bytes") == 17 / 107
    assert bench.finish(tmp_path) == 0


def test_what_is_around_a_method_is_neither_timed_nor_left_open(bench, gauges):
    states = []

    @contextlib.contextmanager
    def hooks():
        gauges.spend(1000)
        states.append("open")
        yield
        gauges.spend(1000)
        states.append("closed")

    records = bench.measure("case", {}, [Method("A", lambda: gauges.spend(2), around=hooks)], repeats=2)
    assert records["A"]["seconds"] == [2, 2]
    assert states == ["open", "closed"] * 3


def test_a_method_may_time_a_part_of_itself(bench, gauges):
    def run():
        gauges.spend(1000)
        return Timed(2.0)

    assert bench.measure("case", {}, [Method("A", run)], repeats=2)["A"]["seconds"] == [2.0, 2.0]


def test_a_timed_loader_gives_the_time_per_batch_after_the_first(gauges):
    loader = TimedLoader(gauges, ["a", "b", "c"])
    for batch, seconds in zip(loader, [100, 3, 5], strict=True):
        assert batch in "abc"
        gauges.spend(seconds)
    gauges.spend(1000)
    assert loader.seconds() == 4.0 and loader.seconds(skip=0) == 36.0


def test_a_method_that_raises_is_recorded_and_the_others_go_on(bench, gauges, tmp_path, capsys):
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of\n luck")

    methods = [Method("ours", lambda: gauges.spend(1)), Method("peer", breaks)]
    bench.measure("case", {}, methods, repeats=4)
    ours, peer = saved(bench, tmp_path)["cases"][0]["methods"]
    assert len(calls) == 3, "a method that failed is not tried again"
    assert peer["error"] == "RuntimeError: out of luck" and len(peer["seconds"]) == 1
    assert ours["seconds"] == [1] * 4 and ours["error"] is None
    assert math.isnan(bench.median("case", "peer")), "half a measurement is none"
    assert bench.finish(tmp_path) == 1
    assert "FAILED case: peer: RuntimeError: out of luck" in capsys.readouterr().err


def test_a_method_that_may_fail_fails_nothing_but_is_on_record(bench, gauges, tmp_path):
    def breaks():
        raise NotImplementedError("no such layer")

    bench.measure("case", {}, [Method("ours", lambda: gauges.spend(1)), Method("peer", breaks, required=False)], 1)
    bench.failed("case", {}, "other peer", ImportError("not installed"), required=False)
    assert bench.finish(tmp_path) == 0
    found = json.loads((tmp_path / "known.json").read_text())
    errors = [record["error"] for case in found["cases"] for record in case["methods"]]
    assert errors == [None, "NotImplementedError: no such layer", "ImportError: not installed"]
    assert found["problems"] == []


def test_a_missing_result_fails(bench, gauges, tmp_path):
    assert bench.problems() == ["nothing was measured"]
    bench.measure("case", {}, [Method("ours", lambda: gauges.spend(1))], repeats=0)
    assert bench.finish(tmp_path) == 1
    assert bench.problems() == ["case: ours: no repeat was measured"]
    bench.failed("case", {}, "peer", ImportError("not installed"))
    assert len(bench.problems()) == 2


@pytest.mark.parametrize(("value", "at_least", "passes"), [(1.1, False, True), (1.2, False, False), (1.2, True, True)])
def test_a_check_holds_a_figure_against_its_limit(bench, value, at_least, passes):
    assert bench.check("ratio", value, 1.15, at_least) is passes
    assert len(bench.problems()) == (not passes)


@pytest.mark.parametrize("at_least", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_missing_passes_no_check(bench, value, at_least, tmp_path):
    assert not bench.check("ratio", value, 1.0, at_least)
    bench.value("ratio", value)
    assert bench.finish(tmp_path) == 1  # and JSON takes it


def test_a_ratio_to_a_method_that_failed_passes_no_check(bench, gauges):
    bench.measure("case", {}, [Method("ours", lambda: gauges.spend(1))], repeats=1)
    assert not bench.check("ratio", bench.ratio("case", "ours", "floor"), 1.15)


def test_two_methods_of_one_name_are_refused(bench):
    with pytest.raises(ValueError, match="'A'"):
        bench.measure("case", {}, [Method("A", int), Method("A", int)], repeats=1)


def test_the_record_says_what_was_measured_where(gauges, tmp_path):
    bench = Benchmark("known", {"repeats": 3}, harness.commit("abc"), gauges, ["pytest", "no-such-package"])
    found = saved(bench, tmp_path)
    assert found["commit"] == "abc" and found["dirty"] is None and found["arguments"] == {"repeats": 3}
    assert found["versions"]["torch"] and found["versions"]["pytest"] and found["versions"]["no-such-package"] is None
    assert found["hardware"]["cpu"] and found["hardware"]["cores"] >= 1 and found["hardware"]["memory_bytes"] > 0
    assert "not measured" in found["memory"]


def test_the_table_ends_its_lines_with_the_ratio_to_the_first_method(bench, gauges):
    methods = [Method("floor", lambda: gauges.spend(2)), Method("ours", lambda: gauges.spend(3))]
    bench.measure("case", {}, methods, repeats=1)
    assert bench.table().splitlines()[-1].endswith("×1.500")


def test_real_time_is_measured(tmp_path):
    bench = Benchmark("real", {}, {"commit": "abc"}, Machine(torch.device("cpu")))
    records = bench.measure("case", {}, [Method("A", lambda: sum(range(1000)))], repeats=2)
    assert len(records["A"]["seconds"]) == 2 and min(records["A"]["seconds"]) > 0
    assert records["A"]["peak_bytes"] == []
