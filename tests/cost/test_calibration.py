"""The measured speeds of a machine, by a clock whose every look takes the same time; and what a card has to have free."""

from __future__ import annotations

import dataclasses
import platform
from collections import Counter
from pathlib import Path

import pytest
import torch

from cost_cases import MACHINE
from reltune.cost import calibration, devices, memory
from reltune.cost.ledger import HOST, Work
from reltune.cost.profile import PlanCost
from reltune.cost.step import Conditions, StepCount
from reltune.cost.timing import HOST_IN_A_STEP, LASTING, TUNED, WAITING, step_time, work_seconds
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
    monkeypatch.setattr(calibration, "SIZES", {"cpu": (4, 8)})
    monkeypatch.setattr(calibration, "MEGABYTES", {"cpu": (1, 2)})
    monkeypatch.setattr(calibration, "LENGTHS", {"cpu": (2, 4)})
    monkeypatch.setattr(
        calibration, "KINDS", {name: calibration.KINDS[name] for name in ("add", "layer_norm_backward")}
    )
    monkeypatch.setattr(calibration, "KIND_MEGABYTES", (1, 2))
    monkeypatch.setattr(calibration, "KEPT", 2 << 20)
    monkeypatch.setattr(calibration, "FRESH", 1 << 20)
    monkeypatch.setattr(calibration, "WIDTH", 64)
    monkeypatch.setattr(calibration, "HEADS", 2)
    monkeypatch.setattr(calibration, "HEAD", 3)


def test_what_is_measured_is_divided_by_the_time(small: None) -> None:
    found = calibration.measure(CPU)
    both = [(2 * n**3, 8 * n**3) for n in (4, 8)]
    assert found.products == {"float32": both, "bfloat16": both}
    forward = [(n, 16 * b * 2 * n * n * 3) for b, n in ((2, 2), (1, 4))]  # two products, batch, heads
    assert found.attention["float32 forward"] == found.attention["bfloat16 forward"] == forward
    assert found.attention["float32 backward"] == [(1.25 * n, 2.5 * b) for n, b in forward]
    # Two tensors of a MiB are read and one is written, twice in a quarter of a second; then of two MiB, once.
    assert found.kinds["bfloat16 add"] == [(3 << 20, 24 << 20), (6 << 20, 24 << 20)]
    assert found.fresh == 0  # all takes the same time
    assert found.threads == torch.get_num_threads()
    assert found.bandwidth == [(m << 20, 4 * m << 20) for m in (1, 2)]
    assert found.device == "cpu" and found.name.endswith(f", {torch.get_num_threads()} threads")
    assert calibration.Calibration.from_dict(found.to_dict()) == found
    # 24 blocks of a norm, two linear maps and GELU: 4 operations forward, at least as many backward, some views between
    assert 24 * 8 < 0.25 / found.per_operation < 24 * 50


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


def test_the_time_of_work_is_the_longer_of_computing_and_moving() -> None:
    """MACHINE multiplies 5e10 numbers a second and moves 1e10 bytes; attention at 1e10; an operation costs 1e-6 s."""
    product = Work("aten.mm", 10**9, 1000, torch.float32)
    moved = Work("aten.add", 0, 10**8, torch.float32)
    attention = Work("aten._scaled_dot_product_flash_attention_backward", 10**9, 1000, torch.float32)
    assert work_seconds({product: 2}, MACHINE) == pytest.approx(2 * (1 / 50 + 1e-6))
    assert work_seconds({moved: 1, attention: 1}, MACHINE) == pytest.approx(0.01 + 0.1 + 2e-6)
    t4 = devices.calibration_of(devices.card("t4"))
    assert t4 is not None  # the host is on to the next operation while a card computes; it has no bfloat16
    assert work_seconds({moved: 1}, t4) == pytest.approx(1e8 / calibration.rate(t4.bandwidth, 1e8))
    assert work_seconds({Work("aten.add", 0, 1, torch.float32): 10}, t4) == pytest.approx(
        max(10 * 1e6 / 3.2e10, 10 * 7e-6)
    )
    assert t4.products["bfloat16"] == t4.products["float32"]


