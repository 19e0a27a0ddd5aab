"""What one linear map takes with its weight in float8, part by part, beside the same map in bfloat16.

On one GPU that multiplies float8, without a network, from the repository's root (about a minute on an H200):

    PYTHONPATH=src python3 benchmarks/float8_products.py --device cuda --commit COMMIT --output_dir benchmarks/results

and on any machine: python benchmarks/float8_products.py --tiny --output_dir /tmp

--blocks measures in the place of these how long the kernels take with other sizes of blocks, numbers of warps and stages (a minute on
an H100; the device's time by torch.profiler), to set them by (src/reltune/ops/kernels/float8.py).

Shapes are those of Llama-3.1-8B's projections, inputs 8192 normal tokens with some large features, as language models
have them. A repeat is the mean of CALLS calls. Errors are relative to a product in float32 of the same bfloat16 numbers:
‖y − y₃₂‖ / ‖y₃₂‖.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from harness import Benchmark, Method, Timed, arguments, benchmark
from reltune.layers.float8 import to_float8
from reltune.ops import float8
from reltune.ops.attach import gradient_of_columns
from sampled_product import kernel_seconds

SHAPES = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}  # out, in
TINY = {"small": (48, 64)}


def repeated(bench: Benchmark, run: Callable[[], Any], calls: int) -> Callable[[], Timed]:
    def timed() -> Timed:
        started = bench.machine.now()
        for _ in range(calls):
            run()
        return Timed((bench.machine.now() - started) / calls)

    return timed


def inputs(tokens: int, features: int, device: str) -> Tensor:
    x = torch.randn(tokens, features, device=device)
    x[:, :: max(features // 8, 1)] *= 20
    return x.to(torch.bfloat16)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def measure(bench: Benchmark, options: argparse.Namespace, name: str, out: int, features: int, tokens: int) -> None:
    linear = torch.nn.Linear(features, out, bias=False, device=options.device, dtype=torch.bfloat16)
    linear.requires_grad_(False)
    x, g = inputs(tokens, features, options.device), inputs(tokens, out, options.device)
    weight = linear.weight.data
    wanted = x.float() @ weight.float().mT, g.float() @ weight.float()
    bench.value(f"{name}: relative error of x Wᵀ in bfloat16", error(x @ weight.mT, wanted[0]))
    bench.value(f"{name}: relative error of g W in bfloat16", error(g @ weight, wanted[1]))
    to_float8(linear)
    q, scale = linear.weight, linear.weight_scale.float()
    rounded, rounded_g = float8.quantise_rows(x), float8.quantise_rows(g, scale)
    turned = float8.transposed(q)
    y = float8._product(rounded, q, scale, torch.bfloat16)
    dx = float8._product(rounded_g, turned, None, torch.bfloat16)
    bench.value(f"{name}: relative error of x Wᵀ in float8", error(y, wanted[0]))
    bench.value(f"{name}: relative error of g W in float8", error(dx, wanted[1]))
    del wanted
    values = torch.randn(out, options.columns, device=options.device)
    own = torch.randn(out, options.columns, device=options.device, dtype=torch.bfloat16)
    change = (values - own).bfloat16()
    idx = torch.arange(options.columns, device=options.device) * (features // options.columns)
    selected = x.index_select(1, idx)
    parts: dict[str, Callable[[], Any]] = {
        "x Wᵀ, bfloat16": lambda: x @ weight.mT,
        "g W, bfloat16": lambda: g @ weight,
        "x Wᵀ, float8": lambda: float8._product(rounded, q, scale, torch.bfloat16),
        "g W, float8": lambda: float8._product(rounded_g, turned, None, torch.bfloat16),
        "rounding x": lambda: float8.quantise_rows(x),
        "rounding g · scale": lambda: float8.quantise_rows(g, scale),
        "rounding x, PyTorch": lambda: float8.quantise_rows_reference(x),
        "transposing W": lambda: float8.transposed(q),
        "transposing W, PyTorch": lambda: q.t().contiguous(),
        "adding the columns to y": lambda: float8._add_columns(y, selected, values, own),
        "adding the columns to y, PyTorch": lambda: y.addmm_(selected, change.mT),
        "gradient of the columns": lambda: gradient_of_columns(g, selected),
        "adding the columns to ∂x": lambda: float8._add_change(dx, idx, g, values, own),
        "adding the columns to ∂x, PyTorch": lambda: dx.index_copy_(1, idx, dx.index_select(1, idx).addmm_(g, change)),
    }
    if float8._has_kernels(q):
        one = torch.ones((), device=options.device)
        for fast in (True, False):
            parts[f"x Wᵀ, float8, one scale, fast accumulation {fast}"] = lambda fast=fast: torch._scaled_mm(
                rounded[0], q.view(float8.E4M3).t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast
            )
        parts["x Wᵀ, float8, fast accumulation False"] = lambda: torch._scaled_mm(
            rounded[0],
            q.view(float8.E4M3).t(),
            rounded[1],
            scale[None],
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
    methods = [Method(part, repeated(bench, run, options.calls)) for part, run in parts.items()]
    bench.measure(name, {"tokens": tokens, "out": out, "in": features}, methods, options.repeats)
    bench.save(options.output_dir, options.name)


# (tokens, outputs, warps, stages)
ADDED = [
    (t, o, w, s) for t, o in ((64, 128), (128, 128), (64, 256), (128, 256), (32, 256)) for w in (4, 8) for s in (1, 2)
]
CHANGED = [(t, o, w, s) for t in (16, 32, 64, 128) for o in (64, 128, 256) for w in (4, 8) for s in (2, 3, 4, 5)]
PER_WARP = [256, 512, 1024, 2048]


def blocks(bench: Benchmark, options: argparse.Namespace, name: str, out: int, features: int, tokens: int) -> None:
    """Microseconds of each kernel at each setting, the shortest first."""
    from reltune.ops.kernels import float8 as kernels

    x, g = inputs(tokens, features, options.device), inputs(tokens, out, options.device)
    values = torch.randn(out, options.columns, device=options.device)
    own = torch.randn(out, options.columns, device=options.device, dtype=torch.bfloat16)
    idx = torch.arange(options.columns, device=options.device) * (features // options.columns)
    selected, scale = x.index_select(1, idx), torch.ones(out, device=options.device)
    tried: list[tuple[str, str, list[Any], Callable[[], Any]]] = [
        ("adding the columns to y", "ADDED", ADDED, lambda: kernels.add_columns(g, selected, values, own)),
        ("adding the columns to ∂x", "CHANGED", CHANGED, lambda: kernels.add_change(x, idx, g, values, own)),
        ("rounding x", "PER_WARP", PER_WARP, lambda: kernels.quantise_rows(x, None, float8.LARGEST, float8.SMALLEST)),
        ("rounding g", "PER_WARP", PER_WARP, lambda: kernels.quantise_rows(g, scale, float8.LARGEST, float8.SMALLEST)),
    ]
    for part, constant, settings, run in tried:
        found: dict[str, float] = {}
        for setting in settings:
            with mock.patch.object(kernels, constant, setting):
                try:
                    found[str(setting)] = round(1e6 * kernel_seconds(run, options.calls), 1)
                except Exception:  # more shared memory than there is
                    continue
        before = found[str(getattr(kernels, constant))]
        best = dict(sorted(found.items(), key=lambda each: each[1]))
        bench.value(f"{name}: {part}", {"now": before, **best})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one small map: does the script run?")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=32)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks", action="store_true")
    options = arguments(parser, "float8_products")
    if options.tiny:
        options.tokens, options.columns, options.calls = 40, 4, 2
    if options.blocks and not options.device.startswith("cuda"):
        parser.error("--blocks measures kernels of a GPU: pass --device cuda")
    bench = benchmark(options)
    for name, (out, features) in (TINY if options.tiny else SHAPES).items():
        (blocks if options.blocks else measure)(bench, options, name, out, features, options.tokens)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
