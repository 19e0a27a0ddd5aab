"""Row, column and module Fisher information of all linear maps: reltune and its peers, side by side.

All methods have the same model, the same batch, the same loss and give the same numbers: Σ over examples of squared
per-example gradients, added up by column and by row of every linear map's weight (benchmarks/peers.py). In this run,
before anything is timed, each is held against reltune's in float32: on the CPU in the very case that is timed, on a GPU
on two layers of the same shapes. Peers may take the batch in parts; each part size is tried once, and the fastest that
runs is timed. A peer that cannot run, or that gives other numbers, is on record with its error.

CPU, MiniLM-L6 (22.7M parameters), 32 examples × 64, 128 and 256 tokens, float32; 5 minutes on 2 quiet cores:

    python benchmarks/relevance_peers.py

One GPU of 80 GB or more, Llama-3.1-8B's shapes with random weights, bfloat16, 16 × 512 tokens; without a network, with
the peers' packages in a folder PEERS (pip install --no-deps --target PEERS …, see below), from the repository's root:

    PYTHONPATH=src:PEERS PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/relevance_peers.py \
        --device cuda --commit COMMIT --name relevance_peers_8b

The peers are no dependencies of reltune:

    pip install --no-deps backpack-for-pytorch==1.7.1 unfoldNd==0.2.3 einops opacus==1.6.0 opt_einsum scipy

`reltune, one batch` is what one batch takes inside `reltune.analyze`: from its second batch to the end of the loop over
the data. `reltune.analyze, whole call` is an analysis of that batch alone, with its inventory, its probe for modules
that mix examples, its hashes and its scores; peers have no such work. reltune gives the biases' relevance too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from typing import Any

import torch
import transformers
from torch import nn

import reltune
from harness import Benchmark, Method, Timed, TimedLoader, arguments, benchmark, described
from llama import PROJECTIONS, TINY, Shape, llama, texts
from peers import FLOOR, PEERS, PIP, Case, Peer, Sums, mean_cross_entropy, mean_next_token_cross_entropy
from reltune.losses import LOSSES

PACKAGES = ("backpack-for-pytorch", "opacus")
SHARES = {"cpu": (1.0, 0.25), "cuda": (1.0, 0.5, 0.25, 0.125, 0.0)}  # of the batch at a time, to try; 0: one example
# Largest difference of two methods' numbers, of a map's largest: in float32; and, only to catch blunders, between
# bfloat16 passes that take other parts of the batch at a time and so round otherwise in every layer.
LIMITS = {"cpu": 1e-4, "cuda": 1e-3}
BFLOAT16_LIMIT = 0.25
OURS, WHOLE = "reltune, one batch", "reltune.analyze, whole call"


def minilm_case(tokens: int, examples: int, tiny: bool) -> Case:
    """A real encoder with a new head of five classes, on real texts cut to ``tokens`` tokens each: no padding."""
    from reltune.data.packages import bbc_news
    from reltune.runs.demo import demo_config

    path = demo_config("", 0).model_name_or_path
    options: dict[str, Any] = {"num_labels": 5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if tiny:
        config = transformers.AutoConfig.from_pretrained(
            path, num_hidden_layers=2, hidden_size=48, intermediate_size=96, num_attention_heads=4, **options
        )
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    else:
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    rows = [row.values for row in bbc_news()]
    classes = sorted({row["label"] for row in rows})
    # Every so many-th of the texts that are long enough, so that all classes occur.
    long_enough = [row for row in rows if len(row["text"].split()) >= tokens]
    chosen = long_enough[:: max(1, len(long_enough) // examples)][:examples]
    encoded = tokenizer([row["text"] for row in chosen], truncation=True, max_length=tokens, return_tensors="pt")
    batch = {"input_ids": encoded["input_ids"], "labels": torch.tensor([classes.index(row["label"]) for row in chosen])}
    maps = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".encoder." in n}
    model.eval().requires_grad_(False)
    return Case(model, maps, batch, LOSSES["sequence_classification"].per_example, mean_cross_entropy)


def llama_case(shape: Shape, tokens: int, examples: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    model = llama(shape, device, dtype)
    batch = {key: value.to(device) for key, value in texts(shape, examples, tokens).items()}
    maps = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in PROJECTIONS}
    return Case(model, maps, batch, LOSSES["causal_lm"].per_example, mean_next_token_cross_entropy)


def analyze(case: Case, loader: Any) -> reltune.RelevanceScores:
    return reltune.analyze(case.model, loader, case.loss, "fisher", target_modules=list(case.maps), progress=False)


def one_batch(bench: Benchmark, case: Case) -> Timed:
    loader = TimedLoader(bench.machine, [case.batch] * 2)
    analyze(case, loader)
    return loader.seconds()


def our_sums(case: Case) -> Sums:
    """Sums over examples, of means over examples."""
    scores = analyze(case, [case.batch])
    columns, rows = scores.by("column"), scores.by("row")
    return {name: (columns[name] * case.examples, rows[name] * case.examples) for name in columns}


def difference(a: Sums, b: Sums) -> float:
    """The largest |a − b| over max|b| of a map's columns, or rows."""
    if a.keys() != b.keys():
        return math.nan
    pairs = [(x.double().cpu(), y.double().cpu()) for name in b for x, y in zip(a[name], b[name], strict=True)]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def tried(bench: Benchmark, case: Case, peer: Peer, size: int, ours: Sums) -> dict[str, Any]:
    """One go at so many examples at a time: its seconds and how far its numbers are from ours, or its error.

    Hooks are put up anew for each: what a library has left on modules when it failed holds memory.
    """
    outcome: dict[str, Any] = {"seconds": math.nan, "difference": 0.0}
    try:
        with peer.ready(case):
            case.start()
            started = bench.machine.now()
            peer.run(case, size)
            outcome["seconds"] = bench.machine.now() - started
            if peer is not FLOOR:
                outcome["difference"] = difference(case.found, ours)
    except Exception as error:
        outcome = {"error": described(error)}
    case.start()
    bench.machine.free()
    return outcome


