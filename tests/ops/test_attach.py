"""The operators that give selected columns and rows their gradient, against plain autograd."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reltune.ops.attach import AttachColumns, AttachRows, HoldWeight, LiveGraphs, selected_linear_reference

COLUMNS, ROWS = [1, 3, 4], [0, 5]


def _case(shape: tuple[int, ...] = (2, 3, 5), seed: int = 0) -> tuple[Tensor, ...]:
    """x, W (6, 5), b, columns (6, 3), rows (2, 5) in float64; the weight does not yet hold columns and rows."""
    g = torch.Generator().manual_seed(seed)
    sizes = (shape, (6, 5), (6,), (6, 3), (2, 5))
    return tuple(torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)


def _attached(x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None, rows: Tensor | None) -> Tensor:
    """One product with the written weight, with the operators on top: what a layer does."""
    idx, row_idx = torch.tensor(COLUMNS), torch.tensor(ROWS)
    written = weight.clone()
    if columns is not None:
        written[:, idx] = columns.detach()
    if rows is not None:
        written[row_idx] = rows.detach()
    y = F.linear(x, written, bias)
    if columns is not None:
        y = AttachColumns.apply(y, x, columns, idx, None if rows is None else row_idx)
    if rows is not None:
        y = AttachRows.apply(y, x, rows, row_idx)
    return y


@pytest.mark.parametrize("parts", ["columns", "rows", "both"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)])
def test_values_and_gradients_are_those_of_plain_autograd(parts: str, with_bias: bool, shape: tuple[int, ...]) -> None:
    x, weight, bias, columns, rows = _case(shape)
    leaves = [x, columns if parts != "rows" else None, rows if parts != "columns" else None]
    results = []
    for attached in (True, False):
        own = [None if leaf is None else leaf.clone().requires_grad_() for leaf in leaves]
        b = bias if with_bias else None
        if attached:
            y = _attached(own[0], weight, b, own[1], own[2])
        else:
            idx, row_idx = torch.tensor(COLUMNS), torch.tensor(ROWS)
            y = selected_linear_reference(own[0], weight, b, own[1], idx, own[2], row_idx)
        (y.sin() * torch.arange(1.0, 7.0)).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in own if leaf is not None)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_reference_itself_puts_rows_over_columns() -> None:
    x, weight, bias, columns, rows = _case()
    idx, row_idx = torch.tensor(COLUMNS), torch.tensor(ROWS)
    expected = weight.clone()
    for j, i in enumerate(COLUMNS):
        expected[:, i] = columns[:, j]
    for j, o in enumerate(ROWS):
        expected[o] = rows[j]
    y = selected_linear_reference(x, weight, bias, columns, idx, rows, row_idx)
    torch.testing.assert_close(y, x @ expected.T + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_rows", [True, False])
def test_gradcheck(with_rows: bool) -> None:
    """Numerical differentiation of the whole map, in which the weight follows columns and rows as training writes them."""
    x, weight, bias, columns, rows = _case()
    inputs = [t.requires_grad_() for t in ([x, columns, rows] if with_rows else [x, columns])]

    def run(x: Tensor, columns: Tensor, rows: Tensor | None = None) -> Tensor:
        return _attached(x, weight, bias, columns, rows)

    assert torch.autograd.gradcheck(run, inputs)


def test_cells_in_both_get_their_gradient_in_the_row_only() -> None:
    x, weight, bias, columns, rows = _case()
    columns.requires_grad_()
    rows.requires_grad_()
    _attached(x, weight, bias, columns, rows).sum().backward()
    assert columns.grad is not None and rows.grad is not None
    assert (columns.grad[ROWS] == 0).all()
    assert (rows.grad[:, COLUMNS] != 0).all()
    assert (columns.grad[[1, 2, 3, 4]] != 0).all()


@pytest.mark.parametrize("last", ["columns", "rows", "hold"])
def test_output_may_be_changed_in_place(last: str) -> None:
    """As a residual added in place does."""
    x, weight, bias, columns, rows = _case()
    columns.requires_grad_()
    rows.requires_grad_()

    def run() -> Tensor:
        y = _attached(x, weight, bias, columns if last != "rows" else None, rows if last == "rows" else None)
        return HoldWeight.apply(y, LiveGraphs()) if last == "hold" else y

    trained = rows if last == "rows" else columns
    (expected,) = torch.autograd.grad(run().sum(), trained)
    y = run()
    y += 1
    y.mul_(2)
    assert torch.equal(torch.autograd.grad(y.sum(), trained)[0], 2 * expected)


@pytest.mark.parametrize("parts", ["columns", "rows"])
def test_second_derivative_is_refused(parts: str) -> None:
    """A silent zero would be wrong: the gradient of columns depends on x and on W, which is not told here."""
    x, weight, bias, columns, rows = _case()
    trained = (columns if parts == "columns" else rows).requires_grad_()
    x.requires_grad_()
    y = _attached(x, weight, bias, trained if parts == "columns" else None, trained if parts == "rows" else None)
    (first,) = torch.autograd.grad((y**2).sum(), trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def _saved(run: Callable[[], object]) -> list[Tensor]:
    """What autograd keeps of the given computation."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return saved


