"""The largest right singular vectors of a matrix, against numpy's full decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from reltune.ops import singular_vectors
from reltune.ops.singular_vectors import leading_right_vectors

SHAPES = [(12, 7), (7, 12), (9, 9), (1, 5), (5, 1)]


def votes(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(-50, 51, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def assert_are_of(matrix: Tensor, values: Tensor, vectors: Tensor, within: float = 1e-5) -> None:
    """σ are the largest, v are orthonormal, MᵀM v = σ² v, and the largest entry of each v is above zero."""
    m, v, s = (t.double().numpy() for t in (matrix, vectors, values))
    exact = np.linalg.svd(m, compute_uv=False)
    np.testing.assert_allclose(s, exact[: len(s)], rtol=within)
    np.testing.assert_allclose(v @ v.T, np.eye(len(v)), atol=within)
    np.testing.assert_allclose(m.T @ m @ v.T, v.T * s**2, atol=within * exact[0] ** 2)
    assert (v[np.arange(len(v)), np.abs(v).argmax(1)] > 0).all()
    assert values.dtype == vectors.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float32, torch.bfloat16, torch.float64])
def test_of_small_matrices(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = votes(*shape).to(dtype)
    for count in (1, 3, 99):
        values, vectors = leading_right_vectors(matrix, count)
        assert len(values) == len(vectors) == min(count, *shape)
        assert_are_of(matrix, values, vectors)
    view = matrix.mT.contiguous().mT  # as a Conv1D's is
    assert all(
        torch.equal(a, b) for a, b in zip(leading_right_vectors(view, 3), leading_right_vectors(matrix, 3), strict=True)
    )


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_what_has_no_direction_is_left_out(shape: tuple[int, int]) -> None:
    assert [len(found) for found in leading_right_vectors(torch.zeros(shape, dtype=torch.int8), 4)] == [0, 0]
    matrix = votes(shape[0], 2).float() @ votes(2, shape[1], seed=1).float()
    values, vectors = leading_right_vectors(matrix, 4)
    assert len(values) == 2
    assert_are_of(matrix, values, vectors)


@pytest.mark.parametrize("shape", [(300, 220), (220, 300)])
def test_of_large_matrices(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some strong directions above the noise, as a probe's movement has them: found as the full decomposition has them."""
    monkeypatch.setattr(singular_vectors, "EXACT", 100)
    monkeypatch.setattr(singular_vectors, "PRODUCT_NUMBERS", 5000)  # several blocks of rows
    g = torch.Generator().manual_seed(0)
    strong = (
        torch.randn(shape[0], 6, generator=g)
        @ torch.diag(torch.arange(12.0, 0, -2))
        @ torch.randn(6, shape[1], generator=g)
    )
    matrix = (strong + torch.randn(shape, generator=g) * 4).round().clamp(-127, 127).to(torch.int8)
    values, vectors = leading_right_vectors(matrix, 6)
    assert_are_of(matrix, values, vectors)
    torch.manual_seed(7)
    again = leading_right_vectors(matrix, 6)
    assert torch.equal(again[0], values) and torch.equal(again[1], vectors)
    assert torch.initial_seed() == 7 and torch.equal(torch.rand(1), torch.manual_seed(7) and torch.rand(1))


def test_of_large_matrices_of_noise_the_space_is_nearly_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = votes(600, 500).sign()
    exact = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:64]
    monkeypatch.setattr(singular_vectors, "EXACT", 100)
    values, vectors = leading_right_vectors(matrix, 64)
    kept = (matrix.double() @ vectors.double().mT).square().sum().sqrt()
    assert float(kept) > 0.995 * np.sqrt((exact**2).sum())
    assert (values.double().numpy() <= exact * (1 + 1e-6)).all() and float(values.diff().max()) <= 0
