"""One training step of a small encoder on a CPU: selected columns and single weights beside full fine-tuning, LoRA and the
frozen floor.

    python benchmarks/tuner_minilm.py          (about 5 minutes on 2 cores)
    python benchmarks/tuner_minilm.py --tiny --output_dir /tmp

The model has MiniLM-L6's shapes and random weights in float32 with a classification head that every method trains, the
batch is 32 × 64 tokens, the optimizer AdamW as Trainer takes it on a CPU. Everything else is as in tuner_step.py: methods
take turns on one base model, each step is forward, backward, optimizer step, write-back and clearing of gradients.
"""

from __future__ import annotations

import argparse
import functools
import re

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from harness import Method, arguments, benchmark
from reltune import ReltuneConfig
from reltune.plan.plan import ModulePlan, Plan
from tuner_step import SHARE, Prepare, Training, floor, ratios

MANY = 0.005
LINEAR = r".*encoder.*\.(query|key|value|dense)"  # every linear map but the pooler's and the head's


def minilm(layers: int, tiny: bool) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "vocab_size": 30522}
    if tiny:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    config = BertConfig(num_hidden_layers=layers, num_labels=2, **sizes)
    return BertForSequenceClassification(config).requires_grad_(False)


def full(base: nn.Module) -> nn.Module:
    return _Full(base)


class _Full(nn.Module):
    """The base model with everything trained, and a way back."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(True)

    def forward(self, **batch: torch.Tensor) -> object:
        return self.base(**batch)

    def unload(self) -> nn.Module:
        return self.base.requires_grad_(False)


def columns(r: int, layers: list[int] | None = None) -> Prepare:
    config = {"target_modules": LINEAR, "r": r, "modules_to_save": ["classifier"]}
    if layers is not None:
        config["target_modules"] = rf".*encoder\.layer\.({'|'.join(map(str, layers))})\..*\.?(query|key|value|dense)"
    return lambda base: get_peft_model(base, ReltuneConfig(**config))


def single_weights(base: nn.Module, share: float) -> Prepare:
    """So many of all parameters, at random places of the linear maps."""
    parameters = sum(p.numel() for p in base.parameters())
    targets = {name: module for name, module in base.named_modules() if re.fullmatch(LINEAR, name)}
    of_target = share * parameters / sum(module.weight.numel() for module in targets.values())
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, module in targets.items():
        modules[name] = ModulePlan(tuple(module.weight.shape))
        count = (max(1, round(of_target * module.weight.numel())),)
        modules[name].take_elements(torch.randint(module.weight.numel(), count, generator=generator).unique())
    total = sum(chosen.parameters for chosen in modules.values())
    plan = Plan(modules, str(total), total, parameters, fingerprint="")
    return lambda base: get_peft_model(base, ReltuneConfig(plan=plan, modules_to_save=["classifier"]))


def lora(r: int) -> Prepare:
    return lambda base: get_peft_model(base, LoraConfig(target_modules=LINEAR, r=r, modules_to_save=["classifier"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model: does the script run?")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--columns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    options = arguments(parser, "tuner_minilm")
    if options.tiny:
        options.examples, options.tokens, options.repeats = 2, 8, 2
    bench = benchmark(options)
    layers = 6
    base = minilm(layers, options.tiny)
    generator = torch.Generator().manual_seed(0)
    shape = (options.examples, options.tokens)
    batch = {
        "input_ids": torch.randint(base.config.vocab_size, shape, generator=generator),
        "labels": torch.randint(2, shape[:1], generator=generator),
    }
    r, top = options.columns, list(range(layers // 2, layers))
    ours, low = f"columns, r = {r}", f"columns, r = {r}, top {len(top)} layers"
    methods: dict[str, Prepare] = {"full": full, f"LoRA, r = {r}": lora(r), ours: columns(r), low: columns(r, top)}
    single, many = (f"single weights, {share:.2%}" for share in (SHARE, MANY))
    methods |= {single: single_weights(base, SHARE), many: single_weights(base, MANY)}
    trainings = {key: Training(base, batch, prepare, options.steps, 1e-5) for key, prepare in methods.items()}
    base.train()
    records = bench.measure(
        "step",
        {"model": "MiniLM-L6 shapes", "examples": options.examples, "tokens": options.tokens, "dtype": "float32"},
        [
            *(Method(key, training.run, training.around) for key, training in trainings.items()),
            Method("floor", functools.partial(floor, base, batch, options.steps)),
        ],
        options.repeats,
    )
    for key, training in trainings.items():
        records[key]["config"] = {"trained": training.trained, "losses": training.losses}
    ratios(bench, "step", ours, "full", 0.74, None, gpu=False)
    ratios(bench, "step", ours, f"LoRA, r = {r}", 0.82, None, gpu=False)
    ratios(bench, "step", low, "full", 0.59, None, gpu=False)
    ratios(bench, "step", single, "full", 0.80, None, gpu=False)
    ratios(bench, "step", single, f"LoRA, r = {r}", 1.00, None, gpu=False)
    ratios(bench, "step", many, "full", 0.90, None, gpu=False)
    return bench.finish(options.output_dir, options.name)


if __name__ == "__main__":
    raise SystemExit(main())
