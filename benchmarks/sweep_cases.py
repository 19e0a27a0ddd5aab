"""The combinations of cost_sweep.py: architectures with random weights, batches, methods, and what is drawn from all of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


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


def distilbert(layers: int, hidden: int, heads: int) -> Any:
    from transformers import DistilBertConfig

    return DistilBertConfig(
        dim=hidden, n_layers=layers, hidden_dim=4 * hidden, n_heads=heads, max_position_embeddings=512, num_labels=4
    )


def gpt2(layers: int, hidden: int, heads: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=hidden, n_layer=layers, n_head=heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
    )


def qwen2(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        use_cache=False,
    )


def bart(layers: int, hidden: int, heads: int) -> Any:
    from transformers import BartConfig

    return BartConfig(
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_ffn_dim=4 * hidden,
        decoder_ffn_dim=4 * hidden,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        use_cache=False,
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


def qwen2_moe(layers: int, hidden: int, intermediate: int, heads: int, experts: int) -> Any:
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=2 * intermediate,
        moe_intermediate_size=intermediate,
        shared_expert_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=experts,
        num_experts_per_tok=2,
        use_cache=False,
        experts_implementation="grouped_mm",
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


# name -> kind of batch, config. Shapes of Llama-3.1-8B, Llama-3.2-1B, SmolLM2-135M, BERT, MiniLM-L6, DistilBERT, GPT-2, T5, BART, ViT.
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama-8b": ("causal", lambda: llama(32, 4096, 14336, 32, 8, 128256)),
    "llama-8b-8": ("causal", lambda: llama(8, 4096, 14336, 32, 8, 128256)),
    "llama-1b": ("causal", lambda: llama(16, 2048, 8192, 32, 8, 128256, tied=True)),
    "llama-135m": ("causal", lambda: llama(30, 576, 1536, 9, 3, 49152, tied=True)),
    "bert-base": ("classes", lambda: bert(12, 768, 3072, 12)),
    "bert-large": ("classes", lambda: bert(24, 1024, 4096, 16)),
    "minilm-l6": ("classes", lambda: bert(6, 384, 1536, 12)),
    "distilbert": ("classes", lambda: distilbert(6, 768, 12)),
    "gpt2": ("causal", lambda: gpt2(12, 768, 12)),
    "qwen2-small": ("causal", lambda: qwen2(8, 512, 1408, 8, 2, 32000)),
    "t5-small": ("pairs", lambda: t5(6, 512, 1024, 8)),
    "bart-base": ("pairs", lambda: bart(6, 768, 12)),
    "vit-small": ("images", lambda: vit(12, 384, 6)),
    "mixtral-mini": ("causal", lambda: mixtral(6, 512, 1024, 8, 4)),
    "qwen2-moe": ("causal", lambda: qwen2_moe(6, 512, 512, 8, 8)),
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
    without_liger()
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


_of_file: dict[str, Any] = {}  # what names mean in Llama's file before Liger changes them


def without_liger() -> None:
    """Undo what Liger changes in Llama's file, for all models that are made later, when it is applied to one."""
    from transformers.models.llama import modeling_llama

    if not _of_file:
        _of_file.update(vars(modeling_llama))
    vars(modeling_llama).update(_of_file)


def batch_of(kind: str, case: Case, config: Any, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    with torch.device(device):
        if kind == "images":
            pixels = torch.zeros(case.batch, 3, 224, 224, dtype=dtype)
            return {"pixel_values": pixels, "labels": torch.zeros(case.batch, dtype=torch.long)}
        ids = torch.randint(config.vocab_size, (case.batch, case.length))
        if kind == "causal":
            return {"input_ids": ids, "labels": ids.clone()}
        mask = torch.ones_like(ids)
        mask[-1, -1] = 0  # a mask of ones alone is left out by the model
        if kind == "pairs":
            return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, : case.length // 4].clone()}
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(case.batch, dtype=torch.long)}


# -- methods -----------------------------------------------------------------------------------------------------------


