"""The measured speeds of a machine, by a clock whose every look takes the same time; and what a card has to have free."""

from __future__ import annotations

import dataclasses
import platform
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cost_cases import MACHINE
from reltune.cost import calibration, devices, ledger, memory
from reltune.cost.ledger import EXPERT, HOST, KERNEL, Work
from reltune.cost.profile import PlanCost
from reltune.cost.step import Conditions, StepCount, count_step
from reltune.cost.timing import (
    ALL_IN_ALL,
    CALLED,
    GIVEN_BACK,
    GROUPED,
    LASTING,
    LAUNCHED,
    ON_A_CPU,
    OPTIMIZED,
    READING,
    STEPPED,
    TRIMMED,
    TUNED,
    TUNED_ON_A_CPU,
    step_time,
    work_seconds,
)
from reltune.notes import collecting

CPU = torch.device("cpu")


def clocks(monkeypatch: pytest.MonkeyPatch, running: float) -> None:
    """A clock that goes on by a quarter of a second at each look, for this share of which the process ran."""
    ticks = [0]

    def now() -> float:
        ticks[0] += 1
        return ticks[0] / 4

    monkeypatch.setattr(calibration.time, "perf_counter", now)
    monkeypatch.setattr(calibration.time, "thread_time", lambda: running * ticks[0] / 4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little to compute, and clocks that say a quarter of a second for everything, in which the process ran."""
    clocks(monkeypatch, 1.0)
    monkeypatch.setattr(calibration, "SHAPES", ((2, 8, 4), (4, 8, 4)))
    monkeypatch.setattr(calibration, "TEXTS", ((1, 2), (1, 4)))
    monkeypatch.setattr(
        calibration, "KINDS", {name: calibration.KINDS[name] for name in ("add", "layer_norm_backward")}
    )
    monkeypatch.setattr(calibration, "KIND_SIZES", (1 << 20, 2 << 20))
    monkeypatch.setattr(calibration, "KEPT", 2 << 20)
    monkeypatch.setattr(calibration, "FRESH", 1 << 20)
    monkeypatch.setattr(calibration, "WIDTH", 64)
    monkeypatch.setattr(calibration, "HEADS", 2)
    monkeypatch.setattr(calibration, "HEAD", 3)


def test_what_is_measured_is_divided_by_the_time(small: None) -> None:
    found = calibration.measure(CPU)
    # As many products as KEPT has room for, at most 64, and one of each length of attention take a quarter of a second, whatever they are.
    assert found.laws["float32 product"] == pytest.approx((1 / 256, 0, 0))
    assert found.laws["bfloat16 forward"] == found.laws["float32 backward"] == pytest.approx((1 / 4, 0, 0))
    # Two tensors of a MiB are read and one is written, twice in a quarter of a second; then of two MiB, once.
    assert found.kinds["bfloat16 add"] == [(3 << 20, 24 << 20), (6 << 20, 24 << 20)]
    assert found.fresh == 0  # all takes the same time
    assert found.bandwidth == found.kinds["float32 add"]
    assert found.device == "cpu" and found.name.endswith(f", {torch.get_num_threads()} threads")
    assert calibration.Calibration.from_dict(found.to_dict()) == found
    # 24 blocks of a norm, two linear maps and GELU: 4 operations forward, at least as many backward, some views between
    assert 24 * 8 < 0.25 / found.per_operation < 24 * 50


def test_what_is_measured_of_a_gpu(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors of the CPU; three runs take so long that there are no more."""
    monkeypatch.setattr(calibration, "SIZES", (4, 8))
    monkeypatch.setattr(calibration, "MEGABYTES", (1, 2))
    monkeypatch.setattr(calibration, "LENGTHS", (2, 4))
    monkeypatch.setattr(ledger, "BLOCK", 2)
    found = calibration._measure_gpu(CPU)
    both = [(2 * n**3, 8 * n**3) for n in (4, 8)]
    assert found.products == {"float32": both, "bfloat16": both}
    # For each query two products with so many keys of 3 numbers each, of the longer texts in 3 of 4 blocks; of two heads.
    forward = [(4 * keys * 3, 4 * b * 2 * n * 4 * keys * 3) for b, n, keys in ((2, 2, 2), (1, 4, 3))]
    assert found.attention["float32 forward"] == found.attention["bfloat16 forward"] == forward
    assert found.attention["float32 backward"] == [(2.5 * n, 2.5 * b) for n, b in forward]
    assert found.bandwidth == [(m << 20, 4 * m << 20) for m in (1, 2)]
    assert found.device == "cuda" and not found.laws


def test_a_law_is_what_its_points_say() -> None:
    amounts, flops = [1e3, 1e6, 1e6, 1e7, 2e7], [1e6, 1e6, 1e9, 1e8, 4e9]
    exact = [(a, f, 2e-5 + a / 1e10 + f / 1e11) for a, f in zip(amounts, flops, strict=True)]
    assert calibration.law(exact) == pytest.approx((2e-5, 1e-10, 1e-11))
    # A law with a part below 0 would be nearer here; none is.
    less = calibration.law([(a, f, f / 1e11 - 1e-7 * (a > 1e6)) for a, f, _ in exact])
    assert min(less) >= 0 and less[2] == pytest.approx(1e-11, rel=0.01)


def test_a_kept_calibration_that_is_damaged_is_measured_anew(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = calibration.calibrated(CPU)
    (kept,) = (tmp_path / "reltune").iterdir()
    assert calibration.calibrated(CPU).to_dict()["per_operation"] == first.per_operation
    for text in ("{", "[1]", '{"device": "cpu"}'):
        kept.write_text(text)
        assert calibration.calibrated(CPU) == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file: nothing can be kept below it
    assert calibration.calibrated(CPU) == first


def test_a_calibration_of_a_busy_machine_is_measured_anew_when_it_is_idle(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[bool] = []
    measure = calibration.measure

    def noted(device: torch.device) -> calibration.Calibration:
        found = measure(device)
        measured.append(found.busy)
        return found

    monkeypatch.setattr(calibration, "measure", noted)

    def another_process(running: float) -> tuple[bool, list[str]]:
        """Whether what it is given is of a busy machine, and what it says twice asked."""
        clocks(monkeypatch, running)
        monkeypatch.setattr(calibration, "_said", set())
        with collecting() as said:
            found = calibration.calibrated(CPU)
            assert calibration.calibrated(CPU).busy == found.busy
        return found.busy, said

    busy, said = another_process(0.5)
    assert busy and measured == [True] and len(said) == 1 and "busy with other work" in said[0]
    assert another_process(0.8) == (True, said) and measured == [
        True
    ]  # as long as it is busy, it is not measured again
    assert another_process(0.96) == (False, []) and measured == [True, False]
    assert another_process(0.5) == (False, []) and measured == [True, False]  # that one is kept


def test_a_machine_without_cpuinfo_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert calibration._processor() == "riscv64"


@pytest.mark.parametrize("limit", [2e9, 7.9e10])
def test_what_tensors_may_hold_is_what_fits(limit: float) -> None:
    for cuda, asked_for in ((True, memory.on_card), (False, memory.resident_on_cpu)):
        most = memory.tensors_within(limit, cuda)
        assert asked_for(PlanCost(most, 0.0, 0, 0)) <= limit < asked_for(PlanCost(most + 3, 0.0, 0, 0))
    assert memory.reserved(PlanCost(10**9, 0.0, 0, 0)) > memory.allocated(PlanCost(10**9, 0.0, 0, 0)) > 10**9


def test_the_time_of_work_on_a_cpu_follows_the_laws() -> None:
    """MACHINE multiplies 5e10 numbers a second and moves 1e10 bytes; attention at 1e10; an operation costs 1e-6 s."""
    product = Work("aten.mm", 10**9, 10**6, torch.float32)
    moved = Work("aten.add", 0, 10**8, torch.float32)
    attention = Work("aten._scaled_dot_product_flash_attention_backward", 10**9, 1000, torch.float32, 0, 10**6)
    each = ON_A_CPU * 1e-6
    assert work_seconds({product: 2}, MACHINE) == pytest.approx(2 * (1 / 50 + 1e-4 + 1e-5 + each))
    assert work_seconds({moved: 1, attention: 1}, MACHINE) == pytest.approx(0.01 + 0.1 + 0.01 + 2 * each)
    measured = dataclasses.replace(MACHINE, stated=False)
    assert work_seconds({product: 2}, measured) == pytest.approx(ALL_IN_ALL * work_seconds({product: 2}, MACHINE))
    assert work_seconds({moved: 1}, MACHINE, tuned=3) == pytest.approx(0.01 + (1 + 3 * TUNED_ON_A_CPU) * each)


def test_the_time_of_work_on_a_gpu_is_the_longer_of_computing_and_moving() -> None:
    moved = Work("aten.add", 0, 10**8, torch.float32)
    t4 = devices.calibration_of(devices.card("t4"))
    assert t4 is not None  # the host is on to the next operation while a card computes; it has no bfloat16
    amount, speed = t4.bandwidth[0]
    most = READING * t4.bandwidth[-1][1]
    assert work_seconds({moved: 1}, t4) == pytest.approx(amount / speed + 1e8 / most)
    plain = 1e8 / (LASTING * t4.bandwidth[-1][1])
    assert work_seconds({dataclasses.replace(moved, plain=True): 1}, t4) == pytest.approx(amount / speed + plain)
    thin = Work("aten.mm", 10**6, 10**8, torch.float32)  # reads as fast
    assert work_seconds({thin: 1}, t4) == pytest.approx(amount / speed + plain)
    product = Work("aten.mm", 10**12, 10**8, torch.float32)
    computing = 1e12 / (LASTING * t4.products["float32"][-1][1])
    assert work_seconds({product: 3}, t4) == pytest.approx(3 * (amount / speed + computing))
    experts = dataclasses.replace(product, name="aten::_grouped_mm")
    assert work_seconds({experts: 1}, t4) == pytest.approx(amount / speed + computing * LASTING / GROUPED)
    assert t4.products["bfloat16"] == t4.products["float32"]
    each, reached = t4.attention["float32 backward"][1]
    attention = Work("aten._scaled_dot_product_backward", int(each) * 10**6, 10**8, torch.float32, vectors=10**6)
    taken = attention.flops / (LASTING * reached)  # by what it computes for each query
    assert work_seconds({attention: 2}, t4) == pytest.approx(2 * (amount / speed + taken), rel=1e-4)


def test_on_a_cpu_kinds_of_operations_have_their_own_speeds() -> None:
    kinds = {"float32 gelu": [(1.0, 1e8)], "float32 softmax": [(1.0, 1e7)]}
    here = dataclasses.replace(MACHINE, kinds=kinds, per_operation=0.1 / ON_A_CPU)
    work = {Work(f"aten::{name}", 0, 10**8, torch.float32): 1 for name in ("gelu", "_log_softmax", "add.Tensor")}
    assert work_seconds(work, here) == pytest.approx(1 + 10 + 0.01 + 0.3)
    assert work_seconds({Work(HOST, 0, 0, torch.int64): 5}, here) == pytest.approx(0.5)  # views: the host alone


def test_the_host_of_a_gpu_takes_what_calls_an_operation_takes() -> None:
    t4 = devices.calibration_of(devices.card("t4"))
    assert t4 is not None
    each = t4.per_operation
    forward, backward, again = (Work(HOST, 0, 0, torch.int64, way=way) for way in ("forward", "backward", "again"))
    launch = Work(KERNEL, 0, 0, torch.float32)

    def calls(work: dict[Work, int], tuned: int = 0) -> float:
        return work_seconds(work, t4, tuned) / each

    assert calls({forward: 100, backward: 10}) == pytest.approx(100 * CALLED["forward"] + 10 * CALLED["backward"])
    assert calls({launch: 3}) == pytest.approx(3 * LAUNCHED)
    assert calls({forward: 1}, tuned=3) == pytest.approx(CALLED["forward"] + 3 * TUNED)
    assert calls({again: 1, backward: 1}, tuned=3) == pytest.approx(CALLED["again"] + CALLED["backward"] + 6 * TUNED)
    expert = Work(EXPERT, 10**12, 10**8, torch.float32)
    waited = work_seconds({expert: 1}, t4)  # of which the host has to know the result before it goes on
    assert calls({expert: 1, forward: 10**6}) == pytest.approx(waited / each + (10**6 + 1) * CALLED["forward"])
    least = t4.bandwidth[0][0] / t4.bandwidth[0][1]  # a recording is launched at once
    assert work_seconds({forward: 100, launch: 3}, t4, tuned=3, replayed=True) == pytest.approx(3 * least)
    count = StepCount(Conditions(), {}, 0, {"forward": Counter(), "backward": Counter()}, 0, 4, 0, 50)
    assert step_time(count, t4).optimizer == pytest.approx(50 * STEPPED * each)


def test_what_checkpointing_does_again_is_told_from_the_backward_pass() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2  # without gradients, in either pass

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g + g

    class Net(torch.nn.Module):
        gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4, device="meta")
            self._gradient_checkpointing_func: Any = None

        def forward(self, x: torch.Tensor) -> Any:
            y = self._gradient_checkpointing_func(lambda x: Doubled.apply(self.linear(x)).exp(), x)
            return SimpleNamespace(loss=y.sum())

    counted = count_step(Net(), {"x": torch.empty(2, 4, device="meta", requires_grad=True)}, Conditions())
    ways = {(part, way): set() for part in counted.work for way in CALLED}
    for part, work in counted.work.items():
        for each in work:
            ways[part, each.way].add(each.name)
    assert not ways["forward", "backward"] and not ways["forward", "again"] and not ways["backward", "forward"]
    assert {"aten::mul.Tensor", "aten::addmm"} <= ways["backward", "again"]
    assert "aten::add.Tensor" in ways["backward", "backward"] and "aten::addmm" not in ways["backward", "backward"]


def test_large_storages_are_given_anew_each_time_and_a_heap_in_part() -> None:
    peak = {"weights": 10**9, "activations": 10**7, "loss": 2 * 10**7, "passing": 0, "gradients": 0}
    here = dataclasses.replace(MACHINE, fresh=1e-6, per_operation=0.0)

    def seconds(made: int, times: int, **more: int) -> float:
        work = {"forward": Counter({Work(HOST, 0, 0, torch.int64, made): times}), "backward": Counter()}
        return step_time(StepCount(Conditions(), {**peak, **more}, 0, work, 0, 0, 0, 1), here).seconds

    assert seconds(GIVEN_BACK - 1, 1) == pytest.approx(30)
    assert seconds(GIVEN_BACK - 1, 1, gradients=10**9) == pytest.approx(TRIMMED / 1e6)
    assert seconds(GIVEN_BACK, 3) == pytest.approx(3 * GIVEN_BACK / 1e6)


def test_a_step_is_its_passes_and_the_optimizer() -> None:
    work = {"forward": Counter({Work("aten.add", 0, 10**8, torch.float32): 1}), "backward": Counter()}
    count = StepCount(Conditions(), {}, 0, work, 0, 10**8, 0, 2)
    found = step_time(count, MACHINE)
    assert (found.forward, found.backward) == (pytest.approx(0.01 + ON_A_CPU * 1e-6), 0)
    # 7 passes over 100 MB at 10 GB/s, of two tensors
    assert found.optimizer == pytest.approx(0.07 + 2 * OPTIMIZED * ON_A_CPU * 1e-6)
    assert found.seconds == pytest.approx(found.forward + found.optimizer)
