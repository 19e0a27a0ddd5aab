"""What the cost model predicts of a training step beside what the step takes: memory and time, over many combinations.

Measure on a GPU without a network, from the repository's root (under 5 minutes), and on a CPU, in a process for each case:

    PYTHONPATH=src:LIGER python3 benchmarks/cost_sweep.py measure --device cuda --commit COMMIT --output_dir DIR
    python benchmarks/cost_sweep.py measure --device cpu --output_dir DIR

Each writes DIR/cost_sweep_DEVICE.json. Then, on any machine, write the predictions beside it, and the table:

    python benchmarks/cost_sweep.py predict DIR/cost_sweep_*.json --output_dir benchmarks/results

A case is an architecture with random weights, a batch, a length, a type of numbers, checkpointing or not, Liger's kernels or
not, a method and how much it trains. ``--drawn SEED N`` takes N cases that are drawn from all combinations in the place of the
listed ones; they are drawn when the model is finished, and are never fitted.

A measured step is forward, backward, AdamW (fused) and clearing the gradients. Of a GPU: the peak of what torch's allocator handed out
and of what it reserved, in steps after the first; seconds by events. Of a CPU: the process's peak of resident memory over what it
held before the model was made; seconds by the clock; and the same peak again with malloc as it is, which keeps what is freed: the
first is measured under MALLOC_MMAP_THRESHOLD_, with which glibc gives it back.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import commit, described, hardware, versions

GIB = 2**30
STEPS = 4
MAPPED = 256 << 10  # blocks from this size on are mapped by themselves, and given back when they are freed


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination. ``share``: of columns, single weights; the rank of LoRA is that of about as many numbers."""

    model: str
    method: str
    batch: int
    length: int
    dtype: str = "bfloat16"  # float32, bfloat16 or autocast: float32 weights and products in bfloat16
    layers: str = "all"  # or top: the top quarter
    checkpointing: bool = False
    liger: bool = False
    rank: int = 16
    each: int = 800  # of so many weights one is trained, where single ones are

    def __str__(self) -> str:
        more = [
            self.layers if self.layers != "all" else "",
            "ckpt" if self.checkpointing else "",
            "liger" if self.liger else "",
        ]
        shown = " ".join(word for word in more if word)
        return f"{self.model} {self.method} {self.batch}×{self.length} {self.dtype} {shown}".strip()


# -- models ------------------------------------------------------------------------------------------------------------


def llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
        use_cache=False,
    )


def bert(layers: int, hidden: int, intermediate: int, heads: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=2048,
        num_labels=4,
    )


def t5(layers: int, hidden: int, intermediate: int, heads: int) -> Any:
    from transformers import T5Config

    return T5Config(
        d_model=hidden,
        d_kv=64,
        d_ff=intermediate,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.1,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        use_cache=False,
    )


def vit(layers: int, hidden: int, heads: int) -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=4 * hidden,
        num_attention_heads=heads,
        num_labels=10,
    )


def mixtral(layers: int, hidden: int, intermediate: int, heads: int, experts: int) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        num_local_experts=experts,
        use_cache=False,
        experts_implementation="grouped_mm",
    )


# name -> kind of batch, config. Shapes of Llama-3.1-8B, Llama-3.2-1B, SmolLM2-135M, BERT, MiniLM-L6, T5, ViT.
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama-8b": ("causal", lambda: llama(32, 4096, 14336, 32, 8, 128256)),
    "llama-8b-8": ("causal", lambda: llama(8, 4096, 14336, 32, 8, 128256)),
    "llama-1b": ("causal", lambda: llama(16, 2048, 8192, 32, 8, 128256, tied=True)),
    "llama-135m": ("causal", lambda: llama(30, 576, 1536, 9, 3, 49152, tied=True)),
    "bert-base": ("classes", lambda: bert(12, 768, 3072, 12)),
    "bert-large": ("classes", lambda: bert(24, 1024, 4096, 16)),
    "minilm-l6": ("classes", lambda: bert(6, 384, 1536, 12)),
    "t5-base": ("pairs", lambda: t5(12, 768, 2048, 12)),
    "vit-base": ("images", lambda: vit(12, 768, 12)),
    "vit-large": ("images", lambda: vit(24, 1024, 16)),
    "mixtral-small": ("causal", lambda: mixtral(8, 1024, 3584, 16, 8)),
    "llama-tiny": ("causal", lambda: llama(2, 64, 160, 4, 2, 300)),
    "bert-tiny": ("classes", lambda: bert(2, 64, 160, 4)),
}


