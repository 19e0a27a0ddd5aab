"""Whether inputs that are made again give what kept ones give, on this device, with its compiled kernels.

    PYTHONPATH=src python3 benchmarks/inputs_check.py --device cuda

takes about a minute on a GPU; exit code 1 if anything differs. On a CPU the references run in the kernels' place.

- The fused norm, the gated product and the rotation, with their gradients, against float64; and how many of their numbers are those
  that PyTorch's own operations give. The loss without logits, with its gradient, against float64.
- Chosen numbers of a product, by the kernel, against float64.
- Small Llama, Qwen3, GPT-2 and BERT models: votes of a probe, and losses and trained values of single weights, rows, columns and
  gains, with inputs made again, with inputs kept, and with nothing fused; also with gradient checkpointing and autocast.
- What the forward pass of a Llama layer leaves in memory for the backward pass, per token, in units of its sizes.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import reltune
from reltune import ReltuneConfig
from reltune.layers import deferred_logits, fused
from reltune.ops import recompute
from reltune.ops.attach_elements import Places, element_gradient
from reltune.ops.gated_product import ACTIVATIONS, GatedProduct, gated_product_reference
from reltune.ops.linear_cross_entropy import linear_cross_entropy
from reltune.ops.rms_norm import RMSNorm, rms_norm_reference
from reltune.ops.rotation import Rotation, rotated_reference
from reltune.plan.plan import ModulePlan, Plan

STEP = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SIZES = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2, "num_attention_heads": 4}
EAGER = {"attn_implementation": "eager"}  # the fused ones add up in an order that changes from run to run
failures: list[str] = []


def report(what: str, found: float, limit: float) -> None:
    good = found <= limit
    print(f"{'ok  ' if good else 'FAIL'} {what}: {found:.3g} (at most {limit:.3g})", flush=True)
    if not good:
        failures.append(what)


def numbers(device: str, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def against(
    what: str, fused: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], g: Tensor
) -> None:
    """Value and gradients against the reference in float64, and in the inputs' own type."""
    results = []
    for dtype, function in ((None, fused), (torch.float64, reference), (None, reference)):
        own = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        y = function(*own)
        y.backward(g.to(y.dtype))
        results.append([y.detach(), *(x.grad for x in own)])
    for name, found, wide, plain in zip(["value", *"abc"], *results, strict=False):
        scale = wide.abs().max()
        report(f"{what}, {name}", float((found - wide).abs().max() / scale), STEP[found.dtype])
        if found.dtype != torch.float32 and not (
            name == "b" and "Norm" in what
        ):  # of a gain PyTorch adds up rounded products
            report(f"{what}, {name}, other than PyTorch's", float((found != plain).float().mean()), 0.15)


