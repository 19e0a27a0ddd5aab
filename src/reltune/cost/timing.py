"""How long the counted work of a training step takes, from what a calibration says of the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from reltune.cost.calibration import Calibration, rate
from reltune.cost.ledger import EXPERT, HOST, KERNEL, Work
from reltune.cost.step import StepCount

PASSES = 7  # over a trained tensor in AdamW: weight, gradient and two states are read, weight and states are written

# What of the speeds that a calibration finds is left in a step of a GPU: for products, attention and the memory; for the experts' products of a
# mixture; and for the memory where an operation does not go through tensors that lie alike. Sums, norms, copies that transpose, casts to a wider
# type and what is broadcast read and write fewer numbers at a time. Set on 54 cases of an H100 and three H200 in
# benchmarks/results/cost_sweep.json, in which the device is what a step waits for.
LASTING, GROUPED, READING = 0.94, 0.42, 0.57
# How many times as long as in the calibration's small model a GPU's host takes for an operation: modules call those of a forward pass from Python,
# and checkpointing wraps what it does again; for the start of a kernel that Triton compiled; for the tuner's operators of a module, in each pass; and
# for the optimizer's part of a tensor. All set on 83 cases of two H200 in benchmarks/results/cost_sweep.json, the same for all models,
# methods and sizes.
CALLED = {"forward": 1.5, "again": 2.75, "backward": 1.05}
LAUNCHED, TUNED, STEPPED = 12, 9, 1.4
# The same of the steps of a CPU, which go on when the host has done its part; and of the optimizer for each tensor. By models of 12 blocks whose
# tensors are tiny.
ON_A_CPU, TUNED_ON_A_CPU, OPTIMIZED = 1.5, 20, 3
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


def step_time(count: StepCount, calibration: Calibration, replayed: bool = False) -> StepTime:
    """What the step takes on the calibrated machine; ``replayed``: both passes as a CUDA graph."""
    parts = {part: work_seconds(work, calibration, count.tuned, replayed) for part, work in count.work.items()}
    held = sum(count.peak.get(area, 0) for area in ("activations", "loss", "passing", "gradients"))
    large = sum(times * _given_back(each) for work in count.work.values() for each, times in work.items())
    fresh = calibration.fresh * max(0, min(held, TRIMMED) - large)
    optimizer = optimizer_seconds(count.trained_bytes, count.tensors, calibration)
    return StepTime(parts["forward"] + _slower(calibration) * fresh, parts["backward"], optimizer)


def optimizer_seconds(trained: int, tensors: int, calibration: Calibration) -> float:
    """What AdamW takes for so many bytes in so many tensors."""
    moved, each = PASSES * trained, calibration.per_operation * tensors
    if calibration.device == "cuda":
        return max(moved / calibration.bandwidth[-1][1], STEPPED * each)
    moving_all = moved / rate(calibration.bandwidth, moved / max(1, tensors))
    return _slower(calibration) * (moving_all + OPTIMIZED * ON_A_CPU * each)


def work_seconds(work: Mapping[Work, int], calibration: Calibration, tuned: float = 0, replayed: bool = False) -> float:
    """What the work takes, each so many times, with the tuner's operators of so many modules."""
    device, host = work_parts(work, calibration)
    passes = 2 if any(each.way == "again" for each in work) else 1
    return together(device, host + passes * tuned * tuned_seconds(calibration), calibration, replayed)


def work_parts(work: Mapping[Work, int], calibration: Calibration) -> tuple[float, float]:
    """What the device takes for the work, each so many times, and what its host does, without the tuner's operators."""
    if calibration.device != "cuda":
        slower, host = _slower(calibration), ON_A_CPU * calibration.per_operation * sum(work.values())
        return slower * sum(times * _on_cpu(each, calibration) for each, times in work.items()), slower * host
    calls = sum(times * (LAUNCHED if each.name == KERNEL else CALLED[each.way]) for each, times in work.items())
    seconds = {each: times * _on_gpu(each, calibration) for each, times in work.items()}
    # PyTorch multiplies experts' weights that are not in bfloat16 one by one, and has the host wait to be told how many tokens each has.
    waits = sum(seconds[each] for each in work if each.name == EXPERT)
    return sum(seconds.values()), calibration.per_operation * calls + waits


