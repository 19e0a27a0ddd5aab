"""The operators that give selected single weights their gradient, against plain autograd, in both forms."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reltune.ops import attach_elements, sampled_on_cpu
from reltune.ops.attach_elements import (
    AttachElements,
    Places,
    SparseProduct,
    element_gradient,
    force,
    is_sampled,
)
from reltune.ops.kernels.sampled_product import sampled_product, transposed
from reltune.ops.sampled_on_cpu import gathered

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("dense", "sampled")
OUT, IN = 6, 5


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(rows: int, columns: int, count: int, seed: int = 0, block: int = 0, dtype=torch.int64) -> Places:
    flat = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return Places(flat.to(dtype), (rows, columns), block)


SIZES = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(0, 12), st.integers(0, 81), st.integers(0, 30), st.sampled_from(FORMS), st.booleans())
def test_the_gradient_is_that_of_the_whole_product(rows, columns, vectors, count, block, form, narrow):
    """Whatever the number of rows in a block, in rows without places, and for no vectors or places at all."""
    a, b = numbers(vectors, rows), numbers(vectors, columns, seed=1)
    chosen = places(
        rows, columns, min(count, rows * columns), block=block, dtype=torch.int32 if narrow else torch.int64
    )
    wanted = (a.mT @ b).flatten()[chosen.index.long()]
    found = element_gradient(a, b, chosen, form)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN), (0, IN)])
def test_values_and_gradients_are_those_of_plain_autograd(form, transposed, shape):
    chosen = places(*((IN, OUT) if transposed else (OUT, IN)), 9, block=8)
    results = []
    for attached in (True, False):
        x, values = numbers(*shape).requires_grad_(), numbers(9, seed=1).requires_grad_()
        weight = numbers(*chosen.shape, seed=2)
        if attached:
            weight.view(-1)[chosen.index] = values.detach()
            y = F.linear(x, weight.mT if transposed else weight)
            with force(form):
                y = AttachElements.apply(y, x, values, chosen, transposed)
        else:
            weight = weight.flatten().index_copy(0, chosen.index, values).view(chosen.shape)
            y = F.linear(x, weight.mT if transposed else weight)
        (y.sin() * torch.arange(1.0, 1 + OUT)).sum().backward()
        results.append([y.detach(), x.grad, values.grad])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(form, transposed):
    chosen = places(*((IN, OUT) if transposed else (OUT, IN)), 7, block=10)
    x, values = numbers(3, IN).requires_grad_(), numbers(7, seed=1).requires_grad_()

    def attached(values: Tensor) -> Tensor:
        weight = numbers(*chosen.shape, seed=2)
        weight.view(-1)[chosen.index] = values.detach()
        plain = x.detach()
        return AttachElements.apply(
            F.linear(plain, weight.mT if transposed else weight), plain, values, chosen, transposed
        )

    with force(form):
        assert torch.autograd.gradcheck(attached, (values,))
        assert torch.autograd.gradcheck(lambda x, d: SparseProduct.apply(x, d, chosen, transposed), (x, values))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_sparse_product_is_that_with_the_dense_matrix(transposed, dtype, monkeypatch):
    monkeypatch.setattr(attach_elements, "GATHERED_NUMBERS", 13)
    chosen = places(*((IN, OUT) if transposed else (OUT, IN)), 11)
    x, delta = numbers(2, 3, IN).to(dtype), numbers(11, seed=1)
    dense = torch.zeros(OUT * IN, dtype=torch.float64).index_copy(0, chosen.index, delta).view(chosen.shape)
    wanted = x.double() @ (dense if transposed else dense.mT)
    found = SparseProduct.apply(x, delta, chosen, transposed)
    assert found.dtype == dtype and found.shape == (2, 3, OUT)
    # sums in float32: only the result is rounded
    torch.testing.assert_close(
        found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-12 if dtype == x.double().dtype else 1e-6
    )


def test_what_is_kept_for_the_backward_pass_is_x_itself():
    x, values, chosen = numbers(4, IN), numbers(3).requires_grad_(), places(OUT, IN, 3)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = AttachElements.apply(F.linear(x, numbers(OUT, IN)), x, values, chosen, False)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
    gone = weakref.ref(x)
    y.sum().backward()
    kept.clear()
    del x, y
    gc.collect()
    assert gone() is None


def test_the_output_may_be_changed_in_place_and_autocast_keeps_its_types():
    chosen, values = places(OUT, IN, 4), numbers(4, dtype=torch.float32).requires_grad_()
    x, weight = numbers(3, IN, dtype=torch.float32), numbers(OUT, IN, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = AttachElements.apply(F.linear(x, weight), x, values, chosen, False)
        assert y.dtype == torch.bfloat16
        y += 1
    y.float().square().sum().backward()
    wanted = (2 * (x @ weight.mT + 1)).mT @ x
    assert values.grad.dtype == torch.float32
    torch.testing.assert_close(values.grad, wanted.flatten()[chosen.index], rtol=0.03, atol=0.05)


def test_the_cheaper_form_is_taken_and_either_can_be_forced(monkeypatch):
    a = torch.zeros(1, 1000)
    assert is_sampled(places(1000, 1000, 100_000), a) and not is_sampled(places(1000, 1000, 110_000), a)
    on_gpu = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    of_size = [Places(torch.arange(14_336 * 4_096 // share), (14_336, 4_096)) for share in (200, 110, 50)]
    for grouped, wanted in ((False, [True, True, False]), (True, [True, False, False])):
        monkeypatch.setattr(attach_elements, "_is_grouped", lambda *_, grouped=grouped: grouped)
        assert [is_sampled(of, on_gpu) for of in of_size] == wanted
    monkeypatch.undo()
    taken = []
    for form in FORMS:
        module, name = (attach_elements, "_dense") if form == "dense" else (sampled_on_cpu, "sampled_product")
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *of, real=real, form=form: taken.append(form) or real(*of))
    chosen, values = places(OUT, IN, 3), numbers(3).requires_grad_()
    for form in FORMS:
        with force(form):
            y = AttachElements.apply(numbers(2, OUT), numbers(2, IN), values, chosen, False)
        # The form is that of the forward pass, wherever and whenever the backward pass runs.
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
    assert taken == list(FORMS)


TOKENS = st.one_of(st.integers(1, 9), st.integers(126, 130), st.just(300))
FEATURES = st.one_of(st.integers(1, 9), st.integers(30, 33))


@settings(max_examples=25, deadline=None)
@given(
    TOKENS,
    FEATURES,
    FEATURES,
    st.integers(0, 40),
    st.sampled_from([torch.float64, torch.float32, torch.float16]),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_kernel_equals_the_reference(tokens, rows, columns, count, dtype, narrow, seed):
    a, b = (numbers(tokens, n, seed=seed + n, dtype=dtype).to(DEVICE) for n in (rows, columns))
    index = places(rows, columns, min(count, rows * columns), seed, dtype=torch.int32 if narrow else torch.int64).index
    found = sampled_product(a, b, index.to(DEVICE))
    wanted = gathered(a.double(), b.double(), index.to(DEVICE))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = 1e-12 if dtype == torch.float64 else 2e-6
    assert count == 0 or (found - wanted).abs().max() <= close * tokens**0.5 * (1 + wanted.abs().max())


@pytest.mark.parametrize(("vectors", "features"), [(1, 1), (63, 65), (64, 64), (130, 3)])
def test_transposed_copies(vectors, features):
    x = numbers(vectors, features, dtype=torch.float16).to(DEVICE)
    for of in (x, x.mT):
        assert torch.equal(transposed(of), of.mT) and transposed(of).is_contiguous()


def test_the_kernel_adds_up_over_blocks_of_vectors(monkeypatch):
    from reltune.ops.kernels import sampled_product as module

    monkeypatch.setattr(module, "CACHED_NUMBERS", 1)
    a, b = numbers(600, 3).to(DEVICE).mT.contiguous().mT, numbers(600, 4, seed=1).to(DEVICE)
    index = torch.arange(12, device=DEVICE)
    torch.testing.assert_close(sampled_product(a, b, index), (a.mT @ b).flatten(), rtol=1e-12, atol=1e-12)
