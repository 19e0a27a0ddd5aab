"""The operator that trains a linear map along fixed directions of its input, against plain autograd."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reltune.ops.add_directions import AddDirections, add_directions_reference


def case(shape: tuple[int, ...] = (2, 3, 5), dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x (…, 5), W (6, 5), directions (3, 5), change (6, 3)."""
    g = torch.Generator().manual_seed(0)
    sizes = (shape, (6, 5), (3, 5), (6, 3))
    x, weight, directions, change = (torch.randn(size, generator=g).to(dtype) for size in sizes)
    return x, weight, directions, change


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_values_and_gradients_are_those_of_plain_autograd(shape: tuple[int, ...]) -> None:
    x, weight, directions, change = case(shape)
    results = []
    for run in (AddDirections.apply, add_directions_reference):
        own, trained = x.clone().requires_grad_(), change.clone().requires_grad_()
        y = run(F.linear(own, weight), own, directions, trained)
        (y.sin() * torch.arange(1.0, 7.0)).sum().backward()
        results.append([y.detach(), own.grad, trained.grad])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_reference_itself_changes_the_weight() -> None:
    x, weight, directions, change = case()
    expected = torch.einsum("bti,oi->bto", x, weight + torch.einsum("or,ri->oi", change, directions))
    found = add_directions_reference(x @ weight.T, x, directions, change)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    x, weight, directions, change = case()

    def run(y: Tensor, x: Tensor, change: Tensor) -> Tensor:
        return AddDirections.apply(y, x, directions, change)

    inputs = [t.requires_grad_() for t in (F.linear(x, weight), x, change)]
    assert torch.autograd.gradcheck(run, inputs)


def test_the_input_is_not_kept_and_below_the_lowest_layer_nothing_is_computed() -> None:
    x, weight, directions, change = case()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = AddDirections.apply(F.linear(x, weight), x, directions, change.requires_grad_())
    assert sorted(tuple(t.shape) for t in kept) == [(2, 3, 3), (3, 5), (6, 3)]
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    (to_change,) = torch.autograd.grad(y.sum(), change)
    assert to_change.shape == change.shape and y.grad_fn.next_functions[1][0] is None  # type: ignore[union-attr]


def test_types_are_those_of_the_base_s_output_and_of_what_is_trained() -> None:
    x, weight, directions, change = case(dtype=torch.float32)
    wide = [t.clone().requires_grad_() for t in (x, change)]
    narrow = x.bfloat16().requires_grad_(), change.clone().requires_grad_()
    y = AddDirections.apply(F.linear(narrow[0], weight.bfloat16()), narrow[0], directions, narrow[1])
    expected = add_directions_reference(F.linear(wide[0], weight), wide[0], directions, wide[1])
    y.square().sum().backward()
    expected.square().sum().backward()
    assert (y.dtype, narrow[0].grad.dtype, narrow[1].grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    pairs = ((y, expected), (narrow[0].grad, wide[0].grad), (narrow[1].grad, wide[1].grad))
    for got, exact in pairs:
        assert (got.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_under_autocast() -> None:
    x, weight, directions, change = case(dtype=torch.float32)
    own, trained = x.clone().requires_grad_(), change.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = AddDirections.apply(F.linear(own, weight), own, directions, trained)
    y.float().square().sum().backward()
    assert (y.dtype, own.grad.dtype, trained.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = add_directions_reference(F.linear(x, weight), x, directions, change)
    assert (y.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_a_second_derivative_is_refused() -> None:
    x, weight, directions, change = case()
    y = AddDirections.apply(F.linear(x, weight), x, directions, change.requires_grad_())
    (first,) = torch.autograd.grad(y.square().sum(), change, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
