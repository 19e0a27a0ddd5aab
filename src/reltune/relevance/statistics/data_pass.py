"""The loop over data that adds up statistics: one forward and one input-gradient backward pass per batch.

The loss that is differentiated is the sum over examples of each example's own loss, so that the rows of an output
gradient that belong to an example carry that example's gradient alone. No weight ever requires a gradient here.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from reltune.errors import AnalysisError, InputError
from reltune.layers.fused_norms import fused_norms
from reltune.layers.inventory import ModuleInfo
from reltune.layers.per_example import WEIGHT_SIZED
from reltune.losses import Loss, rows_of
from reltune.processes import Processes
from reltune.relevance.batches import batch_size, chained, contents, forward, frozen, moved, part_of, with_labels
from reltune.relevance.resumption import Partial, deferred_signals, flat, nested
from reltune.relevance.statistics.collector import Collector, mixing_sentence
from reltune.relevance.statistics.gradient_checkpointing import checkpointing_in_evaluation
from reltune.relevance.statistics.not_finite import where_not_finite

SAMPLED = "sampled_"  # statistics of the pass whose labels are drawn from the model
INPUTS = "inputs"  # the statistic that needs no backward pass
ON_HOST = {prefix + need for prefix in ("", SAMPLED) for need in WEIGHT_SIZED}  # statistics as large as the weights
NO_DATA = "the loader gave no batch; relevance needs at least one example."


class DataPass:
    """One pass over the data: every batch forward and, unless only inputs are wanted, backward, into the collector."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        measured: list[ModuleInfo],
        needs: set[str],
        seed: int,
        processes: Processes,
    ) -> None:
        self.model, self.loss, self.seed, self.processes = model, loss, seed, processes
        self.sampled = {need for need in needs if need.startswith(SAMPLED)}
        self.observed = needs - self.sampled
        self.collector = Collector(model, measured, rows_per_example=getattr(loss, "rows_per_example", 1))
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device)

    def over(
        self, loader: Iterable[Any], progress: bool, partial: Partial | None = None, parallel: str = "auto"
    ) -> tuple[int, str]:
        """The number of examples, and a fingerprint of them that no batching, order or number of processes changes."""
        found = partial.load() if partial else None
        state: dict[str, Any] = {"batches": 0, "examples": 0, "data": "", "contents": 0, "mixing": {}}
        if found is not None:
            state, tensors = found
            self.collector.sums |= nested(tensors, self.device, ON_HOST)
            self.collector.mixing |= state["mixing"]
            self.collector.seen |= self.observed | self.sampled

        data, probed = "", False
        with (
            self.processes.together() as still_at_work,
            _evaluated(self.model),
            self.collector,
            deferred_signals(partial is not None) as waiting,
        ):
            share = self.processes.share(loader, parallel)
            for index, batch in enumerate(tqdm(loader, desc="analyze", unit="batch", disable=not progress)):
                data = chained(data, batch)
                if index == 0 and share.every > 1:
                    still_at_work()
                    self._same_stream(data)
                if index < state["batches"]:
                    if index == state["batches"] - 1 and data != state["data"]:
                        raise InputError(
                            f"the data is not what the interrupted analysis in {partial and partial.path.parent} has seen; "
                            "give it the same data, or remove that directory."
                        )
                    continue
                number = share.number(index)
                if share.examples is not None:
                    batch = part_of(batch, 0, min(batch_size(batch), share.examples - state["examples"]))
                if number is None or batch_size(batch) == 0:
                    continue
                content = contents(batch)
                batch = moved(batch, self.device)
                self.generator.manual_seed(_seed(self.seed, number))
                examples = self._add(batch, number)
                if not probed and batch_size(batch) > 1 and self.backward_needs:
                    self._probe(part_of(batch, 0, 2))
                    probed = True
                state.update(batches=index + 1, examples=state["examples"] + examples, data=data)
                state["contents"] = (state["contents"] + content) % (1 << 128)
                if partial and (waiting or partial.due()):
                    partial.save({**state, "mixing": self.collector.mixing}, flat(self.collector.sums))
                if waiting:
                    signal.raise_signal(waiting.pop())
                still_at_work()
            if share.every > 1:
                self.collector.seen |= self.observed | self.sampled  # of processes that got no batch, too
                if data == "":
                    still_at_work()
                    self._same_stream(data)
        if share.every > 1:
            self._same_stream(data)
        counted = self.processes.gather([state["examples"], f"{state['contents']:x}", self.collector.mixing])
        examples = sum(of[0] for of in counted)
        if examples == 0:
            raise InputError(NO_DATA)
        for *_, mixing in counted:
            self.collector.mixing |= mixing
        if self.processes.count > 1:
            totals = self.processes.add_up(flat(self.collector.sums))
            self.collector.sums |= nested(totals, self.device, ON_HOST)
        if partial:
            partial.remove()
        return examples, f"{sum(int(of[1], 16) for of in counted) % (1 << 128):032x}"

    def _same_stream(self, data: str) -> None:
        """Where every process takes its batches from the same stream, it must be the same indeed."""
        self.processes.agree_on(
            data,
            "the processes' loaders give different batches, so that some would be measured twice and others never; shuffle "
            'with a generator of the same seed, or pass parallel="sharded" if each loader gives its own part.',
        )

    @property
    def backward_needs(self) -> set[str]:
        return (self.observed - {INPUTS}) | {need.removeprefix(SAMPLED) for need in self.sampled}

    def _add(self, batch: Any, index: int, skip: frozenset[tuple[str, str]] = frozenset()) -> int:
        """Add the batch's statistics; in two halves where it does not fit in memory. Gives its number of examples."""
        self.collector.start(index, skip)
        try:
            examples = 0
            if self.observed:
                examples = self._run(batch, self.observed, "")
            if self.sampled:
                examples = self._run(batch, {need.removeprefix(SAMPLED) for need in self.sampled}, SAMPLED)
        except (torch.OutOfMemoryError, MemoryError):
            if batch_size(batch) < 2:
                raise
        else:
            self.collector.finish()
            return examples
        # Outside the handler, which keeps the failed pass's tensors alive.
        size = batch_size(batch)
        skip = self.collector.abandon()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory with {size} examples; going on with {size // 2} at a time.", stacklevel=4)
        halves = part_of(batch, 0, size // 2), part_of(batch, size // 2, size)
        return sum(self._add(half, index, skip) for half in halves)

    def _run(self, batch: Any, wanted: set[str], prefix: str) -> int:
        with torch.set_grad_enabled(wanted != {INPUTS}):
            rows = rows_of(batch, self.loss)
            self.collector.expect(batch_size(batch), wanted, prefix, rows)
            outputs = forward(self.model, rows)
            self.collector.forward_done()
            if wanted == {INPUTS}:
                return batch_size(batch)
            if prefix:
                with torch.no_grad():
                    batch = with_labels(batch, self.loss.sample_labels(outputs, batch, self.generator))
            losses = self._losses(outputs, batch)
            self.collector.backward(losses)
        return len(losses)

    def _losses(self, outputs: Any, batch: Any) -> Tensor:
        losses = self.loss.per_example(outputs, batch)
        if losses.ndim != 1:
            raise InputError(
                f"loss_fn gave a tensor of shape {tuple(losses.shape)}; it must give one loss per example, shape "
                "(batch,): leave out the reduction."
            )
        if len(losses) != batch_size(batch):
            raise InputError(
                f"loss_fn gave {len(losses)} losses for {batch_size(batch)} examples; it must give one loss per example: leave "
                "out the reduction."
            )
        if not torch.isfinite(losses).all():
            bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
            raise AnalysisError(
                f"the loss of batch {self.collector.batch} is not finite at examples {bad[:8]} of the batch: "
                f"{where_not_finite(self.model, rows_of(batch, self.loss))}."
            )
        if not losses.requires_grad:
            if self.collector.mixing:
                raise AnalysisError(mixing_sentence(self.collector.mixing))
            raise InputError("the loss does not depend on any measured module; widen target_modules.")
        return losses

    def _probe(self, pair: Any) -> None:
        """Differentiate the loss of the first of two examples: where the second's rows get a gradient too, the module
        mixes examples, or its input's first axis is not the examples."""
        rows = rows_of(pair, self.loss)
        self.collector.expect(2, self.backward_needs, "", rows, probe=True)
        self.collector.backward(self.loss.per_example(forward(self.model, rows), pair)[:1])


def _seed(seed: int, batch: int) -> int:
    """Of the labels drawn for a batch, whichever process measures it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    with frozen(model), fused_norms(model), checkpointing_in_evaluation(model), torch.enable_grad():
        yield
