"""Sums of squared per-example weight gradients of a linear map, by column and by row.

For y = x Wᵀ the gradient of example s is G_s = g_sᵀ x_s, with x_s (T × in) and g_s = ∂ℓ_s/∂y_s (T × out).
Wanted are Σ_s Σ_o G_s[o, i]² (columns) and Σ_s Σ_i G_s[o, i]² (rows). Two exact ways:

- Gram: with K_g = g gᵀ and K_x = x xᵀ (T × T), column i is Σ_t x[t, i] (K_g x)[t, i] and row o is
  Σ_t g[t, o] (K_x g)[t, o]; about 4·B·T²·(in + out) operations, O(T²) workspace per example. Maps that share their
  input share K_x.
- direct: G_s itself, a few examples at a time, its squares added up over the examples before they are reduced by
  column and by row; about 2·B·T·in·out operations, workspace two gradients or a block.

The Gram form is the identity behind "ghost norms" (Goodfellow, arXiv:1510.01799; Li et al., arXiv:2110.05679),
kept apart by column and by row. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor

from reltune.ops import kernels

Gram = Tensor | tuple[Tensor, Tensor]  # see `input_gram`
# Workspace of one block of examples, in numbers (not bytes): 64 Mi float32 numbers are 256 MiB.
BLOCK_NUMBERS = 1 << 26
# The same on a CPU, where a block should stay in the cache: at 32 examples × 64 tokens and 384 → 1536 features one
# block of 32 examples took 2.5 times as long as eight of 4 (direct form; 2 cores).
CACHED_NUMBERS = 1 << 21
# And for the direct form there, whose products are faster for one example than for several: 384 → 1536 features at 256
# tokens take 50 ms for 32 examples one by one, 66 ms three by three. Only small gradients go together.
DIRECT_NUMBERS = 1 << 18


def block_numbers(x: Tensor) -> int:
    """Workspace of one block, in numbers, on the device of x."""
    return BLOCK_NUMBERS if x.is_cuda else min(BLOCK_NUMBERS, CACHED_NUMBERS)


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# What an operation costs in the fused kernels, where one of the direct form costs 1: GRAM_COST in a Gram matrix, and
# FORMS_COST in the quadratic forms, which run as if there were OVERHEAD more features. Measured on one H200, 4096 → 1024, 4096 and 14336 features at 512 to 4096 tokens,
# 8,192 in all: the rule picks the faster way in ten of these twelve, and one that takes a tenth longer in the others.
GRAM_COST, FORMS_COST, OVERHEAD = 0.55, 1.0, 4096


def is_fused(x: Tensor) -> bool:
    """Whether inputs like x go through the fused kernels: bfloat16 on CUDA, with Triton."""
    return x.is_cuda and x.dtype == torch.bfloat16 and kernels.can_be_imported()


def gram_is_cheaper(
    tokens: int,
    in_features: int,
    out_features: int,
    columns: bool = True,
    rows: bool = True,
    has_gram: bool = False,
    fused: bool = False,
) -> bool:
    """Whether T × T Gram matrices cost less than the gradients themselves.

    ``has_gram``: K_x is there already; ``fused``: see `is_fused`. Without the kernels the operations decide. With both
    sums wanted their count picks the faster way for all of MiniLM's maps at 64, 128 and 256 tokens (measured: 32
    examples, float32, 2 CPU cores).
    """
    forms: float = (
        in_features + out_features if columns and rows else in_features if columns else out_features
    ) * tokens
    grams: float = (columns * out_features + (rows and not has_gram) * in_features) * tokens
    if fused:
        forms, grams = FORMS_COST * (forms + OVERHEAD * tokens), GRAM_COST * grams
    return forms + grams < in_features * out_features


def wants_gram(
    tokens: int, in_features: int, out_features: int, columns: bool = True, rows: bool = True, fused: bool = False
) -> bool:
    """Whether `squared_gradient_sums` would use K_x if it were given."""
    return rows and gram_is_cheaper(tokens, in_features, out_features, columns, rows, True, fused)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32, whatever autocast and the settings for TF32 and bfloat16 products are."""
    settings = {
        "cuda": torch.backends.cuda.matmul,
        "cpu": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    }.get(device.type)
    with torch.autocast(device.type, enabled=False):
        if settings is None:
            yield
            return
        before = settings.fp32_precision
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for batches of matrices, in the accumulator's dtype."""
    with full_precision(a.device):
        if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
            # Products of two such numbers are exact in float32: nothing need be copied to float32 first.
            return torch.bmm(a, b, out_dtype=torch.float32)
        dtype = accumulator_dtype(a)
        return a.to(dtype) @ b.to(dtype)


def input_gram(x: Tensor) -> Gram:
    """K_x = x xᵀ for inputs x (B, T, in): (B, T, T) in the accumulator's dtype, or as the fused kernel takes it."""
    if is_fused(x):
        # Imported where it is used: Triton takes a while to import.
        from reltune.ops.kernels.quadratic_form import triangle

        return triangle(x)
    return _product(x, x.mT)


@overload
def squared_gradient_sums(x: Tensor, g: Tensor, gram: Gram | None = None) -> tuple[Tensor, Tensor]: ...


