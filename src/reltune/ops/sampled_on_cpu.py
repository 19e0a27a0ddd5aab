"""The gradient of single weights on a CPU: aᵀ b at n places, for a (T, rows) and b (T, columns).

Two ways:

- gathered: the numbers of both factors at the places, for some vectors at a time, multiplied and added up. 2·T·n numbers are picked.
- dots: a dot product for each place, of rows of transposed copies of the factors (``torch.sparse.sampled_addmm``). The copies take
  T·(rows + columns) numbers, and each place little: what many places are best served by.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reltune.ops import stand_in

if TYPE_CHECKING:
    from reltune.ops.attach_elements import Places

# What each way costs where a weight of the full product costs 1, by bytes per number: for a place in the first; for a row or column, and for a
# place, in the second. Measured in one thread of an AMD EPYC with AVX-512 and its products of bfloat16: benchmarks/results/sampled_on_cpu.json.
GATHERED = {2: 230.0, 4: 90.0, 8: 90.0}
TRANSPOSED = {2: 95.0, 4: 65.0, 8: 65.0}
DOTTED = {2: 15.0, 4: 8.0, 8: 8.0}
IN_THREADS = 1.8  # times as much, where the full product has several threads: not all of the second way does
GATHERED_NUMBERS = 3 << 16  # of each factor at a time: they stay in a core's own cache
VECTORS = 256  # of the transposed copies at a time, for the same reason


def cost(count: int, shape: tuple[int, int], size: int) -> float:
    """What the cheaper way costs in weights of the full product, for so many places and numbers of so many bytes."""
    return min(GATHERED[size] * count, cost_of_dots(count, shape, size))


def cost_of_dots(count: int, shape: tuple[int, int], size: int) -> float:
    return TRANSPOSED[size] * sum(shape) + DOTTED[size] * count


def takes_dots(count: int, shape: tuple[int, int], size: int) -> bool:
    """Whether the second way is the cheaper one, whatever the number of threads: results do not depend on it."""
    return cost_of_dots(count, shape, size) < GATHERED[size] * count


def flops_of_dots(vectors: int, count: int, shape: tuple[int, int], size: int) -> int:
    """As many multiplications and additions of the full product take as long as the second way."""
    times = IN_THREADS if torch.get_num_threads() > 1 else 1.0
    return int(2 * vectors * times * cost_of_dots(count, shape, size))


def sampled_product(a: Tensor, b: Tensor, places: Places) -> Tensor:
    """(n,) in float32, in float64 for float64."""
    if takes_dots(len(places.index), places.shape, a.element_size()):
        return dots(a, b, places)
    return gathered(a, b, places.index)


def gathered(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """The first way, for flat indices (n,). The reference of the kernels too."""
    total = torch.zeros(len(index), dtype=_wide(a), device=a.device)
    rows, columns = (at.long() for at in (index // b.shape[1], index % b.shape[1]))
    step = max(1, GATHERED_NUMBERS // max(1, len(index)))

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
    wide = _wide(a)
    total = a.new_zeros(len(places.index), dtype=wide)
    if a.is_meta:  # one operation in the place of many
        copies = [x.new_empty(x.shape[1], min(len(x), VECTORS), dtype=wide) for x in (a, b)]
        flops = flops_of_dots(len(a), len(places.index), places.shape, a.element_size())
        return stand_in.kernel([a, b, places.index], [total, *copies], flops)[0]
    _warned()
    columns = places.index % places.shape[1]
    found = torch.sparse_csr_tensor(places.before_rows, columns, total, places.shape, check_invariants=False)
    for start in range(0, len(a), VECTORS):
        left, right = (_transposed(x[start : start + VECTORS]).to(wide) for x in (a, b))
        found = torch.sparse.sampled_addmm(found, left, right.mT)
    return found.values()


@functools.cache
def _warned() -> None:
    """Have PyTorch say here, and to nobody, what it says once of the first sparse matrix with rows: that they are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int64), [], [], (1, 1), check_invariants=False)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _transposed(x: Tensor) -> Tensor:
    """A contiguous xᵀ. PyTorch copies a transposed matrix block by block in one thread, and one with a further dimension in all threads."""
    return x.mT.contiguous() if torch.get_num_threads() <= 2 else x.mT[None].contiguous()[0]
