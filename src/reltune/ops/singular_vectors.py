"""Singular values of a matrix and the singular vectors of its short side, from the eigenvalues of its Gram matrix.

A (long × short) has σ_k² and v_k as eigenvalues and eigenvectors of AᵀA (short × short), which is added up in float64 over
blocks of rows. Beside A: three short × short matrices in float64 (the vectors, which take the Gram matrix's place, and two of
LAPACK's workspace, gone afterwards) and one block. At short = 4096 that is 0.4 GB, at 8192 1.6 GB. Cost: 2 · long · short²
operations and an eigendecomposition of about 9 · short³; 18 s of one CPU core at short = 4096.

Exactness: the eigenvalues carry an error of about short · 1e-16 · σ_1², so a singular value σ one of
short · 1e-16 · σ_1² / 2σ. At short = 4096 that is at most 1e-9 · σ_1 for every σ above 2e-4 · σ_1, less than the rounding of
weights stored in float32 or bfloat16; singular values below 1e-6 · σ_1 are not resolved, which no sum of singular values
feels. A plain SVD of a float32 copy would take longer and several copies of A. The same in float32 takes half the time and half
the memory, and gets σ wrong by 1e-7 · σ_1² / 2σ at least: 5 % of the median of an embedding whose σ_1 is a thousand times that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from reltune.ops.row_blocks import PRODUCT_NUMBERS, row_blocks


def tall(matrix: Tensor) -> Tensor:
    """The matrix with its long side first: a view."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def singular_vectors(a: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (short,), smallest first, and the vectors v_k as columns (short, short), of ``a`` (long, short)."""
    gram = torch.zeros(a.shape[1], a.shape[1], dtype=torch.float64, device=a.device)
    for _, block in row_blocks(a, torch.float64, PRODUCT_NUMBERS):
        gram.addmm_(block.mT, block)
    # In place: one matrix less. The transpose of a symmetric matrix is the same, column by column as LAPACK has it.
    squares, vectors = gram.new_empty(len(gram)), gram.mT
    torch.linalg.eigh(vectors, out=(squares, vectors))
    return squares.clamp_(min=0).sqrt_(), vectors


class Decompositions:
    """Keeps the decompositions of the weight that was asked for last, for criteria that look at it one after the other."""

    def __init__(self) -> None:
        self.weight: Callable[[], Tensor | None] = lambda: None
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def of(self, weight: Tensor, matrices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each of the weight's ``matrices`` with the values and vectors of its tall form."""
        if self.weight() is not weight:
            pairs = self.pairs = []
            self.weight = weakref.ref(weight, lambda _: pairs.clear())  # the next weight comes when they are gone
        for index, matrix in enumerate(matrices):
            if index == len(self.pairs):
                self.pairs.append(singular_vectors(tall(matrix)))
            yield matrix, *self.pairs[index]
