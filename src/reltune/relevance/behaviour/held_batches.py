"""All batches of a loader in host memory, for criteria that pass over them many times."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

from reltune.errors import InputError
from reltune.processes import Processes
from reltune.relevance.batches import batch_size, chained, contents, part_of
from reltune.relevance.statistics.shared_pass import NO_DATA, check_same_stream


@dataclasses.dataclass(frozen=True)
class HeldBatches:
    """``same_on_all``: all processes hold all batches; else each holds its own. The other fields are of the data of all
    processes: how many ``examples`` there are, a ``fingerprint`` of them that no batching changes, and a hash of the
    batches in their order, ``stream``."""

    batches: list[Any]
    same_on_all: bool
    examples: int
    fingerprint: str
    stream: str


def hold_batches(loader: Iterable[Any], processes: Processes, parallel: str) -> HeldBatches:
    """Take all that the loader gives this process. ``parallel`` is as in ``analyze``.

    Raises InputError for a loader without examples, and for processes whose loaders should be the same and are not.
    """
    with processes.together():
        share = processes.share(loader, parallel)
        batches = list(loader)
        if share.examples is not None:
            batches = _first(batches, share.examples)
    stream = ""
    for batch in batches:
        stream = chained(stream, batch)
    same = processes.count == 1 or share.every > 1
    if same:
        check_same_stream(processes, stream)
    shares = processes.gather([sum(map(batch_size, batches)), f"{sum(map(contents, batches)) % (1 << 128):x}", stream])
    shares = shares[:1] if same else shares
    examples = sum(count for count, _, _ in shares)
    if examples == 0:
        raise InputError(NO_DATA)
    if not same:
        stream = hashlib.sha256("/".join(hashed for _, _, hashed in shares).encode()).hexdigest()[:32]
    fingerprint = sum(int(content, 16) for _, content, _ in shares) % (1 << 128)
    return HeldBatches(batches, same, examples, f"{fingerprint:032x}", stream)


def _first(batches: list[Any], examples: int) -> list[Any]:
    """The batches without the examples that a sampler repeats at the end."""
    kept, left = [], examples
    for batch in batches:
        if left > 0:
            kept.append(part_of(batch, 0, min(left, batch_size(batch))))
            left -= batch_size(batch)
    return kept