def kernels(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        for rows, features in ((8192, 4096), (37, 2050), (1000, 128), (3, 16384)):
            x, g = (numbers(device, rows, features, dtype=dtype, seed=seed) for seed in range(2))
            gain = 1 + numbers(device, features, dtype=dtype, seed=2) / 4
            against(
                f"RMSNorm {rows} × {features} {short}",
                lambda x, w: RMSNorm.apply(x, w, 1e-5),
                lambda x, w: rms_norm_reference(x, w, 1e-5),
                [x, gain],
                g,
            )
        for activation in ACTIVATIONS:
            gate, up, g = (3 * numbers(device, 999, 1437, dtype=dtype, seed=seed) for seed in range(3))
            against(
                f"gated product, {activation} {short}",
                lambda a, b, activation=activation: GatedProduct.apply(a, b, activation),
                lambda a, b, activation=activation: gated_product_reference(a, b, activation),
                [gate, up],
                g,
            )
        cos, sin = (numbers(device, 1, 300, 128, dtype=dtype, seed=seed) for seed in range(2))
        x, g = (numbers(device, 2, 300, 5, 128, dtype=dtype, seed=seed).transpose(1, 2) for seed in (2, 3))
        against(
            f"rotation {short}",
            lambda x, cos=cos, sin=sin: Rotation.apply(x, x[:, :1], cos, sin)[0],
            lambda x, cos=cos, sin=sin: rotated_reference(x, cos.to(x.dtype), sin.to(x.dtype)),
            [x],
            g,
        )
        loss_without_logits(device, dtype)
        for vectors, rows, columns, share in (
            (8192, 1024, 4096, 0.001),
            (777, 130, 517, 0.02),
            (64, 4096, 1024, 0.005),
        ):
            a, b = (
                numbers(device, vectors, rows, dtype=dtype, seed=0),
                numbers(device, vectors, columns, dtype=dtype, seed=1),
            )
            places = torch.randperm(rows * columns)[: int(share * rows * columns)].sort().values.int().to(device)
            found = element_gradient(a, b, Places(places, (rows, columns)), "sampled")
            wanted = (a.double().mT @ b.double()).flatten()[places.long()]
            report(
                f"sampled product {vectors} × {rows} × {columns} {short}",
                float((found - wanted).abs().max()),
                1e-5 * vectors,
            )


def loss_without_logits(device: str, dtype: torch.dtype) -> None:
    """Cross entropy behind an output map of many classes, in several blocks, against float64."""
    short = str(dtype).removeprefix("torch.")
    classes, tokens = (128256, 2500) if device != "cpu" else (3000, 50)
    x, weight = (
        numbers(device, tokens, 256, dtype=dtype, seed=0),
        numbers(device, classes, 256, dtype=dtype, seed=1) / 16,
    )
    labels = torch.randint(classes, (tokens,), generator=torch.Generator().manual_seed(2)).to(device)
    own, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    found = linear_cross_entropy(own, weight, None, labels)
    found.losses.mean().backward()
    logits = wide @ weight.double().T
    torch.nn.functional.cross_entropy(logits, labels).backward()
    with torch.no_grad():
        shares = logits.softmax(-1)
        wanted = -shares.gather(1, labels[:, None]).squeeze(1).log()
        report(f"loss without logits {short}", float((found.losses - wanted).abs().max() / wanted.max()), STEP[dtype])
        entropies = torch.special.entr(shares).sum(-1)
        report(f"entropy {short}", float((found.entropies - entropies).abs().max() / entropies.max()), STEP[dtype])
        error = float((own.grad - wide.grad).norm() / wide.grad.norm())
        report(f"loss without logits {short}, gradient", error, STEP[dtype])


def models() -> dict[str, Callable[[], Any]]:
    language = {**SIZES, **EAGER, "vocab_size": 320, "max_position_embeddings": 64, "pad_token_id": 0}
    gpt = GPT2Config(
        vocab_size=320, n_embd=256, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False, **EAGER
    )
    gpt.attn_pdrop = gpt.embd_pdrop = gpt.resid_pdrop = 0.0
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**language, num_key_value_heads=2)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**language, num_key_value_heads=2, head_dim=64)),
        "gpt2": lambda: GPT2LMHeadModel(gpt),
        "bert": lambda: BertForSequenceClassification(
            BertConfig(**language, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        ),
    }


