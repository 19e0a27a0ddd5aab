"""The sign probe: for every batch, V ← V + sign(∂L/∂W) of all weights, and the loss of the next is that of W₀ − η V.

What happens in a step, on each process: forward over its part of the step's examples, in pieces that fit in memory; in
the last piece's backward pass each weight's gradient, complete with those of the earlier pieces, is added up over the
processes, votes and is dropped. A step in which memory runs out anywhere may have voted in part, so the probe then
starts anew with smaller pieces, on all processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import warnings
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from reltune.errors import AnalysisError, InputError, blaming
from reltune.layers.fused import fused
from reltune.layers.registry import layer_type
from reltune.layers.units import by_unit
from reltune.losses import rows_of
from reltune.ops import votes as ops
from reltune.relevance.batches import batch_size, forward, moved, part_of
from reltune.relevance.behaviour.experiment import Experiment, seeded
from reltune.relevance.criteria.contract import ScoresByName
from reltune.relevance.probe.directions import directions_of
from reltune.relevance.probe.moving_weights import MovingWeight, Readings, moving, weights_that_move
from reltune.relevance.probe.reduction import GradientsInOrder, shared_order
from reltune.relevance.probe.stability import EVERY, WatchedSample
from reltune.relevance.probe.steps import Piece, no_larger, share_of, steps_of
from reltune.relevance.resumption import deferred_signals
from reltune.relevance.statistics.gradient_checkpointing import checkpointing_in_evaluation
from reltune.relevance.statistics.not_finite import where_not_finite

MOST_IN_A_BYTE = 127
MOMENTUM = 0.9  # β₁ of Adam, the sign of whose step is that of its running mean of gradients
WINDOW = 10  # steps whose mean loss tells whether the probe diverges


class SignProbe:
    """One probe of one model: the weights that move, and how far it has come."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.options, self.model = experiment, experiment.options, experiment.model
        self.processes = experiment.processes
        inventory = None if self.options.move == "all" else experiment.inventory
        dtype = torch.int8 if self.options.most_steps <= MOST_IN_A_BYTE else torch.int16
        self.weights = weights_that_move(self.model, inventory, self.options.step_size, dtype, self.options.relative)
        self.numbers = {weight: number for number, weight in enumerate(self.weights)}
        self.readings = Readings()
        self.gradients = GradientsInOrder(self.processes, self._vote)
        self.sample = WatchedSample(self.weights, experiment.seed) if self.options.steps == "auto" else None
        self.running: dict[MovingWeight, Tensor] = {}  # means of the gradients, where their sign votes
        self.totals: dict[MovingWeight, Tensor] = {}  # sums of the gradients, where they order equal votes
        self.most: int | None = None  # examples in a piece
        self._share_the_data()
        self._start()

    def _share_the_data(self) -> None:
        """The steps of this process, and how many examples each step has on all of them."""
        sizes = [batch_size(batch) for batch in self.experiment.batches]
        count, examples = self.processes.count, self.options.batch_size
        if self.experiment.same_batches:
            whole = steps_of(sizes, examples)
            self.groups = [share_of(pieces, self.processes.rank, count) for pieces in whole]
            self.examples = [[_examples(pieces) for pieces in whole]]
        else:  # each has batches of its own
            self.groups = steps_of(sizes, examples and max(1, examples // count))
            self.examples = self.processes.gather([_examples(pieces) for pieces in self.groups])

    def _start(self) -> None:
        self.step, self.voting, self.stable = 0, False, False
        self.steps = self.options.most_steps
        self.last = False  # whether this step is the last one, whose gradients order weights with equal votes
        self.witnesses: list[tuple[str, Tensor]] = []  # of this step: a number that is finite if the whole gradient is
        self.single: dict[MovingWeight, Tensor] = {}  # scores of single weights, on the host
        self.losses: list[float] = []
        self.unmoved: dict[
            int, float
        ] = {}  # by step, where they were asked for: what the loss was before anything moved
        self.running.clear()
        self.totals.clear()
        for weight in self.weights:
            weight.votes.zero_()
            weight.leaf.grad = None
        if self.sample is not None:
            self.sample.start()

    # -- the whole probe --------------------------------------------------------------------------------------------

    def run(self) -> tuple[ScoresByName, dict[str, Any]]:
        """The scores, and how the probe went."""
        partial = self.experiment.partial
        with self.processes.together() as self.still_at_work:
            self._resume()
            with self.at_work(), deferred_signals(partial is not None) as waiting, self._bar() as bar:
                while self.step < self.steps:
                    self.take_step()
                    bar.n = self.step
                    bar.set_postfix(loss=f"{self.losses[-1]:.4g}" if self.losses else "")
                    if partial and self.step < self.steps and (waiting or partial.due()) and self.processes.first:
                        self._save()
                    if waiting:
                        signal.raise_signal(waiting.pop())
        return self._parts(), self._facts()

    def _bar(self) -> tqdm:
        shown = self.experiment.progress and self.processes.first
        return tqdm(total=self.steps, initial=self.step, desc=self.experiment.criterion, unit="step", disable=not shown)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Steps may be taken for as long as this lasts."""
        with (
            _mode(self.model, self.options.training),
            fused(self.model),
            checkpointing_in_evaluation(self.model),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
            moving(self.weights, self._arrived, self.readings),
        ):
            yield

    def take_step(self) -> None:
        """Let all weights vote once; start anew where memory runs out."""
        self.last = self.step == self.steps - 1
        self.witnesses.clear()
        pieces = self._pieces(self.step)
        seeded(self.experiment.device, _seed(self.experiment.seed, self.step, self.processes.rank))
        short, total = self._step(pieces)
        outcome = self._from_all([short, total])
        if any(short for short, _ in outcome):
            self._start_anew([short for short, _ in outcome if short])
            return
        self._check_gradients()
        self.losses.append(math.fsum(total for _, total in outcome) / self._examples(self.step))
        self._check_losses()
        self.step += 1
        if self.sample is not None and self.step % EVERY == 0 and not self.stable and self.step < self.steps:
            self.stable = self.sample.check() >= self.options.agreement
            if self.stable:
                self.steps = self.step + 1  # the closing step, whose gradients order equal votes

    def _examples(self, step: int) -> int:
        """Of a step, on all processes."""
        return sum(of[step % len(of)] for of in self.examples if of)

    def _pieces(self, step: int) -> list[Piece]:
        return no_larger(self.groups[step % len(self.groups)], self.most) if self.groups else []

    def _from_all(self, value: Any) -> list[Any]:
        """Every process's value, once it is known that none has failed."""
        if self.processes.count == 1:
            return [value]
        self.still_at_work()
        return self.processes.gather(value)

    # -- one step ---------------------------------------------------------------------------------------------------

    def _step(self, pieces: Sequence[Piece]) -> tuple[int, float]:
        """With how many examples memory ran out, or 0; and the summed loss of this process's examples."""
        self.readings.forget()
        total, short = 0.0, 0
        losses: Tensor | None = None
        try:
            for number, piece in enumerate(pieces):
                self.voting = number == len(pieces) - 1
                losses = self._losses(piece)
                if not losses.requires_grad:
                    raise InputError("the loss does not depend on any weight that may move; widen target_modules.")
                total += float(losses.detach().sum())
                if not self.voting:
                    self._differentiate(losses)
        except (torch.OutOfMemoryError, MemoryError):
            short = _too_many(piece)
        forwards = self._from_all([short, [self.numbers[weight] for weight in self.readings.order]])
        if any(short for short, _ in forwards):
            return short, total
        self.gradients.begin(shared_order([read for _, read in forwards], self.weights))
        try:
            try:
                if losses is not None:
                    self._differentiate(losses)
                for weight in self.weights:  # whose gradient came from an earlier piece alone
                    if weight.leaf.grad is not None:
                        self._arrived(weight)
            except (torch.OutOfMemoryError, MemoryError):
                short = _too_many(piece)
        except BaseException:  # the other processes wait for this one's gradients
            self.gradients.finish(use=False)
            raise
        self.gradients.finish(use=not short)
        return short, total

    def _differentiate(self, losses: Tensor) -> None:
        (losses.sum() / self._examples(self.step)).backward()

    def _losses(self, piece: Piece) -> Tensor:
        """The loss of each of the piece's examples, with the graph that leads back to the weights."""
        loss = self.experiment.loss
        batch = part_of(self.experiment.batches[piece.batch], piece.start, piece.stop)
        batch = moved(batch, self.experiment.device)
        with self.readings.not_kept():
            losses = loss.per_example(forward(self.model, rows_of(batch, loss)), batch)
        if losses.shape != (piece.examples,):
            raise InputError(
                f"loss_fn gave a tensor of shape {tuple(losses.shape)} for {piece.examples} examples; it must give one "
                "loss per example: leave out the reduction."
            )
        if not torch.isfinite(losses).all():
            where = where_not_finite(self.model, rows_of(batch, loss))
            what = f"the loss of batch {piece.batch} is not finite in step {self.step} of the probe: {where}"
            if self.step:  # at the start it was finite
                raise blaming(InputError(f"{what}; {self._mend()}."), batch)
            raise blaming(AnalysisError(f"{what}."), batch)
        return losses

    def _arrived(self, weight: MovingWeight) -> None:
        """The weight's gradient of this piece, with those of the earlier ones, is in its leaf."""
        if self.voting:
            gradient, weight.leaf.grad = weight.leaf.grad, None
            assert gradient is not None
            self.gradients.add(weight, gradient.to_dense())  # nn.Embedding(sparse=True) gives a sparse one

    def _vote(self, weight: MovingWeight, gradient: Tensor) -> None:
        direction = gradient
        if self.options.update == "momentum":
            direction = self.running.setdefault(weight, torch.zeros_like(gradient))
            direction.mul_(MOMENTUM).add_(gradient, alpha=1 - MOMENTUM)
        self.witnesses.append((weight.name, ops.vote(weight.votes, direction)))
        if self.sample is not None:
            self.sample.note(weight, gradient)
        if not self.experiment.elements:
            return
        if self.options.ties == "sum":
            total = self.totals.get(weight)
            if total is None:
                total = self.totals[weight] = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
            total += gradient
        elif self.last:
            self.single[weight] = ops.score(weight.votes, gradient)

    # -- what may go wrong ------------------------------------------------------------------------------------------

    def _check_gradients(self) -> None:
        """Once per step, not once per weight: each look at a number waits for the device."""
        device = self.experiment.device
        finite = torch.stack([value.to(device, torch.float32) for _, value in self.witnesses]).isfinite().tolist()
        for (name, _), good in zip(self.witnesses, finite, strict=True):
            if not good:  # the first to come is the nearest to where it began
                error = AnalysisError(f"the gradient of {name} is not finite in step {self.step} of the probe.")
                pieces = self._pieces(self.step)
                raise blaming(error, self.experiment.batches[pieces[0].batch] if pieces else None)

    def _check_losses(self) -> None:
        """Raise InputError where the loss rises as it does when steps are too large."""
        if len(self.losses) < 2 * WINDOW:
            return
        last, low = fmean(self.losses[-WINDOW:]), min(fmean(self.losses[:WINDOW]), self.losses[0])
        if not self._is_high(last, [low]):
            return
        # Of few examples, or where a model gets few wrong, losses differ by much: these examples' own tell.
        steps = range(self.step + 1 - WINDOW, self.step + 1)
        for step in steps:
            if step not in self.unmoved:
                self.unmoved[step] = self._loss_unmoved(step)
        before = [self.unmoved[step] for step in steps]
        if self._is_high(last, before):
            raise InputError(
                f"the probe diverges: the mean loss of {WINDOW} steps rose from {fmean(before):.4g} to {last:.4g}; "
                f"{self._mend()}."
            )

    def _is_high(self, loss: float, before: Sequence[float]) -> bool:
        """Whether a mean loss is too far above the mean of these, which may be negative, as of a density."""
        return loss - fmean(before) > (self.options.diverged - 1) * fmean(map(abs, before))

    def _loss_unmoved(self, step: int) -> float:
        """The mean loss of a step's examples, on all processes, with the weights where they were."""
        seeded(self.experiment.device, _seed(self.experiment.seed, step, self.processes.rank))
        sizes = {weight: weight.step for weight in self.weights}
        try:
            for weight in self.weights:
                weight.step = 0.0
            with torch.no_grad():
                total = math.fsum(float(self._losses(piece).sum()) for piece in self._pieces(step))
        finally:
            for weight, size in sizes.items():
                weight.step = size
        return math.fsum(self._from_all(total)) / self._examples(step)

    def _mend(self) -> str:
        return f"lower its step_size, which is {self.options.step_size:g} (--probe_step_size)"

    def _start_anew(self, sizes: Sequence[int]) -> None:
        if self.experiment.device.type == "cuda":
            torch.cuda.empty_cache()
        self.most = min(sizes) // 2
        if self.processes.first:
            warnings.warn(
                f"out of memory with {min(sizes)} examples; the probe starts anew with {self.most} at a time, whose "
                "gradients are added up.",
                stacklevel=5,
            )
        self._start()

    # -- interruptions ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        assert self.experiment.partial is not None
        tensors = {f"votes/{weight.name}": weight.votes for weight in self.weights}
        tensors |= {f"running/{weight.name}": of for weight, of in self.running.items()}
        tensors |= {f"total/{weight.name}": of for weight, of in self.totals.items()}
        if self.sample is not None:
            tensors |= self.sample.state()
        state = {"data": self.experiment.data, "step": self.step, "losses": self.losses, "most": self.most}
        state |= {"steps": self.steps, "stable": self.stable, "elements": self.experiment.elements}
        if self.sample is not None:
            state["agreement"] = self.sample.agreement
        self.experiment.partial.save(state, tensors)

    def _resume(self) -> None:
        partial = self.experiment.partial
        if partial is None:
            return
        if partial.of_something_else():
            raise InputError(
                f"{partial.path.parent} holds the votes of an interrupted probe of another model, with other modules or "
                "with other options; give the same again, or remove that directory."
            )
        found = self.experiment.resumed()
        if found is None:
            return
        state, tensors = found
        if self.options.ties == "sum" and self.experiment.elements and not state.get("elements", True):
            raise InputError(
                f"{partial.path.parent} holds an interrupted probe without single weights, whose gradients it did not add up; "
                "leave out elements, or remove that directory."
            )
        self.step, self.losses, self.most = state["step"], state["losses"], state["most"]
        self.steps, self.stable = state["steps"], state["stable"]
        for weight in self.weights:
            device = weight.votes.device
            weight.votes.copy_(tensors[f"votes/{weight.name}"])
            for kind, into in (("running", self.running), ("total", self.totals)):
                if f"{kind}/{weight.name}" in tensors:
                    into[weight] = tensors[f"{kind}/{weight.name}"].to(device)
        if self.sample is not None:
            self.sample.load(tensors, state.get("agreement", 0.0))

    # -- results ----------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        window = min(WINDOW, len(self.losses))
        facts = {
            "steps_taken": self.step,
            "weights_moved": sum(weight.votes.numel() for weight in self.weights),
            "loss_at_first": fmean(self.losses[:window]),
            "loss_at_last": fmean(self.losses[-window:]),
        }
        if self.sample is None:
            return facts
        if not self.stable:
            warnings.warn(
                f"the choice by {self.experiment.criterion} is not stable after {self.step} steps (agreement "
                f"{self.sample.agreement:.2f}); give it more data.",
                RuntimeWarning,
                stacklevel=4,
            )
        return {**facts, "stable": self.stable, "agreement": self.sample.agreement}

    def _parts(self) -> ScoresByName:
        by_place = {(id(module), key): weight for weight in self.weights for module, key in weight.places}
        parts: ScoresByName = {}
        for info in self.experiment.inventory.modules:
            owner = self.model.get_submodule(info.owner)
            own = {key: by_place[id(owner), key] for key in owner._parameters if (id(owner), key) in by_place}
            its_type = layer_type(info.layer_type)
            votes = its_type.laid_out(info, owner, {key: weight.votes for key, weight in own.items()})
            sizes = {key: value.abs() for key, value in votes.items()}
            parts[info.name] = {part: value.float().cpu() for part, value in by_unit(info, sizes).items()}
            parts[info.name] |= directions_of(info, votes, self.options.directions)
            if self.experiment.elements:
                single = {key: self._single(weight) for key, weight in own.items()}
                names = {"weight": "element", "bias": "element_bias"}
                found = its_type.laid_out(info, owner, single)
                parts[info.name] |= {names[key]: value.contiguous() for key, value in found.items()}
        return parts

    def _single(self, weight: MovingWeight) -> Tensor:
        if weight not in self.single:  # the last step gave it no gradient, or the sums order equal votes
            self.single[weight] = ops.score(weight.votes, self.totals.get(weight))
        return self.single[weight]


def _too_many(piece: Piece) -> int:
    """How many examples a piece has for which memory ran out. Raises the error at hand again if it is one example."""
    if piece.examples < 2:
        raise
    return piece.examples


def _examples(pieces: Sequence[Piece]) -> int:
    return sum(piece.examples for piece in pieces)


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training mode, if wanted, with the buffers that change in it (running statistics) put back afterwards."""
    if not training:
        yield
        return
    held = [
        (module, key, b, b.clone()) for module in model.modules() for key, b in module._buffers.items() if b is not None
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        yield
    finally:
        for module, key, buffer, before in held:
            module._buffers[key] = buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode


def _seed(seed: int, step: int, rank: int) -> int:
    """Of a step's random numbers, whatever came before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/probe/{step}/{rank}".encode()).digest()[:8], "big") >> 1
