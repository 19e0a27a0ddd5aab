"""All batches of a loader through one data pass: shared between processes, and resumable after an interruption."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from reltune.errors import InputError
from reltune.processes import Processes, Share
from reltune.relevance.batches import batch_size, chained, contents, part_of
from reltune.relevance.resumption import Partial, deferred_signals, flat, nested
from reltune.relevance.statistics.data_pass import ON_HOST, DataPass

NO_DATA = "the loader gave no batch; relevance needs at least one example."


@dataclasses.dataclass
class _Tally:
    """What this process has measured so far. Saved beside the sums."""

    batches: int = 0  # how far into the loader, batches of other processes included
    data: str = ""  # hash of the loader's batches up to there
    examples: int = 0
    contents: int = 0  # sum of the hashes of these examples

    def count(self, index: int, data: str, examples: int, content: int) -> None:
        self.batches, self.data = index + 1, data
        self.examples += examples
        self.contents = (self.contents + content) % (1 << 128)


def measure_loader(
    data_pass: DataPass,
    loader: Iterable[Any],
    processes: Processes,
    parallel: str = "auto",
    partial: Partial | None = None,
    progress: bool = False,
) -> tuple[int, str]:
    """Measure all batches. Gives the number of examples, and a fingerprint of them that no batching, order or number of
    processes changes; the sums of all processes are then in ``data_pass.collector``.

    ``parallel`` is as in ``analyze``. With ``partial``, the sums so far are saved every few minutes and on Ctrl-C, and a
    pass that was interrupted goes on from them.
    """
    tally, data = _resumed(data_pass, partial), ""
    with (
        processes.together() as still_at_work,
        data_pass.watching(),
        deferred_signals(partial is not None) as waiting,
    ):
        share = processes.share(loader, parallel)
        for index, batch in enumerate(tqdm(loader, desc="analyze", unit="batch", disable=not progress)):
            data = chained(data, batch)
            if index == 0 and share.every > 1:
                still_at_work()
                check_same_stream(processes, data)
            if index < tally.batches:
                if index == tally.batches - 1:
                    _check_same_data(tally, data, partial)
                continue
            number, batch = share.number(index), _own_examples(batch, share, tally)
            if number is None or batch_size(batch) == 0:
                continue
            content = contents(batch)
            tally.count(index, data, data_pass.add(batch, number), content)
            if partial and (waiting or partial.due()):
                _save(partial, tally, data_pass)
            if waiting:
                signal.raise_signal(waiting.pop())
            still_at_work()
        if share.every > 1:
            data_pass.expect_all()  # a process that got no batch needs its zeros too
            if data == "":
                still_at_work()
                check_same_stream(processes, data)
    if share.every > 1:
        check_same_stream(processes, data)
    return _added_up(data_pass, processes, tally, partial)


def _own_examples(batch: Any, share: Share, tally: _Tally) -> Any:
    """The batch without the examples that the loader's sampler repeats at the end."""
    if share.examples is None:
        return batch
    return part_of(batch, 0, min(batch_size(batch), share.examples - tally.examples))


def _added_up(data_pass: DataPass, processes: Processes, tally: _Tally, partial: Partial | None) -> tuple[int, str]:
    """Add up what the processes have. Gives the number of all examples and their fingerprint."""
    collector = data_pass.collector
    tallies = processes.gather([tally.examples, f"{tally.contents:x}", collector.mixing])
    examples = sum(count for count, _, _ in tallies)
    if examples == 0:
        raise InputError(NO_DATA)
    for _, _, mixing in tallies:
        collector.mixing |= mixing
    if processes.count > 1:
        totals = processes.add_up(flat(collector.sums))
        collector.sums |= nested(totals, data_pass.device, ON_HOST)
    if partial:
        partial.remove()
    return examples, f"{sum(int(content, 16) for _, content, _ in tallies) % (1 << 128):032x}"


def check_same_stream(processes: Processes, data: str) -> None:
    """Where every process takes its batches from the same loader, all loaders must give the same batches."""
    processes.agree_on(
        data,
        "the processes' loaders give different batches, so that some would be measured twice and others never; shuffle "
        'with a generator of the same seed, or pass parallel="sharded" if each loader gives its own part.',
    )


# -- interruption ---------------------------------------------------------------------------------------------------


def _resumed(data_pass: DataPass, partial: Partial | None) -> _Tally:
    saved = partial.load() if partial else None
    if saved is None:
        return _Tally()
    state, sums = saved
    data_pass.collector.sums |= nested(sums, data_pass.device, ON_HOST)
    data_pass.collector.mixing |= state["mixing"]
    data_pass.expect_all()
    return _Tally(state["batches"], state["data"], state["examples"], state["contents"])


def _save(partial: Partial, tally: _Tally, data_pass: DataPass) -> None:
    state = {**dataclasses.asdict(tally), "mixing": data_pass.collector.mixing}
    partial.save(state, flat(data_pass.collector.sums))


def _check_same_data(tally: _Tally, data: str, partial: Partial | None) -> None:
    if data != tally.data:
        raise InputError(
            f"the data is not what the interrupted analysis in {partial and partial.path.parent} has seen; give it the same "
            "data, or remove that directory."
        )
