"""How fast this machine is: a few seconds of measuring, kept in the user's cache directory by hardware and versions."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reltune.cost.ledger import Ledger, computed_share
from reltune.files import write_text
from reltune.notes import note
from reltune.reading import read_json

FORMAT = 6  # of the kept files; a higher one measures again
DTYPES = ("float32", "bfloat16")
# Of a GPU: sizes of square products, MiB read and written by one operation, lengths of attention.
SIZES, MEGABYTES, LENGTHS = (256, 512, 1024, 2048, 4096, 8192), (1 / 16, 1, 16, 256), (256, 1024, 4096)
HEADS, HEAD = 16, 64  # of attention
# Of a CPU: products of so many vectors with a weight (in, out), and attention of so many texts of a length. A law is made of each.
SHAPES = (
    (32, 64, 64),
    (256, 16, 768),
    (256, 768, 16),
    (128, 768, 768),
    (512, 768, 768),
    (256, 768, 3072),
    (1024, 1024, 1024),
)
TEXTS = ((1, 16), (4, 32), (4, 64), (2, 128), (2, 256), (1, 512))
# On a CPU operations of one kind take many times as long as others that move as many bytes. Name -> what is measured, on a tensor of
# many rows, of 768 numbers each, its gradient g and a row w.
KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "add": lambda x, g, w: x + g,
    "sum": lambda x, g, w: x.sum(0),
    "mean": lambda x, g, w: x.mean(-1),
    "clone": lambda x, g, w: x.view(len(x), 12, -1).transpose(0, 1).contiguous(),
    "gather": lambda x, g, w: x.gather(1, torch.arange(len(w), device=w.device).expand(len(x), -1)),
    "index_select": lambda x, g, w: x.index_select(1, torch.arange(len(w), device=w.device)),
    "bernoulli": lambda x, g, w: torch.empty_like(x).bernoulli_(0.9),
    "gelu": lambda x, g, w: F.gelu(x),
    "gelu_backward": lambda x, g, w: torch.ops.aten.gelu_backward(g, x),
    "silu": lambda x, g, w: F.silu(x),
    "silu_backward": lambda x, g, w: torch.ops.aten.silu_backward(g, x),
    "tanh": lambda x, g, w: x.tanh(),
    "exp": lambda x, g, w: x.exp(),
    "entr": lambda x, g, w: torch.special.entr(x),
    "logsumexp": lambda x, g, w: x.logsumexp(-1),
    "softmax": lambda x, g, w: F.log_softmax(x, -1),
    "safe_softmax": lambda x, g, w: torch.ops.aten._safe_softmax(x.view(-1, len(w) // 6), -1),
    "softmax_backward": lambda x, g, w: torch.ops.aten._log_softmax_backward_data(g, x, -1, x.dtype),
    "layer_norm": lambda x, g, w: F.layer_norm(x, w.shape, w, w),
    "layer_norm_backward": lambda x, g, w: torch.ops.aten.native_layer_norm_backward(
        g, x, w.shape, x.new_ones(len(x), 1), x.new_ones(len(x), 1), w, w, [True] * 3
    ),
}
KIND_SIZES = (64 << 10, 1 << 20, 8 << 20)  # bytes of x; of the first one core computes alone
# Bytes of results that lie in memory together, as those of a forward pass do: what glibc holds when they are freed. Of weights, twice as many.
KEPT = 16 << 20
FRESH = 64 << 20  # bytes, more than that
WIDTH = 768
SECONDS, ENOUGH = 0.02, 0.2  # that each figure is measured for: at least, and where others are at work
# On a GPU: runs of an operation that follow one another at most, the seconds they take if they are long, how often, and bytes of the work before them.
BURST, BURST_SECONDS, BURSTS, AHEAD = 20, 0.01, 5, 256 << 20
# A process that always has work runs for 0.95 to 1 of the time on an idle machine; with four others on two cores it ran for 0.2 to 0.5.
RUNNING = 0.9
LOOK = 0.3  # seconds, to see whether the machine is idle by now
Rates = list[tuple[float, float]]  # (how much, how much of it a second), from the smallest
Law = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What operations take here.

    Attributes:
        device: "cuda" or "cpu".
        products: of a GPU, by dtype, multiplications and additions a second of products of so many.
        attention: of a GPU, those of fused causal attention with so many for each query, forward and backward: "float32 forward".
        bandwidth: bytes read and written a second by operations that read and write so many.
        per_operation: seconds that an operation takes with nothing to compute, its share of Python's and autograd's included.
        stated: of a CPU, whether steps reach these speeds as they stand; those that were measured they do not.
        kinds: the bandwidth by kind of operation and dtype, "float32 gelu"; of a CPU alone.
        laws: of a CPU, the seconds that a product ("float32 product") takes in any case, for each byte that it reads and writes, and for each
            multiplication and addition; of fused attention ("float32 forward") in any case, for each vector, and for each multiplication.
        fresh: seconds that a byte takes more when the system first gives its page; of a CPU alone.
        busy: whether the machine had other work meanwhile, so that it looks slower than it is.
    """

    device: str
    name: str
    products: Mapping[str, Rates]
    attention: Mapping[str, Rates]
    bandwidth: Rates
    per_operation: float
    stated: bool = False
    kinds: Mapping[str, Rates] = dataclasses.field(default_factory=dict)
    laws: Mapping[str, Law] = dataclasses.field(default_factory=dict)
    fresh: float = 0.0
    busy: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        return cls(**values)


