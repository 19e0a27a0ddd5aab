"""The gradient of single weights on a CPU: aᵀ b at n places, for a (T, rows) and b (T, columns).

Two ways:

- gathered: the numbers of both factors at the places, for some vectors at a time, multiplied and added up. 2·T·n numbers are picked.
- dots: a dot product for each place, of rows of transposed copies of the factors (``torch.sparse.sampled_addmm``), for VECTORS vectors at a
  time. T·(rows + columns) numbers are copied, and a place then takes little: the better way for many.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reltune.ops import stand_in
from reltune.ops.squared_gradient import accumulator_dtype

if TYPE_CHECKING:
    from reltune.ops.attach_elements import Places

# What each way costs where a weight of the full product costs 1: for a place in the first; for a row or column, and for a place, in the second.
# Measured in one thread of an AMD EPYC with AVX-512 and its products of bfloat16 (benchmarks/results/sampled_on_cpu.json); full products of
# float16 take some 25 times as long there.
GATHERED = {torch.float32: 90.0, torch.bfloat16: 230.0, torch.float16: 9.0}
TRANSPOSED = {torch.float32: 65.0, torch.bfloat16: 95.0, torch.float16: 4.0}
DOTTED = {torch.float32: 8.0, torch.bfloat16: 15.0, torch.float16: 0.6}
IN_THREADS = 1.8  # times as much, where the full product has several threads: not all of the second way does
GATHERED_NUMBERS = 3 << 16  # of each factor at a time: they stay in a core's own cache
# At most: PyTorch adds up more in several threads, and the sum of one place would depend on how many.
GATHERED_VECTORS = 1 << 14
VECTORS = 256  # of the transposed copies at a time: they stay there too


def cost(count: int, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """What the cheaper way costs for so many places, in weights of the full product."""
    return min(_of(GATHERED, dtype) * count, cost_of_dots(count, shape, dtype))


def cost_of_dots(count: int, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """The same of the second way."""
    return _of(TRANSPOSED, dtype) * sum(shape) + _of(DOTTED, dtype) * count


def takes_dots(count: int, shape: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the second way is the cheaper one, whatever the number of threads."""
    return cost_of_dots(count, shape, dtype) < _of(GATHERED, dtype) * count


def _of(costs: dict[torch.dtype, float], dtype: torch.dtype) -> float:
    return costs.get(dtype, costs[torch.float32])


def flops_of_dots(vectors: int, count: int, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """As many multiplications and additions of the full product take as long as the second way."""
    times = IN_THREADS if torch.get_num_threads() > 1 else 1.0
    return int(2 * vectors * times * cost_of_dots(count, shape, dtype))


def is_cheaper(places: Places, a: Tensor) -> bool:
    """Whether the cheaper way costs less than the full product."""
    count, (rows, columns) = len(places.index), places.shape
    least = cost(count, places.shape, a.dtype) if _has_dots(a) else _of(GATHERED, a.dtype) * count
    return least < rows * columns


def sampled_product(a: Tensor, b: Tensor, places: Places) -> Tensor:
    """(n,) in float32, in float64 for float64."""
    if _has_dots(a) and takes_dots(len(places.index), places.shape, a.dtype):
        return dots(a, b, places)
    return gathered(a, b, places.index)


def _has_dots(a: Tensor) -> bool:
    """Other devices that are no CUDA ones, such as MPS, come here too, and may not have the sparse product."""
    return a.device.type in ("cpu", "meta")


def gathered(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """The first way, for flat indices (n,). The reference of the kernels too."""
    total = torch.zeros(len(index), dtype=accumulator_dtype(a), device=a.device)
    rows, columns = (at.long() for at in (index // b.shape[1], index % b.shape[1]))
    step = min(max(1, GATHERED_NUMBERS // max(1, len(index))), GATHERED_VECTORS)

    def add(start: int) -> None:
        left, right = a[start : start + step], b[start : start + step]
        # index_select works in one thread, and slowly with narrow numbers
        left, right = left.gather(1, rows.expand(len(left), -1)), right.gather(1, columns.expand(len(right), -1))
        total.add_(left.to(total.dtype).mul_(right).sum(0))

    starts = range(0, len(a), step)
    if a.is_meta and len(starts) > 2:  # all but the last go through as many vectors
        with stand_in.repeated(len(starts) - 1):
            add(0)
        starts = starts[-1:]
    for start in starts:
        add(start)
    return total


def dots(a: Tensor, b: Tensor, places: Places) -> Tensor:
    """The second way."""
    wide, factors = accumulator_dtype(a), (a, b)
    if a.is_meta:  # one operation in the place of many, while the two copies are there
        copies = [x.new_empty(x.shape[1], min(len(x), VECTORS), dtype=wide) for x in factors]
        flops = flops_of_dots(len(a), len(places.index), places.shape, a.dtype)
        sums = stand_in.kernel([a, b, places.index], [a.new_empty(len(places.index), dtype=wide)], flops)[0]
        del copies
        return sums
    _warned()
    zeros, columns = a.new_zeros(len(places.index), dtype=wide), places.index % places.shape[1]
    sums = torch.sparse_csr_tensor(
        places.before_rows, columns, zeros, places.shape, device=a.device, check_invariants=False
    )
    for start in range(0, len(a), VECTORS):
        left, right = (_transposed(x[start : start + VECTORS]).to(wide) for x in factors)
        torch.sparse.sampled_addmm(sums, left, right.mT, out=sums)
        del left, right  # before the next ones are made
    return sums.values()


@functools.cache
def _warned() -> None:
    """Have PyTorch say here, and to nobody, what it says once of the first sparse matrix with rows: that they are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), device="cpu", check_invariants=False)


def _transposed(x: Tensor) -> Tensor:
    """A contiguous xᵀ. PyTorch copies a transposed matrix block by block in one thread, and one with a further dimension in all threads."""
    return x.mT.contiguous() if torch.get_num_threads() <= 2 else x.mT[None].contiguous()[0]
