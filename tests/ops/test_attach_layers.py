"""The operators that give an embedding's and a convolution's units their gradient, against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reltune.ops.attach_conv2d import (
    AttachConvColumns,
    AttachConvRows,
    Convolution,
    columns_of,
    outside_rows,
    put_columns,
    selected_conv2d_reference,
)
from reltune.ops.attach_embedding import (
    AttachEmbeddingColumns,
    AttachEmbeddingRows,
    place_of_token,
    selected_embedding_reference,
)

PARTS = ["columns", "rows", "both"]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _leaves(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.clone().requires_grad_() for t in tensors]


def _compare(got: Tensor, expected: Tensor, mine: list[Any], theirs: list[Any]) -> None:
    """Values, and gradients of a loss that weighs every output differently."""
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for y in (got, expected):
        (y.sin() * torch.arange(1.0, y.numel() + 1, dtype=y.dtype).view_as(y)).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        if a is not None:
            assert (a.grad - b.grad).abs().max() <= 1e-9 * b.grad.abs().max()


# -- embeddings ------------------------------------------------------------------------------------------------------

TOKENS = torch.tensor([[3, 1, 3, 0], [6, 6, 2, 1], [5, 3, 3, 6]])
FEATURES, ROWS = torch.tensor([4, 1]), torch.tensor([6, 3, 0])


def _look_up(tokens: Tensor, weight: Tensor, columns: Any, rows: Any, padding: int | None) -> Tensor:
    with torch.no_grad():
        written = selected_embedding_reference(tokens, weight, columns, FEATURES, rows, ROWS, padding)
    y = written
    if columns is not None:
        y = AttachEmbeddingColumns.apply(y, tokens, columns, FEATURES, None if rows is None else ROWS, padding)
    if rows is not None:
        y = AttachEmbeddingRows.apply(y, tokens, rows, ROWS, padding)
    return y


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("padding", [None, 3, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding_equals_plain_autograd(parts: str, padding: int | None, dtype: torch.dtype) -> None:
    weight = _random(7, 5)
    columns = _random(7, 2, seed=1) if parts != "rows" else None
    rows = _random(3, 5, seed=2) if parts != "columns" else None
    mine, theirs = _leaves(columns, rows), _leaves(columns, rows)
    tokens = TOKENS.to(dtype)
    expected = selected_embedding_reference(tokens, weight, theirs[0], FEATURES, theirs[1], ROWS, padding)
    _compare(_look_up(tokens, weight, *mine, padding), expected, mine, theirs)


@pytest.mark.parametrize("parts", PARTS)
def test_embedding_gradcheck(parts: str) -> None:
    weight = _random(7, 5)
    inputs = _leaves(*([_random(7, 2)] if parts != "rows" else []), *([_random(3, 5)] if parts != "columns" else []))

    def run(*trained: Tensor) -> Tensor:
        columns = trained[0] if parts != "rows" else None
        return _look_up(TOKENS, weight, columns, trained[-1] if parts != "columns" else None, None)

    assert torch.autograd.gradcheck(run, inputs)


def test_tokens_without_a_chosen_one_and_no_tokens_at_all() -> None:
    rows = _random(3, 5).requires_grad_()
    for tokens in (torch.tensor([1, 2, 5]), torch.empty(2, 0, dtype=torch.int64)):
        _look_up(tokens, _random(7, 5), None, rows, None).sum().backward()
        assert rows.grad is not None and (rows.grad == 0).all()
    assert place_of_token(torch.tensor([[6, 1], [0, 7]]), ROWS).tolist() == [[0, 3], [2, 3]]


def test_rows_of_an_embedding_keep_only_where_they_were_met() -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        AttachEmbeddingRows.apply(
            torch.zeros(3, 4, 5), TOKENS, torch.zeros(1, 5, requires_grad=True), torch.tensor([6]), None
        )
    assert sum(t.numel() for t in saved) == 6  # three places, and which row each is of


# -- convolutions ----------------------------------------------------------------------------------------------------

CONVS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride, padding, dilation": {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "same": {"padding": "same", "kernel_size": (2, 4)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (2, 1), "padding_mode": "circular", "stride": 2},
    "replicate": {"padding": 1, "padding_mode": "replicate", "bias": False},
    "patches": {"kernel_size": 3, "stride": 3},
    "1 x 1": {"kernel_size": 1},
    "two groups": {"groups": 2, "padding": 1},
    "three groups, more filters": {"groups": 3, "out_channels": 12, "stride": 2},
    "depthwise": {"groups": 6, "padding": 1, "out_channels": 6},
    "depthwise, two filters each": {"groups": 6, "out_channels": 12},
}


def _conv(name: str) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(**{"in_channels": 6, "out_channels": 6, "kernel_size": (3, 2), **CONVS[name]}).double()


CHANNELS, FILTERS = torch.tensor([4, 0, 5]), torch.tensor([5, 1, 0])


def _convolve(conv: nn.Conv2d, x: Tensor, columns: Any, rows: Any) -> Tensor:
    spec = Convolution.of(conv)
    weight = conv.weight.detach().clone()
    if columns is not None:
        put_columns(weight, CHANNELS, columns.detach(), conv.groups)
    if rows is not None:
        weight.index_copy_(0, FILTERS, rows.detach())
    y = conv._conv_forward(x, weight, None if conv.bias is None else conv.bias.detach())
    if columns is not None:
        y = AttachConvColumns.apply(y, x, columns, CHANNELS, None if rows is None else FILTERS, spec)
    if rows is not None:
        y = AttachConvRows.apply(y, x, rows, FILTERS, spec)
    return y


def _units(conv: nn.Conv2d, parts: str) -> tuple[Tensor | None, Tensor | None]:
    out, inside, *kernel = conv.weight.shape
    columns = _random(out // conv.groups, len(CHANNELS), *kernel, seed=1) if parts != "rows" else None
    return columns, _random(len(FILTERS), inside, *kernel, seed=2) if parts != "columns" else None


@pytest.mark.parametrize("batch", [(2,), ()])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", CONVS)
def test_convolution_equals_plain_autograd(name: str, parts: str, batch: tuple[int, ...]) -> None:
    conv, x = _conv(name), _random(*batch, 6, 8, 7)
    columns, rows = _units(conv, parts)
    mine, theirs = _leaves(x, columns, rows), _leaves(x, columns, rows)
    bias = None if conv.bias is None else conv.bias.detach()
    expected = selected_conv2d_reference(
        theirs[0] if batch else theirs[0][None],
        conv.weight.detach(),
        bias,
        Convolution.of(conv),
        theirs[1],
        CHANNELS,
        theirs[2],
        FILTERS,
    )
    _compare(_convolve(conv, *mine), expected if batch else expected[0], mine, theirs)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["stride, padding, dilation", "two groups"])
def test_convolution_gradcheck(name: str, parts: str) -> None:
    conv, x = _conv(name), _random(1, 6, 4, 5)
    units = _units(conv, parts)
    inputs = _leaves(x, *(t for t in units if t is not None))

    def run(x: Tensor, *trained: Tensor) -> Tensor:
        columns = trained[0] if parts != "rows" else None
        return _convolve(conv, x, columns, trained[-1] if parts != "columns" else None)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("name", ["plain", "two groups", "depthwise, two filters each"])
def test_columns_of_a_convolution_are_what_its_input_channels_touch(name: str) -> None:
    """An input channel's column is what the output loses when the channel is silent."""
    conv, x = _conv(name), _random(2, 6, 8, 7)
    weight = conv.weight.detach()
    columns = columns_of(weight, CHANNELS, conv.groups)
    emptied = weight.clone()
    put_columns(emptied, CHANNELS, torch.zeros_like(columns), conv.groups)
    silent = x.index_fill(1, CHANNELS, 0)
    torch.testing.assert_close(conv._conv_forward(x, emptied, conv.bias), conv(silent), rtol=1e-12, atol=1e-12)
    put_columns(emptied, CHANNELS, columns, conv.groups)
    assert torch.equal(emptied, weight)
    rest = outside_rows(columns, CHANNELS, FILTERS, conv.groups, weight.shape[1])
    put_columns(emptied, CHANNELS, rest, conv.groups)
    expected = weight.clone()
    only_columns = torch.zeros_like(weight)
    put_columns(only_columns, CHANNELS, torch.ones_like(columns), conv.groups)
    for row in FILTERS.tolist():
        expected[row] *= 1 - only_columns[row]
    assert torch.equal(emptied, expected)


