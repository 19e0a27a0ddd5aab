"""One training step of the tuner beside the frozen floor and PEFT's methods, all through `get_peft_model`.

On one GPU of 141 GB, without a network, from the repository's root (about 8 minutes on an H200):

    PYTHONPATH=src:LIGER PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/tuner_step.py \
        --device cuda --commit COMMIT --output_dir benchmarks/results

and on any machine, in seconds: python benchmarks/tuner_step.py --tiny --output_dir /tmp

A base in few bits needs bitsandbytes and is measured by itself (about 6 minutes for both):

    PYTHONPATH=src:PEERS PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/tuner_step.py \
        --device cuda --commit COMMIT --cases 4bit 8bit --name tuner_step_few_bits --output_dir benchmarks/results

The model has Llama-3.1-8B's shapes and random weights in bfloat16, the batch is 4 × 2048 tokens, the optimizer fused AdamW.
A repeat puts a method's adapter on the shared base, takes one step untimed, times STEPS steps (forward, backward, clear
gradients, optimizer step, write-back) and takes the adapter off. The floor is the frozen model's forward pass and the
backward pass down to the embedded tokens, with no weight gradient. Memory is the peak of torch's allocator within the
timed steps, weights and optimizer states included.

- eager: the model as Transformers writes it. liger: the same model with Liger kernels for all methods (kernel package
  `liger-kernel`; left out with its error where that is not installed).
- fp8: the same again with the base's frozen weights in float8 (e4m3), LoRA in bfloat16 measured just before they are rounded.
  This case is the last: the base is changed for good. "LoRA, eager" is that of case eager in the same run. "no waits" is the step with
  the loss of `reltune tune` and without a question to the device, "one CUDA graph" that step captured once and replayed.
- directions are random orthonormal vectors, as many as the columns, so that as many numbers are trained; A is fixed, and its gradient
  is never made.
- single: single weights at random places as the model is in case eager, and once more as it is in case liger.
- 4bit, 8bit: a base whose linear maps are held by bitsandbytes (nf4 with double quantisation; LLM.int8), with gradient
  checkpointing: single weights at random places, 0.12% of all, beside QLoRA (PEFT's LoRA on the same base, without
  ``prepare_model_for_kbit_training``, which would hold all that is not quantised in float32).
- switch: another adapter made active on the device, beside unmerging and merging a LoRA of equal size.
- exactness: on a model with fewer layers, every step's loss beside plain autograd through a materialised weight, in the
  cases in few bits too; in case fp8 beside the products in float32 of the same rounded numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from analysis_memory_cap import quantised_llama
from harness import Benchmark, Machine, Method, Timed, arguments, benchmark
from llama import PROJECTIONS, TINY, Shape, described, llama, texts
from reltune import ReltuneConfig
from reltune.layers.quantised import dequantised, numel
from reltune.ops import float8, recompute
from reltune.ops.linear_cross_entropy import linear_cross_entropy
from reltune.plan.plan import ModulePlan, Plan

Prepare = Callable[[nn.Module], nn.Module]  # base model -> model with an adapter
FLOAT8 = "float8_e4m3fn"
NO_WAITS, GRAPH = "no waits", "one CUDA graph"  # end the names of methods that step so
KEPT = "inputs kept"  # ends the names of methods that do not make them again
SHARE = 0.0012  # of all parameters, as single weights: the default recipe's


@dataclasses.dataclass
class Training:
    """A method's steps on the shared base. Losses of all steps are kept, for the record."""

    base: nn.Module
    batch: dict[str, Tensor]
    prepare: Prepare
    steps: int
    rate: float
    fused: bool | None = None  # of AdamW; on a GPU if None
    keep_inputs: bool = False  # of single weights, instead of making them again
    capturable: bool = False
    losses: list[list[float]] = dataclasses.field(default_factory=list)
    trained: int = 0

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        self.model = self.prepare(self.base)
        self.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=self.rate,
            fused=parameters[0].is_cuda if self.fused is None else self.fused,
            capturable=self.capturable and parameters[0].is_cuda,
        )
        try:
            with recompute.force(False) if self.keep_inputs else contextlib.nullcontext():
                self.losses.append([self._step().item()])  # the states are made, caches are filled
                yield
        finally:
            del self.optimizer
            self.model.unload()
            del self.model

    def run(self) -> Timed:
        machine_seconds = _seconds(self.batch["input_ids"].device, self._steps)
        return Timed(machine_seconds / self.steps)

    def _steps(self) -> None:
        losses = [self._step() for _ in range(self.steps)]
        self.losses[-1] += [loss.item() for loss in losses]

    def _step(self) -> Tensor:
        loss = self._loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _loss(self) -> Tensor:
        return self.model(**self.batch).loss


