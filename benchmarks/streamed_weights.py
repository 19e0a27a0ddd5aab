"""A training step of a model whose frozen weights lie in host memory and come to the card layer by layer, under a cap of memory.

On one GPU, without a network, from the repository's root (about 3 minutes):

    PYTHONPATH=src PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/streamed_weights.py \
        --device cuda --commit COMMIT --output_dir benchmarks/results

and on any machine, in seconds: python benchmarks/streamed_weights.py --tiny --output_dir /tmp (on a CPU nothing can move)

FSDP2 does it, on one process too: `--fsdp` with ``cpu_offload`` in its settings (docs/distributed.md). Every layer is a group of its own,
which is copied from pinned memory while the one before it runs, and again in the backward pass; what is trained, its gradient
and AdamW's states are in host memory as well. The model has Llama-3.1-8B's shapes and random weights in bfloat16, every layer is
checkpointed. "streamed" may take CAP GiB of the card, less than the weights; "on the card" has all of it and no FSDP.

- exactness: on a model with fewer layers, in float32, every step's loss of the one is the other's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import traceback
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from harness import Benchmark, Method, Timed, arguments, benchmark
from harness import described as described_error
from llama import TINY, Shape, described, llama, texts, weights_bytes
from tuner_step import SHARE, Prepare, Training, columns, lora, single_weights


@dataclasses.dataclass
class Streamed(Training):
    """Steps under FSDP2. The base is sharded for good, and is made anew for each training.

    Attributes:
        streams: False: the layers stay on the device, without FSDP.
        exact: in float32. FSDP2 runs norms and gated products unfused, which round otherwise in bfloat16.
    """

    shape: Shape = TINY
    seed: int = 0
    streams: bool = True
    exact: bool = False

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        device = self.batch["input_ids"].device
        base = llama(self.shape, str(device), seed=self.seed)
        if self.exact:
            base.float()
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.model = self.prepare(base)
        self.model.train()
        if self.streams:
            self.model.to("cpu")
            shard(self.model, device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=self.rate, fused=True)
        self.losses.append([self._step().item()])
        try:
            yield
        finally:
            del self.optimizer, self.model, base


def shard(model: nn.Module, device: torch.device) -> None:
    """A group for each decoder layer and one for the rest."""
    mesh = init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy() if device.type == "cuda" else OffloadPolicy()
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    for name, buffer in list(model.named_buffers()):  # indices, angles: FSDP2 leaves them where they are
        holder, _, last = name.rpartition(".")
        model.get_submodule(holder)._buffers[last] = buffer.to(device)


def kinds(r: int) -> dict[str, Prepare]:
    return {
        f"columns, r = {r}": columns(r),
        f"single weights, {SHARE:.2%}": lambda base: single_weights(base, SHARE)(base),
        f"LoRA, r = {max(r // 2, 1)}": lora(max(r // 2, 1)),
    }


def exactness(bench: Benchmark, options: argparse.Namespace, shape: Shape) -> None:
    shape = dataclasses.replace(shape, layers=2)
    batch = {name: value.to(options.device) for name, value in texts(shape, 1, min(options.tokens, 512)).items()}
    for name, prepare in kinds(options.columns).items():
        losses = []
        try:
            for streams in (False, True):
                training = Streamed(nn.Identity(), batch, prepare, 4, 1e-3, shape=shape, streams=streams, exact=True)
                with training.around():
                    training.run()
                losses.append(training.losses[-1])
        except Exception as error:  # whatever it is: it belongs into the record, and the others go on
            traceback.print_exc()
            bench.value(f"exactness: {name}: ended with", described_error(error))
            continue
        bench.value(f"exactness: {name}: losses", losses)
        largest = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
        bench.check(f"exactness: {name}: largest difference of a step's loss, relative", largest, 1e-5)


def measure(bench: Benchmark, options: argparse.Namespace, shape: Shape) -> None:
    batch = {name: value.to(options.device) for name, value in texts(shape, options.examples, options.tokens).items()}
    found = described(shape, dtype="bfloat16", examples=options.examples, tokens=options.tokens, cap_gib=options.cap)
    for case, streams in (("on the card", False), ("streamed", True)):
        trainings = {
            name: Streamed(nn.Identity(), batch, prepare, options.steps, 1e-5, shape=shape, streams=streams)
            for name, prepare in kinds(options.columns).items()
        }
        methods = [
            Method(name, capped(training, options.cap if streams else None), training.around)
            for name, training in trainings.items()
        ]
        records = bench.measure(case, found, methods, options.repeats, warmups=0)
        for name, training in trainings.items():
            records[name]["config"] = {"trained": training.trained, "losses": training.losses}
        bench.save(options.output_dir, options.name)
    bench.value("weights, GiB", weights_bytes(llama(shape, "meta")) / 2**30)
    first = next(iter(kinds(options.columns)))
    ratio = bench.median("streamed", first) / bench.median("on the card", first)
    bench.check(f"streamed: {first} / on the card, time", ratio, 1.25, required=False)


def capped(training: Streamed, gib: float | None) -> Callable[[], Timed]:
    """The training's run, in which torch may take so many GiB of the card."""

    def run() -> Timed:
        if gib is None or not torch.cuda.is_available():
            return training.run()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        try:
            return training.run()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cap", type=float, default=12.0, help="GiB of the card that streamed steps may take")
    options = arguments(parser, "streamed_weights")
    bench = benchmark(options)
    shape = Shape()
    if options.tiny:
        shape, options.examples, options.tokens, options.columns, options.steps = TINY, 2, 16, 4, 2
    backend = "gloo" if options.device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        exactness(bench, options, shape)
        measure(bench, options, shape)
    finally:
        dist.destroy_process_group()
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
