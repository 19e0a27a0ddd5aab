"""The operator behind Fisher scores, against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reltune.ops import squared_gradient
from reltune.ops.squared_gradient import (
    full_precision,
    gram_is_cheaper,
    input_gram,
    squared_gradient_sums,
    squared_gradient_sums_reference,
    stacked_squared_gradient_sums,
    wants_gram,
)

SHAPES = st.tuples(*[st.integers(1, high) for high in (6, 7, 24, 24)])  # examples, tokens, in, out


def inputs(shape, seed=0, dtype=torch.float64):
    examples, tokens, in_features, out_features = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, tokens, in_features, generator=generator, dtype=torch.float64)
    g = torch.randn(examples, tokens, out_features, generator=generator, dtype=torch.float64)
    return x.to(dtype), g.to(dtype)


def by_definition(x, g):
    """Σ_s G_s[o, i]² with every index written out: (columns, rows)."""
    squares = torch.einsum("sto,sti->soi", g, x).square().sum(0)
    return squares.sum(0), squares.sum(1)


def assert_close(found, wanted, relative):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= relative * b.abs().max()


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.integers(0, 99), st.sampled_from([1, 50, 1 << 26]), st.sampled_from([None, True, False]))
def test_sums_equal_the_definition(shape, seed, block_numbers, gram):
    x, g = inputs(shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squared_gradient, "BLOCK_NUMBERS", block_numbers)
        if gram is not None:
            patch.setattr(squared_gradient, "gram_is_cheaper", lambda *_: gram)
        found = squared_gradient_sums(x, g)
    wanted = by_definition(x, g)
    assert found[0].dtype == torch.float64
    assert_close(found, wanted, 1e-9)
    assert_close(squared_gradient_sums_reference(x, g), wanted, 1e-9)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 300, 1 << 26]))
def test_one_sum_alone_and_a_given_gram_change_nothing(shape, columns, rows, given_gram, gram, block_numbers):
    x, g = inputs(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squared_gradient, "BLOCK_NUMBERS", block_numbers)
        patch.setattr(squared_gradient, "gram_is_cheaper", lambda *_: gram)
        found = squared_gradient_sums(x, g, input_gram(x) if given_gram else None, columns=columns, rows=rows)
    for sums, wanted, asked in zip(found, by_definition(x, g), (columns, rows), strict=True):
        assert (sums is not None) == asked
        if sums is not None:
            assert_close([sums], [wanted], 1e-9)


@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_many_maps_at_once_are_those_one_by_one(tokens):
    x, g = inputs((6, tokens, 12, 9))
    columns, rows = stacked_squared_gradient_sums(x.unflatten(0, (3, 2)), g.unflatten(0, (3, 2)))
    assert columns.shape == (3, 12) and rows.shape == (3, 9)
    for m in range(3):
        own = slice(2 * m, 2 * m + 2)
        assert_close((columns[m], rows[m]), squared_gradient_sums_reference(x[own], g[own]), 1e-9)


def test_zeros_give_zeros():
    x, g = inputs((2, 3, 5, 4))
    for found in (
        squared_gradient_sums(x * 0, g),
        squared_gradient_sums(x, g * 0),
    ):
        assert [len(sums) for sums in found] == [5, 4]
        assert not any(sums.any() for sums in found)


def test_autocast_and_faster_products_are_kept_out():
    x, g = inputs((4, 8, 48, 40), dtype=torch.float32)
    wanted = squared_gradient_sums(x, g)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = squared_gradient_sums(x, g)
        assert settings.fp32_precision == "bf16"
        with pytest.raises(KeyError), full_precision(x.device):
            assert settings.fp32_precision == "ieee"
            raise KeyError
        assert settings.fp32_precision == "bf16"
    finally:
        settings.fp32_precision = before
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_gram_is_taken_where_it_counts_fewer_operations():
    # BERT-base's square maps at 128 tokens, its feed-forward maps at 512, and where the balance tips: 2·T·2n = n·n.
    assert gram_is_cheaper(128, 768, 768)
    assert gram_is_cheaper(192 - 1, 768, 768) and not gram_is_cheaper(192, 768, 768)
    assert gram_is_cheaper(300, 768, 3072) and not gram_is_cheaper(512, 768, 3072)
    assert not gram_is_cheaper(1, 768, 2)
    # One sum alone costs half, and K_x that is there already saves its part.
    assert gram_is_cheaper(383, 768, 768, True, False) and not gram_is_cheaper(384, 768, 768, True, False)
    assert gram_is_cheaper(200, 768, 768, has_gram=True) and not gram_is_cheaper(256, 768, 768, has_gram=True)
    assert wants_gram(200, 768, 768) and not wants_gram(200, 768, 768, rows=False)


@pytest.mark.parametrize(
    ("tokens", "out_features", "gram"),
    [
        (512, 1024, False),
        (512, 4096, True),
        (512, 14336, True),
        (1024, 1024, False),
        (1024, 14336, True),
        (2048, 1024, False),
        (2048, 4096, False),
        (4096, 1024, False),
        (4096, 4096, False),
        (4096, 14336, False),
    ],
)
def test_the_rule_for_the_fused_kernels_is_the_measured_one(tokens, out_features, gram):
    assert gram_is_cheaper(tokens, 4096, out_features, fused=True) == gram


@pytest.mark.parametrize("gram", [True, False])
def test_blocks_bound_the_workspace(gram, monkeypatch):
    """The products are made for as many examples at a time as fit in BLOCK_NUMBERS, at least one."""
    x, g = inputs((5, 3, 16, 8))
    per_example = 3 * (3 + 16 + 8) if gram else 2 * 16 * 8  # a gradient, and the squares so far
    monkeypatch.setattr(squared_gradient, "gram_is_cheaper", lambda *_: gram)
    monkeypatch.setattr(squared_gradient, "BLOCK_NUMBERS", 2 * per_example)
    sizes = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: sizes.append(a.shape[0]) or product(a, b), raising=True
    )
    squared_gradient_sums(x, g)
    assert sizes == [2] * (8 if gram else 2) + [1] * (4 if gram else 1)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_cancelling_sums_are_never_negative(shape, seed, gram, dtype):
    """Pairs of tokens with the same input and opposite gradients: every true sum is zero."""
    x, g = inputs(shape, seed)
    x, g = torch.cat([x, x], 1).to(dtype), torch.cat([g, -g], 1).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squared_gradient, "gram_is_cheaper", lambda *_: gram)
        found = squared_gradient_sums(x, g)
    scale = (x.float().square().sum() * g.float().square().sum()).item()
    for sums in found:
        assert sums.dtype == torch.float32
        assert sums.min() >= 0
        assert sums.max() <= 1e-5 * scale


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float32(dtype, gram, monkeypatch):
    monkeypatch.setattr(squared_gradient, "gram_is_cheaper", lambda *_: gram)
    x, g = inputs((4, 8, 48, 40), dtype=dtype)
    # Nearly cancelling: sums made in bfloat16, or with 8 bits somewhere between, would be far off.
    g[:, 1::2] = -g[:, ::2]
    x[:, 1::2] = (x[:, ::2].float() * 1.25).to(dtype)
    wanted = by_definition(x.double(), g.double())
    assert_close(squared_gradient_sums(x, g), wanted, 1e-4)
