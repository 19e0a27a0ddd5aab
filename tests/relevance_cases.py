"""Batches of unequal lengths, losses of one example, and comparisons of relevance with what an oracle says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTForImageClassification
from transformers.pytorch_utils import Conv1D

from measured_models import LABELS, VOCAB
from reltune.relevance.measure import analyze
from reltune.relevance.scores import RelevanceScores

KIND_OF_PARTS = ("column", "row", "weight", "bias", "norm")


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


def lm_batch(lengths: Sequence[int] = (3, 11, 6, 2, 9)) -> dict[str, Tensor]:
    """The same with each token as the label of its own place, as causal language models take them."""
    batch = text_batch(lengths)
    batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    return batch


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


def causal_of_one(outputs: Any, example: Any) -> Tensor:
    labels = example["labels"][:, 1:]
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten())


def own_loss(outputs: Any, batch: Any) -> Tensor:
    """A user's loss: the metric is minus the loss, which unlike an accuracy moves with everything."""
    return F.cross_entropy(getattr(outputs, "logits", outputs), labels_of(batch), reduction="none")


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


def canonical(module: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values by parameter name with the weight's as (out, in), which a Conv1D holds the other way round."""
    return {key: value.mT if isinstance(module, Conv1D) and value.ndim == 2 else value for key, value in values.items()}


def of_expert(owner: Any, projection: str, expert: int, values: Any) -> dict[str, Tensor]:
    """One expert's weight (out, in) and bias out of ``values``, the owner's parameters or their gradients by name."""
    weight = values[projection][expert]
    found = {"weight": weight.mT if isinstance(owner, nn.Module) and owner.is_transposed else weight}
    if f"{projection}_bias" in values:
        found["bias"] = values[f"{projection}_bias"][expert]
    return found


def assert_directions_of(matrix: Tensor, parts: dict[str, Tensor], most: int = 64) -> None:
    """Take the directions out of a module's parts: the first right singular vectors v of a matrix (out, in), MᵀM v = σ² v."""
    exact = torch.linalg.svdvals(matrix.double())
    exact = exact[exact > 1e-6 * exact[0]][:most]
    if not len(exact):
        assert "direction" not in parts and "direction_vectors" not in parts
        return
    values, vectors = parts.pop("direction").double(), parts.pop("direction_vectors").double()
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=1e-6 * float(exact[0]))
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(len(values)).double(), rtol=0, atol=1e-5)
    of = matrix.double().mT @ matrix.double() @ vectors.mT
    torch.testing.assert_close(of, vectors.mT * values**2, rtol=0, atol=1e-5 * float(exact[0]) ** 2)


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
