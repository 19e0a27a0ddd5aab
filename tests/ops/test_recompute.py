"""Inputs made again for an operator's backward pass: once for all that read them, and only where that is safe."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from reltune.ops import recompute
from reltune.ops.attach import AttachRows
from reltune.ops.attach_elements import AttachElements, Places

PLACES = [0, 3, 4, 17, 30]


@pytest.fixture
def everywhere():
    with recompute.force(True):
        yield


def values(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)


def attached(x, elements):
    """A frozen product of x with chosen single weights, rows and a view of x, as the tuner has them."""
    weight = torch.linspace(-1, 1, 48, dtype=x.dtype).reshape(6, 8)
    y = F.linear(x, weight)
    return AttachElements.apply(y, x, elements, Places(torch.tensor(PLACES), (6, 8)), False)


def test_elements_and_rows_get_the_gradient_of_the_whole_weight(everywhere):
    hidden, elements, rows = values(), torch.zeros(5, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.float64)
    elements.requires_grad_(), rows.requires_grad_()
    x = F.gelu(hidden)
    y = AttachRows.apply(attached(x, elements), x, rows, torch.tensor([1, 5]))
    nodes = y.grad_fn, y.grad_fn.next_functions[0][0]
    assert all(node.again is not None and node.saved_tensors[0] is None for node in nodes)
    y.square().sum().backward()
    weight = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(6, 8).requires_grad_()
    plain = hidden.detach().clone().requires_grad_()
    F.linear(F.gelu(plain), weight).square().sum().backward()
    torch.testing.assert_close(elements.grad, weight.grad.flatten()[PLACES], rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.grad, weight.grad[[1, 5]], rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden.grad, plain.grad, rtol=0, atol=1e-12)


def test_readers_of_one_tensor_share_what_is_made(everywhere):
    made = []
    x = F.gelu(values())
    readers = [recompute.again(of) for of in (x, x.view(10, 8), x.reshape(2, 40))]
    remade = x.grad_fn.metadata[recompute.REMADE]()
    how = remade.how
    remade.how = lambda: made.append(1) or how()
    for number, (read, shape) in enumerate(zip(readers, [x.shape, (10, 8), (2, 40)], strict=True)):
        found = read()
        assert found.shape == shape and torch.equal(found.flatten(), x.flatten())
        assert (remade.again is None) == (number == 2)  # dropped after the last
    assert len(made) == 1 and torch.equal(readers[0](), x) and len(made) == 2  # of a graph that was retained


def test_a_graph_that_is_dropped_takes_everything_with_it(everywhere):
    elements = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    hidden = values() * 2
    y = attached(F.gelu(hidden), elements)
    reference = weakref.ref(y.grad_fn), weakref.ref(hidden)
    gc.disable()
    try:
        del y, hidden
        assert all(of() is None for of in reference)
    finally:
        gc.enable()


def test_a_second_backward_pass_through_a_retained_graph(everywhere):
    elements = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    y = attached(F.gelu(values()), elements).square().sum()
    y.backward(retain_graph=True)
    first = elements.grad.clone()
    y.backward()
    assert torch.equal(elements.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_nothing_is_made_again_on_a_cpu_or_where_a_hook_decides_what_is_kept():
    elements = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    assert recompute.again(F.gelu(values())) is None
    with recompute.force(True):
        assert recompute.again(values()) is None
        with torch.autograd.graph.save_on_cpu():
            y = attached(F.gelu(values()), elements)
        assert y.grad_fn.again is None
        y = checkpoint(lambda x: attached(F.gelu(x), elements), values(), use_reentrant=False)
        y.sum().backward()
    found = elements.grad
    elements.grad = None
    attached(F.gelu(values()), elements).sum().backward()
    assert torch.equal(found, elements.grad)


def test_an_operand_that_was_changed_in_place_is_an_error(everywhere):
    elements = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    hidden = values() * 2
    y = attached(F.gelu(hidden), elements)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_without_its_epsilon_is_made_up_to_a_rounding(affine, everywhere):
    norm = nn.LayerNorm(8, eps=0.1, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = norm(values(torch.float32) * 100)
    torch.testing.assert_close(recompute.again(x)(), x, rtol=1e-6, atol=1e-6)
    if torch.device(x.device).type == "cpu":  # whose mean is in bfloat16 as well
        assert recompute.again(norm.bfloat16()(values(torch.bfloat16))) is None


def test_autocast_at_the_time_of_the_backward_pass_changes_nothing(everywhere):
    norm = nn.LayerNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        x = norm(values(torch.float32)).bfloat16()
    read = recompute.again(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(read(), x, rtol=2**-7, atol=0)
        assert read().dtype == torch.bfloat16
