"""The product with an unpacked weight into which trained values are written, against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reltune.ops.attach_elements import Form, Places, force
from reltune.ops.unpacked_product import Chosen, UnpackedProduct, unpacked_product_reference

FORMS: tuple[Form, ...] = ("dense", "sampled")
OUT, IN = 6, 5


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adapters(*counts: int, rows: int = OUT, columns: int = IN) -> tuple[Tensor, list[Chosen], list[Tensor]]:
    """A weight, and as many places as asked for of each adapter, which overlap; with values that are not the weight's."""
    weight, chosen, values = numbers(rows, columns, seed=2), [], []
    for seed, count in enumerate(counts):
        flat = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))[:count].sort().values
        chosen.append(Chosen(Places(flat.int(), (rows, columns), 8), weight.view(-1)[flat].clone()))
        values.append(numbers(count, seed=3 + seed).requires_grad_())
    return weight, chosen, values


def results(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    chosen: Any,
    values: Any,
    form: Form | None,
    transposed: bool = False,
) -> list[Tensor]:
    """y and all gradients, by the operator or, without a form, by plain autograd."""
    given = [t for t in (x, bias, *values) if t is not None]
    if form is None:
        y = unpacked_product_reference(x, bias, weight, transposed, chosen, values)
    else:
        with force(form):
            y = UnpackedProduct.apply(x, bias, weight.clone, transposed, x.dtype, chosen, *values)
    factor = torch.arange(1.0, 1 + y.shape[-1], dtype=x.dtype)
    return [y.detach(), *torch.autograd.grad((y.sin() * factor).sum(), given)]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.sampled_from([(), (1,), (7,), (2, 3), (0,)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(FORMS),
)
def test_output_and_gradients_are_those_of_plain_autograd(rows, columns, counts, shape, with_bias, transposed, form):
    weight, chosen, values = adapters(*(min(n, rows * columns) for n in counts), rows=rows, columns=columns)
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    x = numbers(*shape, inputs).requires_grad_()
    bias = numbers(outputs, seed=9).requires_grad_() if with_bias else None
    before = weight.clone()
    found, wanted = (results(x, bias, weight, chosen, values, which, transposed) for which in (form, None))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    weight, chosen, values = adapters(7, 4)
    x, bias = numbers(3, IN).requires_grad_(), numbers(OUT, seed=9).requires_grad_()
    with force(form):
        assert torch.autograd.gradcheck(
            lambda x, bias, *own: UnpackedProduct.apply(x, bias, weight.clone, False, torch.float64, chosen, *own),
            (x, bias, *values),
        )


def test_only_what_is_wanted_is_differentiated() -> None:
    weight, chosen, values = adapters(7)
    unpacked = []
    unpack = lambda: unpacked.append(1) or weight.clone()  # noqa: E731
    x = numbers(3, IN)
    UnpackedProduct.apply(x, None, unpack, False, torch.float64, chosen, *values).sum().backward()
    assert len(unpacked) == 1 and values[0].grad is not None
    frozen = values[0].detach()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = UnpackedProduct.apply(x.requires_grad_(), None, unpack, False, torch.float64, chosen, frozen)
    y.sum().backward()
    assert [t.numel() for t in kept] == [7] and len(unpacked) == 3
    torch.testing.assert_close(
        x.grad, weight.flatten().index_copy(0, chosen[0].places.index.long(), frozen).view(OUT, IN).sum(0).expand(3, IN)
    )


def test_values_that_change_before_the_backward_pass_do_not_change_it() -> None:
    weight, chosen, values = adapters(7, 4)
    x = numbers(3, IN).requires_grad_()
    wanted = results(x, None, weight, chosen, values, "dense")[1:]
    with force("dense"):
        y = UnpackedProduct.apply(x, None, weight.clone, False, torch.float64, chosen, *values)
    for own in values:
        own.data += 1  # as fused optimizers do, unnoticed by autograd
    y += 0  # and the output may be changed in place
    factor = torch.arange(1.0, 1 + OUT, dtype=torch.float64)
    found = torch.autograd.grad((y.sin() * factor).sum(), [x, *values])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_types(autocast: bool) -> None:
    """Values in float32 are rounded as they are written; what was asked for is computed in, whatever autocast says."""
    weight, chosen, values = adapters(7, 4)
    x, bias = numbers(9, IN).requires_grad_(), numbers(OUT, seed=9).requires_grad_()
    wanted = results(x, bias, weight, chosen, values, None)
    narrow = weight.bfloat16()
    x32, bias32, *values32 = (t.detach().float().requires_grad_() for t in (x, bias, *values))
    of_base = [Chosen(own.places, own.base.bfloat16()) for own in chosen]
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = UnpackedProduct.apply(x32, bias32, narrow.clone, False, torch.bfloat16, of_base, *values32)
    assert y.dtype == torch.bfloat16
    factor = torch.arange(1.0, 1 + OUT)
    found = [y, *torch.autograd.grad((y.float().sin() * factor).sum(), [x32, bias32, *values32])]
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05 * float(b.abs().max()))