def fastest_size(bench: Benchmark, case: Case, peer: Peer, ours: Sums, limit: float) -> tuple[int, dict[str, Any]]:
    """How many examples at a time the peer should have, and what it took to find out."""
    every: dict[str, Any] = {}
    for share in peer.sizes or SHARES[bench.machine.device.type]:
        size = max(1, int(share * case.examples))
        if str(size) not in every:
            every[str(size)] = tried(bench, case, peer, size, ours)
    good = {size: of["seconds"] for size, of in every.items() if of.get("difference", math.inf) <= limit}
    if not good:
        raise RuntimeError("; ".join(f"{size} at a time: {of.get('error') or of}" for size, of in every.items()))
    return int(min(good, key=lambda size: good[size])), every


def verify(bench: Benchmark, case: Case) -> dict[str, dict[str, Any]]:
    """Each peer's difference from our numbers in float32, or its error. The smallest parts: they warm up, too."""
    ours, limit = our_sums(case), LIMITS[bench.machine.device.type]
    found = {peer.name: tried(bench, case, peer, max(1, case.examples // 8), ours) for peer in (FLOOR, *PEERS)}
    for of in found.values():
        if "ModuleNotFound" in of.get("error", ""):
            of["error"] += f" ({PIP})"
        elif not of.get("difference", 0.0) <= limit:
            of["error"] = f"its numbers differ by {of['difference']:.2g} of the largest"
    return found


def compare(
    bench: Benchmark,
    name: str,
    config: dict[str, Any],
    case: Case,
    verified: dict[str, Any],
    options: argparse.Namespace,
) -> None:
    """Time all methods that give our numbers."""
    ours, methods = our_sums(case), []
    in_float32 = next(case.model.parameters()).dtype == torch.float32
    limit = LIMITS[options.device] if in_float32 else BFLOAT16_LIMIT
    for peer in (FLOOR, *PEERS):
        must = options.device == "cpu" or peer in (FLOOR, PEERS[0])
        found = verified[peer.name]
        try:
            if "error" in found:
                raise RuntimeError(found["error"])
            size, every = fastest_size(bench, case, peer, ours, limit)
        except Exception as error:
            bench.failed(name, config, peer.name, error, must)
            continue

        def run(peer: Peer = peer, size: int = size) -> None:
            case.start()
            peer.run(case, size)

        about = {"examples_at_a_time": size, "tried": every, "difference_in_float32": found["difference"]}
        methods.append(Method(peer.name, run, functools.partial(peer.ready, case), must, about))
    methods.insert(1, Method(OURS, functools.partial(one_batch, bench, case)))
    methods.insert(2, Method(WHOLE, functools.partial(analyze, case, [case.batch])))
    bench.measure(name, config, methods, options.repeats, warmups=0)  # all of them have run above

    times = {peer.name: bench.median(name, peer.name) for peer in PEERS}
    ran = {peer: time for peer, time in times.items() if not math.isnan(time)}
    fastest = min(ran, key=lambda peer: ran[peer], default=PEERS[0].name)
    bench.value(f"{name}: fastest peer", fastest)
    bench.value(f"{name}: fastest peer over reltune's whole call", bench.ratio(name, fastest, WHOLE))
    least = 1.0 if options.device == "cpu" else 2.5
    bench.check(f"{name}: fastest peer over reltune", bench.ratio(name, fastest, OURS), least, True, not options.tiny)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models: does the script run?")
    parser.add_argument("--tokens", type=int, nargs="+", help="64 128 256 on a CPU, 512 on a GPU")
    parser.add_argument("--examples", type=int, help="32 on a CPU, 16 on a GPU")
    parser.add_argument("--layers", type=int, default=32, help="of the model on a GPU")
    parser.add_argument("--repeats", type=int, help="3 on a CPU, 5 on a GPU")
    parser.add_argument("--model", choices=["minilm", "llama"], help="minilm on a CPU, llama on a GPU")
    options = arguments(parser, "relevance_peers")
    on_cpu = options.device == "cpu"
    options.model = options.model or ("minilm" if on_cpu else "llama")
    options.tokens = options.tokens or ([16] if options.tiny else [64, 128, 256] if on_cpu else [512])
    options.examples = options.examples or (4 if options.tiny else 32 if on_cpu else 16)
    options.repeats = options.repeats or (3 if on_cpu else 5)
    bench = benchmark(options, PACKAGES)
    for tokens in options.tokens:
        name = f"{options.model}, {options.examples} × {tokens} tokens"
        config: dict[str, Any] = {"model": options.model, "examples": options.examples, "tokens": tokens}
        try:
            if options.model == "minilm":
                case = minilm_case(tokens, options.examples, options.tiny)
                verified = verify(bench, case)
            else:
                shape = TINY if options.tiny else dataclasses.replace(Shape(), layers=options.layers)
                config |= dataclasses.asdict(shape)
                fewer = dataclasses.replace(shape, layers=2)
                config |= {"checked_on_layers": 2, "checked_on_examples": 2}
                verified = verify(bench, llama_case(fewer, tokens, 2, options.device, torch.float32))
                bench.machine.free()
                case = llama_case(shape, tokens, options.examples, options.device)
            config |= {"dtype": str(next(case.model.parameters()).dtype), "linear_maps": len(case.maps)}
            compare(bench, name, config, case, verified, options)
        except Exception as error:  # the other lengths go on
            bench.failed(name, config, "comparison", error)
        case = None
        bench.machine.free()
        bench.save(options.output_dir, options.name)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
