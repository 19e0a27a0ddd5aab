"""Votes of a probe: kernels (on the GPU, or else in Triton's interpreter) and PyTorch references by their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reltune.ops.kernels import votes as kernels
from reltune.ops.votes import moved, moved_reference, score, vote, vote_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.float64, torch.bfloat16]
COUNTS = st.one_of(st.integers(0, 9), st.integers(4090, 4100), st.just(140_000))


def drawn(count, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    votes = torch.randint(-127, 128, (count,), generator=generator, dtype=torch.int8).to(DEVICE)
    gradient = torch.randn(count, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    gradient[::3] = 0
    return weight, votes, gradient


def by_kernel(dtype):
    return dtype in (torch.float32, torch.float16) or (DEVICE == "cuda" and dtype == torch.bfloat16)


@settings(max_examples=15, deadline=None)
@given(COUNTS, st.sampled_from(DTYPES), st.integers(0, 99))
def test_a_moved_weight_is_rounded_once(count, dtype, seed):
    weight, votes, _ = drawn(count, seed, dtype)
    step = 0.001
    exact = weight.double() - step * votes.double()
    half = torch.finfo(dtype).eps / 2
    for of in [moved, moved_reference, *([kernels.moved] if by_kernel(dtype) else [])]:
        found = of(weight, votes, step)
        assert found.dtype == dtype and found.is_contiguous()
        # half a place of the result, and what float32 is off by where the two nearly cancel
        assert ((found.double() - exact).abs() <= 1.01 * half * exact.abs() + 3e-7).all()


@settings(max_examples=15, deadline=None)
@given(COUNTS, st.sampled_from(DTYPES), st.integers(0, 99))
def test_votes_add_up_signs(count, dtype, seed):
    _, votes, gradient = drawn(count, seed, dtype)
    votes.clamp_(-126, 126)
    wanted = votes.long() + (gradient > 0).long() - (gradient < 0).long()
    for of in [vote, vote_reference, *([kernels.vote] if by_kernel(dtype) else [])]:
        found = votes.clone()
        total = of(found, gradient)
        assert torch.equal(found.long(), wanted)
        assert total.shape == () and abs(float(total) - float(gradient.double().sum())) <= 1e-3 * max(count, 1) ** 0.5


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_number_that_is_not_finite_shows_in_the_sum(bad):
    _, votes, gradient = drawn(5000, 0, torch.float32)
    gradient[4999], gradient[3] = bad, -bad
    assert not torch.isfinite(vote_reference(votes, gradient)) and not torch.isfinite(kernels.vote(votes, gradient))


def test_shapes_of_more_dimensions_and_strides():
    weight, votes, gradient = (of.reshape(20, 100) for of in drawn(2000, 1, torch.float32))
    wanted = weight - 0.01 * votes
    assert torch.allclose(moved(weight.mT, votes.mT, 0.01), wanted.mT, atol=1e-6)
    found = votes.clone().clamp_(-126, 126)
    vote(found, gradient.mT.contiguous().mT)
    assert torch.equal(found.long(), votes.clamp(-126, 126).long() + gradient.sign().long())


def test_the_fraction_orders_equal_votes_and_no_others():
    sizes = torch.tensor([0.0, 1e-44, 1e-30, 1e-12, 1.002e-12, 1.0, 3e38])
    for most in (0, 1, 50, 127):
        votes = torch.full_like(sizes, -most).to(torch.int8)
        found = score(votes, -sizes)
        assert found[0] == most and (found[1:] > found[:-1]).all() and (found < most + 1).all()
    assert torch.equal(score(votes, None), votes.abs().float())
