"""A step on one long text under a cap of memory: checkpointed layers, with and without their inputs waiting in host memory.

On one GPU of 80 GB or more, without a network, with the wheel of trl unpacked in PEERS, from the repository's root (about 3 minutes):

    PYTHONPATH=src:PEERS PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/long_context.py \
        --device cuda --commit COMMIT --output_dir benchmarks/results

and on any machine, in seconds: python benchmarks/long_context.py --tiny --output_dir /tmp

The model has Llama-3.1-8B's shapes and random weights in bfloat16, the batch is one text of TOKENS tokens, torch may take CAP GB.
Single weights (0.12% of the model) and columns (r = 32 in every linear map) are trained with fused AdamW; a repeat takes one step
untimed and then STEPS steps. "all logits" is the same with the model's own loss. A method that does not fit is on record with
its error.

- exactness: on a model with fewer layers and a shorter text, every step's loss with activations in host memory is that with
  activations on the device.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from harness import Benchmark, Method, arguments, benchmark
from llama import TINY, Shape, described, llama, texts
from reltune.layers import deferred_logits
from reltune.runs.training import offloaded_activations
from tuner_step import SHARE, Training, columns, single_weights

Around = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]


def on_device(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def in_host_memory(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """On a CPU a copy has nowhere else to go."""
    if next(model.parameters()).is_cuda:
        return offloaded_activations(model)
    return torch.autograd.graph.save_on_cpu()


@dataclasses.dataclass
class LongTraining(Training):
    """``keeping`` gives what a step runs inside."""

    keeping: Around = on_device
    all_logits: bool = False

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        self.base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        own = mock.patch.object(deferred_logits, "defer", lambda *_: False)
        self.kept: contextlib.AbstractContextManager[Any] | None = None
        with own if self.all_logits else contextlib.nullcontext(), super().around():
            yield

    def _step(self) -> torch.Tensor:
        self.kept = self.kept or self.keeping(self.model)
        with self.kept:
            loss = self.model(**self.batch).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def exactness(bench: Benchmark, options: argparse.Namespace, shape: Shape) -> None:
    shape = dataclasses.replace(shape, layers=2)
    batch = {key: value.to(options.device) for key, value in texts(shape, 1, min(options.tokens[0], 2048)).items()}
    losses = []
    for keeping in (on_device, in_host_memory):
        base = llama(shape, options.device)
        training = LongTraining(base, batch, single_weights(base, SHARE), 4, 1e-2, keeping=keeping)
        with training.around():
            training.run()
        losses.append(training.losses[-1])
    bench.value("exactness: losses", losses)
    largest = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    bench.check("exactness: largest difference of a step's loss, relative", largest, 1e-3)
    bench.check("exactness: the training moved the loss: last / first", losses[0][-1] / losses[0][0], 0.999)


def lengths(bench: Benchmark, options: argparse.Namespace, shape: Shape, tokens: int) -> None:
    base = llama(shape, options.device)
    base.train()
    batch = {key: value.to(options.device) for key, value in texts(shape, 1, tokens).items()}
    few, several = f"single weights, {SHARE:.2%}", f"columns, r = {options.columns}"
    kinds = {few: single_weights(base, SHARE), several: columns(options.columns)}
    waiting = "inputs in host memory"
    settings: list[tuple[str, str, dict[str, Any]]] = [
        (few, few, {}),
        (f"{few}, {waiting}", few, {"keeping": in_host_memory}),
        (several, several, {}),
        (f"{several}, {waiting}", several, {"keeping": in_host_memory}),
        (f"{few}, all logits", few, {"all_logits": True}),
    ]
    trainings = {
        name: LongTraining(base, batch, kinds[kind], options.steps, 1e-5, **more) for name, kind, more in settings
    }
    case = f"{tokens} tokens"
    records = bench.measure(
        case,
        described(shape, dtype="bfloat16", tokens=tokens, steps=options.steps, cap_gb=options.cap),
        [
            # Whether all logits fit, or a longer text with nothing in host memory, is what is to be found out.
            Method(name, training.run, training.around, required=waiting in name)
            for name, training in trainings.items()
        ],
        options.repeats,
        warmups=0,  # each repeat begins with an untimed step
    )
    for name, training in trainings.items():
        records[name]["config"] = {"trained": training.trained, "losses": training.losses}
    if options.device != "cpu":
        for kind in kinds:
            for key, what in (("seconds", "time"), ("peak_bytes", "peak memory")):
                ratio = bench.ratio(case, f"{kind}, {waiting}", kind, key)
                bench.value(f"{case}: {kind}, {waiting} / on the device, {what}", ratio)
            peak = bench.median(case, f"{kind}, {waiting}", "peak_bytes") / 1e9
            bench.check(f"{case}: {kind}, {waiting}, GB", peak, options.cap, required=False)
    bench.save(options.output_dir, options.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768])
    parser.add_argument("--columns", type=int, default=32)
    parser.add_argument("--cap", type=float, default=80.0, help="GB that torch may take")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    options = arguments(parser, "long_context")
    bench = benchmark(options, ["trl"])
    shape = Shape()
    if options.tiny:
        shape, options.tokens, options.columns = TINY, [64], 4
    if options.device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * 1e9 / total))
    exactness(bench, options, shape)
    for tokens in options.tokens:
        lengths(bench, options, shape, tokens)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
