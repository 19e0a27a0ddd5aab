"""Where each millisecond of a training step goes on a GPU: time of the device's kernels by kind, method beside method.

On one GPU of 80 GB or more, without a network, from the repository's root (about 1 minute on an H200):

    PYTHONPATH=src:LIGER PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/step_profile.py \
        --device cuda --commit COMMIT --output_dir benchmarks/results

The step is that of tuner_step.py, with Liger kernels. Each method is profiled by torch.profiler in STEPS steps after as many
that are timed without it. ``idle`` is the time between one kernel and the next, most of it where the device waits for the host,
and ``waits`` says in front of which kernels it is.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from harness import Machine, arguments, benchmark
from llama import TINY, Shape, described, llama, texts
from tuner_step import FLOAT8, SHARE, Training, columns, floor, lora, single_weights

KINDS = {  # parts of a kernel's name -> what it does, the first that fits
    "sampled product": ("sampled_sums", "add_parts", "sampled_kernel"),
    "gradient of columns": ("gradient_kernel",),
    "write back": ("copy_kernel", "index_copy", "index_put"),
    "gather": ("index_select", "indexSelect", "gather"),
    "optimizer": ("FusedAdam", "fused_adam", "multi_tensor_apply"),
    "attention": ("flash", "fmha", "attention", "cudnn_generated"),
    "product in float8": ("nvjet_sm90_qq", "e4m3"),
    "rounding to float8": ("rows_kernel", "transpose_kernel"),
    "columns beside the product": ("add_kernel", "change_kernel"),
    "matrix product": ("gemm", "nvjet", "cutlass", "xmma", "splitK"),
    "norms and gated products": ("rms_norm", "swiglu", "forward_kernel", "backward_kernel"),
    "rotary embedding": ("rope",),
    "loss": ("cross_entropy",),
    "addition": ("CUDAFunctor_add",),
    "sum": ("reduce_kernel",),
    "copy or cast": ("copy", "Memcpy", "CatArray"),
    "fill": ("Fill", "Memset"),
}


def kind(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise, other")


def profiled(run: Any, steps: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of one step: of the step itself, and of its kernels by kind and by name, with how many there are."""
    machine = Machine(device)
    started = machine.now()
    run()
    seconds = machine.now() - started
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as found:
        run()
        machine.now()
    kinds: dict[str, float] = {}
    names: dict[str, list[float]] = {}
    for event in found.key_averages():
        time = (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1000 / steps
        kinds[kind(event.key)] = kinds.get(kind(event.key), 0) + time
        names[event.key[:100]] = [round(time, 3), event.count / steps]
    waits = gaps(found.events()) if device.type == "cuda" else {}
    kinds["idle"] = sum(waits.values()) / steps
    return {
        "step": round(seconds * 1000 / steps, 2),
        "waits": {
            name[:100]: round(time / steps, 3) for name, time in sorted(waits.items(), key=lambda of: -of[1])[:12]
        },
        "kinds": {name: round(time, 2) for name, time in sorted(kinds.items(), key=lambda of: -of[1])},
        "kernels": dict(sorted(names.items(), key=lambda of: -of[1][0])[:40]),
    }


def gaps(events: Any) -> dict[str, float]:
    """Milliseconds for which no kernel runs, by the name of the one that follows."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.key)
        for event in events
        if event.device_type == DeviceType.CUDA
    )
    found: dict[str, float] = {}
    end = kernels[0][0]
    for start, stop, name in kernels:
        if start > end:
            found[name] = found.get(name, 0) + (start - end) / 1000
        end = max(end, stop)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--methods", nargs="*")
    options = arguments(parser, "step_profile")
    shape = Shape()
    if options.tiny:
        shape, options.examples, options.tokens, options.columns = TINY, 2, 16, 4
    bench = benchmark(options, ["liger-kernel"])
    base = llama(shape, options.device)
    if options.device != "cpu":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=base)
    base.train()
    batch = {key: value.to(options.device) for key, value in texts(shape, options.examples, options.tokens).items()}
    device, r = torch.device(options.device), options.columns
    methods = {
        f"single weights, {SHARE:.2%}": single_weights(base, SHARE),
        "single weights, 0.50%": single_weights(base, 0.005),
        f"columns, r = {r}": columns(r),
        f"LoRA, r = {max(r // 2, 1)}, bf16": lora(max(r // 2, 1), autocast=False),
    }
    floor(base, batch, 2)
    bench.value("step", described(shape, examples=options.examples, tokens=options.tokens))
    profiles = {"floor": profiled(lambda: floor(base, batch, options.steps), options.steps, device)}
    fp8 = f"columns, r = {r}, fp8"
    methods[fp8] = columns(r, frozen_dtype=FLOAT8)  # the last: the base is changed for good
    for name, prepare in methods.items():
        if options.methods and not any(part in name for part in options.methods):
            continue
        training = Training(base, batch, prepare, options.steps, 1e-5)
        with training.around():
            training.run()
            profiles[name] = profiled(training.run, options.steps, device)
    for name, found in profiles.items():
        bench.value(name, found)
        bench.check(
            f"{name}: share of a step in which no kernel runs",
            found["kinds"]["idle"] / found["step"],
            0.05,
            required=False,
        )
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