def test_on_a_cpu_kinds_of_operations_have_their_own_speeds_and_wait_for_each_other() -> None:
    kinds = {"float32 gelu": [(1.0, 1e8)], "float32 softmax": [(1.0, 1e7)]}
    here = dataclasses.replace(MACHINE, kinds=kinds, per_operation=0.1)
    work = {Work(f"aten::{name}", 0, 10**8, torch.float32): 1 for name in ("gelu", "_log_softmax", "add.Tensor")}
    assert work_seconds(work, here) == pytest.approx(1 + 10 + 0.01 + 0.3)
    several = dataclasses.replace(here, threads=2)
    assert work_seconds(work, several) == pytest.approx(1 + 10 + 0.01 + 0.3 + 0.3 * WAITING)
    assert work_seconds({Work(HOST, 0, 0, torch.int64): 5}, several) == pytest.approx(
        0.5
    )  # views are made by the host alone


def test_attention_on_a_cpu_is_as_quick_as_its_texts_are_long() -> None:
    here = dataclasses.replace(MACHINE, attention={"float32 forward": [(64.0, 1e9), (256.0, 4e9)]})
    for batch in (1, 8):
        flops, numbers = 4 * batch * 128**2 * 64, 4 * batch * 128 * 64
        work = Work("aten::_scaled_dot_product_flash_attention_for_cpu", flops, 4 * numbers, torch.float32)
        assert work_seconds({work: 1}, here) == pytest.approx(flops / 2e9 + 1e-6)


def test_bursts_are_quicker_than_steps() -> None:
    product = {Work("aten.mm", 10**9, 1000, torch.float32): 1}
    measured = dataclasses.replace(MACHINE, stated=False, per_operation=0.0)
    assert work_seconds(product, measured) == pytest.approx(1 / 50 / LASTING["cpu"]["float32"])


def test_the_host_of_a_gpu_takes_longer_in_a_step_and_for_modules_that_are_tuned() -> None:
    t4 = devices.calibration_of(devices.card("t4"))
    assert t4 is not None
    views = {Work(HOST, 0, 0, torch.int64): 100}
    each = t4.per_operation
    assert work_seconds(views, t4) == pytest.approx(100 * each)
    assert work_seconds(views, t4, tuned=3) == pytest.approx((100 + 3 * TUNED) * each)
    measured = dataclasses.replace(t4, stated=False)
    assert work_seconds(views, measured, tuned=3) == pytest.approx(HOST_IN_A_STEP * (100 + 3 * TUNED) * each)


def test_memory_is_given_anew_in_every_step() -> None:
    peak = {
        "weights": 10**9,
        "states": 10**9,
        "activations": 10**6,
        "loss": 2 * 10**6,
        "passing": 0,
        "gradients": 10**6,
    }
    count = StepCount(Conditions(), peak, 0, {"forward": Counter(), "backward": Counter()}, 0, 0, 0, 1)
    assert step_time(count, dataclasses.replace(MACHINE, fresh=1e-6)).seconds == pytest.approx(4)


def test_a_step_is_its_passes_and_the_optimizer() -> None:
    work = {"forward": Counter({Work("aten.add", 0, 10**8, torch.float32): 1}), "backward": Counter()}
    count = StepCount(Conditions(), {}, 0, work, 0, 10**8, 0, 2)
    found = step_time(count, MACHINE)
    assert (found.forward, found.backward) == (pytest.approx(0.01 + 1e-6), 0)
    assert found.optimizer == pytest.approx(0.07)  # 7 passes over 100 MB at 10 GB/s
    assert found.seconds == pytest.approx(0.08 + 1e-6)
