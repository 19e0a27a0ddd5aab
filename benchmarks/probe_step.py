"""One step of the sign probe beside the training steps that it is like, and the probe of an 8B model on small cards.

On any machine (about 3 minutes on 2 cores; the model has MiniLM-L6's shapes, in float32):

    python benchmarks/probe_step.py --cases minilm

On one GPU of 141 or 80 GB, without a network, from the repository's root (needs bitsandbytes for cap4):

    PYTHONPATH=src:PEERS PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/probe_step.py \
        --device cuda --cases cap4 cap16 llama --commit COMMIT

and in seconds, to see that it runs: python benchmarks/probe_step.py --tiny --cases minilm cap16 llama --output_dir /tmp

- minilm: 32 × 64 tokens; full fine-tuning with AdamW as Trainer takes it on a CPU and in its fused form, and a probe step.
- llama: Llama-3.1-8B's shapes and random weights in bfloat16, 4 × 2048 tokens, no checkpointing. "floor" is the frozen
  model's forward pass and the backward pass down to the embedded tokens; "backward" also has the gradients of all weights,
  which nobody uses. All take the same loss. "probe, linear maps" moves the seven projections of each layer alone; "probe,
  inputs kept" keeps what the maps read, where the probe otherwise makes it again in the backward pass.
- cap4, cap16: a whole probe through ``analyze`` with gradient checkpointing, and with a score for every single weight of
  the 4-bit maps or of all bfloat16 weights, where torch may take 16 or 30 GiB less what the CUDA context takes.

A repeat takes one step untimed and times the next STEPS. Memory is the peak of torch's allocator within them, weights and
votes included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import reltune
from analysis_memory_cap import GIB, cap, quantised_llama
from harness import Benchmark, Machine, Method, Timed, arguments, benchmark
from llama import PROJECTIONS, TINY, Shape, described, llama, texts, weights_bytes
from reltune.layers.inventory import choose, take_inventory
from reltune.losses import Loss, as_loss
from reltune.ops import recompute
from reltune.relevance.batches import frozen
from reltune.relevance.behaviour.experiment import Experiment
from reltune.relevance.criteria.movement import Options
from reltune.relevance.probe.sign_probe import SignProbe
from tuner_minilm import full, minilm
from tuner_step import Training

CAPS = {"cap4": 16.0, "cap16": 30.0}  # GiB


@dataclasses.dataclass
class Probe:
    """A probe's steps on the shared model, which it leaves as it was."""

    model: nn.Module
    batch: dict[str, Tensor]
    loss: str
    steps: int
    target_modules: list[str]
    move: str = "allowed"
    keep_inputs: bool = False  # instead of making them again

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        inventory = take_inventory(self.model)
        inventory = inventory.only(set(choose(inventory, self.target_modules)))
        options = Options(steps=1 + self.steps, move=self.move)
        loss = as_loss(self.loss)
        experiment = Experiment("movement", self.model, loss, inventory, [self.batch], options, 0, False, None, "")
        keeping = recompute.force(False) if self.keep_inputs else contextlib.nullcontext()
        with frozen(self.model), keeping:
            self.probe = SignProbe(experiment)
            with self.probe.at_work():
                self.probe.take_step()
                yield
        del self.probe

    def run(self) -> Timed:
        return timed(self.batch, self.probe.take_step, self.steps)


@dataclasses.dataclass
class Backward:
    """Forward and backward passes without an optimizer; with ``weights``, the gradients of all of them."""

    model: nn.Module
    batch: dict[str, Tensor]
    loss: Loss
    steps: int
    weights: bool

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with frozen(self.model):
            self.model.requires_grad_(self.weights)
            self.step()
            yield

    def run(self) -> Timed:
        return timed(self.batch, self.step, self.steps)

    def step(self) -> None:
        embedded = self.model.get_input_embeddings()(self.batch["input_ids"])
        if not self.weights:
            embedded = embedded.detach().requires_grad_()
        self.loss.per_example(self.model(inputs_embeds=embedded), self.batch).mean().backward()
        self.model.zero_grad(set_to_none=True)


def timed(batch: dict[str, Tensor], step: Callable[[], None], steps: int) -> Timed:
    machine = Machine(batch["input_ids"].device)
    started = machine.now()
    for _ in range(steps):
        step()
    return Timed((machine.now() - started) / steps)