def rate(rates: Sequence[tuple[float, float]], amount: float) -> float:
    """The rate for an amount, between the measured ones along a line on logarithmic scales, beyond them the last one."""
    from math import exp, log

    for (low, slow), (high, fast) in itertools.pairwise(rates):
        if amount < high:
            part = 0.0 if amount <= low else log(amount / low) / log(high / low)
            return exp(log(slow) + part * log(fast / slow))
    return rates[-1][1]


def calibrated(device: torch.device) -> Calibration:
    """This machine's calibration: the kept one, or one that is measured now and kept.

    One of a busy machine is measured again by the first process that finds the machine idle.
    """
    path, found = _path(device), None
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = Calibration.from_dict(read_json(path))
    if found is None or (found.busy and path not in _said and not is_busy(device)):
        found = measure(device)
        with contextlib.suppress(OSError):  # a home that cannot be written to: it is measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(found.to_dict(), indent=1) + "\n")
    if found.busy and path not in _said:
        _said.add(path)
        note(
            "The machine was busy with other work when its speed was measured, so that predicted times may be too long; it is measured "
            "again when it is idle."
        )
    return found


_said: set[Path] = set()  # the files of which this process has found that they are of a busy machine


def _path(device: torch.device) -> Path:
    about = [FORMAT, _name(device), torch.__version__, platform.python_version(), torch.get_num_threads()]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "reltune" / f"calibration-{digest}.json"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def is_busy(device: torch.device) -> bool:
    """Whether the machine has other work now, by some work like that which is measured."""
    with _watched(device) as busy:
        until = time.perf_counter() + LOOK
        while time.perf_counter() < until:
            _product(512 if device.type == "cpu" else SIZES[-2], torch.float32, device)
    return busy[0]


@contextlib.contextmanager
def _watched(device: torch.device) -> Iterator[list[bool]]:
    """Gives, when the context ends, whether work in it has waited for a processor: it was there all the time, and did not always run.

    On a CPU threads wait for one another, and the first one for all; with a GPU one of several threads is at work at a time.
    """
    running = time.process_time if device.type == "cuda" else time.thread_time
    busy: list[bool] = []
    ran, began = running(), time.perf_counter()
    yield busy
    busy.append(running() - ran < RUNNING * (time.perf_counter() - began))