def test_columns_of_a_convolution_keep_only_their_channels() -> None:
    conv, x = _conv("plain").requires_grad_(False), _random(2, 6, 8, 7).requires_grad_()
    columns = _units(conv, "columns")[0].requires_grad_()  # type: ignore[union-attr]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        AttachConvColumns.apply(torch.zeros(2, 6, 6, 6), x, columns, CHANNELS, None, Convolution.of(conv))
    assert max(t.numel() for t in saved) == x.numel() // 2


@pytest.mark.parametrize("operator", ["embedding columns", "embedding rows", "conv columns", "conv rows"])
def test_second_derivative_is_refused(operator: str) -> None:
    conv, x = _conv("plain"), _random(1, 6, 4, 4).requires_grad_()
    columns, rows = _leaves(*_units(conv, "both"))
    scale = _random(1).requires_grad_()
    if operator == "conv columns":
        y, trained = _convolve(conv, x, columns, None), columns
    elif operator == "conv rows":
        y, trained = _convolve(conv, x, None, rows), rows
    elif operator == "embedding columns":
        trained = _random(7, 2).requires_grad_()
        y = _look_up(TOKENS, _random(7, 5), trained, None, None)
    else:
        trained = _random(3, 5).requires_grad_()
        y = _look_up(TOKENS, _random(7, 5), None, trained, None)
    (first,) = torch.autograd.grad((y * scale).sum(), trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
