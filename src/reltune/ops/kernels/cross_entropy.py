"""Cross entropy of each row of logits, its gradient written over them: the Triton kernel of ops/linear_cross_entropy.py.

A row is read twice and written once, and nothing of the logits' size is made beside them. The sums are in float32.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

LARGEST_BLOCK = 8192  # classes that a program looks at together


@triton.jit
def row_kernel(  # type: ignore[no-untyped-def]
    logits, labels, losses, entropies, guessed, classes, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * classes
    label = tl.load(labels + row)
    # Not a number for a label that is no class. Read before the sums, after which the row is written over.
    chosen = tl.load(at + label, mask=(label >= 0) & (label < classes), other=float("nan")).to(tl.float32)
    largest = -1e38
    total = 0.0  # Σ e with e = exp(z − largest)
    weighted = 0.0  # Σ e · (z − largest)
    for first in range(0, classes, BLOCK):
        d = first + tl.arange(0, BLOCK)
        z = tl.load(at + d, mask=d < classes, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(z, 0))
        e = tl.exp(z - above)
        before = tl.exp(largest - above)
        weighted = (weighted + (largest - above) * total) * before + tl.sum(e * tl.where(e > 0, z - above, 0.0), 0)
        total = total * before + tl.sum(e, 0)
        largest = above
    log_total = tl.log(total)
    tl.store(losses + row, log_total - (chosen - largest))
    tl.store(entropies + row, log_total - weighted / total)
    tl.store(guessed + row, chosen >= largest)
    if GRADIENT:
        for first in range(0, classes, BLOCK):
            d = first + tl.arange(0, BLOCK)
            z = tl.load(at + d, mask=d < classes, other=float("-inf")).to(tl.float32)
            share = tl.exp(z - largest) / total
            tl.store(at + d, tl.where(d == label, share - 1.0, share), mask=d < classes)


def cross_entropy(logits: Tensor, labels: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, entropies and whether the label is the likeliest class, (N,) each, and the gradient, which is the logits' own
    memory."""
    logits = logits.contiguous()
    rows, classes = logits.shape
    losses, entropies = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    guessed = torch.empty(rows, dtype=torch.bool, device=logits.device)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(classes))
    if rows:
        with torch.cuda.device_of(logits):
            row_kernel[(rows,)](
                *(logits, labels.contiguous(), losses, entropies, guessed, classes),
                GRADIENT=with_gradient,
                BLOCK=block,
                num_warps=max(1, min(16, block // 512)),
            )
    return losses, entropies, guessed, logits
