"""Peak memory of analysing a checkpoint that is not loaded, beside its largest tensor; and of loading it, to compare.

    python benchmarks/streaming_memory.py --commit HASH --output_dir benchmarks/results

Writes a checkpoint of Llama's shapes with random bfloat16 weights, shard by shard, and analyses it in a fresh process per
run. Peak is the process's largest resident memory less what it has after its imports. Part of it are pages of the files,
which the system drops where memory is short; the anonymous peak (the largest of samples 20 ms apart) is without them. Every
run, failed ones too, is in the JSON. 70B shapes, the tallest and the widest matrix:

    python benchmarks/streaming_memory.py --layers 1 --hidden 8192 --intermediate 28672 --repeats 1 --device cpu \
        --only spectral_snr,principal --target_modules embed_tokens down_proj --name streaming_memory_70b …
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RUNS = (  # how, criteria, device
    ("streaming", ["magnitude"], "cpu"),
    ("streaming", ["magnitude", "random", "depth"], "cpu"),
    ("streaming", ["spectral_snr"], "cpu"),
    ("streaming", ["principal"], "cpu"),
    ("streaming", ["spectral_snr", "principal"], "cpu"),
    ("streaming", ["spectral_snr", "principal"], "cuda"),
    ("loaded", ["magnitude"], "cpu"),
)


def write_checkpoint(path: Path, layers: int, hidden: int, intermediate: int, vocab: int) -> dict[str, int]:
    """A sharded checkpoint, one shard per layer; gives its sizes in bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
    )
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    places = {name: f"shard-{name.split('.')[2] if '.layers.' in name else name}.safetensors" for name in shapes}
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for file in sorted(set(places.values())):
        held = {
            name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items() if places[name] == file
        }
        for tensor in held.values():  # the same numbers over and over: drawing them all takes longer than the runs
            for part in tensor.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
        save_file(held, path / file, {"format": "pt"})
        del held
    sizes = [2 * math.prod(shape) for shape in shapes.values()]
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return {"largest_tensor_bytes": max(sizes), "checkpoint_bytes": sum(sizes), "tensors": len(sizes)}


def one_run(path: str, how: str, criteria: list[str], device: str, target_modules: list[str]) -> dict[str, Any]:
    """In a process of its own: what the analysis takes."""
    import torch
    from transformers import AutoModelForCausalLM

    from reltune.relevance.measure import analyze
    from reltune.relevance.weights.scan import analyze_checkpoint

    if device == "cuda" and not torch.cuda.is_available():
        return {"error": "no CUDA device"}
    before, anonymous_before = _status("VmRSS"), _status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew from here
    asked: dict[str, Any] = {"criteria": criteria, "target_modules": target_modules, "progress": False}
    started, worked = time.perf_counter(), time.process_time()
    with _anonymous_peak() as anonymous:
        if how == "streaming":
            found = analyze_checkpoint(path, device=device, **asked)
        else:
            found = analyze(AutoModelForCausalLM.from_pretrained(path), **asked)
    result = {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - worked,
        "peak_bytes": _status("VmHWM") - before,
        "peak_anonymous_bytes": anonymous[0] - anonymous_before,
        "imports_bytes": before,
        "modules": len(found.inventory.modules),
        "fingerprint": found.fingerprint,
    }
    if device == "cuda":
        result["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return result


@contextlib.contextmanager
def _anonymous_peak() -> Iterator[list[int]]:
    """A list whose one number is the largest anonymous memory seen so far."""
    largest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            largest[0] = max(largest[0], _status("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield largest
    finally:
        done.set()
        thread.join()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measured(
    path: Path,
    how: str,
    criteria: list[str],
    device: str,
    target_modules: Sequence[str] = (),
    timeout: float | None = None,
) -> dict[str, Any]:
    """``one_run`` in a fresh process."""
    run = {"how": how, "criteria": criteria, "device": device}
    command = [sys.executable, __file__, "--run", json.dumps([str(path), how, criteria, device, list(target_modules)])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        answer = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-500:]}
    except subprocess.TimeoutExpired:
        answer = {"error": f"took more than {timeout:.0f} s"}
    return {**run, **answer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="only runs whose criteria, joined by commas, are among these; a|b,c")
    parser.add_argument("--device", default="", help="only runs on this device")
    parser.add_argument("--target_modules", nargs="*", default=[], help="as in analyze; none means all")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--name", default="streaming_memory", help="of the result file")
    parser.add_argument("--commit", default="")
    parser.add_argument("--output_dir", default="")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(one_run(*json.loads(options.run))))
        return
    if not options.output_dir:
        parser.error("--output_dir is missing")

    import torch
    import transformers

    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        shape = {name: getattr(options, name) for name in ("layers", "hidden", "intermediate", "vocab")}
        sizes = write_checkpoint(Path(scratch), **shape)
        for how, criteria, device in RUNS:
            if options.only and ",".join(criteria) not in options.only.split("|"):
                continue
            if options.device not in ("", device):
                continue
            for _ in range(options.repeats):
                run = measured(Path(scratch), how, criteria, device, options.target_modules, options.timeout)
                for kind in ("peak", "peak_anonymous"):
                    if f"{kind}_bytes" in run:
                        run[f"{kind}_over_largest_tensor"] = run[f"{kind}_bytes"] / sizes["largest_tensor_bytes"]
                runs.append(run)
                print(json.dumps(run), flush=True)
    result = {
        "benchmark": "streaming_memory",
        "commit": options.commit,
        "arguments": {
            **shape,
            "dtype": "bfloat16",
            "repeats": options.repeats,
            "target_modules": options.target_modules,
        },
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **sizes,
        "runs": runs,
    }
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    target = Path(options.output_dir) / f"{options.name}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
