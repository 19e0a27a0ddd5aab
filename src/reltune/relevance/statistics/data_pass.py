"""One batch at a time: forward, backward to the inputs of the measured modules, and into the sums.

The loss that is differentiated is the sum over examples of each example's own loss, so that the rows of an output
gradient that belong to an example carry that example's gradient alone. No weight ever requires a gradient here.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from reltune.errors import AnalysisError, InputError, blaming
from reltune.layers.deferred_logits import deferred
from reltune.layers.fused import fused
from reltune.layers.inventory import ModuleInfo
from reltune.layers.per_example import WEIGHT_SIZED
from reltune.losses import LOSSES, Loss, rows_of
from reltune.relevance.batches import batch_size, forward, frozen, moved, part_of, with_labels
from reltune.relevance.statistics.collector import Collector, mixing_sentence
from reltune.relevance.statistics.gradient_checkpointing import checkpointing_in_evaluation
from reltune.relevance.statistics.not_finite import where_not_finite

SAMPLED = "sampled_"  # begins the names of statistics whose labels are drawn from the model
INPUTS = "inputs"  # the statistic that needs no backward pass
ON_HOST = {prefix + need for prefix in ("", SAMPLED) for need in WEIGHT_SIZED}  # statistics as large as the weights


class DataPass:
    """Measures batches: each runs forward and, unless only inputs are needed, backward; ``collector`` holds the sums.

    ``needs`` names the statistics (``criteria/contract.py``). Statistics of drawn labels take a forward and backward pass of
    their own.
    """

    def __init__(self, model: nn.Module, loss: Loss, measured: list[ModuleInfo], needs: set[str], seed: int) -> None:
        self.model, self.loss, self.seed = model, loss, seed
        self.sampled = {need for need in needs if need.startswith(SAMPLED)}
        self.observed = needs - self.sampled
        self.collector = Collector(model, measured, rows_per_example=getattr(loss, "rows_per_example", 1))
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device)
        self.checked_for_mixing = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The model as ``add`` needs it: in evaluation mode, with the collector's hooks. Undone when the context ends."""
        with (
            frozen(self.model),
            fused(self.model),
            checkpointing_in_evaluation(self.model),
            torch.enable_grad(),
            self.collector,
        ):
            yield

    def add(self, batch: Any, number: int) -> int:
        """Add the statistics of one batch; gives its number of examples. ``number`` is that of the batch in the whole
        data, whichever process measures it: the labels drawn for it depend on the seed and this number alone."""
        batch = moved(batch, self.device)
        self.generator.manual_seed(_seed(self.seed, number))
        examples = self._add(batch, number)
        if not self.checked_for_mixing and batch_size(batch) > 1 and self.backward_needs:
            self._check_for_mixing(part_of(batch, 0, 2))
            self.checked_for_mixing = True
        return examples

    def expect_all(self) -> None:
        """Give modules that no batch has reached sums of zeros, as if a batch had been measured."""
        self.collector.seen |= self.observed | self.sampled

    @property
    def backward_needs(self) -> set[str]:
        return (self.observed - {INPUTS}) | {need.removeprefix(SAMPLED) for need in self.sampled}

    def _add(self, batch: Any, index: int, skip: frozenset[tuple[str, str]] = frozenset()) -> int:
        """Add the batch's statistics, in two halves where it does not fit in memory. Gives its number of examples.

        ``skip`` names what an earlier try at these examples has already added."""
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
            try:
                self.collector.finish()
            except AnalysisError as error:
                raise blaming(error, batch)  # noqa: B904  (the same error)
            return examples
        # Not inside the handler: it would keep the failed pass's tensors alive.
        size = batch_size(batch)
        skip = self.collector.abandon()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory with {size} examples; going on with {size // 2} at a time.", stacklevel=6)
        halves = part_of(batch, 0, size // 2), part_of(batch, size // 2, size)
        return sum(self._add(half, index, skip) for half in halves)

    def _run(self, batch: Any, wanted: set[str], prefix: str) -> int:
        with torch.set_grad_enabled(wanted != {INPUTS}):
            rows = rows_of(batch, self.loss)
            self.collector.expect(batch_size(batch), wanted, prefix, rows)
            with deferred(self.model) if self._needs_no_logits(prefix) else contextlib.nullcontext():
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

    def _needs_no_logits(self, prefix: str) -> bool:
        """Whether the loss is made of hidden states, as that of language models is, and no labels are drawn."""
        return self.loss is LOSSES["causal_lm"] and not prefix and torch.is_grad_enabled()

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
            what = f"the loss of batch {self.collector.batch} is not finite at examples {bad[:8]} of the batch"
            where = where_not_finite(self.model, rows_of(batch, self.loss))
            raise blaming(AnalysisError(f"{what}: {where}."), batch)
        if not losses.requires_grad:
            if self.collector.mixing:
                raise AnalysisError(mixing_sentence(self.collector.mixing))
            raise InputError("the loss does not depend on any measured module; widen target_modules.")
        return losses

    def _check_for_mixing(self, pair: Any) -> None:
        """Differentiate the loss of the first of two examples. Where the second one's rows get a gradient too, the module
        mixes examples, or the first axis of its input is not the examples; the collector notes it."""
        rows = rows_of(pair, self.loss)
        self.collector.expect(2, self.backward_needs, "", rows, probe=True)
        self.collector.backward(self.loss.per_example(forward(self.model, rows), pair)[:1])


def _seed(seed: int, batch: int) -> int:
    """The seed of the labels drawn for a batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:8], "big") >> 1