def encoder(bench: Benchmark, options: argparse.Namespace) -> None:
    base = minilm(6, options.tiny)
    generator = torch.Generator().manual_seed(0)
    examples, tokens = (2, 8) if options.tiny else (32, 64)
    batch = {
        "input_ids": torch.randint(base.config.vocab_size, (examples, tokens), generator=generator),
        "labels": torch.randint(2, (examples,), generator=generator),
    }
    training = Training(base, batch, full, options.steps, 1e-5)
    fused = Training(base, batch, full, options.steps, 1e-5, fused=True)
    probe = Probe(base, batch, "sequence_classification", options.steps, [], "all")
    base.train()
    bench.measure(
        "minilm",
        {"model": "MiniLM-L6 shapes", "examples": examples, "tokens": tokens, "dtype": "float32"},
        [
            Method("full, AdamW", training.run, training.around),
            Method("full, fused AdamW", fused.run, fused.around),
            Method("probe", probe.run, probe.around),
        ],
        options.repeats,
    )
    for name in ("full, AdamW", "full, fused AdamW"):
        bench.check(f"minilm: probe / {name}, time", bench.ratio("minilm", "probe", name), 1.05, required=False)


def decoder(bench: Benchmark, options: argparse.Namespace, shape: Shape) -> None:
    model = llama(shape, options.device)
    examples, tokens = (2, 16) if options.tiny else (options.examples, options.tokens)
    batch = {key: value.to(options.device) for key, value in texts(shape, examples, tokens).items()}
    loss = as_loss("causal_lm")
    ways = {
        "backward": Backward(model, batch, loss, options.steps, weights=True),
        "floor": Backward(model, batch, loss, options.steps, weights=False),
        "probe": Probe(model, batch, "causal_lm", options.steps, [], "all"),
        "probe, linear maps": Probe(model, batch, "causal_lm", options.steps, PROJECTIONS),
        "probe, inputs kept": Probe(model, batch, "causal_lm", options.steps, [], "all", keep_inputs=True),
    }
    config = described(shape, dtype="bfloat16", examples=examples, tokens=tokens, steps=options.steps)
    bench.measure("llama", config, [Method(name, of.run, of.around) for name, of in ways.items()], options.repeats)
    bench.check("llama: probe / backward, time", bench.ratio("llama", "probe", "backward"), 1.10, required=False)
    if options.device != "cpu":
        weights = weights_bytes(model)
        bench.value("weights, GiB", weights / GIB)
        activations = bench.median("llama", "floor", "peak_bytes") - weights
        found = bench.median("llama", "probe", "peak_bytes") - activations
        bench.check(
            "llama: (peak of the probe − the floor's activations) / weights", found / weights, 1.6, required=False
        )


def capped(bench: Benchmark, options: argparse.Namespace, shape: Shape, case: str) -> None:
    on_gpu, device = options.device != "cpu", bench.machine.device
    share = cap(device, CAPS[case]) if on_gpu else None
    model: Any = quantised_llama(shape, options.device, 4) if case == "cap4" else llama(shape, options.device)
    model.gradient_checkpointing_enable()
    examples, tokens = (2, 16) if options.tiny else (4, 512)
    batches = [texts(shape, examples, tokens, seed) for seed in range(2)]
    targets = PROJECTIONS if case == "cap4" else []
    found: list[reltune.RelevanceScores] = []

    def run() -> None:
        found[:] = []
        found[:] = [
            reltune.analyze(
                model,
                batches,
                "causal_lm",
                "movement",
                elements=True,
                target_modules=targets,
                progress=False,
                options={"movement": {"steps": 4}},
            )
        ]

    config = described(shape, examples=examples, tokens=tokens, steps=4, torch_gib=share, target_modules=targets)
    bench.measure(case, config, [Method("probe", run)], 1, warmups=0)
    scored = found[0].by("module") if found else {}
    bench.check(f"{case}: modules with votes", sum(float(v) > 0 for v in scored.values()), 7 * shape.layers, True)
    if on_gpu:
        bench.value(f"{case}: reserved by torch at most, GiB", torch.cuda.max_memory_reserved(device) / GIB)
        peak = bench.median(case, "probe", "peak_bytes") / GIB
        bench.check(f"{case}: peak, GiB", peak, CAPS[case])
        torch.cuda.set_per_process_memory_fraction(1.0, torch.cuda.current_device())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models: does the script run?")
    parser.add_argument("--cases", nargs="+", default=["minilm"], choices=["minilm", "llama", *CAPS])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = arguments(parser, "probe_step")
    bench = benchmark(options, ["bitsandbytes"])
    shape = TINY if options.tiny else dataclasses.replace(Shape(), layers=options.layers)
    for case in options.cases:
        try:
            if case == "minilm":
                encoder(bench, options)
            elif case == "llama":
                decoder(bench, options, shape)
            else:
                capped(bench, options, shape, case)
        except Exception as error:
            bench.failed(case, described(shape), "probe", error)
        bench.machine.free()
        bench.save(options.output_dir, options.name)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
