"""The Triton kernels, against their PyTorch references: on the GPU, or else in Triton's interpreter."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reltune.ops import squared_gradient
from reltune.ops.gated_product import (
    ACTIVATIONS,
    gated_product_gradients_reference,
    gated_product_reference,
)
from reltune.ops.index_copy import Copy, index_copy
from reltune.ops.kernels import rms_norm as rms_norm_kernels
from reltune.ops.kernels.column_gradient import column_gradient
from reltune.ops.kernels.gated_product import gated_product, gated_product_gradients
from reltune.ops.kernels.index_copy import copy_all
from reltune.ops.kernels.quadratic_form import quadratic_forms, quadratic_forms_reference, triangle
from reltune.ops.kernels.rms_norm import rms_norm, rms_norm_gradients
from reltune.ops.kernels.rotation import rotated
from reltune.ops.kernels.squared_product import squared_product_sums
from reltune.ops.rms_norm import rms_norm_reference
from reltune.ops.rotation import rotated_reference
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
@example(1, 126, 2, 1, torch.float32, 1)
def test_kernels_equal_the_reference(batch, tokens, features, others, dtype, seed):
    # float16 tells whether K's second half arrives: K in one float16 would be off by 1e-4.
    g, x = rows(batch, tokens, others, seed, dtype), rows(batch, tokens, features, seed + 1, dtype)
    found = quadratic_forms(triangle(g), x)
    wanted = quadratic_forms_reference(gram(g), x)
    assert found.shape == (features,) and found.dtype == torch.float32
    summed = quadratic_forms_reference(gram(g.abs()), x.abs())  # where terms cancel, their sum is as exact as they are
    assert (found - wanted).abs().max() <= 5e-6 * wanted.abs().max() + 2e-8 * summed.max()


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


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3), TOKENS, FEATURES, FEATURES, st.sampled_from([torch.float32, torch.float16]), st.integers(0, 99)
)
def test_squared_products_equal_the_definition(batch, tokens, features, others, dtype, seed):
    g, x = rows(batch, tokens, others, seed, dtype), rows(batch, tokens, features, seed + 1, dtype)
    wide_g, wide_x = g.double(), x.double()
    # A product P is a sum over the tokens that may cancel: rounding moves it by a part of the sum of sizes, A, and its
    # square by 2 |P| times as much.
    moved = (wide_g.mT @ wide_x).abs() * (wide_g.abs().mT @ wide_x.abs())
    for found, wanted, error in zip(
        squared_product_sums(x, g),
        squared_gradient_sums_reference(wide_x, wide_g),
        (moved.sum((0, 1)), moved.sum((0, 2))),
        strict=True,
    ):
        assert found.shape == wanted.shape and found.dtype == torch.float32
        assert ((found - wanted).abs() <= 1e-6 * wanted + 2e-7 * error).all()


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("cancels", [False, True])
def test_sums_of_the_narrowest_type_are_those_of_float64(cancels, gram, monkeypatch):
    """bfloat16 on a GPU; the interpreter has no bfloat16 products, so float16 goes through the same code there."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    monkeypatch.setattr(squared_gradient, "is_fused", lambda x: True)
    x, g = rows(3, 200, 60, 0), rows(3, 200, 40, 1) / 16
    if cancels:
        x, g = x + 10, g - g.mean(1, keepdim=True)
    x, g = x.to(dtype), g.to(dtype)
    wanted = squared_gradient_sums_reference(x.double(), g.double())
    monkeypatch.setattr(squared_gradient, "gram_is_cheaper", lambda *_: gram)
    for given_gram in (None, input_gram(x)):
        for a, b in zip(squared_gradient_sums(x, g, given_gram), wanted, strict=True):
            assert (a - b).abs().max() <= (2e-3 if cancels else 1e-4) * b.max()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 700), st.integers(8, 600), st.sampled_from([torch.float32, torch.float16]), st.integers(0, 99))
def test_rms_norm_and_its_gradients_equal_the_reference(tokens, features, dtype, seed):
    if DEVICE == "cpu":
        tokens = 1 + tokens % 9  # the interpreter goes row by row
    x, gain = rows(2, tokens, features, seed, dtype), 1 + rows(1, 1, features, seed + 1, dtype)[0, 0] / 4
    g = rows(2, tokens, features, seed + 2, dtype)
    wide, wide_gain = x.double().requires_grad_(), gain.double().requires_grad_()
    y = rms_norm(x, gain, 1e-3)
    reference = rms_norm_reference(wide, wide_gain, 1e-3)
    reference.backward(g.double())
    scale = 1 if dtype == torch.float32 else 2**12
    assert (y - reference).abs().max() <= scale * 1e-6 * reference.abs().max()
    for of_gain in (False, True):
        to_x, to_gain = rms_norm_gradients(g, x, gain, 1e-3, of_gain)
        assert (to_x - wide.grad).abs().max() <= scale * 2e-6 * wide.grad.abs().max().clamp(min=1)
        assert (to_gain is not None) == of_gain
    size = (g.double() * reference.detach() / wide_gain.detach()).abs().sum((0, 1)).max()
    assert to_gain.dtype == dtype and (to_gain - wide_gain.grad).abs().max() <= scale * 1e-6 * size


