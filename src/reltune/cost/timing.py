"""How long the counted work of a training step takes, from what a calibration says of the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from reltune.cost.calibration import Calibration, rate
from reltune.cost.ledger import HOST, KERNEL, Work
from reltune.cost.step import StepCount

PASSES = 7  # over a trained tensor in AdamW: weight, gradient and two states are read, weight and states are written

# A calibration measures operations one at a time, in bursts of 20 ms. What of those speeds products and attention keep in a step, beside a
# model's other work and with the power that a GPU may draw; how many times as long a GPU's host takes there for an operation, among a
# model's own Python and PEFT's, and how many of them the operators of the tuner, which are written in Python, add to each module that it
# trains; and for how many operations without work threads of a CPU wait for each other at one that they share. Set on
# the listed cases of benchmarks/results/cost_sweep.json (an H100 whose host was shared, two cores of a CPU): the same for all models, methods
# and sizes.
LASTING = {"cuda": {"bfloat16": 0.77, "float32": 0.9}, "cpu": {"bfloat16": 0.7, "float32": 0.8}}
HOST_IN_A_STEP, WAITING, TUNED = 2.05, 14, 22


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
    parts = {part: work_seconds(work, calibration, count.tuned / 2) for part, work in count.work.items()}
    moved = PASSES * count.trained_bytes
    optimizer = moved / rate(calibration.bandwidth, moved / max(1, count.tensors))
    # A process gives memory back to the system when a step ends: what a step holds at most beyond that, it is given anew.
    fresh = calibration.fresh * sum(count.peak.get(area, 0) for area in ("activations", "loss", "passing", "gradients"))
    return StepTime(parts["forward"] + fresh, parts["backward"], optimizer)


def work_seconds(work: Mapping[Work, int], calibration: Calibration, tuned: float = 0) -> float:
    """What the work takes, each so many times, with the tuner's operators of so many modules, forward and backward."""
    device = sum(times * _seconds(each, calibration) for each, times in work.items())
    host = calibration.per_operation * sum(work.values())
    if calibration.device != "cuda":  # one after the other
        shared = sum(times for each, times in work.items() if each.name != HOST) if calibration.threads > 1 else 0
        return device + host + WAITING * calibration.per_operation * shared
    # A GPU computes while Python is on to the next operation.
    host += calibration.per_operation * TUNED * tuned
    return max(device, host if calibration.stated else HOST_IN_A_STEP * host)


def _seconds(work: Work, calibration: Calibration) -> float:
    """The longer one of multiplying and of reading and writing, and no less than the least that was measured."""
    if work.name == HOST:
        return 0.0
    gpu = calibration.device == "cuda"
    dtype = "float32" if work.dtype in (torch.float32, torch.float64) else "bfloat16"
    rates = calibration.kinds.get(f"{dtype} {_kind(work.name)}", calibration.bandwidth)
    moving = work.bytes / rate(rates, work.bytes)
    least = calibration.bandwidth[0][0] / calibration.bandwidth[0][1] if gpu else 0.0
    if not work.flops:
        return max(moving, least)
    amount = float(work.flops)
    if "scaled_dot_product" in work.name:
        direction = "backward" if "backward" in work.name else "forward"
        rates = calibration.attention[f"{dtype} {direction}"]
        amount = amount if gpu else amount / (work.bytes / work.dtype.itemsize)
    else:
        rates = calibration.products["float32" if work.name == KERNEL and not gpu else dtype]
    return max(work.flops / (lasting(calibration, dtype) * rate(rates, amount)), moving, least)


def lasting(calibration: Calibration, dtype: str) -> float:
    """What of the calibrated speed of products is left in a step."""
    return 1.0 if calibration.stated else LASTING[calibration.device][dtype]


def _kind(name: str) -> str:
    """Of ``calibration.KINDS``, the one that an operation is most like."""
    return _LIKE.get(name.removeprefix("aten::").partition(".")[0], "add")


_LIKE = {
    "sum": "sum", "mean": "sum", "amax": "sum", "bernoulli_": "bernoulli", "gelu": "gelu", "gelu_backward": "gelu_backward",
    "silu": "silu", "silu_backward": "silu_backward", "tanh": "tanh", "_softmax": "softmax", "_log_softmax": "softmax",
    "_safe_softmax": "softmax", "logsumexp": "softmax", "special_entr": "softmax", "exp": "softmax", "exp_": "softmax",
    "_softmax_backward_data": "softmax_backward", "_log_softmax_backward_data": "softmax_backward",
    "native_layer_norm": "layer_norm", "native_layer_norm_backward": "layer_norm_backward",
}  # fmt: skip
