"""Frozen maps that add up their input's gradient, against plain autograd."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reltune.ops import join_inputs
from reltune.ops.join_inputs import joined_linear

IN = 6


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHTS = [numbers(out, IN, seed=out) for out in (3, 4, 5)]
BIAS = numbers(4, seed=9)


def outputs(x: Tensor, linear) -> list[Tensor]:
    return [linear(x, weight, BIAS if len(weight) == 4 else None) for weight in WEIGHTS]


def both(loss, shape: tuple[int, ...] = (2, 3, IN)) -> None:
    """The loss of the outputs and of x, and the gradient of what x is made from, are as with plain products."""
    found = []
    for linear in (joined_linear, F.linear):
        start = numbers(*shape).requires_grad_()
        x = start.sin()
        of = loss(x, outputs(x, linear))
        of.backward()
        found.append((of.detach(), start.grad))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN), (0, IN)])
def test_the_gradient_is_that_of_all_maps_together(shape):
    both(lambda x, of: sum(y.cos().sum() for y in of), shape)


def test_maps_that_the_loss_does_not_reach_and_other_readers_of_the_input():
    both(lambda x, of: of[1].cos().sum())
    both(lambda x, of: of[0].cos().sum() + (x * x).sum() + of[2].sum())
    both(lambda x, of: (of[0].sum(-1) * of[2].sum(-1) * x.sum(-1)).sum())


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda x: tuple(outputs(x * 1, joined_linear)), (numbers(3, IN).requires_grad_(),))


def test_a_graph_can_be_gone_through_again_also_after_an_error_or_in_part():
    start = numbers(3, IN).requires_grad_()
    x = start.sin()
    first, second, third = outputs(x, joined_linear)
    wanted = torch.autograd.grad(sum(y.sum() for y in outputs(start.sin(), F.linear)), start)[0]
    with pytest.raises(RuntimeError, match="stop here"):
        broken = second.clone()
        broken.register_hook(lambda g: (_ for _ in ()).throw(RuntimeError("stop here")))
        (first.sum() + broken.sum()).backward(retain_graph=True)
    for _ in range(2):
        (of,) = torch.autograd.grad(first.sum() + second.sum() + third.sum(), start, retain_graph=True)
        torch.testing.assert_close(of, wanted, rtol=1e-12, atol=1e-12)
    (of,) = torch.autograd.grad(third.sum(), x, retain_graph=True)
    torch.testing.assert_close(of, WEIGHTS[2].sum(0).expand(3, IN), rtol=1e-12, atol=1e-12)


def test_the_input_is_not_kept_and_a_changed_weight_is_noticed():
    weight = WEIGHTS[0].clone()
    x = numbers(3, IN).requires_grad_() * 2
    y = joined_linear(x, weight, None)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_large_inputs_on_a_gpu_are_joined():
    x, weight = numbers(3, IN).requires_grad_(), WEIGHTS[0]
    assert not join_inputs.joins(x, weight, None)
    if torch.cuda.is_available():
        leaf = torch.zeros(join_inputs.LEAST_NUMBERS // IN + 1, IN, device="cuda", requires_grad=True)
        large = leaf * 1
        weight = torch.zeros(3, IN, device="cuda")
        assert join_inputs.joins(large, weight, None) and not join_inputs.joins(large, weight.requires_grad_(), None)
        assert not join_inputs.joins(large.detach(), weight.detach(), None)
        assert not join_inputs.joins(leaf, weight.detach(), None)
