"""What ablation and correlation of layers and modules take beside plain forward passes over the same texts.

    python benchmarks/behaviour_trials.py          (about 8 minutes on 2 idle cores, with the demo's packages)
    python benchmarks/behaviour_trials.py --tiny --output_dir /tmp

MiniLM-L6 with a classifier trained for one epoch, and the demo's data: 300 BBC news texts of at most 64 tokens, 32 in a
batch. "plain pass" is one forward pass over them all in evaluation mode; methods take turns.

The ideal plan computes, of every pass in which something is changed, only the blocks from the first changed one on, as a part
of all blocks: what stands around the blocks counts as nothing, and a change behind them costs nothing. A pass over n of N texts
counts n/N, and the plain pass over all texts, which gives the metric of the untouched model, counts 1. How many texts and
trials there are follows from the data, by the criterion's own rules; the record has them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reltune
import study_data
from behaviour_agreement import batches, classifier, drawn, fit, found
from harness import Machine, Method, Timed, arguments, benchmark
from reltune.relevance.criteria import correlation

SEED = 42
HEAD_TEXTS = 512
KINDS = ["layer", "module"]
PASSES = 2  # of a repeat of the plain pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on drawn texts: does the script run?")
    parser.add_argument(
        "--inputs", default=str(study_data.FOLDER), help="folder that study_data.py wrote, if there is one"
    )
    parser.add_argument("--texts", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--criteria", nargs="+", default=["ablation", "correlation"])
    options = arguments(parser, "behaviour_trials")
    bench = benchmark(options)
    weights, tasks = drawn() if options.tiny else found(Path(options.inputs))
    texts, head_texts = (40, 64) if options.tiny else (options.texts, HEAD_TEXTS)
    task = next(iter(tasks.values())) if options.tiny else tasks["bbc"]
    rows = study_data.split(task, 0)["train"]
    device = torch.device(options.device)
    model = classifier(weights, int(task["labels"].max()) + 1, 0).to(device)
    fit(model, ["classifier"], task, rows[texts : texts + head_texts], 0, 3e-2)
    data = list(batches(task, rows[:texts], device))
    facts: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {name: {"kinds": KINDS} for name in options.criteria}
    if options.tiny:
        settings["correlation"]["max_trials"] = 12

    def plain() -> Timed:
        machine = Machine(device)
        started = machine.now()
        with torch.no_grad():
            for batch in data * PASSES:
                model(**{key: value for key, value in batch.items() if key != "labels"})
        return Timed((machine.now() - started) / PASSES)

    def analysis(criterion: str) -> Method:
        def run() -> None:
            scores = reltune.analyze(
                model,
                data,
                "sequence_classification",
                criterion,
                always_trained=["classifier"],
                seed=SEED,
                progress=False,
                options={criterion: settings[criterion]},
            )
            facts[criterion] = scores.provenance[criterion]
            facts["units"] = {kind: list(scores.by(kind)) for kind in KINDS}

        return Method(criterion, run)

    case = f"{texts} texts"
    methods = [Method("plain pass", plain), *map(analysis, options.criteria)]
    bench.measure(case, {"model": "MiniLM-L6", "kinds": KINDS}, methods, options.repeats)
    for criterion in options.criteria:
        if criterion not in facts:
            continue
        ideal = ideal_passes(model, criterion, facts[criterion], facts["units"], texts)
        bench.value(f"{criterion}: facts", {kind: facts[criterion][kind] for kind in KINDS})
        bench.value(f"{criterion}: plain passes of the ideal plan", ideal)
        ratio = bench.ratio(case, criterion, "plain pass") / ideal
        bench.check(f"{criterion} / ideal plan of plain passes, time", ratio, 1.5, required=False)
        bench.check(f"{criterion}, s", bench.median(case, criterion), 90, required=False)
    return bench.finish(options.output_dir, options.name)


def ideal_passes(
    model: nn.Module, criterion: str, facts: dict[str, Any], units: dict[str, list[str]], texts: int
) -> float:
    """Passes over all texts that the ideal plan takes."""
    layers = len(model.get_submodule("bert.encoder.layer"))
    passes = 1.0
    for kind in KINDS:
        names = units[kind]
        starts = [first_block(name, layers) + (kind == "layer") for name in names]  # a layer's own block is not needed
        share = facts[kind]["examples"] / texts
        if criterion == "ablation":
            passes += share * sum(1 - start / layers for start in starts)
            continue

        def of_trials(purpose: str, numbers: range, names: list[str] = names, starts: list[int] = starts) -> float:
            total = 0.0
            for number in numbers:
                mask = correlation.drawn(SEED, purpose, number, len(names), facts["share"]).tolist()
                changed = [start for start, out in zip(starts, mask, strict=True) if out]
                total += 1 - min(changed) / layers if changed else 0.0
            return total

        passes += share * of_trials(kind, range(facts[kind]["trials"]))
        tried = correlation.STRENGTHS.index(facts[kind]["strength"]) + 1
        pilot = min(facts["sample"], texts) / texts
        passes += pilot * (1 + of_trials(f"pilot {kind}", range(1, 1 + tried * correlation.PILOT)))
    return passes


def first_block(name: str, layers: int) -> int:
    """The number of the first block that has to be computed anew where this module is changed."""
    parts = name.split(".")
    if "layer" in parts:
        return int(parts[parts.index("layer") + 1])
    return 0 if "embeddings" in parts else layers


if __name__ == "__main__":
    raise SystemExit(main())
