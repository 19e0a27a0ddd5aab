"""Embeddings: rows are tokens, columns are features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reltune.ops.attach_embedding import AttachEmbeddingColumns, AttachEmbeddingRows, place_of_token
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.written_weight import Originals


class ReltuneEmbedding(ReltuneLayer):
    """nn.Embedding. The row of ``padding_idx`` can be chosen and gets no gradient, as in full fine-tuning."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = self.out_features, self.in_features  # as PEFT counts an embedding's

    def lora_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        lora_a, lora_b = self.lora_factors(adapter_name)
        return {"lora_embedding_A": lora_b.mT, "lora_embedding_B": lora_a.mT}

    @property
    def _padding(self) -> int | None:
        base = self.get_base_layer()
        assert isinstance(base, nn.Embedding)
        return base.padding_idx

    def attach_columns(self, y: Tensor, x: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None) -> Tensor:
        return AttachEmbeddingColumns.apply(y, x, columns, idx, row_idx, self._padding)

    def attach_rows(self, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor) -> Tensor:
        return AttachEmbeddingRows.apply(y, x, rows, idx, self._padding)

    def change_of_output(self, x: Tensor, kept: Originals, columns: Tensor | None, rows: Tensor | None) -> Tensor:
        total: Tensor | None = None
        if rows is not None:
            table = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])  # the last one is that of all other tokens
            total = F.embedding(place_of_token(x, kept.row_idx), table)
            if self._padding is not None:
                total = torch.where((x == self._padding)[..., None], total.detach(), total)
        if columns is not None:
            part = F.embedding(x, columns, self._padding)
            if total is None:
                total = part.new_zeros(*x.shape, self.out_features)
            total = total.index_add(-1, kept.column_idx, part)
        assert total is not None
        return total
