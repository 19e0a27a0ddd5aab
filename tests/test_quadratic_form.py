"""The Triton kernel for quadratic forms, against its PyTorch reference: on the GPU, or else in Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")

from reltune.ops.quadratic_form import quadratic_forms, quadratic_forms_reference
from reltune.ops.squared_gradient import input_gram, squared_gradient_sums, squared_gradient_sums_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Blocks are 128 tokens by 128 features: sizes around them, and far below.
TOKENS = st.one_of(st.integers(1, 9), st.integers(125, 131), st.just(259))
FEATURES = st.one_of(st.integers(1, 9), st.integers(126, 131))


def symmetric(batch, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(batch, tokens, 5, generator=generator)
    return (g @ g.mT).to(DEVICE)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), TOKENS, FEATURES, st.sampled_from([torch.float32, torch.float16]), st.integers(0, 99))
def test_kernel_equals_the_reference(batch, tokens, features, dtype, seed):
    # float16 tells whether K's second half arrives: K in one float16 would be off by 1e-4.
    k = symmetric(batch, tokens, seed)
    x = torch.randn(batch, tokens, features, generator=torch.Generator().manual_seed(seed + 1)).to(DEVICE, dtype)
    found = quadratic_forms(k, x)
    wanted = quadratic_forms_reference(k.double(), x)
    assert found.shape == (features,) and found.dtype == torch.float32
    assert (found - wanted).abs().max() <= 5e-6 * wanted.abs().max()


def test_inputs_need_not_be_contiguous():
    k = symmetric(2, 40, 0)
    x = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE).mT
    assert torch.allclose(quadratic_forms(k.mT, x), quadratic_forms_reference(k, x), rtol=1e-5)


def test_zeros_give_zeros_and_nothing_is_negative():
    k = symmetric(2, 40, 0)
    x = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert not quadratic_forms(k, torch.zeros_like(x)).any()
    assert not quadratic_forms(torch.zeros_like(k), x).any()
    assert not quadratic_forms(-k, x).any()


def test_a_number_that_is_not_finite_is_not_hidden():
    k = symmetric(2, 40, 0)
    x = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x[1, 3, 4] = torch.nan
    assert quadratic_forms(k, x).isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16 products")
@pytest.mark.parametrize("cancels", [False, True])
def test_bfloat16_sums_are_those_of_float64(cancels):
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(3, 200, 300, generator=generator, device=DEVICE)
    g = torch.randn(3, 200, 150, generator=generator, device=DEVICE)
    if cancels:
        x, g = x + 10, g - g.mean(1, keepdim=True)
    x, g = x.bfloat16(), g.bfloat16()
    wanted = squared_gradient_sums_reference(x.double(), g.double())
    for gram in (None, input_gram(x)):
        for a, b in zip(squared_gradient_sums(x, g, gram), wanted, strict=True):
            assert (a - b).abs().max() <= (2e-3 if cancels else 1e-4) * b.max()
