"""The Fisher analysis of an 8B model with quantised weights on a card of 16 GiB, shown on a larger one with a cap.

Needs bitsandbytes; one GPU, without a network, from the repository's root (about 2 minutes):

    PYTHONPATH=src:PEERS PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/analysis_memory_cap.py \
        --device cuda --commit COMMIT

The model has Llama-3.1-8B's shapes and random weights, its linear maps but lm_head in 4 bits (nf4) or 8 bits, the rest
in bfloat16; gradient checkpointing is on. 16 examples × 512 tokens in batches of 4 give row, column and module
relevance of the quantised maps. torch may take the cap less what the CUDA context takes, so that all of the process
fits into so much memory; where more is asked for, it is out of memory. With --uncapped the same is measured without.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

import reltune
from harness import Benchmark, Method, arguments, benchmark
from llama import PROJECTIONS, TINY, Shape, configuration, described, texts

GIB = 2**30


def quantised_llama(shape: Shape, device: str, bits: int) -> LlamaForCausalLM:
    """Made map by map: the weights never stand there in bfloat16 all together."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(configuration(shape), dtype=torch.bfloat16)
    with torch.device(device):  # its frequencies are computed and no weights
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    torch.manual_seed(0)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in PROJECTIONS:
                setattr(module, name, _quantised(_random(child.weight, device), bits, device))
    for module in model.modules():  # anew: the maps that were replaced are none of them
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = _random(parameter, device) if parameter.ndim == 2 else torch.ones_like(parameter, device=device)
                setattr(module, name, nn.Parameter(drawn, requires_grad=False))
    return model.eval().requires_grad_(False)


def _random(like: torch.Tensor, device: str) -> torch.Tensor:
    return torch.empty_like(like, device=device, requires_grad=False).normal_(std=0.02)


def _quantised(weight: torch.Tensor, bits: int, device: str) -> nn.Module:
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    common: dict[str, Any] = {"bias": False, "device": "meta"}
    if bits == 4:
        layer = bnb.nn.Linear4bit(
            in_features,
            out_features,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=True,
            **common,
        )
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    else:
        layer = bnb.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False, **common)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to(device)  # which quantises


def cap(device: torch.device, gib: float) -> float:
    """Let torch have so much less what the context takes. Gives its share, in GiB."""
    device = torch.device(device.type, device.index or 0)
    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    share = gib * GIB - context
    torch.cuda.set_per_process_memory_fraction(share / torch.cuda.get_device_properties(device).total_memory, device)
    return share / GIB


def measure(bench: Benchmark, options: argparse.Namespace, shape: Shape) -> None:
    on_gpu = options.device != "cpu"
    capped = on_gpu and not options.uncapped
    share = cap(bench.machine.device, options.gib) if capped else None
    model = quantised_llama(shape, options.device, options.bits)
    model.gradient_checkpointing_enable()
    batches = [texts(shape, options.batch, options.tokens, seed) for seed in range(options.examples // options.batch)]
    found: list[reltune.RelevanceScores] = []

    def analysis() -> None:
        found[:] = [reltune.analyze(model, batches, "causal_lm", "fisher", target_modules=PROJECTIONS, progress=False)]

    name = f"{options.bits} bits"
    config = described(
        shape, bits=options.bits, examples=options.examples, batch=options.batch, tokens=options.tokens, torch_gib=share
    )
    bench.measure(name, config, [Method("analysis", functools.partial(analysis))], options.repeats)
    modules = found[0].by("module") if found else {}
    bench.check("modules with a positive score", sum(float(v) > 0 for v in modules.values()), 7 * shape.layers, True)
    if on_gpu:
        free, total = torch.cuda.mem_get_info(bench.machine.device)
        bench.value("memory of the process at the end, cache and context, GiB", (total - free) / GIB)
        bench.value("reserved by torch at most, GiB", torch.cuda.max_memory_reserved(bench.machine.device) / GIB)
        peak = bench.median(name, "analysis", "peak_bytes") / GIB
        bench.check("peak of the analysis, GiB", peak, options.gib, required=capped)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--gib", type=float, default=16.0)
    parser.add_argument("--uncapped", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    options = arguments(parser, "analysis_memory_cap")
    bench = benchmark(options, ["bitsandbytes"])
    shape = dataclasses.replace(Shape(), layers=options.layers)
    if options.tiny:
        shape, options.examples, options.batch, options.tokens = TINY, 4, 2, 32
    try:
        measure(bench, options, shape)
    except Exception as error:
        bench.failed(f"{options.bits} bits", described(shape), "analysis", error)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