def tuned_seconds(calibration: Calibration) -> float:
    """What the host does for the tuner's operators of a module, in one pass."""
    if calibration.device == "cuda":
        return TUNED * calibration.per_operation
    return _slower(calibration) * ON_A_CPU * TUNED_ON_A_CPU * calibration.per_operation


def together(device: float, host: float, calibration: Calibration, replayed: bool = False) -> float:
    """Of a pass. A CPU does one after the other; a GPU computes while Python is on to the next operation, or all that the host launches as
    one graph."""
    if calibration.device != "cuda":
        return device + host
    return device if replayed else max(device, host)


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
    """The longer one of multiplying and of reading and writing, after the least that any operation takes."""
    if work.name == HOST:
        return 0.0
    amount, speed = calibration.bandwidth[0]
    dtype = dtype_name(work.dtype)
    if work.vectors:
        direction = "backward" if "backward" in work.name else "forward"
        reached = rate(calibration.attention[f"{dtype} {direction}"], work.flops / work.vectors)
        seconds = max(work.flops / (LASTING * reached), _streaming(calibration, work.bytes))
    elif work.flops or work.plain or work.name == KERNEL:
        seconds = multiplying(calibration, dtype, work.flops, work.bytes)
        seconds *= LASTING / GROUPED if "grouped_mm" in work.name else 1
    else:
        seconds = moving(calibration, "", "", work.bytes)
    return amount / speed + seconds


def _streaming(calibration: Calibration, moved: float) -> float:
    """Seconds in which a GPU reads and writes so many bytes one after the other."""
    return moved / (LASTING * calibration.bandwidth[-1][1])


def multiplying(calibration: Calibration, dtype: str, flops: float, moved: float) -> float:
    """Seconds of a matrix product; a GPU reads and writes meanwhile."""
    if calibration.device == "cuda":
        return max(flops / (LASTING * rate(calibration.products[dtype], flops)), _streaming(calibration, moved))
    each, by_byte, by_flop = calibration.laws[f"{dtype} product"]
    return each + by_byte * moved + by_flop * flops


def moving(calibration: Calibration, dtype: str, kind: str, moved: float) -> float:
    """Seconds of an operation of a kind that reads and writes so many bytes; of a GPU beyond the least that any takes."""
    if calibration.device == "cuda":
        return moved / (READING * calibration.bandwidth[-1][1])
    return moved / rate(calibration.kinds.get(f"{dtype} {kind}", calibration.bandwidth), moved)


def dtype_name(dtype: torch.dtype) -> str:
    """Of the calibrated types, the one that is most like it."""
    return "float32" if dtype in (torch.float32, torch.float64) else "bfloat16"


def _kind(name: str) -> str:
    """Of ``calibration.KINDS``, the one that an operation is most like."""
    return _LIKE.get(name.removeprefix("aten::").partition(".")[0], "add")


_LIKE = {
    "sum": "sum", "mean": "mean", "amax": "sum", "clone": "clone", "index_select": "index_select", "gather": "gather",
    "index_put": "index_select", "cat": "clone",
    "bernoulli_": "bernoulli", "gelu": "gelu", "gelu_backward": "gelu_backward", "silu": "silu", "silu_backward": "silu_backward",
    "tanh": "tanh", "exp": "exp", "exp_": "exp", "special_entr": "entr", "logsumexp": "logsumexp", "_softmax": "softmax",
    "_log_softmax": "softmax", "_safe_softmax": "safe_softmax", "_softmax_backward_data": "softmax_backward",
    "_log_softmax_backward_data": "softmax_backward", "native_layer_norm": "layer_norm",
    "native_layer_norm_backward": "layer_norm_backward",
}  # fmt: skip
