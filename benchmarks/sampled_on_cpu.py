"""What the gradient of single weights of one matrix costs on a CPU, by each way to it: dense, gathered, dots.

    PYTHONPATH=src python benchmarks/sampled_on_cpu.py --output_dir benchmarks/results          (about 9 minutes on 2 cores)

Places are random. The matrices are those of MiniLM, of SmolLM2-135M and one of an 8B Llama; float32 and bfloat16, with one thread and with
``--threads``. Every result is compared with products in float64. The costs in ops/sampled_on_cpu.py are read off the times with one thread:
`takes_dots` and `is_sampled` have to pick a way that is at most half as long again as the fastest one.
"""

from __future__ import annotations

import argparse

import torch

from harness import Benchmark, Method, arguments, benchmark
from reltune.ops.attach_elements import Places, element_gradient, is_sampled
from reltune.ops.sampled_on_cpu import dots, gathered, takes_dots

SHAPES = ((384, 384), (384, 1536), (1536, 576), (4096, 4096))
SHARES = (0.0012, 0.005, 0.02)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def one_case(bench: Benchmark, case: str, chosen: Places, a: torch.Tensor, b: torch.Tensor, repeats: int) -> None:
    ways = {
        "dense": lambda: element_gradient(a, b, chosen, "dense"),
        "gathered": lambda: gathered(a, b, chosen.index),
        "dots": lambda: dots(a, b, chosen),
    }
    about = {"rows": chosen.shape[0], "columns": chosen.shape[1], "vectors": len(a), "places": len(chosen.index)}
    about |= {"dtype": str(a.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    bench.measure(case, about, [Method(way, run) for way, run in ways.items()], repeats)
    index = chosen.index.long()[:4096]
    wanted = (a[:, index // b.shape[1]].double() * b[:, index % b.shape[1]].double()).sum(0)
    for way in ("gathered", "dots"):
        error = (ways[way]()[: len(index)] - wanted).abs().max() / wanted.abs().max()
        bench.check(f"{case}: largest error of {way}, relative", error.item(), 5e-6)
    sampled = "dots" if takes_dots(len(chosen.index), chosen.shape, a.dtype) else "gathered"
    taken = sampled if is_sampled(chosen, a) else "dense"
    fastest = min(ways, key=lambda way: bench.median(case, way))
    alone = torch.get_num_threads() == 1
    bench.check(
        f"{case}: {taken}, which is taken, / the fastest", bench.ratio(case, taken, fastest), 1.5, required=alone
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="does the script run?")
    options = arguments(parser, "sampled_on_cpu")
    bench = benchmark(options)
    for shape in SHAPES[:1] if options.tiny else SHAPES:
        generator = torch.Generator().manual_seed(0)
        for share in SHARES:
            count = round(share * shape[0] * shape[1])
            index = torch.randperm(shape[0] * shape[1], generator=generator)[:count].sort().values.int()
            chosen = Places(index, shape)
            for vectors in options.vectors:
                factors = [torch.randn(vectors, side, generator=generator) for side in shape]
                for name, dtype in DTYPES.items():
                    for threads in sorted({1, options.threads}):
                        torch.set_num_threads(threads)
                        case = f"{shape[0]} × {shape[1]}, {share:.2%}, {vectors} vectors, {name}, threads: {threads}"
                        one_case(bench, case, chosen, *(x.to(dtype) for x in factors), repeats=options.repeats)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
