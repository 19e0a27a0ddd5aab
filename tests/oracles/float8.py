"""float8 (e4m3) by its definition, and a linear map that rounds with it, in float64 and with nothing of reltune's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, and the largest pattern is no number.
POSITIVE = torch.tensor(
    [
        (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    ],
    dtype=torch.float64,
)


def nearest(x: Tensor) -> Tensor:
    """The e4m3 number nearest to each of x, the even one of two; in float64. |x| ≤ 448 · (1 + 1/32)."""
    size = x.abs().double()
    above = torch.searchsorted(POSITIVE, size).clamp(max=len(POSITIVE) - 1)
    below = (above - 1).clamp(min=0)
    up, down = POSITIVE[above] - size, size - POSITIVE[below]
    take_above = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(take_above, POSITIVE[above], POSITIVE[below]) * x.sign()


def rounded_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ŵ (out, in) and the scales (out,), the smallest powers of two with which no number of a row is above 448 (or 2^-24)."""
    scales = []
    for row in weight.double():
        scale = 2.0**-24
        while float(row.abs().max()) / scale > 448:
            scale *= 2
        scales.append(scale if float(row.abs().max()) > 0 else 1.0)
    scale = torch.tensor(scales, dtype=torch.float64)
    return nearest(weight.double() / scale[:, None]) * scale[:, None], scale


def rounded_rows(x: Tensor) -> Tensor:
    """x̂ (…, n): each vector with its largest number at 448."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-30).float()
    factor = torch.full_like(largest, 448) / largest  # a number over a tensor would be its reciprocal, times that
    return nearest(x * factor) * (largest / 448).double()


class Rounding(torch.autograd.Function):
    """x (…, in) -> x̂ Ŵᵀ, and backwards g -> (g ⊙ scales)^ Ŵ/scales: the gradient goes straight through roundings."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return rounded_rows(x) @ weight.mT

    @staticmethod
    def backward(ctx, g):
        weight, scale = ctx.saved_tensors
        return rounded_rows(g * scale) @ (weight / scale[:, None]), None, None


class RoundedLinear(nn.Module):
    """A float64 nn.Linear in float8, with the columns idx of its own weight trained in place of the rounded ones."""

    def __init__(self, linear: nn.Linear, idx: Tensor | None = None) -> None:
        super().__init__()
        rounded, scale = rounded_weight(linear.weight.detach())
        self.register_buffer("rounded", rounded)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.idx = idx
        if idx is not None:
            self.columns = nn.Parameter(linear.weight.detach()[:, idx].clone())

    def forward(self, x: Tensor) -> Tensor:
        y = Rounding.apply(x, self.rounded, self.scale)
        if self.idx is not None:
            y = y + x[..., self.idx] @ (self.columns - self.rounded[:, self.idx]).mT
        return y if self.bias is None else y + self.bias
