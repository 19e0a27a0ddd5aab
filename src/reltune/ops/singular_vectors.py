"""Singular values of a matrix and the singular vectors of its short side, from the eigenvalues of its Gram matrix.

A (long × short) has σ_k² and v_k as eigenvalues and eigenvectors of AᵀA (short × short), which is added up in float64 over
blocks of rows. Beside A: about four short × short matrices in float64 (the Gram matrix, its vectors, LAPACK's workspace)
and one block. Cost: 2 · long · short² operations and an eigendecomposition of about 9 · short³.

Exactness: the eigenvalues carry an error of about short · 1e-16 · σ_1², so a singular value σ one of
short · 1e-16 · σ_1² / 2σ. At short = 4096 that is at most 1e-9 · σ_1 for every σ above 2e-4 · σ_1, less than the rounding of
weights stored in float32 or bfloat16; singular values below 1e-6 · σ_1 are not resolved, which no sum of singular values
feels. A plain SVD of a float32 copy would take longer and several copies of A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reltune.ops.row_blocks import row_blocks

PRODUCT_NUMBERS = 1 << 22  # of A per product, so that the Gram matrix is not read and written too often


def tall(matrix: Tensor) -> Tensor:
    """The matrix with its long side first: a view."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def singular_vectors(a: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (short,), largest first, and the vectors v_k as columns (short, short), of ``a`` (long, short)."""
    gram = torch.zeros(a.shape[1], a.shape[1], dtype=torch.float64, device=a.device)
    for _, block in row_blocks(a, torch.float64, PRODUCT_NUMBERS):
        gram.addmm_(block.mT, block)
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
