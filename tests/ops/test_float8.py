"""float8 linear maps against their definition (oracles/float8.py), and the Triton kernels against PyTorch: on the GPU, or
else in Triton's interpreter."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracles.float8 import POSITIVE, Rounding, rounded_rows, rounded_weight
from reltune.ops import float8
from reltune.ops.float8 import E4M3, float8_linear, quantise_rows_reference, quantise_weight
from reltune.ops.kernels import float8 as float8_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers; rows of very different sizes, the second one of zeros."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(-2, 1, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    if shape[0] > 2:
        x[1] = 0
    return x.to(dtype)


def float64_map(
    out: int = 32, features: int = 48, c: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """q as int8, scale, bias, D, idx, Ŵ[:, idx] of a map."""
    q, scale = quantise_weight(numbers(out, features, seed=seed, dtype=dtype))
    idx = torch.randperm(features, generator=torch.Generator().manual_seed(seed))[:c]
    own = q.to(dtype)[:, idx] * scale[:, None]
    bias, columns = numbers(1, out, seed=seed + 1, dtype=dtype)[0], own + numbers(out, c, seed=seed + 2, dtype=dtype)
    return q.view(torch.int8), scale, bias, columns, idx, own


def test_the_oracle_has_all_numbers_of_the_type() -> None:
    every = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    assert torch.equal(every, POSITIVE)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), DTYPES, st.integers(0, 99))
def test_rows_are_rounded_to_the_nearest(tokens: int, features: int, dtype: torch.dtype, seed: int) -> None:
    x = numbers(tokens, features, seed=seed, dtype=dtype)
    factor = None if seed % 2 else torch.rand(features, generator=torch.Generator().manual_seed(seed)) + 0.1
    wide = x.float() if factor is None else x.float() * factor
    q, scales = quantise_rows_reference(x, factor)
    assert q.dtype == E4M3 and q.shape == x.shape and scales.shape == (tokens, 1) and scales.dtype == torch.float32
    assert torch.equal(q.double() * scales.double(), rounded_rows(wide))
    assert ((q.double() * scales - wide).abs() <= wide.abs() / 15.99 + scales * 2**-9).all()  # half a step


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), DTYPES, st.integers(0, 99))
def test_weights_are_rounded_to_the_nearest(out: int, features: int, dtype: torch.dtype, seed: int) -> None:
    weight = numbers(out, features, seed=seed, dtype=dtype)
    q, scale = quantise_weight(weight)
    wanted, scales = rounded_weight(weight)
    assert scale.dtype == dtype and torch.equal(scale.double(), scales)
    held = q.to(dtype) * scale[:, None]
    assert torch.equal(held.double(), wanted)  # exact in the weight's own type
    assert torch.equal(q.to(torch.bfloat16).double() * scale.to(torch.bfloat16).double()[:, None], wanted)
    again, once_more = quantise_weight(held)
    assert torch.equal(again.to(dtype) * once_more[:, None], held)


def test_rows_that_are_rounded_up_to_the_largest_number_stay_as_they_are() -> None:
    weight = torch.tensor([[447.0, 2.0**-9, -3.0], [448.0, 2.0**-9, 1.0]])
    q, scale = quantise_weight(weight)
    again, once_more = quantise_weight(q.float() * scale[:, None])
    assert scale.tolist() == [1, 1] and torch.equal(once_more, scale) and torch.equal(again.float(), q.float())


def test_what_is_not_finite_is_not_hidden() -> None:
    x = numbers(4, 16)
    x[0, 3], x[2, 5] = torch.nan, torch.inf
    q, scales = quantise_rows_reference(x)
    assert (q.float() * scales).isnan().any(1).tolist() == [True, False, True, False]


def on_the_grid(tokens: int, features: int, seed: int) -> Tensor:
    """Numbers that rounding leaves as they are, whatever it is."""
    generator = torch.Generator().manual_seed(seed)
    values = POSITIVE[torch.randint(len(POSITIVE), (tokens, features), generator=generator)]
    values[:, 0] = 448
    signs = torch.randint(2, values.shape, generator=generator) * 2 - 1
    return (values * signs * 2.0 ** torch.randint(-9, 9, (tokens, 1), generator=generator)).float()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 5),
    st.one_of(st.integers(1, 40), st.integers(126, 131), st.just(700)),
    st.booleans(),
    DTYPES,
    st.integers(0, 99),
)
def test_the_kernel_rounds_as_pytorch_does(
    tokens: int, features: int, multiplied: bool, dtype: torch.dtype, seed: int
) -> None:
    # Triton's interpreter does not carry into the exponent when it rounds to float8: there nothing has to be rounded.
    factor = None
    if DEVICE == "cuda":
        x = numbers(tokens, features, seed=seed, dtype=dtype).to(DEVICE)
        factor = torch.rand(features, device=DEVICE) + 0.1 if multiplied else None
    else:
        x = on_the_grid(tokens, features, seed)
        if multiplied:
            factor = 2.0 ** torch.randint(-3, 3, (features,), generator=torch.Generator().manual_seed(seed))
            x = x / factor
    found = float8_kernels.quantise_rows(x, factor, float8.LARGEST, float8.SMALLEST)
    # On the CPU: torch divides by a number on a GPU with an error in the last place, which ties do not forgive.
    wanted = quantise_rows_reference(x.cpu(), None if factor is None else factor.cpu())
    assert torch.equal(found[0].view(torch.uint8).cpu(), wanted[0].view(torch.uint8))
    assert torch.equal(found[1].cpu(), wanted[1])


def test_the_kernel_takes_rows_of_zeros_and_any_strides() -> None:
    x = on_the_grid(6, 40, 0).to(DEVICE)
    x[3] = 0
    for rows in (x, x.mT.contiguous().mT, x[:1].expand(6, 40)):
        found = float8_kernels.quantise_rows(rows, None, float8.LARGEST, float8.SMALLEST)
        wanted = quantise_rows_reference(rows)
        assert torch.equal(found[0].float(), wanted[0].float()) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("shape", [(1, 1), (16, 48), (127, 130), (300, 128), (3, 259)])
def test_the_kernel_transposes(shape: tuple[int, int]) -> None:
    weight = torch.randint(-128, 128, shape, dtype=torch.int8, device=DEVICE)
    found = float8_kernels.transposed(weight)
    assert found.is_contiguous() and torch.equal(found, weight.t())


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("c", [0, 1, 5])
@pytest.mark.parametrize("shape", [(7,), (2, 5), ()])
def test_a_map_is_what_its_definition_says(shape: tuple[int, ...], c: int, with_bias: bool) -> None:
    q, scale, bias, columns, idx, own = float64_map(c=c)
    x = numbers(2, *shape, 48, seed=3, dtype=torch.float64).sum(0).requires_grad_()
    g = numbers(2, *shape, 32, seed=4, dtype=torch.float64).sum(0)
    columns.requires_grad_()
    chosen = (columns, idx, own) if c else ()
    y = float8_linear(x, q, scale, bias if with_bias else None, *chosen)
    y.backward(g)
    found = [y, x.grad, columns.grad]
    weight = q.view(E4M3).double() * scale[:, None]
    x.grad = columns.grad = None
    wanted_y = Rounding.apply(x, weight, scale)
    if c:
        wanted_y = wanted_y + x[..., idx] @ (columns - own).mT
    if with_bias:
        wanted_y = wanted_y + bias
    wanted_y.backward(g)
    for a, b in zip(found, [wanted_y, x.grad, columns.grad], strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and (a - b).abs().max() <= 1e-12 * b.abs().max())


@pytest.mark.parametrize("with_columns", [True, False])
def test_without_rounding_it_is_differentiated_exactly(monkeypatch: Any, with_columns: bool) -> None:
    def exact(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x if factor is None else x * factor, x.new_ones(len(x), 1)

    monkeypatch.setattr(float8, "quantise_rows", exact)
    q, scale, bias, columns, idx, own = float64_map()
    x = numbers(4, 48, seed=3, dtype=torch.float64).requires_grad_()
    bias.requires_grad_()
    if with_columns:
        columns.requires_grad_()
        inputs = (x, bias, columns)
        assert torch.autograd.gradcheck(lambda x, b, d: float8_linear(x, q, scale, b, d, idx, own), inputs)
    else:
        assert torch.autograd.gradcheck(lambda x, b: float8_linear(x, q, scale, b), (x, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_of_the_types_they_should_be(dtype: torch.dtype) -> None:
    q, scale, bias, columns, idx, own = float64_map()
    scale, bias, own, columns = scale.to(dtype), bias.to(dtype), own.to(dtype), columns.float().requires_grad_()
    x = numbers(6, 48, seed=3, dtype=dtype).requires_grad_()
    y = float8_linear(x, q, scale, bias, columns, idx, own)
    y.sum().backward()
    assert y.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    assert columns.grad is not None and columns.grad.dtype == torch.float32
    weight = q.view(E4M3).double() * scale.double()[:, None]
    wanted = rounded_rows(x.detach().float()) @ weight.mT + bias.double()
    wanted += x.detach().double()[:, idx] @ (columns.detach() - own).double().mT
    assert (y - wanted).abs().max() <= 3 * torch.finfo(dtype).eps * wanted.abs().max()


def test_autocast_decides_on_the_type_of_the_output() -> None:
    q, scale, bias, columns, idx, own = float64_map(dtype=torch.float32)
    columns.requires_grad_()
    x = numbers(6, 48, seed=3).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = float8_linear(x, q, scale, bias, columns, idx, own)
    assert y.dtype == torch.bfloat16
    plain = float8_linear(x, q, scale, bias, columns, idx, own)
    assert (y - plain).abs().max() <= 0.02 * plain.abs().max()
    found = [torch.autograd.grad(of.float().sum(), [x, columns]) for of in (y, plain)]
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() <= 0.02 * b.abs().max()


def kept_by(y: Tensor) -> list[Tensor]:
    node = y.grad_fn
    while node is not None and "Float8Product" not in type(node).__name__:
        node = node.next_functions[0][0]
    return [] if node is None else [t for t in node.saved_tensors if t is not None]


def test_no_more_is_kept_than_the_backward_pass_needs() -> None:
    q, scale, bias, columns, idx, own = float64_map()
    x = numbers(40, 48, seed=3, dtype=torch.float64)
    assert float8_linear(x, q, scale, bias, columns, idx, own).grad_fn is None
    held = kept_by(float8_linear(x.requires_grad_(), q, scale))
    assert {t.data_ptr() for t in held} == {q.data_ptr(), scale.data_ptr()}  # the map's own
    columns.requires_grad_()
    held = kept_by(float8_linear(x, q, scale, bias, columns, idx, own))
    given = {t.data_ptr() for t in (q, scale, columns, idx, own)}
    assert [tuple(t.shape) for t in held if t.data_ptr() not in given] == [(40, 3)]
    held = kept_by(float8_linear(x.detach(), q, scale, bias, columns, idx, own))
    assert [tuple(t.shape) for t in held] == [(40, 3)]


def test_nothing_is_computed_for_an_input_that_wants_no_gradient(monkeypatch: Any) -> None:
    q, scale, bias, columns, idx, own = float64_map()
    y = float8_linear(numbers(4, 48, dtype=torch.float64), q, scale, bias, columns.requires_grad_(), idx, own)
    monkeypatch.setattr(float8, "transposed", lambda weight: 1 / 0)
    y.sum().backward()
    assert columns.grad is not None


def test_a_step_between_the_two_passes_is_refused_as_by_a_plain_map() -> None:
    q, scale, bias, columns, idx, own = float64_map()
    x = numbers(4, 48, dtype=torch.float64).requires_grad_()
    y = float8_linear(x, q, scale, bias, columns.requires_grad_(), idx, own)
    with torch.no_grad():
        columns.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    q, scale, *_ = float64_map()
    x = numbers(4, 48, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(float8_linear(x, q, scale).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_outputs_may_be_changed_in_place() -> None:
    q, scale, *_ = float64_map()
    x = numbers(4, 2, 48, dtype=torch.float64).requires_grad_()
    y = float8_linear(x, q, scale)
    y += 1
    y.sum().backward()
    assert x.grad is not None


@pytest.fixture
def count(monkeypatch: Any) -> list[Tensor]:
    """The inputs that are rounded from now on."""
    made: list[Tensor] = []
    rounding = float8.quantise_rows
    monkeypatch.setattr(float8, "quantise_rows", lambda x, f=None: made.append(x) or rounding(x, f))
    monkeypatch.setattr(float8, "_latest", float8.Latest())
    return made


def test_maps_that_share_their_input_round_it_once(count: list[Tensor]) -> None:
    q, scale, *_ = float64_map()
    x, other = (numbers(4, 48, seed=seed, dtype=torch.float64) for seed in (0, 1))
    first = float8_linear(x, q, scale)
    assert torch.equal(float8_linear(x, q, scale), first) and len(count) == 1
    assert not torch.equal(float8_linear(other, q, scale), first) and len(count) == 2
    assert torch.equal(float8_linear(x, q, scale), first) and len(count) == 3  # one is remembered
    x.mul_(-1)
    assert torch.equal(float8_linear(x, q, scale), -first) and len(count) == 4
    x.data = other
    assert torch.equal(float8_linear(x, q, scale), float8_linear(other, q, scale)) and len(count) == 6
    with torch.inference_mode():
        x = numbers(4, 48, seed=0, dtype=torch.float64)
        float8_linear(x, q, scale)
        x.mul_(-1)
        assert torch.equal(float8_linear(x, q, scale), -first) and len(count) == 8


def test_a_rounded_input_goes_when_the_input_goes(count: list[Tensor]) -> None:
    q, scale, *_ = float64_map()
    x = numbers(4, 48, dtype=torch.float64)
    float8_linear(x, q, scale)
    assert float8._latest._seen is not None
    count.clear()
    del x
    gc.collect()
    assert float8._latest._seen is None


def scaled_product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """torch._scaled_mm with a scale per row, with what a Hopper GPU demands of its arguments."""
    assert a.dtype == b.dtype == E4M3 and a.is_contiguous() and b.stride(0) == 1 and b.stride(1) == b.shape[0]
    assert not any(size % 16 for size in (a.shape[1], *b.shape)) and a.shape[1] == b.shape[0]
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
    assert scale_a.dtype == scale_b.dtype == torch.float32 and scale_a.is_contiguous() and scale_b.is_contiguous()
    assert bias is None and out_dtype == torch.bfloat16
    return (a.float() @ b.float() * scale_a * scale_b).to(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_device_s_products_get_what_they_demand(monkeypatch: Any, dtype: torch.dtype) -> None:
    """The whole path of a GPU; on a CPU with the kernels' references and a stand-in for the device's product."""
    q, scale, bias, columns, idx, own = (t.to(DEVICE) for t in float64_map(dtype=torch.float32))
    bias, own = bias.to(dtype), own.to(dtype)
    columns.requires_grad_()
    x = numbers(6, 48, seed=3, dtype=dtype).to(DEVICE).requires_grad_()
    g = numbers(6, 32, seed=4, dtype=dtype).to(DEVICE)
    found = []
    for on_device in (False, True):
        monkeypatch.setattr(float8, "_has_kernels", lambda x, on=on_device: on)
        if DEVICE == "cpu":
            monkeypatch.setattr(torch, "_scaled_mm", scaled_product)
            monkeypatch.setattr(float8_kernels, "quantise_rows", lambda x, f, *_: quantise_rows_reference(x, f))
            monkeypatch.setattr(float8_kernels, "MOST", 0)  # bfloat16 is no type of Triton's interpreter
        float8._latest._seen = None
        y = float8_linear(x, q, scale, bias, columns, idx, own)
        found.append([y, *torch.autograd.grad(y, [x, columns], g)])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        for row, wanted in zip(a.float(), b.float(), strict=True):
            assert (row - wanted).abs().max() <= 2**-6 * wanted.abs().max()


@settings(max_examples=20, deadline=None)
@given(
    st.one_of(st.integers(1, 9), st.integers(126, 131)),
    st.one_of(st.integers(1, 9), st.integers(126, 131)),
    st.one_of(st.integers(1, 4), st.integers(15, 33)),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 99),
)
def test_the_columns_part_is_added_in_one_pass(
    tokens: int, out: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    def drawn(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + sum(shape))
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    features = columns + 5
    selected, own, g, y, dx = (
        drawn(tokens, columns),
        drawn(out, columns),
        drawn(tokens, out),
        drawn(tokens, out),
        drawn(tokens, features),
    )
    idx = torch.randperm(features, generator=torch.Generator().manual_seed(seed))[:columns].to(DEVICE)
    values = own.float() + drawn(columns, out).mT.float() / 3  # not of the numbers that they are kept as
    change = (values - own.float()).to(dtype)
    values = values.contiguous()
    near = {"rtol": 0, "atol": (1e-5 if dtype == torch.float32 else 2e-2) * max(1, out) ** 0.5}
    wanted = y.double() + selected.double() @ change.double().mT
    float8_kernels.add_columns(y, selected, values, own)
    torch.testing.assert_close(y.double(), wanted, **near)
    wanted = dx.double().index_add(1, idx, g.double() @ change.double())
    float8_kernels.add_change(dx, idx, g, values, own)
    torch.testing.assert_close(dx.double(), wanted, **near)


HOPPER, ADA = (90, 232448), (89, 101376)  # compute capability, and the bytes of shared memory that a block may have


def compiled(cases: list[tuple[Any, ...]], cache: Path) -> dict[tuple[Any, ...], list[int]]:
    """What each case's two kernels take."""
    words = [sys.executable, str(Path(__file__).parents[1] / "shared_memory_worker.py"), json.dumps(cases)]
    answer = subprocess.run(
        words, env={**os.environ, "TRITON_CACHE_DIR": str(cache)}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return dict(zip(cases, json.loads(answer.stdout), strict=True))


def assert_fits(cases: list[tuple[Any, ...]], cache: Path) -> None:
    for case, found in compiled(cases, cache).items():
        assert 0 < max(found) <= case[1], (case, found)


def test_kernels_of_columns_fit_into_shared_memory(tmp_path: Path) -> None:
    """As Triton lays them out for the GPU. A base in float32 under bf16 has wide values beside narrow gradients."""
    cases = [(*HOPPER, "bf16", "fp32", own, columns) for own, columns in (("bf16", 32), ("fp32", 64), ("fp32", 128))]
    assert_fits([*cases, (*HOPPER, "fp32", "fp32", "fp32", 8), (*ADA, "bf16", "fp32", "fp32", 32)], tmp_path)


@pytest.mark.slow
def test_kernels_of_any_columns_fit_into_shared_memory(tmp_path: Path) -> None:
    kinds = (("bf16", "bf16", "bf16"), ("bf16", "fp32", "bf16"), ("bf16", "fp32", "fp32"), ("fp32", "fp32", "fp32"))
    cases = itertools.product((HOPPER, ADA), kinds, (8, 32, 64, 128))
    assert_fits([(*card, *kind, columns) for card, kind, columns in cases], tmp_path)