def test_columns_keep_only_their_part_of_the_input() -> None:
    linear = nn.Linear(64, 64).requires_grad_(False)
    x = torch.randn(10, 7, 64, requires_grad=True)
    idx = torch.tensor([5, 9, 40, 63])
    columns = linear.weight[:, idx].clone().requires_grad_()
    saved = _saved(lambda: AttachColumns.apply(linear(x), x, columns, idx, None))
    float_shapes = sorted(tuple(t.shape) for t in saved if t.is_floating_point())
    assert float_shapes == [(10, 7, 4), (64, 64)]  # x[..., idx], and the weight for the gradient of x
    kept = next(t for t in saved if t.shape == (10, 7, 4))
    assert torch.equal(kept, x[..., idx])
    assert kept.untyped_storage().nbytes() == 10 * 7 * 4 * 4  # a view of x would keep all of x alive


def test_rows_keep_a_reference_to_the_input_and_no_copy() -> None:
    linear = nn.Linear(64, 64).requires_grad_(False)
    x = torch.randn(10, 7, 64)
    idx = torch.tensor([5, 9])
    rows = linear.weight[idx].clone().requires_grad_()
    saved = [t for t in _saved(lambda: AttachRows.apply(linear(x), x, rows, idx)) if t.shape == x.shape]
    assert len(saved) == 1
    assert saved[0].data_ptr() == x.data_ptr()


def test_input_of_rows_must_not_change_before_the_backward_pass() -> None:
    x, weight, bias, _, rows = _case()
    rows.requires_grad_()
    y = _attached(x, weight, bias, None, rows)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_input_of_columns_may_change_before_the_backward_pass() -> None:
    x, weight, bias, columns, _ = _case()
    columns.requires_grad_()
    expected = torch.autograd.grad(_attached(x, weight, bias, columns, None).sum(), columns)[0]
    y = _attached(x, weight, bias, columns, None)
    x.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), columns)[0], expected)


@pytest.mark.parametrize("y_dtype", [torch.bfloat16, torch.float16])
def test_gradient_has_the_dtype_of_the_trained_tensor(y_dtype: torch.dtype) -> None:
    """A low-precision product over a float32 input (autocast) or beside float32 columns (a low-precision base)."""
    x, weight, bias, columns, rows = (t.float() for t in _case())
    columns.requires_grad_()
    rows.requires_grad_()
    idx, row_idx = torch.tensor(COLUMNS), torch.tensor(ROWS)
    y = F.linear(x, weight, bias).to(y_dtype)
    y = AttachRows.apply(AttachColumns.apply(y, x, columns, idx, row_idx), x, rows, row_idx)
    y.sum().backward()
    assert columns.grad is not None and rows.grad is not None
    assert columns.grad.dtype == rows.grad.dtype == torch.float32
    expected = x.sum((0, 1))
    torch.testing.assert_close(columns.grad[1], expected[idx], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(rows.grad[0], expected, rtol=2e-2, atol=2e-2)


def test_a_held_graph_is_known_for_as_long_as_it_lives() -> None:
    graphs = LiveGraphs()
    weight = torch.randn(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    first = HoldWeight.apply(F.linear(x, weight), graphs).sum()
    second = HoldWeight.apply(F.linear(x, weight), graphs).sum()
    assert len(graphs) == 2
    first.backward()
    del first
    gc.collect()
    assert len(graphs) == 1
    for _ in range(20):  # what is over is forgotten without being asked for
        HoldWeight.apply(F.linear(x, weight), graphs)
    assert len(graphs) <= 2
    del second
    gc.collect()
    assert len(graphs) == 0
