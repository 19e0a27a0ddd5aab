"""What autograd keeps of a forward pass, read off the pass itself: the storages that its hooks are handed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(model: nn.Module, batch: Mapping[str, Any], known: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that are kept, without those of weights, buffers, the batch and ``known``."""
    without = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), *batch.values(), *known]}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in without:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch).loss
    assert torch.isfinite(loss)  # and the graph is alive until here, so that no address is used twice
    return sum(found.values())
