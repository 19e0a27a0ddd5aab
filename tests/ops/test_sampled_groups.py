"""How places are cut into groups for the CUDA kernel, and on a GPU the kernel itself, against plain products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reltune.ops.attach_elements import Places, element_gradient
from reltune.ops.kernels import sampled_groups
from reltune.ops.kernels.cuda import compiled
from reltune.ops.kernels.sampled_groups import OCTETS, PLACES, SET, Groups, fits, grouped, suits

OCTET = 8


def random_places(shape: tuple[int, int], count: int, seed: int, crowded: bool = False) -> Tensor:
    """Ascending flat places, each once; crowded ones lie in few rows and columns more often than in others."""
    generator = torch.Generator().manual_seed(seed)
    if not crowded:
        return torch.randint(shape[0] * shape[1], (count,), generator=generator).unique()
    rows, columns = (
        torch.multinomial(torch.randn(side, generator=generator).mul(2).exp(), count, True, generator=generator)
        for side in shape
    )
    return (rows * shape[1] + columns).unique()


def by_thread(groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Of each place: its group and the slots whose product ends in the thread that keeps its sum.

    From what mma.m16n8k8 says of its operands: thread t has rows t / 4 and 8 + t / 4 of the result, in columns 2 · (t % 4)
    and the next. Of a unit, threads 0 to 7 and 8 to 15 name the rows of the first factor, 16 to 31 those of the second,
    once for the upper half of the result and once for the lower.
    """
    slots = groups.slots.long()  # (sets, 32, units)
    sets = torch.arange(len(slots))
    group = torch.repeat_interleave(torch.arange(len(groups.table)), groups.table[:, 1].long())
    low, high = torch.full((2, len(slots) * SET), -1)
    for thread in range(32):
        row = thread // 4
        unit = (thread % 4 - thread // 8) % 4  # the one of four whose result it keeps
        column = 2 * (thread % 4) + row % 2
        for half in (0, 8):
            at = sets * SET + unit * 16 + half + row
            low[at] = slots[:, half + row, unit]
            high[at] = slots[:, 16 + half + column, unit]
    return group.repeat_interleave(SET), low, high


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 700), st.integers(1, 700), st.integers(1, 20_000), st.booleans(), st.integers(0, 99), st.booleans()
)
def test_each_place_is_met_once_by_the_right_factors(rows, columns, count, crowded, seed, small):
    """Also where a device holds few features at a time."""
    shape = (rows * OCTET, columns * OCTET)
    index = random_places(shape, count, seed, crowded)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(sampled_groups, "HELD", 64)
            patch.setattr(sampled_groups, "OCTETS", 40)
            patch.setattr(sampled_groups, "PLACES", 256)
        groups = grouped(index, shape)
        assert (groups.table[:, 1] * SET <= sampled_groups.PLACES).all()
        assert (groups.table[:, [3, 5]].sum(1) <= sampled_groups.OCTETS).all()
    first_set, sets, held_from, held, streamed_from, _ = groups.table.long().unbind(1)
    assert torch.equal(first_set, sets.cumsum(0) - sets)
    group, low, high = by_thread(groups)
    order, chosen = groups.order.long(), groups.order >= 0
    assert torch.equal(order[chosen].sort().values, torch.arange(len(index)))
    held_at = (low + held_from[group] * OCTET)[chosen]
    streamed_at = (high + (streamed_from - held)[group] * OCTET)[chosen]
    assert (low < held[group] * OCTET)[chosen].all() and (high >= held[group] * OCTET)[chosen].all()
    row, column = (held_at, streamed_at) if groups.rows_held else (streamed_at, held_at)
    assert torch.equal(row * shape[1] + column, index[order[chosen]])
    assert groups.rows_held == (rows <= columns)


def test_groups_of_a_large_matrix_are_even_and_read_from_different_banks():
    shape = (14_336, 4_096)
    groups = grouped(random_places(shape, 81_000, 0), shape)
    assert len(groups.table) == 5
    assert groups.table[:, 1].max() - groups.table[:, 1].min() < 16 and (groups.table[:, 3] == 4_096 // OCTET).all()
    banks = (groups.slots.mT.reshape(-1, 8) % 8).sort(1).values
    assert (banks == torch.arange(8)).all(1).float().mean() > 0.8


def test_an_octet_with_more_places_than_a_group_takes_several():
    index = (torch.arange(4_096)[:, None] * 4_096 + torch.arange(9)).flatten()
    groups = grouped(index, (4_096, 4_096))
    assert groups.table[:, 1].tolist() == [PLACES // SET, PLACES // SET, 4_096 // SET, 0]
    assert (groups.table[:, [3, 5]].sum(1) <= OCTETS).all()


def test_shares_cover_the_vectors():
    for vectors, groups in ((1, 1), (8_192, 5), (8_190, 21), (100, 300), (2_048, 1)):
        share, parts = sampled_groups._shares(vectors, groups, 132)
        assert share % sampled_groups.VECTORS == 0 and share * (parts - 1) < vectors <= share * parts


def test_without_a_gpu_there_is_no_kernel_and_no_error():
    if torch.version.cuda is None:
        assert compiled("sampled_groups.cu", ("sampled_sums",), 0) is None
    assert not suits((8, 8), torch.float32, 0) and not suits((8, 9), torch.bfloat16, 0)


if torch.cuda.is_available():  # needs a Hopper GPU or later

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("vectors", [1, 7, 8, 1_000])
    @pytest.mark.parametrize(
        ("shape", "count", "crowded"),
        [
            ((8, 8), 64, False),
            ((64, 4_096), 9_000, True),
            ((9_216, 512), 40_000, False),
            ((1_024, 9_208), 70_000, True),
        ],
    )
    def test_the_kernel_equals_the_product(dtype, vectors, shape, count, crowded):
        a, b = (torch.randn(vectors, side, device="cuda").to(dtype) for side in shape)
        places = Places(random_places(shape, count, 0, crowded).cuda().int(), shape)
        assert suits(shape, dtype, 0) and fits(a, b)
        wanted = (a.double().mT @ b.double()).flatten()[places.index.long()]
        for _ in range(2):
            found = element_gradient(a, b, places, "sampled")
            assert found.dtype == torch.float32
            assert (found - wanted).abs().max() <= 1e-6 * vectors**0.5 * (1 + wanted.abs().max())
        wide = torch.randn(vectors, shape[0] + 8, device="cuda").to(dtype)[:, 8:]  # rows of a wider matrix
        wanted = (wide.double().mT @ b.double()).flatten()[places.index.long()]
        found = element_gradient(wide, b, places, "sampled")
        assert (found - wanted).abs().max() <= 1e-6 * vectors**0.5 * (1 + wanted.abs().max())
