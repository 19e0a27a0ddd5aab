"""Singular values and vectors of a matrix: all of its short side, or the largest few of the side that its rows have.

**All of the short side**, from the eigenvalues of the Gram matrix.

A (long × short) has σ_k² and v_k as eigenvalues and eigenvectors of AᵀA (short × short), which is added up in float64 over
blocks of rows. Beside A: three short × short matrices in float64 (the vectors, which take the Gram matrix's place, and two of
LAPACK's workspace, gone afterwards) and one block. At short = 4096 that is 0.4 GB, at 8192 1.6 GB. Cost: 2 · long · short²
operations and an eigendecomposition of about 9 · short³; 18 s of one CPU core at short = 4096.

Exactness: the eigenvalues carry an error of about short · 1e-16 · σ_1², so a singular value σ one of
short · 1e-16 · σ_1² / 2σ. At short = 4096 that is at most 1e-9 · σ_1 for every σ above 2e-4 · σ_1, less than the rounding of
weights stored in float32 or bfloat16; singular values below 1e-6 · σ_1 are not resolved, which no sum of singular values
feels. A plain SVD of a float32 copy would take longer and several copies of A. The same in float32 takes half the time and half
the memory, and gets σ wrong by 1e-7 · σ_1² / 2σ at least: 5 % of the median of an embedding whose σ_1 is a thousand times that.

**The largest few right singular vectors** (``leading_right_vectors``): from the same decomposition where the short side is at most
EXACT, else by block power iteration on AᵀA from random vectors, with a Rayleigh–Ritz step at the end (Halko, Martinsson and
Tropp, SIAM Review 2011), in float32. Beside A one block of rows, and 2 · in · (count + OVERSAMPLED) numbers. Cost:
4 · (ITERATIONS + 1) · out · in · (count + OVERSAMPLED) operations: for 64 vectors of a 4096 × 4096 matrix 4.5e10, where its
eigendecomposition takes 6e11. Where neighbouring singular values hardly differ, as in the noise of a matrix, the vectors found
are some of that space, and the values a little too small.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from reltune.ops.row_blocks import PRODUCT_NUMBERS, row_blocks

EXACT = 1024  # the short side up to which all singular vectors are found: a third of a second of one CPU core
OVERSAMPLED = 32  # vectors more than are wanted, in the iteration
ITERATIONS = 6
RESOLVED = 1e-6  # of the largest singular value: what is smaller counts as zero


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


@torch.no_grad()
def leading_right_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest singular values (k,) of a matrix (out, in) of any type, and their right singular vectors (k, in).

    In float32, largest first, each vector of length 1 with its largest entry above zero. Fewer where the matrix has a lower rank.
    The same matrix gives the same vectors, whatever random numbers were drawn before.
    """
    if min(matrix.shape) <= EXACT:
        values, vectors = singular_vectors(tall(matrix))
        values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
        if matrix.shape[0] < matrix.shape[1]:  # these are the left ones
            vectors = _product(matrix.mT, vectors) / values.clamp(min=torch.finfo(values.dtype).tiny)
    else:
        values, vectors = _by_iteration(matrix, count)
    kept = values > RESOLVED * values[:1]
    values, vectors = values[kept].float(), vectors.mT[kept].float()
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return values, vectors * largest.sign() / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def _by_iteration(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Singular values (count,), largest first, and right singular vectors as columns (in, count)."""
    generator = torch.Generator().manual_seed(0)
    size = min(count + OVERSAMPLED, *a.shape)
    basis = torch.randn(a.shape[1], size, generator=generator).to(a.device)
    for _ in range(ITERATIONS):
        power = torch.zeros_like(basis)
        for _, block in row_blocks(a, torch.float32, PRODUCT_NUMBERS):
            power.addmm_(block.mT, block @ basis)
        basis = torch.linalg.qr(power).Q
    gram = torch.zeros(size, size, dtype=torch.float64, device=a.device)
    for _, block in row_blocks(a, torch.float32, PRODUCT_NUMBERS):
        image = (block @ basis).double()
        gram.addmm_(image.mT, image)
    squares, rotation = torch.linalg.eigh(gram)
    best = squares.flip(0)[:count].clamp(min=0).sqrt()
    return best, basis.double() @ rotation.flip(1)[:, :count]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float64, by blocks of rows."""
    return torch.cat([block @ b for _, block in row_blocks(a, torch.float64, PRODUCT_NUMBERS)])


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