def linear_maps(model: nn.Module, case: Case) -> dict[str, nn.Module]:
    """The linear maps of the numbered blocks, all of them or those of the top quarter."""
    from transformers.pytorch_utils import Conv1D

    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and any(part.isdigit() for part in name.split("."))
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
        shape = shape if type(module) is nn.Linear else shape[::-1]
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
    Case("minilm-l6", "full", 32, 64, "float32"),
    Case("minilm-l6", "lora", 16, 128, "float32"),
    Case("minilm-l6", "columns", 32, 128, "float32"),
    Case("minilm-l6", "weights", 32, 64, "float32", layers="top"),
    Case("minilm-l6", "full", 16, 256, "float32", checkpointing=True),
    Case("minilm-l6", "rows", 8, 128, "bfloat16"),
    Case("minilm-l6", "weights", 16, 128, "autocast"),
    Case("bert-base", "full", 4, 64, "float32"),
    Case("bert-base", "lora", 4, 128, "float32"),
    Case("bert-base", "columns", 4, 128, "float32", layers="top"),
    Case("bert-base", "bitfit", 4, 64, "float32"),
    Case("bert-base", "weights", 4, 64, "float32"),
    Case("distilbert", "full", 4, 128, "float32"),
    Case("distilbert", "dora", 8, 64, "float32"),
    Case("distilbert", "columns", 4, 128, "bfloat16"),
    Case("llama-135m", "full", 1, 128, "float32"),
    Case("llama-135m", "lora", 1, 128, "float32"),
    Case("llama-135m", "columns", 2, 64, "float32"),
    Case("llama-135m", "weights", 2, 128, "float32", layers="top"),
    Case("llama-135m", "lora", 2, 128, "float32", checkpointing=True),
    Case("gpt2", "full", 2, 128, "float32"),
    Case("gpt2", "lora", 2, 128, "float32"),
    Case("gpt2", "columns", 2, 128, "float32"),
    Case("gpt2", "weights", 2, 128, "float32", layers="top"),
    Case("qwen2-small", "full", 4, 128, "float32"),
    Case("qwen2-small", "rows", 4, 128, "float32"),
    Case("qwen2-small", "lora", 2, 256, "autocast"),
    Case("qwen2-small", "columns", 2, 256, "bfloat16", layers="top"),
    Case("t5-small", "full", 8, 128, "float32"),
    Case("t5-small", "lora", 8, 128, "float32"),
    Case("t5-small", "columns", 8, 128, "float32", checkpointing=True),
    Case("t5-small", "weights", 8, 64, "float32"),
    Case("bart-base", "full", 4, 64, "float32"),
    Case("bart-base", "lora", 4, 128, "float32"),
    Case("bart-base", "weights", 4, 128, "float32", layers="top"),
    Case("vit-small", "full", 4, 224, "float32"),
    Case("vit-small", "columns", 4, 224, "float32"),
    Case("vit-small", "lora", 4, 224, "autocast"),
    Case("vit-base", "lora", 2, 224, "float32"),
    Case("vit-base", "full", 2, 224, "float32"),
    Case("vit-base", "weights", 2, 224, "float32", layers="top"),
    Case("mixtral-mini", "full", 4, 128, "float32"),
    Case("mixtral-mini", "lora", 4, 128, "float32"),
    Case("mixtral-mini", "columns", 4, 128, "float32"),
    Case("qwen2-moe", "full", 2, 128, "float32"),
    Case("qwen2-moe", "weights", 4, 128, "float32"),
]
# What cases are drawn from: model -> batches, lengths.
DRAWN_ON_GPU = {
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
DRAWN_ON_CPU = {
    "minilm-l6": ([8, 16, 32], [64, 128, 256]),
    "bert-base": ([2, 4], [64, 128]),
    "distilbert": ([2, 4, 8], [64, 128]),
    "llama-135m": ([1, 2], [64, 128]),
    "gpt2": ([1, 2], [64, 128, 256]),
    "qwen2-small": ([2, 4, 8], [64, 128, 256]),
    "t5-small": ([4, 8, 16], [64, 128]),
    "bart-base": ([2, 4], [64, 128]),
    "vit-small": ([2, 4, 8], [224]),
    "vit-base": ([1, 2, 4], [224]),
    "mixtral-mini": ([1, 2, 4], [64, 128, 256]),
    "qwen2-moe": ([1, 2, 4], [64, 128, 256]),
}


def drawn(seed: int, count: int, gpu: bool, liger: bool) -> list[Case]:
    """Cases drawn from all combinations, none of which is in the lists."""
    sizes = DRAWN_ON_GPU if gpu else DRAWN_ON_CPU
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
            generator.choice(_dtypes(model, gpu)),
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


def _dtypes(model: str, gpu: bool) -> list[str]:
    """Of a CPU mostly float32: few have fast products of narrow numbers."""
    if gpu:
        return ["bfloat16"] if model == "llama-8b" else ["float32", "bfloat16", "autocast"]
    return ["float32", "float32", "float32", "bfloat16", "autocast"]