class WithoutWaits(Training):
    """Steps in which the host asks the device nothing: Transformers asks whether texts are packed, Liger how many tokens count."""

    def _step(self) -> Tensor:
        with mock.patch("transformers.models.llama.modeling_llama.create_causal_mask", lambda *args, **kwargs: None):
            return super()._step()

    def _loss(self) -> Tensor:
        model = self.model.get_base_model()
        hidden = model.model(input_ids=self.batch["input_ids"]).last_hidden_state[:, :-1]
        labels = self.batch["labels"][:, 1:]
        return linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]), model.lm_head.weight, None, labels.reshape(-1)
        ).losses.mean()


@dataclasses.dataclass
class Captured(WithoutWaits):
    """The step as one CUDA graph. It is captured before the time is taken, so that its memory counts."""

    capturable: bool = True

    def run(self) -> Timed:
        if not self.batch["input_ids"].is_cuda:
            return super().run()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            loss = self._step()

        def replays() -> None:
            losses = []
            for _ in range(self.steps):
                graph.replay()
                losses.append(loss.clone())
            self.losses[-1] += [loss.item() for loss in losses]

        return Timed(_seconds(loss.device, replays) / self.steps)


def _seconds(device: torch.device, run: Callable[[], None]) -> float:
    machine = Machine(device)
    started = machine.now()
    run()
    return machine.now() - started


def floor(model: nn.Module, batch: dict[str, Tensor], steps: int) -> Timed:
    """Forward, and backward to the embedded tokens, through a model in which nothing is trained."""

    def run() -> None:
        for _ in range(steps):
            embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            model(inputs_embeds=embedded, labels=batch["labels"]).loss.backward()

    return Timed(_seconds(batch["input_ids"].device, run) / steps)


def columns(r: int, layers: list[int] | None = None, frozen_dtype: str | None = None) -> Prepare:
    config = {"target_modules": PROJECTIONS, "r": r, "layers_to_transform": layers, "frozen_dtype": frozen_dtype}
    return lambda base: get_peft_model(base, ReltuneConfig(**config))


def lora(r: int, autocast: bool = True) -> Prepare:
    return lambda base: get_peft_model(
        base, LoraConfig(target_modules=PROJECTIONS, r=r), autocast_adapter_dtype=autocast
    )


def shira(r: int) -> Prepare:
    config = ShiraConfig(target_modules=PROJECTIONS, r=r)
    config.mask_fn = _evenly_spaced  # its own draws a permutation of all elements on the CPU: minutes for this model
    return lambda base: get_peft_model(base, config)


