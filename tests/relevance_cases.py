"""Tiny models in float64 and batches of unequal lengths for the tests of relevance and selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from reltune.relevance.measure import analyze
from reltune.relevance.scores import RelevanceScores

VOCAB, LABELS = 20, 3
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "num_labels": LABELS,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
KIND_OF_PARTS = ("column", "row", "weight", "bias", "norm")


def tiny_bert(**changes: Any) -> BertForSequenceClassification:
    return made(BertForSequenceClassification, BertConfig(**{**TEXT, **changes}))


def tiny_roberta() -> RobertaForSequenceClassification:
    return made(RobertaForSequenceClassification, RobertaConfig(**TEXT))


def tiny_llama() -> LlamaForSequenceClassification:
    return made(LlamaForSequenceClassification, LlamaConfig(**TEXT, num_key_value_heads=1))


def tiny_qwen2() -> Qwen2ForSequenceClassification:
    return made(Qwen2ForSequenceClassification, Qwen2Config(**TEXT, num_key_value_heads=1))


def tiny_vit() -> ViTForImageClassification:
    sizes = {key: value for key, value in TEXT.items() if key.endswith(("size", "layers", "heads", "labels"))}
    sizes.pop("vocab_size")
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, initializer_range=0.2)
    return made(ViTForImageClassification, config)


def tiny_sequential() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 5, bias=False), nn.RMSNorm(5)]
    model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(5, LABELS)).double()
    return _stirred(model)


MODELS = {
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "vit": tiny_vit,
    "sequential": tiny_sequential,
}


def made(kind: type, config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return _stirred(kind(config).double())


def _stirred(model: Any) -> Any:
    """Gains that are not all one and biases that are not all zero, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def text_batch(lengths: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """Right-padded token ids (the padding is token 0), their mask, and a label each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, VOCAB, (length,), generator=generator)
        mask[row, :length] = 1
    labels = torch.randint(LABELS, (len(lengths),), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def data_for(model: nn.Module, lengths: Sequence[int] = (3, 11, 6, 1, 9, 4, 2), seed: int = 0) -> Any:
    """One batch of everything; token ids for language models, else images or vectors with labels."""
    torch.manual_seed(seed)
    labels = torch.randint(LABELS, (len(lengths),))
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(len(lengths), 1, 8, 8, dtype=torch.float64), "labels": labels}
    if isinstance(model, nn.Sequential):
        return torch.randn(len(lengths), 6, dtype=torch.float64), labels
    return text_batch(lengths, seed)


def split(batch: Any, size: int, order: Sequence[int] | None = None) -> list[Any]:
    """The batch in smaller ones, each cut to its own longest example."""
    columns = list(batch.values()) if isinstance(batch, dict) else list(batch)
    order = list(range(len(columns[0]))) if order is None else list(order)
    parts = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        if not isinstance(batch, dict):
            parts.append(tuple(column[rows] for column in columns))
            continue
        part = {key: value[rows] for key, value in batch.items()}
        if "attention_mask" in part:
            longest = int(part["attention_mask"].sum(1).max())
            part = {key: v[:, :longest] if v.ndim == 2 else v for key, v in part.items()}
        parts.append(part)
    return parts


def labels_of(batch: Any) -> Tensor:
    return batch["labels"] if isinstance(batch, dict) else batch[1]


def cross_entropy_of_one(outputs: Any, example: Any) -> Tensor:
    return F.cross_entropy(getattr(outputs, "logits", outputs), labels_of(example))


def measure(model: nn.Module, batches: Any = None, *arguments: Any, **options: Any) -> RelevanceScores:
    return analyze(model, batches, *arguments, progress=False, **options)


def parts_by_formula(weights: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Add one number per weight (``weights[module][parameter]``) up over every unit, by the definition."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, of in weights.items():
        if of["weight"].ndim == 1:
            parts[name] = {"norm": sum(vector.sum() for vector in of.values())}
            continue
        matrix = of["weight"].flatten(2).sum(2) if of["weight"].ndim == 4 else of["weight"]
        parts[name] = {"column": matrix.sum(0), "row": matrix.sum(1), "weight": matrix.sum()}
        if "bias" in of:
            parts[name]["bias"] = of["bias"].sum()
    return parts


def by_module(parameters: dict[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Sort values by parameter name into ``[module][parameter]``, for the modules named."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for parameter, value in parameters.items():
        module, _, key = parameter.rpartition(".")
        if module in found:
            found[module][key] = value
    return found


def assert_parts_equal(
    found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]], relative: float = 1e-9
) -> None:
    """|a − b| ≤ relative · max|b| over the units of one kind; the same modules with the same parts."""
    assert {name: sorted(parts) for name, parts in found.items()} == {
        name: sorted(parts) for name, parts in wanted.items()
    }
    for part in KIND_OF_PARTS:
        names = [name for name in wanted if part in wanted[name]]
        if not names:
            continue
        a = torch.cat([found[name][part].double().cpu().reshape(-1) for name in names])
        b = torch.cat([wanted[name][part].double().cpu().reshape(-1) for name in names])
        assert (a - b).abs().max() <= relative * b.abs().max(), part
