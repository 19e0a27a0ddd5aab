"""How much data a run has: examples, the lengths of their texts, and of the batches that they are padded to; and which head they want."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from reltune.data.splitting import HELD_OUT

MULTIPLE = 32  # tokens, to multiples of which --cuda_graphs pads batches, so that few shapes come
GROUPED, IN_ORDER = (
    "group_by_length",
    "sequential",
)  # of transformers' train_sampling_strategy; else the order is random


def multiple_for(model: Any) -> int:
    """What --cuda_graphs pads batches to multiples of, for a model with this config; 1 where its positions leave no room for that."""
    positions = getattr(model, "max_position_embeddings", None)
    return MULTIPLE if not isinstance(positions, int) or positions % MULTIPLE in (0, 2) else 1  # RoBERTa leaves two out


class TextLengths:
    """Of examples in their order, how many tokens each has in each of the K tensors of a batch that are padded apart.

    Attributes:
        tokens: (N, K), as ``Task.lengths`` says; K is 2 for a source and its target, else 1.
    """

    def __init__(self, tokens: Iterable[Any]) -> None:
        self.tokens = np.array(tokens, np.int32)

    def cut(self, most: int, multiple: int = 1) -> TextLengths:
        """Of texts that are cut, and then padded to multiples."""
        return TextLengths(-(-np.minimum(self.tokens, most) // multiple) * multiple)

    @property
    def longest(self) -> tuple[int, ...]:
        """Of a batch that has the longest text: each of the K lengths."""
        return tuple(self.tokens.max(0).tolist())

    @property
    def mean(self) -> float:
        """Tokens of an example, of all K tensors together."""
        return float(self.tokens.sum(1).mean())

    def padded(self, batch_size: int, order: str = "", grouped: int = 0) -> tuple[int, ...]:
        """The mean of batches, each as long as its longest text. A smaller batch at the end of a pass is left out.

        Args:
            order: ``GROUPED``, ``IN_ORDER``, or else random; the mean is then the expected one.
            grouped: how many examples are of similar length in ``GROUPED``; a batch if not given.
        """
        count = len(self.tokens)
        size = min(batch_size, count)
        if order == GROUPED:
            import torch
            from transformers.trainer_pt_utils import get_length_grouped_indices

            drawn = torch.Generator().manual_seed(0)
            places = get_length_grouped_indices(self.tokens[:, 0].tolist(), grouped or size, generator=drawn)
        elif order == IN_ORDER:
            places = range(count)
        else:
            # Of all batches, the share whose longest text is the k-th shortest, from the last to the first: C(k-1, B-1) / C(N, B).
            before = np.arange(count - 1, 0, -1)
            shares = size / count * np.cumprod([1.0, *(np.maximum(before - size + 1, 0) / before)])
            return _rounded(shares @ np.sort(self.tokens, 0)[::-1])
        batches = self.tokens[list(places)[: count // size * size]].reshape(-1, size, self.tokens.shape[1])
        return _rounded(batches.max(1).mean(0))


def _rounded(lengths: np.ndarray) -> tuple[int, ...]:
    return tuple(np.rint(lengths).astype(int).tolist())


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many examples a run has, how long they are, and which head they want, as far as that is known.

    Attributes:
        lengths: of training; ``held_out_lengths``: of validation and test.
        adapt: ``Task.adapt`` of their task, which knows their classes.
    """

    train: int | None = None
    validation: int = 0
    test: int = 0
    lengths: TextLengths | None = None
    held_out_lengths: TextLengths | None = None
    adapt: Callable[[Any], bool] | None = None

    @classmethod
    def of(cls, train: int | None, held_out: int | None = None) -> Sizes:
        """With so many for evaluation, or else with as many as a run splits off."""
        if train is None:
            return cls()
        if held_out is None:
            part = round(train * HELD_OUT / (1 - 2 * HELD_OUT))
            return cls(train, part, part)
        return cls(train, held_out // 2, held_out - held_out // 2)

    def digest(self) -> str:
        total = hashlib.sha256(repr((self.train, self.validation, self.test)).encode())
        for known in (self.lengths, self.held_out_lengths):
            total.update(b"" if known is None else known.tokens.tobytes())
        return total.hexdigest()


NOT_KNOWN = Sizes()
