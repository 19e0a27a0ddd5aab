"""The output map of a language model, where TRL's trainers look for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer


class OutputMapOnDevice(Trainer):
    """Comes before a trainer of TRL's among the bases of a class.

    TRL multiplies by the weight of the output map itself, on the device that it finds it on. With weights in host memory (FSDP2) that is
    a shard on the CPU, where the loss would be computed and could not be gathered from: TRL is shown the shard on the GPU.
    """

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with output_map_on(self.accelerator.unwrap_model(model), self.accelerator.device):
            return super().compute_loss(model, *args, **kwargs)


@contextlib.contextmanager
def output_map_on(model: Any, device: torch.device) -> Iterator[None]:
    """``get_output_embeddings`` of the model gives a shard's weight and bias on ``device``. Gradients reach the shard."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, DTensor) or weight.device.type == device.type:
        yield
        return
    moved = SimpleNamespace(weight=weight.to(device), bias=None if bias is None else bias.to(device))
    base.get_output_embeddings = lambda: moved
    try:
        yield
    finally:
        del base.get_output_embeddings