def made(name: str, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = models()[name]().to(device, dtype)
    ids = torch.randint(1, 320, (4, 48), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(4) % 2 if name == "bert" else ids.clone()
    return model, {"input_ids": ids, "labels": labels}


def plan_of(base: nn.Module) -> Plan:
    modules = {}
    for name, module in base.named_modules():
        weight: Any = getattr(module, "weight", None)
        if weight is None or "lm_head" in name or isinstance(module, nn.Embedding):
            continue
        if weight.ndim == 1:
            modules[name] = ModulePlan(tuple(weight.shape), weight=True)
            continue
        shape = tuple(weight.shape) if isinstance(module, nn.Linear) else tuple(weight.mT.shape)
        modules[name] = ModulePlan(shape, rows=[1], columns=[2])
        index = torch.arange(5, weight.numel(), 173)
        modules[name].take_elements(index[(index // shape[1] != 1) & (index % shape[1] != 2)])
    return Plan(modules, "all", 10**9, 10**9, "")


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """again, kept, or plain: with nothing fused."""
    with recompute.force(name == "again"):
        if name == "plain":
            with (
                mock.patch.object(fused, "_can_compute", lambda x: False),
                mock.patch.object(deferred_logits, "defer", lambda *_: False),
            ):
                yield
        else:
            yield


def train(
    name: str, device: str, dtype: torch.dtype, how: str, checkpointing: bool = False, autocast: bool = False
) -> tuple[list[float], Tensor]:
    base, batch = made(name, device, dtype)
    model: Any = get_peft_model(base, ReltuneConfig(plan=plan_of(base)), autocast_adapter_dtype=dtype != torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    batch = {key: value.to(device) for key, value in batch.items()}
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    with way(how):
        for _ in range(5):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten().float() for p in parameters])


def trainings(device: str) -> None:
    for name in models():
        for dtype in (torch.float32, torch.bfloat16):
            short = f"{name} {str(dtype).removeprefix('torch.')}"
            found = {how: train(name, device, dtype, how) for how in ("again", "kept", "plain")}
            exact = "bert" not in name and "gpt2" not in name  # whose layer norms are made again up to a rounding
            limit = 1e-4 if dtype == torch.float32 else 2e-2
            for other, most in (("kept", limit / 20 if exact else limit), ("plain", limit)):
                far = max(abs(a - b) / abs(b) for a, b in zip(found["again"][0], found[other][0], strict=True))
                report(f"{short}: losses, made again and {other}", far, most)
            moved = float((found["kept"][1] - train_start(name, device, dtype)).abs().mean())
            far = float((found["again"][1] - found["kept"][1]).abs().mean()) / moved
            report(f"{short}: trained values, made again and kept, over what they moved", far, 1e-3 if exact else 0.05)
            drop = found["kept"][0][-1] / found["kept"][0][0]
            report(f"{short}: last loss over the first", drop, 0.999)
    for options in ({"checkpointing": True}, {"autocast": True}):
        pair = [train("llama", device, torch.float32, how, **options) for how in ("again", "kept")]
        far = max(abs(a - b) / abs(b) for a, b in zip(pair[0][0], pair[1][0], strict=True))
        report(f"llama {options}: losses, made again and kept", far, 1e-3 if "autocast" in options else 1e-5)


def train_start(name: str, device: str, dtype: torch.dtype) -> Tensor:
    base, _ = made(name, device, dtype)
    model: Any = get_peft_model(base, ReltuneConfig(plan=plan_of(base)), autocast_adapter_dtype=dtype != torch.float32)
    return torch.cat([p.detach().flatten().float() for p in model.parameters() if p.requires_grad])


def probes(device: str) -> None:
    for name in models():
        for dtype in (torch.float32, torch.bfloat16):
            found = []
            for how in ("again", "kept", "plain"):
                model, batch = made(name, device, dtype)
                loss = "sequence_classification" if name == "bert" else "causal_lm"
                with way(how):
                    scores = reltune.analyze(
                        model,
                        [batch],
                        loss,
                        "movement",
                        elements=True,
                        progress=False,
                        options={"movement": {"steps": 3}},
                    )
                votes = [
                    parts["element"].trunc().flatten()
                    for parts in scores.parts["movement"].values()
                    if "element" in parts
                ]
                found.append(torch.cat(votes))
            short = f"{name} {str(dtype).removeprefix('torch.')}"
            exact = name in ("llama", "qwen3")
            for other, votes, most in (("kept", found[1], 1e-3 if exact else 0.03), ("plain", found[2], 0.2)):
                far = float((found[0] != votes).float().mean())
                report(f"{short}: votes that differ, made again and {other}", far, most)


def memory(device: str) -> None:
    """Of one layer and token, in bytes, and what the kept tensors' sizes give."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8, "num_key_value_heads": 2}
    held = {}
    for how in ("again", "kept"):
        used = []
        for layers in (1, 3):
            torch.manual_seed(0)
            config = LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=layers, attn_implementation="sdpa")
            base = LlamaForCausalLM(config).to(device, torch.bfloat16)
            model = get_peft_model(base, ReltuneConfig(plan=plan_of(base)))
            ids = torch.randint(1, 64, (2, 1024)).to(device)
            with way(how):
                model(input_ids=ids, labels=ids).loss.backward()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                loss = model(input_ids=ids, labels=ids).loss
                used.append(torch.cuda.memory_allocated() - before)
            del loss, model, base
        held[how] = (used[1] - used[0]) / 2 / 2048 / 2
    hidden, between = sizes["hidden_size"], sizes["intermediate_size"]
    print(f"     kept per layer and token: {held['again']:.0f} numbers, {held['kept']:.0f} with inputs kept")
    saved = held["kept"] - held["again"]
    report("memory that making inputs again saves, over the inputs' size", -saved / (2 * hidden + between), -0.95)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    for part in (kernels, trainings, probes, *([memory] if device != "cpu" else [])):
        try:
            part(device)
        except Exception as error:
            print(f"FAIL {part.__name__}: {type(error).__name__}: {error}", flush=True)
            failures.append(part.__name__)
    print(f"{len(failures)} failed" if failures else "all as it should be")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
