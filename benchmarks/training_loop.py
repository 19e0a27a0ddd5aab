"""Tokens per second of the whole training loop of `reltune run` on chats of full length, beside the bare step on the same batches.

On one GPU of 80 GB, without a network, with the wheels of trl and datasets and what they need unpacked in PEERS, from the
repository's root (about 4 minutes for both shapes):

    PYTHONPATH=src:PEERS PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/training_loop.py \
        --device cuda --commit COMMIT --output_dir benchmarks/results

and on any machine, in seconds: python benchmarks/training_loop.py --tiny --output_dir /tmp

- loop: ``reltune.runs.training.train`` with the task causal_lm, as `reltune run` calls it: rows through Arrow, the collator, TRL's
  trainer with reltune's step, gradient clipping, the scheduler and the log every 10 steps. No checkpoint and no evaluation, which depend
  on what is asked for. The first steps are not counted.
- bare step: forward, backward, fused AdamW, clear gradients and nothing else, on a batch that is on the device already.
- TRL's step: the loop with TRL's own loss and metrics in place of reltune's, for comparison.

Models have Llama-3.2-1B's and Llama-3.1-8B's shapes and random weights in bfloat16; single weights are trained, 0.12% of all.
``waits`` are the places at which the loop waited for the device in a step, as torch's sync debug mode reports them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from harness import Benchmark, Machine, Method, Timed, arguments, benchmark
from llama import TINY, Shape, described, llama, made_up_tokenizer, texts
from reltune.runs import training
from reltune.tasks.causal_lm import CausalLM
from reltune.tasks.sft_step import SFTStep
from reltune.tasks.task import Examples
from tuner_step import SHARE, Prepare, single_weights

SHAPES = {
    "1b": Shape(hidden=2048, intermediate=8192, layers=16),
    "8b": Shape(),
    "tiny": TINY,
}
RATE = 1e-5
SKIPPED = 3  # first steps, in which states are made and caches filled


class Ticks(TrainerCallback):
    """When steps ended: after those that are ``skipped`` and after the last."""

    def __init__(self, machine: Machine, steps: int, skipped: int = SKIPPED) -> None:
        self.machine, self.steps, self.skipped = machine, steps, skipped
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.skipped:
            self.began = self.machine.now()
        elif state.global_step == self.skipped + self.steps:
            self.seconds = (self.machine.now() - self.began) / self.steps


class Waits(TrainerCallback):
    """Counts by place what torch reports as waiting for the device, between the ends of two steps."""

    def __init__(self) -> None:
        self.places: collections.Counter[str] = collections.Counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == SKIPPED:
            self.caught = warnings.catch_warnings(record=True)
            self.found = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == SKIPPED + 1:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            for warning in self.found:
                if "synchronizing" in str(warning.message):
                    path = Path(warning.filename)
                    self.places[f"{path.parent.name}/{path.name}:{warning.lineno}"] += 1


@dataclasses.dataclass
class Loop:
    """Trainings of one model on the same rows, each with a fresh adapter."""

    base: nn.Module
    prepare: Prepare
    tokenizer: PreTrainedTokenizerFast
    rows: torch.Tensor  # (rows, tokens)
    examples: int
    steps: int
    machine: Machine

    def arguments(self, directory: str, steps: int) -> Any:
        fields = {
            "max_steps": steps,
            "per_device_train_batch_size": self.examples,
            "learning_rate": RATE,
            "bf16": False,  # the weights are in it already
            "optim": "adamw_torch_fused",
            "eval_strategy": "no",
            "save_strategy": "no",
            "use_cpu": self.machine.device.type == "cpu",
            "disable_tqdm": True,
        }
        return training.arguments(directory, "selection", 0, fields, self.task())

    def task(self) -> CausalLM:
        return CausalLM(max_length=self.rows.shape[1])

    def examples_of_rows(self) -> Examples:
        ones = [1] * self.rows.shape[1]
        return Examples([{"input_ids": ids, "attention_mask": ones, "labels": ids} for ids in self.rows.tolist()])

    @contextlib.contextmanager
    def adapted(self) -> Iterator[None]:
        forward = self.base.__dict__.get("forward")
        self.model = self.prepare(self.base)
        try:
            yield
        finally:
            self.model.unload()
            del self.model
            self.base.__dict__.pop("forward", None)  # TRL puts one of its own there
            if forward is not None:
                self.base.forward = forward

    def run(self, own_step: bool = True) -> Timed:
        ticks = Ticks(self.machine, self.steps)
        self._train(SKIPPED + self.steps, ticks, own_step)
        return Timed(ticks.seconds)

    def waits(self) -> dict[str, int]:
        """In one step, by place. Needs a GPU."""
        found = Waits()
        with self.adapted():
            self._train(SKIPPED + 1, found, True)
        return dict(found.places)

    def _train(self, steps: int, callback: TrainerCallback, own_step: bool) -> None:
        plain = mock.patch.object(SFTStep, "_has_plain_loss", lambda self: False)
        with tempfile.TemporaryDirectory() as directory, contextlib.nullcontext() if own_step else plain:
            training.train(
                self.model,
                self.arguments(directory, steps),
                self.task(),
                self.tokenizer,
                self.examples_of_rows(),
                callbacks=[callback],
            )

    @contextlib.contextmanager
    def with_batch(self) -> Iterator[None]:
        """For the bare step: a batch as the loop's collator makes it, on the device, and the optimizer that has taken steps."""
        with self.adapted():
            self.model.train()
            items = [self.examples_of_rows()[i] for i in range(self.examples)]
            batch = self.task().collator(self.tokenizer)(items)
            self.batch = {key: value.to(self.machine.device) for key, value in batch.items()}
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
            for _ in range(SKIPPED):
                self._step()
            try:
                yield
            finally:
                del self.optimizer

    def bare(self) -> Timed:
        began = self.machine.now()
        for _ in range(self.steps):
            self._step()
        return Timed((self.machine.now() - began) / self.steps)

    def _step(self) -> None:
        self.model(**self.batch, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def compare(bench: Benchmark, options: argparse.Namespace, name: str) -> None:
    shape = SHAPES[name]
    base = llama(shape, options.device)
    loop = Loop(
        base,
        single_weights(base, SHARE),
        made_up_tokenizer(shape.vocabulary),
        texts(shape, options.examples * (SKIPPED + options.steps), options.tokens)["input_ids"],
        options.examples,
        options.steps,
        bench.machine,
    )
    tokens = options.examples * options.tokens
    methods: list[tuple[str, Callable[[], Timed], Callable[[], Any]]] = [
        ("bare step", loop.bare, loop.with_batch),
        ("loop", loop.run, loop.adapted),
        ("loop, TRL's step", functools.partial(loop.run, False), loop.adapted),
    ]
    bench.measure(
        name,
        described(shape, dtype="bfloat16", examples=options.examples, tokens=options.tokens, steps=options.steps),
        [Method(method, run, around, required=method != "loop, TRL's step") for method, run, around in methods],
        options.repeats,
    )
    for method, *_ in methods:
        bench.value(f"{name}: tokens per second, {method}", tokens / bench.median(name, method))
    if bench.machine.device.type == "cuda":
        bench.value(f"{name}: waits", loop.waits())
    share = bench.median(name, "bare step") / bench.median(name, "loop")
    bench.check(f"{name}: tokens per second, loop / bare step", share, 0.95, at_least=True, required=False)
    bench.save(options.output_dir, options.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--shapes", nargs="+", default=["1b", "8b"], choices=list(SHAPES))
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    options = arguments(parser, "training_loop")
    if options.tiny:
        options.shapes, options.examples, options.tokens, options.steps = ["tiny"], 2, 16, 4
    bench = benchmark(options, ["trl", "datasets", "accelerate"])
    for name in options.shapes:
        compare(bench, options, name)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
