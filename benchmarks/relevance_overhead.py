"""What the Fisher analysis costs over a frozen model's forward and input-gradient backward pass, and how exact it is.

On one GPU of 80 GB or more, without a network, from the repository's root (about 4 minutes on an H200):

    PYTHONPATH=src PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/relevance_overhead.py \
        --device cuda --commit COMMIT --output_dir benchmarks/results

and on any machine, in seconds: python benchmarks/relevance_overhead.py --tiny --output_dir /tmp

The model has Llama-3.1-8B's shapes and random weights in bfloat16; the data is 16 examples × 512 tokens in one batch, the
loss each example's mean over its tokens, summed over examples.

- overhead: `floor` is that loss's forward pass and the backward pass through every layer down to the first one's input,
  with no weight gradient. `analysis, one batch` is what one batch takes inside `reltune.analyze(criteria="fisher")`,
  which gives row, column and module relevance of all linear maps but lm_head: the mean from the second batch's coming
  to the end of the loop over the data. `whole call` is an analysis of one batch with all set-up: inventory, probe for
  modules that mix examples, hashes, fingerprint, the scores. The analysis computes a frozen model's norms in a kernel
  of its own, which the model as it comes does not have; the last method is the floor with that kernel, for comparison.
- elements: the Fisher information of every single weight at 1 × 512 tokens with gradient checkpointing.
- exactness: on a model of the same shapes with fewer layers, the row and column sums of the bfloat16 path that is
  timed, against a float32 copy of the model, one example at a time, by plain autograd; and against the same inputs and
  output gradients (bfloat16, from hooks) multiplied in float32, which leaves the model's own rounding out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import resource
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reltune
from harness import Benchmark, Method, Timed, TimedLoader, arguments, benchmark
from llama import PROJECTIONS, TINY, Shape, described, llama, texts, weights_bytes
from reltune.layers.fused import fused
from reltune.losses import LOSSES

LOSS = LOSSES["causal_lm"].per_example


def floor(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Forward, and backward to the first layer's input."""
    device = next(model.parameters()).device
    batch = {key: value.to(device) for key, value in batch.items()}
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    LOSS(model(inputs_embeds=embedded), batch).sum().backward()


def floor_with_fused_norms(model: nn.Module, batch: dict[str, Tensor]) -> None:
    with fused(model):
        floor(model, batch)


def analyze(model: nn.Module, batches: Iterable[dict[str, Tensor]], **options: Any) -> reltune.RelevanceScores:
    return reltune.analyze(model, batches, "causal_lm", "fisher", target_modules=PROJECTIONS, progress=False, **options)


def overhead(bench: Benchmark, options: argparse.Namespace, shape: Shape) -> None:
    model = llama(shape, options.device)
    batch = texts(shape, options.examples, options.tokens)
    case = "overhead"
    bench.measure(
        case,
        described(
            shape,
            dtype="bfloat16",
            examples=options.examples,
            tokens=options.tokens,
            weights_bytes=weights_bytes(model),
        ),
        [
            Method("floor", functools.partial(floor, model, batch)),
            Method("analysis, one batch", functools.partial(one_batch, bench, model, [batch] * options.batches)),
            Method("whole call", functools.partial(analyze, model, [batch])),
            Method("floor, the analysis's norms", functools.partial(floor_with_fused_norms, model, batch)),
        ],
        options.repeats,
    )
    same_norms = bench.ratio(case, "analysis, one batch", "floor, the analysis's norms")
    bench.value("ratio to the floor with the analysis's norms", same_norms)
    bench.value("ratio of the whole call, set-up included", bench.ratio(case, "whole call", "floor"))
    strict = not options.tiny
    bench.check("time over the floor's", bench.ratio(case, "analysis, one batch", "floor"), 1.15, required=strict)
    if options.device != "cpu":
        for method in ("analysis, one batch", "whole call"):
            peak = bench.ratio(case, method, "floor", "peak_bytes")
            bench.check(f"peak memory over the floor's, {method}", peak, 1.03, required=strict)


def one_batch(bench: Benchmark, model: nn.Module, batches: list[dict[str, Tensor]]) -> Timed:
    loader = TimedLoader(bench.machine, batches)
    analyze(model, loader)
    return loader.seconds()