def make(case: Case, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of a case as it is trained, and a batch for it."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    kind, config = MODELS[case.model]
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
    auto: Any = {
        "causal": AutoModelForCausalLM,
        "classes": AutoModelForSequenceClassification,
        "pairs": AutoModelForSeq2SeqLM,
        "images": AutoModelForImageClassification,
    }[kind]
    torch.manual_seed(0)
    settings = config()
    with torch.device(device):
        model = auto.from_config(settings, dtype=dtype)
    if case.liger and device != "meta":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    model = prepare(model, case).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if case.method != "full":
            model.enable_input_require_grads()
    return model, batch_of(kind, case, settings, device, dtype)


def batch_of(kind: str, case: Case, config: Any, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.device(device):
        if kind == "images":
            pixels = torch.zeros(case.batch, 3, 224, 224, dtype=dtype)
            return {"pixel_values": pixels, "labels": torch.zeros(case.batch, dtype=torch.long)}
        ids = torch.randint(config.vocab_size, (case.batch, case.length))
        if kind == "causal":
            return {"input_ids": ids, "labels": ids.clone()}
        if kind == "pairs":
            return {"input_ids": ids, "labels": ids[:, : case.length // 4].clone()}
        return {"input_ids": ids, "labels": torch.zeros(case.batch, dtype=torch.long)}


# -- methods -----------------------------------------------------------------------------------------------------------


def linear_maps(model: nn.Module, case: Case) -> dict[str, nn.Linear]:
    """The linear maps of the numbered blocks, all of them or those of the top quarter."""
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and any(part.isdigit() for part in name.split("."))
    }
    if case.layers == "all":
        return found

    def depth(name: str) -> tuple[bool, int]:
        return "decoder" in name, int(next(part for part in name.split(".") if part.isdigit()))

    depths = sorted({depth(name) for name in found})
    top = set(depths[-max(1, len(depths) // 4) :])
    return {name: module for name, module in found.items() if depth(name) in top}


def prepare(model: nn.Module, case: Case) -> nn.Module:
    """Make what the method trains require a gradient, and nothing else."""
    from peft import LoraConfig, get_peft_model

    from reltune import ReltuneConfig
    from reltune.plan.plan import ModulePlan, Plan

    model.requires_grad_(False)
    maps = linear_maps(model, case)
    heads = [name for name, _ in model.named_children() if name in ("classifier", "score")]
    if case.method == "full":
        model.requires_grad_(True)
        if case.layers == "top":
            kept = {id(p) for module in maps.values() for p in module.parameters()}
            for p in model.parameters():
                p.requires_grad_(id(p) in kept)
        return model
    if case.method == "bitfit":
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
        return model
    if case.method in ("lora", "lora_bf16", "dora"):
        config = LoraConfig(
            r=case.rank, target_modules=list(maps), modules_to_save=heads or None, use_dora=case.method == "dora"
        )
        return get_peft_model(model, config, autocast_adapter_dtype=case.method != "lora_bf16")
    modules = {}
    for name, module in maps.items():
        shape = tuple(module.weight.shape)
        step = max(1, shape[1] // (2 * case.rank))
        if case.method == "columns":
            modules[name] = ModulePlan(shape, columns=list(range(0, shape[1], step))[: 2 * case.rank])
        elif case.method == "rows":
            modules[name] = ModulePlan(shape, rows=list(range(0, shape[0], max(1, shape[0] // case.rank)))[: case.rank])
        elif case.method == "weights":
            modules[name] = ModulePlan(shape)
            size = shape[0] * shape[1]
            modules[name].take_elements(torch.arange(0, size, case.each))
        else:
            raise ValueError(f"no method is called {case.method!r}")
    numbers = sum(p.numel() for p in model.parameters())
    plan = Plan(modules, "100%", numbers, numbers, fingerprint="", always_trained=heads)
    return get_peft_model(model, ReltuneConfig(plan=plan))


# -- cases -------------------------------------------------------------------------------------------------------------

GPU = [
    Case("llama-8b", "lora", 1, 2048),
    Case("llama-8b", "columns", 4, 2048),
    Case("llama-8b", "full", 1, 1024, checkpointing=True),
    Case("llama-8b", "weights", 2, 2048),
    Case("llama-8b", "columns", 4, 2048, layers="top"),
    Case("llama-8b", "lora_bf16", 8, 2048, checkpointing=True),
    Case("llama-8b", "lora", 2, 2048, liger=True),
    Case("llama-8b", "weights", 4, 2048, liger=True),
    Case("llama-8b", "full", 1, 2048, layers="top"),
    Case("llama-1b", "full", 4, 1024),
    Case("llama-1b", "lora", 8, 1024),
    Case("llama-1b", "columns", 8, 1024, liger=True),
    Case("llama-1b", "lora", 4, 512, dtype="float32"),
    Case("llama-1b", "full", 2, 2048, dtype="autocast"),
    Case("llama-1b", "columns", 4, 1024, dtype="autocast"),
    Case("llama-1b", "dora", 4, 1024),
    Case("llama-1b", "full", 8, 2048, checkpointing=True, liger=True),
    Case("llama-8b-8", "full", 2, 2048),
    Case("llama-8b-8", "rows", 4, 1024),
    Case("llama-135m", "full", 16, 512),
    Case("llama-135m", "weights", 16, 512),
    Case("llama-135m", "lora", 4, 1024, dtype="autocast"),
    Case("bert-base", "full", 64, 128, dtype="float32"),
    Case("bert-base", "lora", 64, 256, dtype="autocast"),
    Case("bert-large", "full", 32, 512, dtype="autocast"),
    Case("bert-large", "columns", 32, 512),
    Case("bert-large", "weights", 16, 512, layers="top"),
    Case("bert-large", "bitfit", 32, 256, dtype="float32"),
    Case("t5-base", "full", 16, 512),
    Case("t5-base", "lora", 16, 512, dtype="float32"),
    Case("t5-base", "columns", 16, 512, checkpointing=True),
    Case("vit-base", "full", 64, 224, dtype="autocast"),
    Case("vit-large", "lora", 64, 224),
    Case("vit-large", "weights", 64, 224, dtype="float32"),
    Case("mixtral-small", "full", 4, 1024),
    Case("mixtral-small", "lora", 8, 1024),
]

CPU = [
    Case("minilm-l6", "full", 32, 64, dtype="float32"),
    Case("minilm-l6", "lora", 32, 256, dtype="float32"),
    Case("minilm-l6", "columns", 64, 128, dtype="float32"),
    Case("minilm-l6", "weights", 64, 128, dtype="float32", layers="top"),
    Case("minilm-l6", "full", 64, 256, dtype="float32", checkpointing=True),
    Case("bert-base", "full", 16, 128, dtype="float32"),
    Case("bert-base", "lora", 16, 256, dtype="float32"),
    Case("bert-base", "columns", 16, 128, dtype="float32", layers="top"),
    Case("bert-base", "bitfit", 8, 256, dtype="float32"),
    Case("llama-135m", "full", 2, 256, dtype="float32"),
    Case("llama-135m", "lora", 2, 256, dtype="float32"),
    Case("llama-135m", "columns", 4, 256, dtype="float32"),
    Case("llama-135m", "weights", 2, 512, dtype="float32"),
    Case("llama-135m", "lora", 4, 256, dtype="float32", checkpointing=True),
    Case("llama-135m", "columns", 2, 256, dtype="bfloat16", layers="top"),
    Case("t5-base", "lora", 4, 128, dtype="float32"),
    Case("t5-base", "full", 2, 128, dtype="float32"),
    Case("vit-base", "columns", 8, 224, dtype="float32"),
    Case("vit-base", "full", 8, 224, dtype="float32"),
    Case("mixtral-small", "lora", 2, 128, dtype="float32"),
]


def drawn(seed: int, count: int, gpu: bool, liger: bool) -> list[Case]:
    """Cases drawn from all combinations, none of which is in the lists."""
    sizes = {
        "llama-8b": ([1, 2, 4], [512, 1024, 2048]),
        "llama-1b": ([2, 4, 8], [512, 1024, 2048]),
        "llama-135m": ([4, 8, 32], [256, 512, 1024]),
        "bert-base": ([16, 32, 64], [128, 256, 512]),
        "bert-large": ([8, 16, 32], [128, 256, 512]),
        "t5-base": ([4, 8, 16], [256, 512]),
        "vit-base": ([16, 32, 128], [224]),
        "vit-large": ([16, 32, 64], [224]),
        "mixtral-small": ([2, 4, 8], [512, 1024]),
    }
    if not gpu:
        sizes = {
            "minilm-l6": ([16, 32, 64], [64, 128, 256]),
            "bert-base": ([4, 8, 16], [64, 128, 256]),
            "llama-135m": ([1, 2, 4], [128, 256]),
            "t5-base": ([2, 4], [64, 128]),
            "vit-base": ([4, 8, 16], [224]),
            "mixtral-small": ([1, 2], [64, 128]),
        }
    generator = random.Random(seed)
    found: list[Case] = []
    while len(found) < count:
        model = generator.choice(list(sizes))
        batches, lengths = sizes[model]
        case = Case(
            model,
            generator.choice(["full", "lora", "lora_bf16", "columns", "weights", "rows"]),
            generator.choice(batches),
            generator.choice(lengths),
            generator.choice(
                ["float32", "bfloat16", "autocast"]
                if gpu and model != "llama-8b"
                else ["bfloat16" if gpu else "float32"]
            ),
            generator.choice(["all", "all", "top"]),
            generator.random() < 0.25,
            liger and model.startswith("llama") and generator.random() < 0.3,
            generator.choice([8, 16, 32]),
        )
        known = case in found or case in GPU or case in CPU
        too_large = model == "llama-8b" and case.method == "full" and case.layers == "all"
        if not known and not too_large:
            found.append(case)
    return found


# -- measuring ---------------------------------------------------------------------------------------------------------


def step(model: Any, batch: Mapping[str, Tensor], optimizer: Any, autocast: bool, device: str) -> None:
    with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_on_gpu(case: Case) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, batch = make(case, "cuda")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    autocast = case.dtype == "autocast"
    for _ in range(2):
        step(model, batch, optimizer, autocast, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(model, batch, optimizer, autocast, "cuda")
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return {
        "trained": sum(p.numel() for p in trained),
        "before_bytes": before,
        "held_bytes": held,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "seconds": seconds,
    }


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure_on_cpu(case: Case) -> dict[str, Any]:
    """In a process of its own. What imports and a first product take is held before."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    make(Case("llama-tiny", case.method if case.method != "bitfit" else "full", 1, 8, case.dtype), "cpu")
    warm = torch.randn(64, 64, requires_grad=True)
    (warm @ warm).sum().backward()
    gc.collect()
    before = resident()
    model, batch = make(case, "cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    autocast = case.dtype == "autocast"
    step(model, batch, optimizer, autocast, "cpu")
    seconds = []
    for _ in range(STEPS - 1):
        started = time.perf_counter()
        step(model, batch, optimizer, autocast, "cpu")
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "trained": sum(p.numel() for p in trained),
        "before_bytes": before,
        "peak_bytes": peak,
        "seconds": seconds,
    }


def calibrate(device: str) -> dict[str, Any]:
    from reltune.cost import calibration

    return calibration.measure(torch.device(device)).to_dict()


def measure(options: argparse.Namespace) -> int:
    gpu = options.device != "cpu"
    if options.case:
        print(json.dumps(measure_on_cpu(Case(**json.loads(options.case)))))
        return 0
    cases: Sequence[Case] = GPU if gpu else CPU
    if options.drawn:
        cases = drawn(*options.drawn, gpu=gpu, liger=gpu)
    if options.tiny:
        cases = [Case("llama-tiny", "columns", 2, 16, "float32"), Case("bert-tiny", "weights", 2, 16, "float32")]
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "benchmark": "cost_sweep",
        **commit(options.commit),
        "hardware": hardware(torch.device(options.device)),
        "versions": versions(["liger-kernel"]),
        "drawn": options.drawn,
        "steps": STEPS,
        "cases": [],
    }
    name = f"cost_sweep_{options.name or options.device}" + ("_drawn" if options.drawn else "")
    path = Path(options.output_dir) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result["calibration"] = calibrate(options.device)
    if gpu:
        warm = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        (warm @ warm).sum().backward()  # the workspaces of products are there before the first case
        torch.cuda.synchronize()
        del warm
        result["workspace_bytes"] = torch.cuda.memory_allocated()
        free, total = torch.cuda.mem_get_info()
        result["context_bytes"] = (
            total - free - torch.cuda.memory_reserved()
        )  # of this process, where it has the device alone
    ends = time.monotonic() + options.seconds
    for case in cases:
        if time.monotonic() > ends:
            print("out of time", file=sys.stderr)
            break
        record: dict[str, Any] = {"case": dataclasses.asdict(case), "error": None}
        try:
            record |= measure_on_gpu(case) if gpu else in_a_process(case, options)
        except Exception as error:  # whatever it is: it belongs into the record, and the others go on
            record["error"] = described(error)
        result["cases"].append(record)
        shown = record["error"] or f"{record['peak_bytes'] / GIB:.3f} GiB, {statistics.median(record['seconds']):.4f} s"
        print(f"{case}: {shown}", file=sys.stderr, flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


def in_a_process(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Twice: with freed memory given back, and with malloc as it is."""
    command = [sys.executable, __file__, "measure", "--device", "cpu", "--case", json.dumps(dataclasses.asdict(case))]
    found: list[dict[str, Any]] = []
    for more in ({"MALLOC_MMAP_THRESHOLD_": str(MAPPED)}, {}):
        done = subprocess.run(
            [*command, "--threads", str(options.threads)],
            capture_output=True,
            text=True,
            timeout=options.seconds,
            env=os.environ | more,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    mapped, kept = found
    growth = kept["peak_bytes"] - kept["before_bytes"]
    return mapped | {"growth_with_malloc_as_it_is": growth, "seconds_with_malloc_as_it_is": kept["seconds"]}


# -- predicting --------------------------------------------------------------------------------------------------------


def count(case: Case, cuda: bool) -> Any:
    from reltune.cost.step import Conditions, count_step, counting

    conditions = Conditions(cuda=cuda, autocast=torch.bfloat16 if case.dtype == "autocast" else None, liger=case.liger)
    with counting(conditions):
        model, batch = make(case, "meta")
        return count_step(model, batch, conditions)


def predict(options: argparse.Namespace) -> int:
    """Write predictions beside what was measured, and print how near they are."""
    from reltune.cost.calibration import Calibration
    from reltune.cost.memory import allocated, reserved, resident_on_cpu
    from reltune.cost.timing import step_time

    sweeps = []
    for path in options.files:
        sweep = json.loads(Path(path).read_text(encoding="utf-8"))
        cuda = "gpu" in sweep["hardware"]
        calibration = Calibration.from_dict(sweep["calibration"])
        for record in sweep["cases"]:
            if record["error"]:
                continue
            case = Case(**record["case"])
            counted = count(case, cuda)
            time_of = step_time(counted, calibration)
            record["predicted"] = {
                "trained": counted.trained,
                "peak_bytes": allocated(counted) if cuda else resident_on_cpu(counted),
                "reserved_bytes": reserved(counted) if cuda else None,
                "by_area": counted.peak,
                "by_fitcheck": by_fitcheck(case) if cuda else None,
                "seconds": dataclasses.asdict(time_of),
            }
            memory, seconds = _errors(record, cuda)
            print(
                f"{case!s:52} {_peak(record, cuda) / GIB:7.3f} GiB {memory:+7.2%}   "
                f"{statistics.median(record['seconds']) * 1000:8.1f} ms {seconds:+7.1%}",
                flush=True,
            )
        sweeps.append(sweep)
    for sweep in sweeps:
        _table(sweep)
    target = Path(options.output_dir) / "cost_sweep.json"
    target.write_text(json.dumps({"benchmark": "cost_sweep", "sweeps": sweeps}, indent=1) + "\n", encoding="utf-8")
    print(target)
    return 0


def by_fitcheck(case: Case) -> int | None:
    """What fitcheck-llm says of the same case, in bytes, where it knows such cases and is installed; its context included."""
    try:
        from fitcheck.config_parser import ModelConfig, _count_params, _parse_fields
        from fitcheck.estimator import TrainingConfig, estimate
        from fitcheck.gpu_db import get_gpu
    except ImportError:
        return None
    known = case.model.startswith("llama") and case.method in ("lora", "lora_bf16", "full") and case.layers == "all"
    if not known or case.liger or case.dtype == "autocast":
        return None
    fields = _parse_fields(MODELS[case.model][1]().to_dict())
    model = ModelConfig(name=case.model, num_params=_count_params(fields), **dataclasses.asdict(fields))
    precision = "bf16" if case.dtype == "bfloat16" else "fp32"
    training = TrainingConfig(
        precision=precision,
        optimizer_dtype="bf16" if case.method == "full" and precision == "bf16" else "fp32",
        batch_size=case.batch,
        seq_len=case.length,
        lora_rank=None if case.method == "full" else case.rank,
        lora_targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        grad_checkpoint=case.checkpointing,
        flash_attn=True,
    )
    return int(estimate(model, training, get_gpu("h200")).total_mib * 2**20)


def _peak(record: Mapping[str, Any], cuda: bool) -> int:
    return int(record["peak_bytes"]) if cuda else int(record["peak_bytes"] - record["before_bytes"])


def _errors(record: Mapping[str, Any], cuda: bool) -> tuple[float, float]:
    """Of memory and of time: predicted over measured, less one."""
    predicted = record["predicted"]
    seconds = sum(predicted["seconds"].values())
    return predicted["peak_bytes"] / _peak(record, cuda) - 1, seconds / statistics.median(record["seconds"]) - 1


CONTEXT = 550 * 2**20  # as in src/reltune/cost/memory.py


def _table(sweep: Mapping[str, Any]) -> None:
    hardware, cuda = sweep["hardware"], "gpu" in sweep["hardware"]
    errors = [_errors(record, cuda) for record in sweep["cases"] if record["error"] is None]
    failed = sum(record["error"] is not None for record in sweep["cases"])
    kind = "held out" if sweep["drawn"] else "fitted"
    memory, seconds = ([pair[i] for pair in errors] for i in (0, 1))
    print(f"\n{hardware.get('gpu', hardware['cpu'])}, {len(errors)} cases, {kind}; {failed} failed")
    print(f"  memory within 5%: {share(memory, 0.05):.0%}; lowest {min(memory):+.1%}, highest {max(memory):+.1%}")
    beside = [record for record in sweep["cases"] if record["error"] is None and record["predicted"]["by_fitcheck"]]
    if beside:
        context = sweep["context_bytes"]
        theirs = [r["predicted"]["by_fitcheck"] / (r["reserved_bytes"] + context) - 1 for r in beside]
        ours = [(r["predicted"]["reserved_bytes"] + CONTEXT) / (r["reserved_bytes"] + context) - 1 for r in beside]
        for name, found in (("here", ours), ("fitcheck-llm", theirs)):
            mean = statistics.mean(map(abs, found))
            print(
                f"  reserved and context of {len(found)} LoRA and full cases, {name}: mean {mean:.1%}, {min(found):+.1%} to {max(found):+.1%}"
            )
    print(f"  time within 15%: {share(seconds, 0.15):.0%}; lowest {min(seconds):+.1%}, highest {max(seconds):+.1%}")


def share(errors: Sequence[float], limit: float) -> float:
    return sum(abs(error) <= limit for error in errors) / len(errors)


# -- records that were there before ------------------------------------------------------------------------------------

# Methods of tuner_step.py on the 8B model, 4 × 2048 tokens, and the same as cases here. The tuner was another one then, PEFT's LoRA was not.
RECORDED = {
    "LoRA, r = 16, bf16": Case("llama-8b", "lora_bf16", 4, 2048),
    "LoRA, r = 16": Case("llama-8b", "lora", 4, 2048),
}


def of_records(options: argparse.Namespace) -> int:
    """Predict what an earlier record holds, on a card by its data sheet."""
    from reltune.cost.devices import calibration_of, card
    from reltune.cost.memory import allocated
    from reltune.cost.timing import step_time

    calibration = calibration_of(card("h200"))
    assert calibration is not None
    rows = []
    for path in options.files:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        for measured in (m | {"case": c["case"]} for c in record["cases"] for m in c["methods"]):
            case = RECORDED.get(measured["method"])
            if (
                case is None
                or measured["case"].startswith("fp8")
                or measured["error"]
                or not measured.get("peak_bytes")
            ):
                continue
            case = dataclasses.replace(case, liger="liger" in measured["case"])
            # What the process held before, of earlier methods, is not the method's.
            held = min(
                m["held_bytes"][0]
                for c in record["cases"]
                for m in c["methods"]
                if c["case"] == measured["case"] and m["method"] == "floor"
            )
            counted = count(case, cuda=True)
            peak = measured["peak_bytes"][0] - max(0, held - WEIGHTS_8B)
            row = {
                "record": Path(path).name,
                "method": measured["method"],
                "case": dataclasses.asdict(case),
                "measured": {"peak_bytes": peak, "seconds": statistics.median(measured["seconds"])},
                "predicted": {"peak_bytes": allocated(counted), "seconds": step_time(counted, calibration).seconds},
            }
            rows.append(row)
            memory, seconds = (row["predicted"][key] / row["measured"][key] - 1 for key in ("peak_bytes", "seconds"))
            print(
                f"{row['record']:26} {case!s:44} {peak / GIB:7.3f} GiB {memory:+7.2%}  {row['measured']['seconds']:.3f} s {seconds:+6.1%}",
                flush=True,
            )
    target = Path(options.output_dir) / "cost_records.json"
    about = {"benchmark": "cost_records", **commit(options.commit), "versions": versions(), "rows": rows}
    target.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(target)
    return 0


WEIGHTS_8B = 16127780864  # bytes that the model alone holds on the device, with the workspaces


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--device", default="cpu")
    measuring.add_argument("--threads", type=int, default=2)
    measuring.add_argument("--commit", default="")
    measuring.add_argument("--name", default="")
    measuring.add_argument("--drawn", type=int, nargs=2, metavar=("SEED", "N"))
    measuring.add_argument("--seconds", type=float, default=280, help="no case begins later")
    measuring.add_argument("--tiny", action="store_true")
    measuring.add_argument("--case", help=argparse.SUPPRESS)
    measuring.add_argument("--output_dir", default=str(Path(__file__).parent / "results"))
    predicting = commands.add_parser("predict")
    predicting.add_argument("files", nargs="+", metavar="FILE")
    predicting.add_argument("--output_dir", default=str(Path(__file__).parent / "results"))
    records = commands.add_parser("records")
    records.add_argument("files", nargs="+", metavar="FILE")
    records.add_argument("--commit", default="")
    records.add_argument("--output_dir", default=str(Path(__file__).parent / "results"))
    options = parser.parse_args()
    if options.command == "records":
        return of_records(options)
    return measure(options) if options.command == "measure" else predict(options)


if __name__ == "__main__":
    raise SystemExit(main())
