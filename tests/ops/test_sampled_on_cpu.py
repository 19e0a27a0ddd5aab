"""Single weights' gradient on a CPU: both ways against the full product, the rule between them, and what is counted of them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reltune.cost.ledger import KERNEL, Ledger
from reltune.ops import sampled_on_cpu
from reltune.ops.attach_elements import Places
from reltune.ops.sampled_on_cpu import dots, gathered, is_cheaper, sampled_product, takes_dots

ROWS, COLUMNS = 30, 40


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def some_places(count: int, dtype: torch.dtype = torch.int32) -> Places:
    order = torch.randperm(ROWS * COLUMNS, generator=torch.Generator().manual_seed(count))
    return Places(order[:count].sort().values.to(dtype), (ROWS, COLUMNS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vectors", [0, 1, 7, 8, 17])
@pytest.mark.parametrize("count", [0, 1, 9, 700])
def test_both_ways_equal_the_full_product(monkeypatch, threads, dtype, vectors, count) -> None:
    monkeypatch.setattr(sampled_on_cpu, "VECTORS", 8)
    monkeypatch.setattr(sampled_on_cpu, "GATHERED_NUMBERS", 30)
    a, b = numbers(vectors, ROWS, dtype=dtype), numbers(vectors, COLUMNS, dtype=dtype)
    for places in (some_places(count), some_places(count, torch.int64)):
        wanted = (a.double().mT @ b.double()).flatten()[places.index.long()]
        close = 1e-12 if dtype == torch.float64 else 2e-6
        for found in (gathered(a, b, places.index), dots(a, b, places), sampled_product(a, b, places)):
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert found.shape == (count,)
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=close * (1 + vectors))


def test_factors_may_lie_in_any_order(threads) -> None:
    places = some_places(50)
    of_columns = numbers(COLUMNS, 9).mT
    for a in (numbers(1, ROWS).expand(9, -1), numbers(9, 2 * ROWS)[:, ::2]):
        wanted = (a.mT @ of_columns).flatten()[places.index.long()]
        for found in (gathered(a, of_columns, places.index), dots(a, of_columns, places)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("vectors", "count"), [(2048, 300), (40_000, 1)])
def test_results_do_not_depend_on_the_number_of_threads(vectors, count) -> None:
    """With numbers enough for PyTorch to share them out: more than 32,768."""
    a, b = numbers(vectors, ROWS, dtype=torch.float32), numbers(vectors, COLUMNS, dtype=torch.float32)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append([gathered(a, b, some_places(count).index), dots(a, b, some_places(count))])
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for others in found[1:] for x, y in zip(found[0], others, strict=True))


def test_many_places_of_a_large_weight_take_dots() -> None:
    # by benchmarks/results/sampled_on_cpu.json: 0.12% and 0.5% of MiniLM's feed-forward weights, and of a large one
    assert [takes_dots(count, (384, 1536), torch.float32) for count in (708, 2949)] == [False, True]
    assert [takes_dots(count, (4096, 4096), torch.bfloat16) for count in (20, 20_133)] == [False, True]


def test_other_devices_than_a_cpu_gather(monkeypatch) -> None:
    monkeypatch.setattr(sampled_on_cpu, "_has_dots", lambda a: False)
    monkeypatch.setattr(sampled_on_cpu, "dots", None)
    a, b, places = numbers(3, ROWS), numbers(3, COLUMNS), some_places(700)
    monkeypatch.setattr(sampled_on_cpu, "takes_dots", lambda *_: True)
    torch.testing.assert_close(sampled_product(a, b, places), gathered(a, b, places.index))
    large = Places(
        torch.arange(0, 4096 * 4096, 50), (4096, 4096)
    )  # dots would cost less than all of it, gathering more
    assert not is_cheaper(large, a)
    monkeypatch.undo()
    assert is_cheaper(large, a)


@pytest.mark.parametrize("vectors", [1, 2, 3, 20, 21])
def test_gathering_is_counted_as_it_is_done(monkeypatch, threads, vectors) -> None:
    monkeypatch.setattr(sampled_on_cpu, "GATHERED_NUMBERS", 200)  # of 100 places: two vectors at a time
    a, b, index = numbers(vectors, ROWS, dtype=torch.bfloat16), numbers(vectors, COLUMNS), some_places(100).index
    called: Counter[str] = Counter()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func).removesuffix(".default").replace(".", "::", 1)
            called["host" if name in ("aten::slice.Tensor", "aten::expand") else name] += 1
            return func(*args, **(kwargs or {}))

    with Calls():
        gathered(a, b, index)
    meta = [x.to("meta") for x in (a, b, index)]
    with Ledger() as ledger:
        gathered(*meta)
    counted: Counter[str] = Counter()
    for work, times in ledger.spans[-1].work.items():
        counted[work.name] += times
    assert counted == called


def test_dots_are_counted_as_one_operation(threads) -> None:
    places = some_places(700).apply(lambda index: index.to("meta"))
    a, b = numbers(300, ROWS, dtype=torch.bfloat16).to("meta"), numbers(300, COLUMNS).to("meta")
    with Ledger() as ledger:
        sampled_product(a, b, places)
    ((work, times),) = ((work, times) for work, times in ledger.spans[-1].work.items() if work.name == KERNEL)
    most = 4 * (700 + 256 * (ROWS + COLUMNS))  # the sums, and copies of 256 vectors
    assert times == 1 and most <= ledger.spans[-1].most <= most + 4 * 700 + 4 * 512
    cost = sampled_on_cpu.cost_of_dots(700, (ROWS, COLUMNS), torch.bfloat16)
    assert work.flops == int(2 * 300 * (cost if threads == 1 else sampled_on_cpu.IN_THREADS * cost))


def test_nobody_is_told_that_sparse_matrices_are_in_beta() -> None:
    program = """
import torch, warnings
warnings.simplefilter("error")
from reltune.ops.attach_elements import Places
from reltune.ops.sampled_on_cpu import dots
dots(torch.ones(1, 2), torch.ones(1, 2), Places(torch.tensor([1]), (2, 2)))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