def elements(bench: Benchmark, options: argparse.Namespace, shape: Shape) -> None:
    model = llama(shape, options.device)
    batch = texts(shape, 1, options.tokens)
    with checkpointing(model):
        bench.measure(
            "elements",
            described(shape, dtype="bfloat16", examples=1, tokens=options.tokens, weights_bytes=weights_bytes(model)),
            [Method("elementwise Fisher", functools.partial(analyze, model, [batch], elements=True))],
            repeats=1,
            warmups=0,  # the scores alone are 30 GB
        )
    # Whole process, all parts of this run: what the scores take in main memory.
    bench.value("peak main memory of the process, GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
    if options.device != "cpu":
        ratio = bench.median("elements", "elementwise Fisher", "peak_bytes") / weights_bytes(model)
        bench.check("elementwise Fisher, peak memory over the weights'", ratio, 1.3, required=not options.tiny)


@contextlib.contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Checkpoint every layer, in evaluation mode too, where transformers' own switch does nothing."""
    layers = list(model.model.layers)
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def exactness(bench: Benchmark, options: argparse.Namespace, shape: Shape) -> None:
    model = llama(shape, options.device)
    batch = texts(shape, options.examples, options.tokens, seed=1)
    found = analyze(model, [batch])
    references = {
        "a float32 model": by_loop(copy.deepcopy(model).float(), batch),
        "float32 products": by_hooks(model, batch),
    }
    for against, wanted in references.items():
        for kind in ("column", "row"):
            scores = {name: values.double().cpu() for name, values in found.by(kind).items()}
            assert scores.keys() == wanted[kind].keys()
            pairs = [(scores[name], wanted[kind][name].double().cpu()) for name in scores]
            title = f"{kind}s against {against}"
            bench.check(
                f"{title}: lowest rank correlation of a module", min(_spearman(a, b) for a, b in pairs), 0.999, True
            )
            scaled = max(float((a - b).abs().max() / b.max()) for a, b in pairs)
            relative = max(float(((a - b).abs() / b).max()) for a, b in pairs)
            bench.value(f"{title}: largest error, of a module's largest", scaled)
            bench.value(f"{title}: largest error, of the number itself", relative)
    for kind in ("column", "row", "module"):
        bench.check(f"lowest {kind} score", min(float(values.min()) for values in found.by(kind).values()), 0.0, True)


Sums = dict[str, dict[str, Tensor]]  # column or row -> module -> mean over examples


def by_loop(model: nn.Module, batch: dict[str, Tensor]) -> Sums:
    """Plain autograd, one example at a time."""
    device = next(model.parameters()).device
    weights = {name: m.weight.requires_grad_() for name, m in projections(model).items()}
    sums: Sums = {"column": {}, "row": {}}
    examples = len(batch["labels"])
    with float32_products():
        for s in range(examples):
            one = {key: value[s : s + 1].to(device) for key, value in batch.items()}
            loss = LOSS(model(input_ids=one["input_ids"]), one).sum()
            for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                _add(sums, name, gradient, examples)
    return sums


def by_hooks(model: nn.Module, batch: dict[str, Tensor]) -> Sums:
    """The batched pass's inputs and output gradients, multiplied in float32, example by example; norms as in the analysis."""
    device = next(model.parameters()).device
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in projections(model).items():

        def keep(_: nn.Module, args: tuple, output: Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = args[0].detach(), output

        handles.append(module.register_forward_hook(keep))
    try:
        batch = {key: value.to(device) for key, value in batch.items()}
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        with fused(model):
            loss = LOSS(model(inputs_embeds=embedded), batch).sum()
    finally:
        for handle in handles:
            handle.remove()
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    sums: Sums = {"column": {}, "row": {}}
    with float32_products():
        for name, g in gradients.items():
            for x_s, g_s in zip(inputs[name], g, strict=True):
                _add(sums, name, g_s.float().mT @ x_s.float(), len(g))
    return sums


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS}


@contextlib.contextmanager
def float32_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _add(sums: Sums, name: str, gradient: Tensor, examples: int) -> None:
    square = gradient.square()
    for kind, dimension in (("column", 0), ("row", 1)):
        mean = square.sum(dimension) / examples
        sums[kind][name] = sums[kind][name] + mean if name in sums[kind] else mean


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


PARTS = {"exactness": exactness, "overhead": overhead, "elements": elements}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=32, help="of the model that is timed")
    parser.add_argument("--exact_layers", type=int, default=2, help="of the model that is checked")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batches", type=int, default=3, help="of the analysis whose batches are timed")
    parser.add_argument("--repeats", type=int, default=5)
    options = arguments(parser, "relevance_overhead")
    bench = benchmark(options)
    shape = dataclasses.replace(Shape(), layers=options.layers)
    if options.tiny:
        shape, options.examples, options.tokens = TINY, 4, 32
    for part in options.parts:
        of_part = dataclasses.replace(shape, layers=options.exact_layers) if part == "exactness" else shape
        try:
            PARTS[part](bench, options, of_part)
        except Exception as error:  # the other parts go on
            bench.failed(part, described(of_part), part, error)
        bench.machine.free()
        bench.save(options.output_dir)
    return bench.finish(options.output_dir)


if __name__ == "__main__":
    raise SystemExit(main())