@overload
def squared_gradient_sums(
    x: Tensor, g: Tensor, gram: Gram | None = None, *, columns: bool, rows: bool
) -> tuple[Tensor | None, Tensor | None]: ...


def squared_gradient_sums(
    x: Tensor, g: Tensor, gram: Gram | None = None, *, columns: bool = True, rows: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Column sums (in,) and row sums (out,) of Σ_s G_s², for inputs x (B, T, in) and output gradients g (B, T, out).

    ``gram`` is `input_gram(x)`, if the caller has it. None for what is not wanted. Computed in float32, or float64
    when the inputs are: sums of squares through Gram matrices cancel, and in bfloat16 they cancel badly. Never
    negative.
    """
    if x.dtype != g.dtype:
        x, g, gram = x.to(accumulator_dtype(x)), g.to(accumulator_dtype(g)), None
    tokens, in_features, out_features = x.shape[1], x.shape[2], g.shape[2]
    found_columns = x.new_zeros(in_features, dtype=accumulator_dtype(x)) if columns else None
    found_rows = x.new_zeros(out_features, dtype=accumulator_dtype(x)) if rows else None
    if gram_is_cheaper(tokens, in_features, out_features, columns, rows, gram is not None, is_fused(x)):
        _add_by_gram(x, g, gram, found_columns, found_rows)
    else:
        _add_directly(x, g, found_columns, found_rows)
    return found_columns, found_rows


def _examples_per_block(x: Tensor, numbers: int) -> int:
    """How many examples of so many numbers of workspace each make a block."""
    return max(1, block_numbers(x) // numbers)


def _add_by_gram(x: Tensor, g: Tensor, gram: Gram | None, columns: Tensor | None, rows: Tensor | None) -> None:
    tokens = x.shape[1]
    step = _examples_per_block(x, 3 * tokens**2 if is_fused(x) else tokens * (tokens + x.shape[2] + g.shape[2]))
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        xs, gs = x[some], g[some]
        if columns is not None:
            columns += _forms(input_gram(gs), xs)
        if rows is not None:
            rows += _forms(input_gram(xs) if gram is None else _examples_of(gram, some), gs)


def _examples_of(gram: Gram, some: slice) -> Gram:
    return gram[some] if isinstance(gram, Tensor) else (gram[0][some], gram[1][some])


def _forms(k: Gram, x: Tensor) -> Tensor:
    """Σ_b Σ_t x[b, t, d] (K_b x_b)[t, d] for every feature d."""
    if isinstance(k, tuple):
        from reltune.ops.kernels.quadratic_form import quadratic_forms

        return quadratic_forms(k, x)
    return _product(k, x.to(k.dtype)).mul_(x).sum((0, 1)).clamp_min_(0)


def _add_directly(x: Tensor, g: Tensor, columns: Tensor | None, rows: Tensor | None) -> None:
    if is_fused(x):
        from reltune.ops.kernels.squared_product import squared_product_sums

        for total, sums in zip((columns, rows), squared_product_sums(x, g), strict=True):
            if total is not None:
                total += sums
        return
    if x.shape[2] > g.shape[2]:  # the long side first: the product is a twelfth faster on a CPU
        x, g, columns, rows = g, x, rows, columns
    features, numbers = x.shape[2], BLOCK_NUMBERS // 2
    step = max(1, (numbers if x.is_cuda else min(numbers, DIRECT_NUMBERS)) // (features * g.shape[2]))
    outputs = max(1, numbers // features)
    for some in (slice(first, first + outputs) for first in range(0, g.shape[2], outputs)):
        blocks = (_product(gs[..., some].mT, xs) for gs, xs in zip(g.split(step), x.split(step), strict=True))
        total = next(blocks).square_()
        for block in blocks:
            total[: len(block)].addcmul_(block, block)
        if columns is not None:
            columns += total.sum((0, 1))
        if rows is not None:
            rows[some] += total.sum((0, 2))


def stacked_squared_gradient_sums(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Column sums (n, in) and row sums (n, out) of n maps at once, for x (n, B, T, in) and g (n, B, T, out).

    Many small maps, as the experts of a layer: one product for all where the Gram form is cheaper. The caller sees to it
    that n · B · T · (T + in + out) numbers of workspace are a block.
    """
    if not gram_is_cheaper(x.shape[2], x.shape[3], g.shape[3]):
        pairs = [squared_gradient_sums(xs, gs) for xs, gs in zip(x, g, strict=True)]
        return torch.stack([columns for columns, _ in pairs]), torch.stack([rows for _, rows in pairs])
    maps, examples = x.shape[:2]
    xs, gs = x.flatten(0, 1), g.flatten(0, 1)

    def forms(gram: Tensor, factor: Tensor) -> Tensor:
        values = _product(gram, factor.to(gram.dtype)).mul_(factor)
        return values.unflatten(0, (maps, examples)).sum((1, 2)).clamp_min_(0)

    return forms(_product(gs, gs.mT), xs), forms(_product(xs, xs.mT), gs)


def squared_gradient_sums_reference(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the definition: one example at a time."""
    total = sum((gs.mT @ xs).square() for xs, gs in zip(x, g, strict=True))
    assert isinstance(total, Tensor)
    return total.sum(0), total.sum(1)
