"""What the gradient of single weights of one matrix costs, by each way to it: dense, by Triton, by groups in shared memory.

    PYTHONPATH=src python3 benchmarks/sampled_product.py --device cuda --commit COMMIT --output_dir benchmarks/results   (1 minute)

needs an H100 or H200. The matrices are those of an 8B Llama, with 8,192 vectors in bfloat16, and 0.12% or 0.5% of the model's
parameters as in tuner_step.py: 0.138% and 0.575% of each matrix. Places are random, or crowd in some rows and columns as those do
that a sign probe chose (benchmarks/results/crowded_places.json, the decoder's 0.5%: rows and columns drawn independently).
Times are of the kernels alone, by torch.profiler. Every result is compared with products in float64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harness import Benchmark, Machine, Method, Timed, arguments, benchmark
from reltune.ops.attach_elements import Places, element_gradient, is_sampled
from reltune.ops.kernels import sampled_groups
from reltune.ops.kernels.sampled_product import sampled_product

SHAPES = {"gate, up": (14336, 4096), "down": (4096, 14336), "query, output": (4096, 4096), "key, value": (1024, 4096)}
DENSITIES = {"0.12%": 0.00138, "0.5%": 0.00575}


def places(shape: tuple[int, int], count: int, crowding: dict[str, Any] | None, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if crowding is None:
        return torch.randint(shape[0] * shape[1], (count,), generator=generator).unique().to(device)
    at = []
    for name, side in (("rows", shape[0]), ("columns", shape[1])):
        hundredth = torch.multinomial(torch.tensor(crowding[name]["hundredths"]), 2 * count, True, generator=generator)
        ranked = ((hundredth + torch.rand(2 * count, generator=generator)) / 100 * side).long().clamp(max=side - 1)
        at.append(torch.randperm(side, generator=generator)[ranked])
    found = (at[0] * shape[1] + at[1]).unique()
    return found[torch.randperm(len(found), generator=generator)[:count]].sort().values.to(device)


def kernel_seconds(run: Callable[[], Any], calls: int) -> Timed:
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return Timed(sum(event.self_device_time_total for event in found.key_averages()) / 1e6 / calls)


def one_case(bench: Benchmark, options: argparse.Namespace, case: str, chosen: Places, a: Tensor, b: Tensor) -> None:
    index, groups = chosen.index.long(), chosen.groups
    ways: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: element_gradient(a, b, chosen, "dense"),
        "Triton": lambda: sampled_product(a, b, chosen.index),
        "groups": lambda: sampled_groups.sampled_product(a, b, groups),
    }
    shape = {"rows": chosen.shape[0], "columns": chosen.shape[1]}
    records = bench.measure(
        case,
        shape | {"vectors": len(a), "places": len(index)},
        [Method(way, lambda run=run: kernel_seconds(run, options.calls)) for way, run in ways.items()],
        options.repeats,
    )
    records["groups"]["config"] = {"groups": len(groups.table)}
    some = torch.randperm(len(index), device=index.device)[:4096]
    wanted = (a[:, index[some] // b.shape[1]].double() * b[:, index[some] % b.shape[1]].double()).sum(0)
    error = (ways["groups"]()[some] - wanted).abs().max() / wanted.abs().max()
    bench.check(f"{case}: largest error of the groups' sums, relative", error.item(), 2e-6)
    taken, other = ("groups", "dense") if is_sampled(chosen, a) else ("dense", "groups")
    bench.check(f"{case}: {taken}, which is taken, / {other}", bench.ratio(case, taken, other), 1.0, required=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--crowded", default="crowded_places", help="name of the record in benchmarks/results")
    options = arguments(parser, "sampled_product")
    bench = benchmark(options)
    Machine(torch.device(options.device)).ready()
    of_probe = json.loads((Path(__file__).parent / "results" / f"{options.crowded}.json").read_text())["values"]
    for name, shape in SHAPES.items():
        factors = [
            torch.randn(options.vectors, side, device=options.device, dtype=torch.bfloat16).contiguous()
            for side in shape
        ]
        for share, density in DENSITIES.items():
            count = round(density * shape[0] * shape[1])
            for kind, crowding in (("random", None), ("crowded", of_probe["decoder, 0.50%"])):
                chosen = Places(places(shape, count, crowding, options.device).int(), shape)
                one_case(bench, options, f"{name}, {share}, {kind}", chosen, *factors)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
