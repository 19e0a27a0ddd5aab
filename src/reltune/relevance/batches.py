"""Batches, whether mappings of tensors or pairs of inputs and labels: their size, parts and hashes, and a model run on them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reltune.errors import InputError
from reltune.layers.quantised import compute_as_in_training


def chained(before: str, batch: Any) -> str:
    """The hash of a stream of batches, from the hash of those before and the batch that follows them."""
    digest = hashlib.sha256(before.encode())
    for tensor in values_of(batch):
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def contents(batch: Any) -> int:
    """A number that stands for the batch's examples, in any order and with any padding: the sum of a hash of each.

    What ``attention_mask`` (B, T), or (B, rows, T), marks as padding is left out of every tensor that has its positions.
    """
    size = batch_size(batch)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    names = list(batch) if isinstance(batch, Mapping) else range(len(batch))
    tensors = {n: v.detach().cpu() for n, v in zip(names, values_of(batch), strict=True) if isinstance(v, Tensor)}
    real = tensors["attention_mask"].bool() if isinstance(mask, Tensor) and mask.ndim in (2, 3) else None
    total = 0
    for s in range(size):
        digest = hashlib.sha256()
        for name, value in tensors.items():
            one = value[s] if value.ndim and len(value) == size else value
            if real is not None and one is not value and value.shape[: real.ndim] == real.shape:
                if real.ndim > 2:  # an example has several rows: their lengths tell where one ends
                    digest.update(f"{real[s].sum(-1).tolist()} ".encode())
                one = one[real[s]]
            digest.update(f"{name} {one.dtype} {tuple(one.shape)} ".encode())
            digest.update(one.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        total += int.from_bytes(digest.digest()[:16], "big")
    return total % (1 << 128)


def values_of(batch: Any) -> Iterable[Any]:
    if isinstance(batch, Mapping):
        return batch.values()
    if not isinstance(batch, list | tuple):
        raise InputError(
            f"the loader gave a batch of type {type(batch).__name__}; "
            "give mappings of tensors or (inputs, labels) pairs."
        )
    return batch


def like(batch: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(batch, Mapping):
        return {key: change(value) for key, value in batch.items()}
    return tuple(change(value) for value in batch)


def moved(batch: Any, device: torch.device) -> Any:
    return like(batch, lambda value: value.to(device) if isinstance(value, Tensor) else value)


def batch_size(batch: Any) -> int:
    """The number of examples: the length of the labels, or else of the first tensor."""
    values = list(values_of(batch))
    labels = batch.get("labels") if isinstance(batch, Mapping) else values[-1]
    tensors = [value for value in (labels, *values) if isinstance(value, Tensor) and value.ndim]
    return len(tensors[0]) if tensors else 1


def part_of(batch: Any, start: int, stop: int) -> Any:
    size = batch_size(batch)
    return like(batch, lambda v: v[start:stop] if isinstance(v, Tensor) and v.ndim and len(v) == size else v)


def picked(batch: Any, rows: list[int]) -> Any:
    """These examples of the batch."""
    size = batch_size(batch)
    return like(batch, lambda v: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == size else v)


def joined(batches: Sequence[Any]) -> Any:
    """The examples of several batches of one ``form`` in one."""
    first = batches[0]
    keys = list(first) if isinstance(first, Mapping) else range(len(first))
    values = [torch.cat([batch[key] for batch in batches]) for key in keys]
    return dict(zip(keys, values, strict=True)) if isinstance(first, Mapping) else tuple(values)


def form(batch: Any) -> tuple | None:
    """What batches must have in common to be joined; None for a batch that holds more than a row per example."""
    size = batch_size(batch)
    values = list(values_of(batch))
    if not all(isinstance(value, Tensor) and value.ndim and len(value) == size for value in values):
        return None
    names = tuple(batch) if isinstance(batch, Mapping) else len(values)
    return (names, *((value.dtype, tuple(value.shape[1:])) for value in values))


def with_labels(batch: Any, labels: Tensor) -> Any:
    return {**batch, "labels": labels} if isinstance(batch, Mapping) else (*batch[:-1], labels)


def forward(model: nn.Module, batch: Any, call: Callable[..., Any] | None = None) -> Any:
    """The model's outputs. The model is not given the labels; a sequence-to-sequence model is given the decoder input that
    it would have made from them, if the batch has none. ``call``: what is called in place of the model."""
    call = call or model
    if isinstance(batch, Mapping):
        return call(**{key: value for key, value in batch.items() if key != "labels"}, **_shifted_labels(model, batch))
    return call(batch[0])


def _shifted_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or "labels" not in batch or {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch):
        return {}
    return {"decoder_input_ids": shift(labels=batch["labels"])}


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no weight requires a gradient, until the context ends."""
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        compute_as_in_training(model)
        model.requires_grad_(False)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
        for name, module in model.named_modules():
            module.training = modes[name]
