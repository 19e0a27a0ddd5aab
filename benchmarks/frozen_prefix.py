"""A training step of later passes over the data, which begins above the frozen layers, beside full fine-tuning and LoRA.

    python benchmarks/frozen_prefix.py          (about 5 minutes on 2 cores)
    python benchmarks/frozen_prefix.py --tiny --output_dir /tmp

and on one GPU of 80 GB, without a network, from the repository's root (about 5 minutes on an H200):

    PYTHONPATH=src PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/frozen_prefix.py \
        --device cuda --commit COMMIT --output_dir benchmarks/results

- minilm, on a CPU: MiniLM-L6's shapes and random weights in float32 with a classification head that every method trains, 32 × 64 tokens,
  the top 3 of 6 layers.
- 8b, on a GPU: Llama-3.1-8B's shapes and random weights in bfloat16, 4 × 2048 tokens, the top 8 of 32 layers. Afterwards with frozen weights
  in float8, and with Liger kernels as well; LoRA is that of case 8b.

Steps are those of tuner_step.py. A method whose name ends in "later pass" has taken a first pass over BATCHES batches, which
``--cache_frozen_prefix on`` keeps in a file; its timed steps are of batches drawn from the same examples in another order. A step tells
its examples apart (the digest that the collator makes), reads them from the file, hands them to the device and trains. The seconds
of a step of the first pass, which computes, writes and trains, are in the values. The file is in a temporary directory, and as
fresh files are it is in the system's memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import Benchmark, Machine, Method, Timed, arguments, benchmark
from llama import TINY, Shape, described, llama, texts
from reltune.tuner.frozen_prefix import FrozenPart, FrozenPrefix, identified
from reltune.tuner.kept_states import KeptStates
from tuner_minilm import columns as encoder_columns
from tuner_minilm import full, minilm
from tuner_minilm import lora as encoder_lora
from tuner_step import FLOAT8, Prepare, Training, _seconds, columns, lora, ratios, top_layers

BATCHES = 4
LATER = "later pass"  # ends the names of methods that begin above the frozen layers


@dataclasses.dataclass
class LaterPass(Training):
    """Steps on examples that a first pass has kept. ``batch`` holds all of them, on the CPU; a step takes ``examples``.

    Attributes:
        first: seconds of a step of each first pass.
    """

    examples: int = 1
    first: list[float] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        self.model = self.prepare(self.base)
        self.model.train()
        self.device = next(self.model.parameters()).device
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        fused = self.device.type == "cuda" if self.fused is None else self.fused
        self.optimizer = torch.optim.AdamW(parameters, lr=self.rate, fused=fused)
        self.order: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)
        one = {name: x[:1].to(self.device) for name, x in self.batch.items()}
        part = FrozenPart(self.model, one)
        count = self.batch["input_ids"].numel()
        size = count * part.width * part.dtype.itemsize
        with tempfile.TemporaryDirectory() as place:
            kept = KeptStates(Path(place) / "kept", part.width, part.dtype, size, part.origin())
            self.prefix = FrozenPrefix(part, kept)
            try:
                with self.prefix.installed():
                    self.losses.append([self._step().item()])  # the states are made, caches are filled
                    machine = Machine(self.device)
                    started = machine.now()
                    for _ in range(BATCHES - 1):
                        self._step()
                    self.first.append((machine.now() - started) / (BATCHES - 1))
                    computed = self.prefix.computed
                    self._step()
                    yield
                    assert self.prefix.computed == computed == len(self.batch["input_ids"]), "it computed what was kept"
            finally:
                kept.close()
                del self.optimizer, self.prefix
                self.model.unload()  # type: ignore[operator]
                del self.model

    def run(self) -> Timed:
        return Timed(_seconds(self.device, self._steps) / self.steps)

    def _step(self) -> Tensor:
        if not self.order:
            drawn = torch.randperm(len(self.batch["input_ids"]), generator=self.generator)
            self.order = list(drawn.split(self.examples))
        rows = self.order.pop()
        some = {name: x[rows] for name, x in self.batch.items()}
        identity = identified(some)
        here = {name: x.to(self.device, non_blocking=True) for name, x in some.items()}
        with self.prefix.batch(identity):
            loss: Tensor = self.model(**here).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Top(nn.Module):
    """A base model with its top layers and its head trained whole, and a way back."""

    def __init__(self, base: Any, layers: int) -> None:
        super().__init__()
        self.base = base
        for module in (*list(base.bert.encoder.layer)[-layers:], base.bert.pooler, base.classifier):
            module.requires_grad_(True)

    def forward(self, **batch: Tensor) -> Any:
        return self.base(**batch)

    def unload(self) -> nn.Module:
        return self.base.requires_grad_(False)


def measured(
    bench: Benchmark,
    options: argparse.Namespace,
    case: str,
    about: dict[str, Any],
    base: nn.Module,
    methods: dict[str, Prepare],
    seen: dict[str, Prepare],
    batch: dict[str, Tensor],
) -> None:
    """Methods on the first examples of ``batch``, and those ``seen`` on all of them in a later pass as well."""
    base.train()
    one = {name: x[: options.examples].to(options.device) for name, x in batch.items()}
    trainings = {key: Training(base, one, prepare, options.steps, 1e-5) for key, prepare in {**methods, **seen}.items()}
    later = {
        f"{key}, {LATER}": LaterPass(base, batch, prepare, options.steps, 1e-5, examples=options.examples)
        for key, prepare in seen.items()
    }
    records = bench.measure(
        case,
        about,
        [Method(key, training.run, training.around) for key, training in {**trainings, **later}.items()],
        options.repeats,
    )
    for key, training in {**trainings, **later}.items():
        records[key]["config"] = {"trained": training.trained, "losses": training.losses}
    for key, training in later.items():
        bench.value(f"{case}: {key}, seconds of a step of the first pass", min(training.first, default=float("nan")))
    bench.save(options.output_dir, options.name)


def encoder(bench: Benchmark, options: argparse.Namespace) -> None:
    layers = 6
    base: Any = minilm(layers, options.tiny)
    generator = torch.Generator().manual_seed(0)
    shape = (BATCHES * options.examples, options.tokens)
    batch = {
        "input_ids": torch.randint(base.config.vocab_size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(2, shape[:1], generator=generator),
    }
    r, top = options.columns, list(range(layers // 2, layers))
    ours, whole = f"columns, r = {r}, top {len(top)} layers", f"top {len(top)} layers whole"
    about = {"model": "MiniLM-L6 shapes", "examples": options.examples, "tokens": options.tokens, "dtype": "float32"}
    seen: dict[str, Prepare] = {ours: encoder_columns(r, top), whole: functools.partial(Top, layers=len(top))}
    methods: dict[str, Prepare] = {"full": full, f"LoRA, r = {r}": encoder_lora(r)}
    measured(bench, options, "minilm", about, base, methods, seen, batch)
    ratios(bench, "minilm", f"{ours}, {LATER}", "full", 0.40, None, gpu=False)
    ratios(bench, "minilm", f"{whole}, {LATER}", "full", 0.60, None, gpu=False)
    ratios(bench, "minilm", f"{ours}, {LATER}", ours, 1.00, None, gpu=False)


def decoder(bench: Benchmark, options: argparse.Namespace) -> None:
    shape = dataclasses.replace(TINY, layers=4) if options.tiny else Shape()
    base = llama(shape, options.device)
    batch = texts(shape, BATCHES * options.examples, options.tokens)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    r, top = options.columns, top_layers(shape)
    rank = max(r // 2, 1)
    ours, leaner = f"columns, r = {r}, top {len(top)} layers", f"LoRA, r = {rank}, bf16"
    about = described(shape, dtype="bfloat16", examples=options.examples, tokens=options.tokens, steps=options.steps)
    methods: dict[str, Prepare] = {f"LoRA, r = {rank}": lora(rank), leaner: lora(rank, autocast=False)}
    measured(bench, options, "8b", about, base, methods, {ours: columns(r, top)}, batch)
    for beside in (f"LoRA, r = {rank}", leaner):
        ratios(bench, "8b", f"{ours}, {LATER}", beside, 0.12, None, gpu=False)
    ratios(bench, "8b", f"{ours}, {LATER}", ours, 1.00, None, gpu=False)
    columns(r, frozen_dtype=FLOAT8)(base).unload()  # for good
    cases = {"8b, float8": contextlib.nullcontext}
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        cases["8b, float8, liger"] = functools.partial(apply_liger_kernel_to_llama, model=base)  # for good, too
    except ImportError as error:
        if options.device != "cpu":
            bench.failed("8b, float8, liger", about, "all", error)
    for case, change in cases.items():
        change()
        measured(bench, options, case, about, base, {}, {ours: columns(r, top, FLOAT8)}, batch)
        found = bench.median(case, f"{ours}, {LATER}")
        for beside in (f"LoRA, r = {rank}", leaner):
            ratio = found / bench.median("8b", beside)
            bench.check(f"{case}: {ours}, {LATER} / 8b: {beside}, time", ratio, 0.12, required=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models, both cases: does the script run?")
    parser.add_argument("--examples", type=int, help="in a batch: 32 of the encoder, 4 of the decoder if not given")
    parser.add_argument("--tokens", type=int, help="64 of the encoder, 2048 of the decoder if not given")
    parser.add_argument("--columns", type=int, help="8 of the encoder, 32 of the decoder if not given")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = arguments(parser, "frozen_prefix")
    gpu = options.device.startswith("cuda")
    if options.tiny:
        options.examples, options.tokens, options.columns, options.repeats = 2, 8, 4, 1
    options.examples = options.examples or (4 if gpu else 32)
    options.tokens = options.tokens or (2048 if gpu else 64)
    options.columns = options.columns or (32 if gpu else 8)
    bench = benchmark(options)
    if options.tiny or not gpu:
        encoder(bench, options)
    if options.tiny or gpu:
        decoder(bench, options)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
