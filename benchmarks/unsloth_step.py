"""One training step of Unsloth's 16-bit LoRA on the model and batch of tuner_step.py, in a process of its own: Unsloth changes Transformers when imported.

On a GPU, without a network, with Unsloth and what it needs on PYTHONPATH:

    HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 UNSLOTH_DISABLE_STATISTICS=1 PYTHONPATH=UNSLOTH python3 benchmarks/unsloth_step.py \
        --output_dir benchmarks/results

The base is written to a temporary directory with a tokenizer made up for it, as Unsloth loads from files only. Steps are timed as
in tuner_step.py: forward, backward, fused AdamW, clear gradients; the peak is torch's allocator's within the timed steps.
"""

from __future__ import annotations

import unsloth  # noqa: F401  first, as it asks to be; isort: skip
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from unsloth import FastLanguageModel

from harness import commit, hardware, versions
from llama import PROJECTIONS, TINY, Shape, llama, made_up_tokenizer, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="with Unsloth's own gradient checkpointing")
    parser.add_argument("--commit", default="")
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()
    shape = TINY if options.tiny else Shape()
    with tempfile.TemporaryDirectory() as directory:
        base = llama(shape, "cuda")
        base.save_pretrained(directory, max_shard_size="40GB")
        made_up_tokenizer(shape.vocabulary).save_pretrained(directory)
        del base
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(
            directory, max_seq_length=options.tokens, dtype=torch.bfloat16, load_in_4bit=False
        )
    model = FastLanguageModel.get_peft_model(
        model,
        r=options.r,
        lora_alpha=options.r,
        target_modules=PROJECTIONS,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing="unsloth" if options.checkpointing else False,
    )
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    batch = {name: tensor.cuda() for name, tensor in texts(shape, options.examples, options.tokens).items()}
    losses = []

    def step() -> torch.Tensor:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for _ in range(3):
        losses.append(step())
    repeats = []
    for _ in range(options.repeats):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        losses += [step() for _ in range(options.steps)]
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / options.steps
        repeats.append({"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated()})
    record = {
        "commit": commit(options.commit),
        "hardware": hardware(torch.device("cuda")),
        "versions": versions(["unsloth", "unsloth_zoo", "triton"]),
        "options": {k: v for k, v in vars(options).items() if k not in ("commit", "output_dir")},
        "trained": sum(p.numel() for p in parameters),
        "trained dtype": str(parameters[0].dtype),
        "repeats": repeats,
        "losses": [loss.item() for loss in losses],
    }
    path = Path(options.output_dir) / "unsloth_step.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    median = statistics.median(r["seconds"] for r in repeats)
    print(f"Unsloth LoRA r = {options.r}: {median:.3f} s, {max(r['peak_bytes'] for r in repeats) / 2**30:.1f} GiB")
    print("losses", [round(loss.item(), 4) for loss in losses[:4]], "…", round(losses[-1].item(), 4))


if __name__ == "__main__":
    main()
