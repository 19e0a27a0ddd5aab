"""How long the counted work of a training step takes, from what a calibration says of the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from reltune.cost.calibration import Calibration, rate
from reltune.cost.ledger import Work
from reltune.cost.step import StepCount

PASSES = 7  # over a trained tensor in AdamW: weight, gradient and two states are read, weight and states are written


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a training step, by part."""

    forward: float
    backward: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.optimizer


def step_time(count: StepCount, calibration: Calibration) -> StepTime:
    """What the step takes on the calibrated machine."""
    parts = {part: work_seconds(work, calibration) for part, work in count.work.items()}
    moved = PASSES * count.trained_bytes
    optimizer = moved / rate(calibration.bandwidth, moved / max(1, count.tensors))
    return StepTime(parts["forward"], parts["backward"], optimizer)


def work_seconds(work: Mapping[Work, int], calibration: Calibration) -> float:
    """What the work takes, each so many times."""
    device = sum(times * _seconds(each, calibration) for each, times in work.items())
    host = calibration.per_operation * sum(work.values())
    # A GPU computes while Python is on to the next operation; a CPU does one after the other.
    return max(device, host) if calibration.device == "cuda" else device + host


def _seconds(work: Work, calibration: Calibration) -> float:
    """The longer one of multiplying and of reading and writing, and no less than the least that was measured."""
    gpu = calibration.device == "cuda"
    moving = work.bytes / rate(calibration.bandwidth, work.bytes)
    least = calibration.bandwidth[0][0] / calibration.bandwidth[0][1] if gpu else 0.0
    if not work.flops:
        return max(moving, least)
    dtype = "float32" if work.dtype in (torch.float32, torch.float64) else "bfloat16"
    if "scaled_dot_product" in work.name:
        direction = "backward" if "backward" in work.name else "forward"
        rates = calibration.attention[f"{dtype} {direction}"]
    else:
        rates = calibration.products[dtype]
    return max(work.flops / rate(rates, work.flops), moving, least)
