"""How long the counted work of a training step takes, from what a calibration says of the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from reltune.cost.calibration import Calibration, rate
from reltune.cost.ledger import HOST, Work
from reltune.cost.step import StepCount

PASSES = 7  # over a trained tensor in AdamW: weight, gradient and two states are read, weight and states are written

# Of a GPU a calibration measures operations one at a time, in bursts of 20 ms. What of those speeds products and attention keep in a step,
# beside a model's other work and with the power that a GPU may draw; how many times as long a GPU's host takes there for an operation,
# among a model's own Python and PEFT's, and how many of them the operators of the tuner, which are written in Python, add to each module
# that it trains. Set on the listed cases of benchmarks/results/cost_sweep.json (an H100 whose host was shared): the same for all models,
# methods and sizes.
LASTING = {"bfloat16": 0.77, "float32": 0.9}
HOST_IN_A_STEP, TUNED = 2.05, 22
# The same of a CPU's steps, which go on when the host has done its part; and of the optimizer for each tensor. By models of 12 blocks whose
# tensors are tiny.
ON_A_CPU, TUNED_ON_A_CPU, OPTIMIZED = 1.5, 40, 3
# A calibration has the best of several runs of each operation, and threads that wait for one another; a step has what comes. By how much its
# parts take longer: set on 69 cases of the record, the same for all.
ALL_IN_ALL = 1.15
# On a CPU glibc gives storages of so many bytes back to the system when they are let go, and their pages are new each time; of the smaller ones
# those at the top of its heap, where they are more than its M_TRIM_THRESHOLD: at most about so many in a step. By the page faults of
# steps: those of 41 cases of the same record were counted.
GIVEN_BACK, TRIMMED = 24 << 20, 48 << 20


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
    if calibration.device != "cuda":
        optimizer += OPTIMIZED * ON_A_CPU * calibration.per_operation * count.tensors
    held = sum(count.peak.get(area, 0) for area in ("activations", "loss", "passing", "gradients"))
    large = sum(times * _given_back(each) for work in count.work.values() for each, times in work.items())
    fresh = calibration.fresh * max(0, min(held, TRIMMED) - large)
    slower = _slower(calibration)
    return StepTime(parts["forward"] + slower * fresh, parts["backward"], slower * optimizer)


def work_seconds(work: Mapping[Work, int], calibration: Calibration, tuned: float = 0) -> float:
    """What the work takes, each so many times, with the tuner's operators of so many modules, forward and backward."""
    operations = sum(work.values())
    if calibration.device != "cuda":  # one after the other
        host = ON_A_CPU * calibration.per_operation * (operations + TUNED_ON_A_CPU * tuned)
        return _slower(calibration) * (host + sum(times * _on_cpu(each, calibration) for each, times in work.items()))
    device = sum(times * _on_gpu(each, calibration) for each, times in work.items())
    # A GPU computes while Python is on to the next operation.
    host = calibration.per_operation * (operations + TUNED * tuned)
    return max(device, host if calibration.stated else HOST_IN_A_STEP * host)


def _slower(calibration: Calibration) -> float:
    return 1.0 if calibration.stated or calibration.device == "cuda" else ALL_IN_ALL


def _on_cpu(work: Work, calibration: Calibration) -> float:
    fresh = calibration.fresh * _given_back(work)
    if work.name == HOST:
        return fresh
    dtype = dtype_name(work.dtype)
    if not work.flops:
        return fresh + moving(calibration, dtype, _kind(work.name), work.bytes)
    if work.vectors:
        each, by_vector, by_flop = calibration.laws[f"{dtype} {'backward' if 'backward' in work.name else 'forward'}"]
        return fresh + each + by_vector * work.vectors + by_flop * work.flops
    return fresh + multiplying(calibration, dtype, work.flops, work.bytes)


def _given_back(work: Work) -> int:
    made = (
        work.bytes if work.name == "aten::logsumexp" else work.made
    )  # which holds the differences from the largest meanwhile
    return made if made >= GIVEN_BACK else 0


def _on_gpu(work: Work, calibration: Calibration) -> float:
    """The longer one of multiplying and of reading and writing, and no less than the least that was measured."""
    if work.name == HOST:
        return 0.0
    dtype = dtype_name(work.dtype)
    least = calibration.bandwidth[0][0] / calibration.bandwidth[0][1]
    moved = max(work.bytes / rate(calibration.bandwidth, work.bytes), least)
    if not work.flops:
        return moved
    if "scaled_dot_product" in work.name:
        direction = "backward" if "backward" in work.name else "forward"
        rates = calibration.attention[f"{dtype} {direction}"]
        return max(work.flops / (_lasting(calibration, dtype) * rate(rates, float(work.flops))), moved)
    return max(multiplying(calibration, dtype, work.flops, work.bytes), moved)


def multiplying(calibration: Calibration, dtype: str, flops: float, moved: float) -> float:
    """Seconds of a matrix product; of a GPU without reading and writing, which it does meanwhile."""
    if calibration.device == "cuda":
        return flops / (_lasting(calibration, dtype) * rate(calibration.products[dtype], flops))
    each, by_byte, by_flop = calibration.laws[f"{dtype} product"]
    return each + by_byte * moved + by_flop * flops


def moving(calibration: Calibration, dtype: str, kind: str, moved: float) -> float:
    """Seconds of an operation of a kind that reads and writes so many bytes."""
    return moved / rate(calibration.kinds.get(f"{dtype} {kind}", calibration.bandwidth), moved)


def dtype_name(dtype: torch.dtype) -> str:
    """Of the calibrated types, the one that is most like it."""
    return "float32" if dtype in (torch.float32, torch.float64) else "bfloat16"


def _lasting(calibration: Calibration, dtype: str) -> float:
    """What of the calibrated speed of products is left in a step."""
    return 1.0 if calibration.stated else LASTING[dtype]


def _kind(name: str) -> str:
    """Of ``calibration.KINDS``, the one that an operation is most like."""
    return _LIKE.get(name.removeprefix("aten::").partition(".")[0], "add")


_LIKE = {
    "sum": "sum", "mean": "mean", "amax": "sum", "clone": "clone", "index_select": "index_select", "gather": "index_select",
    "index_put": "index_select", "cat": "clone",
    "bernoulli_": "bernoulli", "gelu": "gelu", "gelu_backward": "gelu_backward", "silu": "silu", "silu_backward": "silu_backward",
    "tanh": "tanh", "exp": "exp", "exp_": "exp", "special_entr": "entr", "logsumexp": "logsumexp", "_softmax": "softmax",
    "_log_softmax": "softmax", "_safe_softmax": "safe_softmax", "_softmax_backward_data": "softmax_backward",
    "_log_softmax_backward_data": "softmax_backward", "native_layer_norm": "layer_norm",
    "native_layer_norm_backward": "layer_norm_backward",
}  # fmt: skip
