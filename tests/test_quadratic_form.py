"""The Triton kernel for quadratic forms, against its PyTorch reference: on the GPU, or else in Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")

from reltune.ops import squared_gradient
from reltune.ops.quadratic_form import quadratic_forms, quadratic_forms_reference, triangle
from reltune.ops.squared_gradient import input_gram, squared_gradient_sums, squared_gradient_sums_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Blocks are 128 tokens by 128 features: sizes around them, and far below.
TOKENS = st.one_of(st.integers(1, 9), st.integers(125, 131), st.just(259))
FEATURES = st.one_of(st.integers(1, 9), st.integers(126, 131))


def rows(batch, tokens, features, seed, dtype=torch.float32):
    return torch.randn(batch, tokens, features, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def gram(g):
    return g.double() @ g.double().mT


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), TOKENS, FEATURES, FEATURES, st.sampled_from([torch.float32, torch.float16]), st.integers(0, 99)
)
def test_kernels_equal_the_reference(batch, tokens, features, others, dtype, seed):
    # float16 tells whether K's second half arrives: K in one float16 would be off by 1e-4.
    g, x = rows(batch, tokens, others, seed, dtype), rows(batch, tokens, features, seed + 1, dtype)
    found = quadratic_forms(triangle(g), x)
    wanted = quadratic_forms_reference(gram(g), x)
    assert found.shape == (features,) and found.dtype == torch.float32
    assert (found - wanted).abs().max() <= 5e-6 * wanted.abs().max()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), TOKENS, FEATURES, st.integers(0, 99))
def test_triangle_is_the_lower_one_doubled_below_the_diagonal(batch, tokens, features, seed):
    g = rows(batch, tokens, features, seed)
    high, low = (half[:, :tokens, :tokens].tril().double() for half in triangle(g))
    k = gram(g)
    wanted = k.tril() + k.tril(-1)
    assert (high + low - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_inputs_need_not_be_contiguous():
    g, x = rows(2, 5, 40, 0).mT, rows(2, 7, 40, 1).mT
    assert torch.allclose(quadratic_forms(triangle(g), x).double(), quadratic_forms_reference(gram(g), x), rtol=1e-5)


def test_zeros_give_zeros_and_nothing_is_negative():
    g, x = rows(2, 40, 5, 0), rows(2, 40, 7, 1)
    assert not quadratic_forms(triangle(g), torch.zeros_like(x)).any()
    assert not quadratic_forms(triangle(torch.zeros_like(g)), x).any()
    high, low = triangle(g)
    assert not quadratic_forms((-high, -low), x).any()


def test_a_number_that_is_not_finite_is_not_hidden():
    g, x = rows(2, 40, 5, 0), rows(2, 40, 7, 1)
    x[1, 3, 4] = torch.nan
    assert quadratic_forms(triangle(g), x).isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("cancels", [False, True])
def test_sums_of_the_narrowest_type_are_those_of_float64(cancels, monkeypatch):
    """bfloat16 on a GPU; the interpreter has no bfloat16 products, so float16 goes through the same code there."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    monkeypatch.setattr(squared_gradient, "is_fused", lambda x: True)
    x, g = rows(3, 200, 60, 0), rows(3, 200, 40, 1) / 16
    if cancels:
        x, g = x + 10, g - g.mean(1, keepdim=True)
    x, g = x.to(dtype), g.to(dtype)
    wanted = squared_gradient_sums_reference(x.double(), g.double())
    monkeypatch.setattr(squared_gradient, "gram_is_cheaper", lambda *_: True)
    for given_gram in (None, input_gram(x)):
        for a, b in zip(squared_gradient_sums(x, g, given_gram), wanted, strict=True):
            assert (a - b).abs().max() <= (2e-3 if cancels else 1e-4) * b.max()