def measure(device: torch.device) -> Calibration:
    """Measure now. Takes a few seconds."""
    with _watched(device) as busy:
        found = _measure_cpu(device) if device.type == "cpu" else _measure_gpu(device)
    return dataclasses.replace(found, busy=busy[0])


def _measure_gpu(device: torch.device) -> Calibration:
    products, attention = {}, {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        products[name] = [_product(size, dtype, device) for size in SIZES]
        both = [_attention(length, dtype, device) for length in LENGTHS]
        attention[f"{name} forward"] = [forward for forward, _ in both]
        attention[f"{name} backward"] = [backward for _, backward in both]
    bandwidth = [_bandwidth(int(size * (1 << 20)), device) for size in MEGABYTES]
    return Calibration("cuda", _name(device), products, attention, bandwidth, _per_operation(device))


def _measure_cpu(device: torch.device) -> Calibration:
    laws, kinds = {}, {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        laws[f"{name} product"] = law([_cold_product(*shape, dtype) for shape in SHAPES])
        ways = zip(*(_attention_on_cpu(*text, dtype) for text in TEXTS), strict=True)
        laws[f"{name} forward"], laws[f"{name} backward"] = map(law, ways)
        for kind in KINDS:
            kinds[f"{name} {kind}"] = [_kind(kind, size, dtype) for size in KIND_SIZES]
    return Calibration(
        "cpu",
        _name(device),
        {},
        {},
        kinds["float32 add"],
        _per_operation(device),
        kinds=kinds,
        laws=laws,
        fresh=_fresh(),
    )


def law(points: Sequence[tuple[float, float, float]]) -> Law:
    """Of (amount, flops, seconds), the law a + b · amount + c · flops of the least relative errors, none of a, b and c below 0."""
    amounts, flops, seconds = np.array(points, dtype=float).T
    parts = np.stack([np.ones(len(points)), amounts, flops], 1) / seconds[:, None]
    best, least = np.zeros(3), np.inf
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            some = parts[:, chosen]
            scale = np.linalg.norm(some, axis=0)
            found = np.linalg.lstsq(some / scale, np.ones(len(points)), rcond=None)[0] / scale
            off = float(np.sum((some @ found - 1) ** 2))
            if off < least and np.all(found >= 0):
                best, least = np.zeros(3), off
                best[list(chosen)] = found
    a, b, c = best.tolist()
    return a, b, c


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The least time that a run took, of at least 7, one of them undisturbed, and as many as ``SECONDS`` allow; or of ``ENOUGH`` seconds.

    On a GPU with the host's part.
    """

    def once() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    run()
    times: list[float] = []
    undisturbed = False
    while sum(times) < (SECONDS if undisturbed and len(times) >= 7 else ENOUGH):
        with _watched(device) as busy:
            times.append(once())
        undisturbed |= not busy[0]
    return min(times)


def _on_device(run: Callable[[], Any], device: torch.device) -> float:
    """The least time of a run among others: on a GPU without the host's part, as in a step whose operations wait for the device."""
    if device.type == "cpu":
        return _seconds(run, device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def events(work: Callable[[], Any]) -> float:
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    ahead = torch.zeros(AHEAD // 4, device=device)
    each = min(events(ahead.zero_) for _ in range(3))
    run()
    often = max(1, min(BURST, round(BURST_SECONDS / events(run))))
    began = time.perf_counter()
    for _ in range(often):
        run()
    queued = time.perf_counter() - began
    torch.cuda.synchronize(device)
    times = []
    for _ in range(BURSTS):
        for _ in range(1 + int(2 * queued / each)):
            ahead.zero_()
        times.append(events(lambda: [run() for _ in range(often)]))
    return min(times) / often


def _product(size: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    flops = 2.0 * size**3
    return flops, flops / _on_device(lambda: a @ b, device)


def _cold_product(vectors: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """With many weights and vectors, which come from memory as in a step. Bytes, multiplications and additions, seconds."""
    moved = dtype.itemsize * (vectors * (inputs + outputs) + inputs * outputs)
    often = max(1, min(64, 2 * KEPT // moved))
    operands = [(torch.randn(vectors, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)) for _ in range(often)]
    torch.empty(KEPT, dtype=torch.uint8)  # after it glibc holds as much when it is freed
    seconds = _seconds(lambda: [F.linear(x, w) for x, w in operands], torch.device("cpu")) / often
    return float(moved), 2.0 * vectors * inputs * outputs, seconds


def _attention(
    length: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[float, float], tuple[float, float]]:
    batch = max(1, LENGTHS[-1] // length)
    each = 4.0 * length * HEAD * computed_share(length, length, causal=True)
    flops = batch * HEADS * length * each
    ahead, back = _attention_seconds(batch, length, dtype, device, is_causal=True)
    return (each, flops / ahead), (2.5 * each, 2.5 * flops / back)


def _attention_on_cpu(
    batch: int, length: int, dtype: torch.dtype
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Vectors, multiplications and additions, seconds: forward and backward."""
    vectors = float(batch * HEADS * length)
    flops = 4.0 * vectors * length * HEAD
    ahead, back = _attention_seconds(batch, length, dtype, torch.device("cpu"), is_causal=False)
    return (vectors, flops, ahead), (vectors, 2.5 * flops, back)


def _attention_seconds(
    batch: int, length: int, dtype: torch.dtype, device: torch.device, is_causal: bool
) -> tuple[float, float]:
    q, k, v = (
        torch.randn(batch, HEADS, length, HEAD, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    y = forward()
    g = torch.randn_like(y)
    ahead = _on_device(forward, device)
    return ahead, _on_device(lambda: torch.autograd.grad(y, (q, k, v), g, retain_graph=True), device)


def _bandwidth(size: int, device: torch.device) -> tuple[float, float]:
    x = torch.randn(size // 8, device=device)  # half of the bytes are read, half are written
    y = torch.empty_like(x)
    return float(size), size / _on_device(lambda: torch.mul(x, 2.0, out=y), device)


def _kind(name: str, size: int, dtype: torch.dtype) -> tuple[float, float]:
    """On x of so many bytes, as often as makes at most ``KEPT`` bytes of results, which are let go together, as in a step."""
    numbers = torch.rand(size // dtype.itemsize // WIDTH, WIDTH).to(dtype)
    often = max(1, min(64, KEPT // size))
    operands = [(numbers.clone(), numbers) for _ in range(often)]
    w = torch.ones(WIDTH, dtype=dtype)
    shapes = [each.to("meta") for each in (numbers, numbers, w)]
    with Ledger() as ledger:
        KINDS[name](*shapes)
    moved = sum(work.bytes * times for work, times in ledger.spans[-1].work.items())
    torch.empty(KEPT, dtype=torch.uint8)  # after it glibc holds as much when it is freed
    seconds = _seconds(lambda: [KINDS[name](x, g, w) for x, g in operands], torch.device("cpu")) / often
    return float(moved), moved / seconds


def _fresh() -> float:
    """By filling memory that the system gives, and the same memory once more."""
    known = torch.empty(FRESH // 4)
    cpu = known.device
    return (
        max(0.0, _seconds(lambda: torch.empty(FRESH // 4).fill_(1), cpu) - _seconds(lambda: known.fill_(1), cpu))
        / FRESH
    )


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def _per_operation(device: torch.device) -> float:
    """By forward and backward passes of a model whose tensors are tiny."""
    layers = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(24)]
    model = nn.Sequential(*layers).to(device)
    x = torch.randn(4, 8, device=device)

    def run() -> None:
        model(x).sum().backward()
        model.zero_grad()

    run()
    with _Count() as count:
        run()
    return _seconds(run, device) / count.operations