def test_rows_of_a_norm_shared_out_to_programs(monkeypatch):
    monkeypatch.setattr(rms_norm_kernels, "PROGRAMS", 3)  # 4 rows each, and 2 for the last
    x, g, gain = rows(1, 10, 40, 0), rows(1, 10, 40, 1), rows(1, 1, 40, 2)[0, 0]
    found = rms_norm_gradients(g, x, gain, 1e-3, True)
    monkeypatch.undo()
    for a, b in zip(found, rms_norm_gradients(g, x, gain, 1e-3, True), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numbers", [3, 1030])
def test_gated_product_and_its_gradients_equal_the_reference(activation, numbers, dtype):
    gate, up, g = (3 * rows(1, 2, numbers, n, dtype)[0] for n in range(3))
    wide = [gate.double().requires_grad_(), up.double().requires_grad_()]
    wanted = gated_product_reference(*wide, activation)
    wanted.backward(g.double())
    found = gated_product(gate, up, activation), *gated_product_gradients(g, gate, up, activation)
    # Rounded where PyTorch's own operations round: nearly all numbers are theirs. The interpreter cuts bfloat16 off instead.
    plain = gated_product_reference(gate, up, activation), *gated_product_gradients_reference(g, gate, up, activation)
    exact = dtype == torch.float16 or (dtype == torch.bfloat16 and DEVICE == "cuda")
    step = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2.4e-2}[dtype]
    for a, b, c in zip(found, [wanted, *(t.grad for t in wide)], plain, strict=True):
        assert a.dtype == dtype and (a - b).abs().max() <= step * b.abs().max()
        assert not exact or int((a != c).sum()) <= 1 + a.numel() // 10


def test_large_gates_do_not_overflow():
    gate, up = torch.tensor([[-1e4, -100.0, 100.0, 1e4]], device=DEVICE), torch.ones(1, 4, device=DEVICE)
    for activation in ACTIVATIONS:
        y, (to_gate, to_up) = gated_product(gate, up, activation), gated_product_gradients(up, gate, up, activation)
        for found, wanted in ((y, [0, 0, 100, 1e4]), (to_gate, [0, 0, 1, 1]), (to_up, [0, 0, 100, 1e4])):
            assert torch.allclose(found, torch.tensor([wanted], device=DEVICE, dtype=torch.float32), atol=1e-6)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 1, 1, 2), (2, 5, 3, 96), (1, 40, 2, 128)], ids=str)
def test_rotations_equal_the_reference(shape, dtype, back):
    examples, heads, tokens, features = shape
    x = rows(examples, tokens, heads * features, 0, dtype).view(examples, tokens, heads, features).transpose(1, 2)
    for of in (1, examples):
        cos, sin = (rows(of, tokens, features, seed, dtype) for seed in (1, 2))
        for given_x in (x, x.contiguous(), x.mT.contiguous().mT):
            found, wanted = rotated(given_x, cos, sin, back), rotated_reference(x, cos, sin, back)
            assert found.dtype == dtype and (found - wanted).abs().max() <= (2e-6 if dtype == torch.float32 else 0)
    assert rotated(x, cos, sin, back).stride() == x.stride()


@settings(max_examples=15, deadline=None)
@given(
    st.one_of(st.integers(0, 9), st.integers(125, 131), st.just(700)),
    st.one_of(st.integers(1, 9), st.integers(62, 67), st.just(200)),
    st.one_of(st.integers(1, 4), st.integers(15, 33)),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 99),
)
def test_column_gradient_equals_the_product(tokens, out_features, columns, dtype, seed):
    g, selected = rows(1, tokens, out_features, seed, dtype)[0], rows(1, tokens, columns, seed + 1, dtype)[0]
    found = column_gradient(g, selected)
    wanted = g.double().mT @ selected.double()
    assert found.shape == (out_features, columns) and found.dtype == torch.float32
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1e-30)
    assert torch.equal(found, column_gradient(g, selected))  # added up in a fixed order


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32)], ids=str)
def test_many_columns_and_rows_are_written_at_once(dtypes):
    shapes, dims, counts = [(130, 70), (3, 100), (5, 5), (64, 200)], [1, 0, 1, 0], [40, 1, 5, 33]
    copies, wanted = [], []
    for seed, (shape, dim, count) in enumerate(zip(shapes, dims, counts, strict=True)):
        weight = rows(1, *shape, seed, dtypes[0])[0]
        idx = torch.randperm(shape[dim], generator=torch.Generator().manual_seed(seed))[:count].to(DEVICE)
        values = rows(1, *(count if d == dim else size for d, size in enumerate(shape)), seed + 9, dtypes[1])[0]
        copies.append(Copy(weight, dim, idx, values))
        wanted.append(weight.clone().index_copy_(dim, idx, values.to(weight.dtype)))
    strided = Copy(copies[0].weight.mT.contiguous().mT, *copies[0][1:])  # which the kernel does not take
    index_copy([*copies, strided])
    assert torch.equal(strided.weight, wanted[0])
    assert all(torch.equal(copy.weight, want) for copy, want in zip(copies, wanted, strict=True))
    for copy in copies:
        copy.weight.zero_()
    copy_all(copies)
    for copy, want in zip(copies, wanted, strict=True):
        want.copy_(torch.zeros_like(want).index_copy_(copy.dim, copy.idx, copy.values.to(want.dtype)))
    assert all(torch.equal(copy.weight, want) for copy, want in zip(copies, wanted, strict=True))


def test_writing_counts_as_a_change_of_the_weight():
    weights = [torch.zeros(4, 4, device=DEVICE) for _ in range(3)]
    idx = torch.tensor([1, 3], device=DEVICE)
    versions = [weight._version for weight in weights]
    index_copy(Copy(weight, 1, idx, torch.ones(4, 2, device=DEVICE)) for weight in weights)
    assert all(float(weight.sum()) == 8 for weight in weights)
    assert all(weight._version > version for weight, version in zip(weights, versions, strict=True))