def elements(base: nn.Module, r: int) -> Prepare:
    """As many single weights per matrix as SHiRA trains, in the same places."""
    modules = {}
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            count = r * (module.in_features + module.out_features)
            chosen = ModulePlan(tuple(module.weight.shape))
            chosen.take_elements(torch.arange(count) * (module.weight.numel() // count))
            modules[name] = chosen
    total = sum(chosen.parameters for chosen in modules.values())
    plan = Plan(modules, str(total), total, sum(p.numel() for p in base.parameters()), fingerprint="")
    return lambda base: get_peft_model(base, ReltuneConfig(plan=plan))


def single_weights(base: nn.Module, share: float, frozen_dtype: str | None = None) -> Prepare:
    """So many of all parameters, at random places of the projections, which may be held in few bits."""
    targets = {name: m for name, m in base.named_modules() if name.rpartition(".")[2] in PROJECTIONS}
    shapes = {name: (module.out_features, module.in_features) for name, module in targets.items()}
    parameters = sum(numel(p) for p in base.parameters())
    of_target = share * parameters / sum(rows * columns for rows, columns in shapes.values())
    modules = {}
    for number, (name, module) in enumerate(targets.items()):
        device, size = module.weight.device, shapes[name][0] * shapes[name][1]
        generator = torch.Generator(device).manual_seed(number)
        count = (max(1, round(of_target * size)),)
        modules[name] = ModulePlan(shapes[name])
        modules[name].take_elements(torch.randint(size, count, generator=generator, device=device).unique().cpu())
    total = sum(chosen.parameters for chosen in modules.values())
    plan = Plan(modules, str(total), total, parameters, fingerprint="")
    return lambda base: get_peft_model(base, ReltuneConfig(plan=plan, frozen_dtype=frozen_dtype))


def directions(base: nn.Module, r: int) -> Prepare:
    """So many random directions of each projection's input: they train as many numbers as columns do."""
    modules = {}
    for number, (name, module) in enumerate(base.named_modules()):
        if name.rpartition(".")[2] in PROJECTIONS:
            generator = torch.Generator(module.weight.device).manual_seed(number)
            drawn = torch.randn(module.in_features, r, generator=generator, device=module.weight.device)
            vectors = torch.linalg.qr(drawn).Q.T.contiguous().cpu().numpy()
            chosen = ModulePlan((module.out_features, module.in_features), directions=list(range(r)), vectors=vectors)
            modules[name] = chosen
    total = sum(chosen.parameters for chosen in modules.values())
    plan = Plan(modules, str(total), total, sum(p.numel() for p in base.parameters()), fingerprint="")
    return lambda base: get_peft_model(base, ReltuneConfig(plan=plan))


def _evenly_spaced(layer: nn.Linear, r: int, **_: Any) -> Tensor:
    """SHiRA's r (in + out) elements per weight as a mask like the weight."""
    count = r * (layer.in_features + layer.out_features)
    mask = torch.zeros_like(layer.weight)
    mask.view(-1)[torch.arange(count, device=mask.device) * (mask.numel() // count)] = 1
    return mask


def case(
    bench: Benchmark, options: argparse.Namespace, shape: Shape, name: str, base: nn.Module, methods: dict[str, Prepare]
) -> None:
    base.train()  # it has no dropout, and Liger's fused loss is there in training only
    batch = {key: value.to(options.device) for key, value in texts(shape, options.examples, options.tokens).items()}
    trainings = {
        key: (Captured if key.endswith(GRAPH) else WithoutWaits if key.endswith(NO_WAITS) else Training)(
            base, batch, prepare, options.steps, 1e-5, keep_inputs=key.endswith(KEPT)
        )
        for key, prepare in methods.items()
    }
    records = bench.measure(
        name,
        described(shape, dtype="bfloat16", examples=options.examples, tokens=options.tokens, steps=options.steps),
        [
            Method("floor", functools.partial(floor, base, batch, options.steps)),
            *(Method(key, training.run, training.around) for key, training in trainings.items()),
        ],
        options.repeats,
    )
    for key, training in trainings.items():
        records[key]["config"] = {"trained": training.trained, "losses": training.losses}
    bench.save(options.output_dir, options.name)


def ratios(bench: Benchmark, case: str, method: str, to: str, seconds: float, memory: float | None, gpu: bool) -> None:
    """Checks that are recorded and, as targets, not required of other hardware or of a tiny model."""
    bench.check(f"{case}: {method} / {to}, time", bench.ratio(case, method, to), seconds, required=False)
    if gpu and memory is not None:
        found = bench.ratio(case, method, to, "peak_bytes")
        bench.check(f"{case}: {method} / {to}, peak memory", found, memory, required=False)


def in_float8(bench: Benchmark, options: argparse.Namespace, shape: Shape, base: nn.Module, gpu: bool) -> None:
    """Case fp8, on a base that has Liger kernels where they are installed. Afterwards it is in float8."""
    r, rank, top = options.columns, max(options.columns // 2, 1), top_layers(shape)
    leaner, ours, low = (
        f"LoRA, r = {rank}, bf16",
        f"columns, r = {r}, fp8",
        f"columns, r = {r}, fp8, top {len(top)} layers",
    )
    case(bench, options, shape, "fp8, before", base, {leaner: lora(rank, autocast=False)})
    columns(r, frozen_dtype=FLOAT8)(base).unload()
    single = f"elements, {SHARE:.2%}, fp8"
    methods = {ours: columns(r, frozen_dtype=FLOAT8), low: columns(r, top, FLOAT8)}
    methods |= {f"{ours}, {how}": columns(r, frozen_dtype=FLOAT8) for how in (NO_WAITS, GRAPH)}
    methods[single] = single_weights(base, SHARE, FLOAT8)
    case(bench, options, shape, "fp8", base, methods)
    for key, limit, kind in (("seconds", 0.62, "time"), ("peak_bytes", 0.66, "peak memory")):
        for method in (ours, f"{ours}, {NO_WAITS}", f"{ours}, {GRAPH}") if gpu or key == "seconds" else ():
            found = bench.median("fp8", method, key) / bench.median("fp8, before", leaner, key)
            bench.check(f"fp8: {method} / {leaner}, {kind}", found, limit, required=False)
    found = bench.median("fp8", low) / bench.median("eager", leaner)
    bench.check(f"fp8: {low} / {leaner}, eager, time", found, 0.30, required=False)


def in_few_bits(bench: Benchmark, options: argparse.Namespace, shape: Shape, bits: int, gpu: bool) -> None:
    """Cases 4bit and 8bit, on a base of their own."""
    name, rank = f"{bits}bit", max(options.columns // 2, 1)
    few_bits_exactness(bench, options, shape, bits)
    base = quantised_llama(shape, options.device, bits)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    ours, leaner = f"elements, {SHARE:.2%}", f"QLoRA, r = {rank}, bf16"
    methods = {
        ours: single_weights(base, SHARE),
        leaner: lora(rank, autocast=False),
        f"QLoRA, r = {rank}": lora(rank),
    }
    case(bench, options, shape, name, base, methods)
    ratios(bench, name, ours, "floor", 1.10, 1.05, gpu)
    for qlora in (leaner, f"QLoRA, r = {rank}"):
        ratios(bench, name, ours, qlora, 0.90, 0.90, gpu)


def few_bits_exactness(
    bench: Benchmark, options: argparse.Namespace, shape: Shape, bits: int, steps: int = 8, rate: float = 1e-2
) -> None:
    """Losses of single weights against plain autograd through unpacked weights with the values put in."""
    shape = dataclasses.replace(shape, layers=2)
    base = quantised_llama(shape, options.device, bits)
    batch = {key: value.to(options.device) for key, value in texts(shape, 2, min(options.tokens, 512)).items()}
    weights = {
        name: dequantised(module, torch.bfloat16)
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in PROJECTIONS
    }
    training = Training(base, batch, single_weights(base, SHARE), steps, rate)
    with training.around():
        chosen = {
            name.removeprefix("base_model.model."): module.reltune_element_indices["default"].long()
            for name, module in training.model.named_modules()
            if hasattr(module, "reltune_elements")
        }
        training.run()
    plain = llama(shape, options.device)
    state = {name: p for name, p in base.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict({**plain.state_dict(), **state, **{f"{name}.weight": w for name, w in weights.items()}})
    values = {name: weights[name].flatten()[idx].float().requires_grad_() for name, idx in chosen.items()}
    optimizer = torch.optim.AdamW(values.values(), lr=rate, fused=batch["input_ids"].is_cuda)
    found = []
    for _ in range(steps + 1):
        put = {
            f"{name}.weight": weights[name]
            .flatten()
            .index_copy(0, chosen[name], own.to(torch.bfloat16))
            .view(weights[name].shape)
            for name, own in values.items()
        }
        loss = functional_call(plain, put, kwargs=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    bench.value(f"{bits}bit: losses of the tuner", [round(x, 5) for x in training.losses[-1]])
    bench.value(f"{bits}bit: losses by plain autograd", [round(x, 5) for x in found])
    largest = max(abs(a - b) / abs(b) for a, b in zip(training.losses[-1], found, strict=True))
    bench.check(f"{bits}bit: largest difference of a step's loss, relative", largest, 2e-3)
    bench.check(f"{bits}bit: the training moved the loss: last / first", found[-1] / found[0], 0.999)


def float8_exactness(bench: Benchmark, options: argparse.Namespace, shape: Shape, steps: int = 8) -> None:
    """Losses with the device's float8 products and with float32 products of the same rounded numbers."""
    shape = dataclasses.replace(shape, layers=2)
    batch = {key: value.to(options.device) for key, value in texts(shape, 2, min(options.tokens, 512)).items()}
    losses = []
    for kernels in (float8._has_kernels, lambda x: False):
        with mock.patch.object(float8, "_has_kernels", kernels):
            training = Training(
                llama(shape, options.device), batch, columns(options.columns, None, FLOAT8), steps, 1e-3
            )
            with training.around():
                training.run()
        losses.append(training.losses[-1])
    bench.value("fp8: losses by the device's products", [round(x, 5) for x in losses[0]])
    bench.value("fp8: losses by float32 products", [round(x, 5) for x in losses[1]])
    largest = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    bench.check("fp8: largest difference of a step's loss, relative", largest, 2e-3)
    bench.check("fp8: the training moved the loss: last / first", losses[0][-1] / losses[0][0], 0.99)


def single(bench: Benchmark, options: argparse.Namespace, shape: Shape, name: str, base: nn.Module, gpu: bool) -> None:
    """Single weights, with their inputs made again and kept, beside columns and LoRA."""
    r, rank = options.columns, max(options.columns // 2, 1)
    ours, leaner, few, many = (
        f"columns, r = {r}",
        f"LoRA, r = {rank}, bf16",
        "single weights, 0.12%",
        "single weights, 0.5%",
    )
    methods = {
        few: single_weights(base, SHARE),
        f"{few}, {KEPT}": single_weights(base, SHARE),
        many: single_weights(base, 0.005),
        ours: columns(r),
        leaner: lora(rank, autocast=False),
    }
    case(bench, options, shape, name, base, methods)
    if name.endswith("liger"):
        ratios(bench, name, few, "floor", 1.10, 1.04, gpu)
        ratios(bench, name, few, leaner, 0.92, 0.81, gpu)
        ratios(bench, name, ours, "floor", 1.02, 1.02, gpu)
    else:
        ratios(bench, name, many, "floor", 1.05, 1.00, gpu)


def top_layers(shape: Shape) -> list[int]:
    """The top quarter."""
    return list(range(shape.layers - shape.layers // 4, shape.layers)) or [shape.layers - 1]


def exactness(bench: Benchmark, options: argparse.Namespace, shape: Shape, steps: int = 8) -> None:
    """The tuner's losses against plain autograd through weights whose columns are put in by index_copy."""
    shape = dataclasses.replace(shape, layers=2)
    base = llama(shape, options.device)
    batch = {key: value.to(options.device) for key, value in texts(shape, 2, min(options.tokens, 512)).items()}
    rate = 1e-3
    model = get_peft_model(base, ReltuneConfig(target_modules=PROJECTIONS, r=options.columns))
    layers = {
        name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "reltune_columns")
    }
    chosen = {
        name: (layer.reltune_column_indices["default"].clone(), layer.reltune_columns["default"].detach().clone())
        for name, layer in layers.items()
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    ours = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ours.append(loss.item())
    base = model.unload()
    weights = dict(base.named_parameters())
    trained = {name: values.requires_grad_() for name, (_, values) in chosen.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=rate)
    plain = []
    for _ in range(steps):
        put = {
            f"{name}.weight": weights[f"{name}.weight"].index_copy(1, chosen[name][0], values.to(torch.bfloat16))
            for name, values in trained.items()
        }
        loss = functional_call(base, put, kwargs=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.append(loss.item())
    bench.value("losses of the tuner", [round(x, 5) for x in ours])
    bench.value("losses by plain autograd", [round(x, 5) for x in plain])
    largest = max(abs(a - b) / abs(b) for a, b in zip(ours, plain, strict=True))
    bench.check("largest difference of a step's loss, relative", largest, 2e-3)
    bench.check("the training moved the loss: last / first", plain[-1] / plain[0], 0.99)


def switch(bench: Benchmark, options: argparse.Namespace, shape: Shape, base: nn.Module) -> None:
    """Make another adapter active and, for LoRA, merged: what serving takes to change the task."""
    config = ReltuneConfig(target_modules=PROJECTIONS, r=options.columns, init_weights=False)
    ours = get_peft_model(base, config, adapter_name="first")
    ours.add_adapter("second", ReltuneConfig(target_modules=PROJECTIONS, r=options.columns, init_weights=False))
    ours.eval()

    def set_columns() -> None:
        ours.set_adapter("second" if ours.active_adapter == "first" else "first")

    bench.measure("switch", described(shape), [Method("columns: set_adapter", set_columns)], 10)
    sizes = {"columns": _saved_bytes(ours, "first")}
    base = ours.unload()
    theirs = get_peft_model(base, LoraConfig(target_modules=PROJECTIONS, r=options.columns // 2), adapter_name="first")
    theirs.add_adapter("second", LoraConfig(target_modules=PROJECTIONS, r=options.columns // 2))
    theirs.merge_adapter(["first"])

    def merge_lora() -> None:
        active = "second" if theirs.active_adapter == "first" else "first"
        theirs.unmerge_adapter()
        theirs.set_adapter(active)
        theirs.merge_adapter([active])

    bench.measure("switch, LoRA", described(shape), [Method("LoRA: unmerge, set_adapter, merge", merge_lora)], 10)
    theirs.unmerge_adapter()
    sizes["LoRA"] = _saved_bytes(theirs, "first")
    theirs.unload()
    bench.value("bytes on disk", sizes)
    seconds = bench.median("switch", "columns: set_adapter")
    bench.check("switch: seconds", seconds, 0.010, required=False)
    against = seconds / bench.median("switch, LoRA", "LoRA: unmerge, set_adapter, merge")
    bench.check("switch: columns / LoRA", against, 0.1, required=False)


def _saved_bytes(model: Any, adapter: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, selected_adapters=[adapter])
        file = next(Path(directory).rglob("adapter_model.safetensors"))
        trained = sum(p.numel() for n, p in model.named_parameters() if f".{adapter}" in n)
        return {"bytes": file.stat().st_size, "parameters": trained}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--cases", nargs="+", default=["exactness", "eager", "single", "switch", "liger", "fp8"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = arguments(parser, "tuner_step")
    bench = benchmark(options, ["liger-kernel"])
    shape = dataclasses.replace(Shape(), layers=options.layers)
    if options.tiny:
        shape, options.examples, options.tokens, options.columns, options.steps = TINY, 2, 16, 4, 2
    gpu = options.device != "cpu"
    for bits in (4, 8):
        if f"{bits}bit" in options.cases:
            try:
                in_few_bits(bench, options, shape, bits, gpu)
            except ImportError as error:
                bench.failed(f"{bits}bit", described(shape), "floor", error, required=gpu)
    if not {"exactness", "eager", "single", "switch", "liger", "fp8"} & set(options.cases):
        return bench.finish(options.output_dir, options.name)
    if "exactness" in options.cases:
        exactness(bench, options, shape)
    r, top = options.columns, top_layers(shape)
    base = llama(shape, options.device)
    rank = max(r // 2, 1)
    ours, low, leaner = f"columns, r = {r}", f"columns, r = {r}, top {len(top)} layers", f"LoRA, r = {rank}, bf16"
    if "eager" in options.cases:
        methods = {
            ours: columns(r),
            low: columns(r, top),
            leaner: lora(rank, autocast=False),
            f"LoRA, r = {rank}": lora(rank),
            f"SHiRA, r = {rank}": shira(rank),
            "elements, as many": elements(base, rank),
            f"directions, r = {r}": directions(base, r),
        }
        case(bench, options, shape, "eager", base, methods)
        ratios(bench, "eager", ours, "floor", 1.02, 1.02, gpu)
        ratios(bench, "eager", ours, leaner, 0.90, 0.86, gpu)
        ratios(bench, "eager", f"directions, r = {r}", leaner, 1.00, 1.00, gpu)
        ratios(bench, "eager", "elements, as many", f"SHiRA, r = {rank}", 1.00, 0.86, gpu)
    if "single" in options.cases:
        single(bench, options, shape, "single", base, gpu)
    if "switch" in options.cases:
        switch(bench, options, shape, base)
    if {"single", "liger", "fp8"} & set(options.cases):
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=base)  # for good: nothing after it is eager
            liger = True
        except ImportError as error:
            liger = False
            bench.failed("liger", described(shape), "floor", error, required=gpu and "liger" in options.cases)
            options.cases = [name for name in options.cases if name != "liger"]
        if liger and "single" in options.cases:
            single(bench, options, shape, "single, liger", base, gpu)
    if "liger" in options.cases:
        methods = {ours: columns(r), low: columns(r, top), leaner: lora(rank, autocast=False)}
        methods[f"directions, r = {r}"] = directions(base, r)
        case(bench, options, shape, "liger", base, methods)
        ratios(bench, "liger", ours, "floor", 1.02, 1.02, gpu)
        ratios(bench, "liger", ours, leaner, 0.87, 0.79, gpu)
        ratios(bench, "liger", f"directions, r = {r}", leaner, 1.00, 1.00, gpu)
    if "fp8" in options.cases:
        float8_exactness(bench, options, shape)
        in_float8(bench, options, shape, base, gpu)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
