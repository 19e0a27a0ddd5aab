"""The sign probe: for every batch, V ← V + sign(∂L/∂W) of all weights, and the loss of the next is that of W₀ − η V."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from reltune.errors import AnalysisError, InputError
from reltune.layers.fused_norms import fused_norms
from reltune.layers.registry import layer_type
from reltune.layers.units import by_unit
from reltune.losses import rows_of
from reltune.ops import votes as ops
from reltune.relevance.batches import batch_size, forward, moved, part_of
from reltune.relevance.behaviour.experiment import Experiment, seeded
from reltune.relevance.criteria.contract import ScoresByName
from reltune.relevance.probe.moving_weights import MovingWeight, Readings, moving, weights_that_move
from reltune.relevance.probe.steps import Piece, no_larger, steps_of
from reltune.relevance.statistics.gradient_checkpointing import checkpointing_in_evaluation
from reltune.relevance.statistics.not_finite import where_not_finite

MOST_IN_A_BYTE = 127


class SignProbe:
    """One probe of one model: the weights that move, and where it stands."""

    def __init__(self, experiment: Experiment, steps: int) -> None:
        self.experiment, self.options, self.model = experiment, experiment.options, experiment.model
        self.steps = steps
        inventory = None if self.options.move == "all" else experiment.inventory
        dtype = torch.int8 if steps <= MOST_IN_A_BYTE else torch.int16
        self.weights = weights_that_move(self.model, inventory, self.options.step_size, dtype)
        self.groups = steps_of([batch_size(batch) for batch in experiment.batches], self.options.batch_size)
        self.readings = Readings()
        self.step = 0
        self.voting = False
        self.last = False  # whether this step is the last one, whose gradients order weights with equal votes
        self.witnesses: list[tuple[str, Tensor]] = []  # of this step: a number that is finite if the whole gradient is
        self.single: dict[MovingWeight, Tensor] = {}  # scores of single weights, on the host
        self.losses: list[float] = []

    def run(self) -> tuple[ScoresByName, dict[str, Any]]:
        experiment = self.experiment
        with self._prepared(), moving(self.weights, self._arrived, self.readings):
            bar = tqdm(
                total=self.steps,
                initial=self.step,
                desc=experiment.criterion,
                unit="step",
                disable=not experiment.progress,
            )
            with bar:
                while self.step < self.steps:
                    self.last = self.step == self.steps - 1
                    self._take_step()
                    self.step += 1
                    bar.update()
                    bar.set_postfix(loss=f"{self.losses[-1]:.4g}")
        return self._parts(), {"loss_of_first_step": self.losses[0], "loss_of_last_step": self.losses[-1]}

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        with fused_norms(self.model), checkpointing_in_evaluation(self.model), torch.enable_grad():
            yield

    def _take_step(self) -> None:
        pieces = no_larger(self.groups[self.step % len(self.groups)], None)
        examples = sum(piece.examples for piece in pieces)
        seeded(self.experiment.device, _seed(self.experiment.seed, self.step))
        self.witnesses.clear()
        total = 0.0
        for number, piece in enumerate(pieces):
            self.voting = number == len(pieces) - 1
            losses = self._losses(piece)
            (losses.sum() / examples).backward()
            total += float(losses.detach().sum())
        for weight in self.weights:  # whose gradient came from an earlier piece alone
            if weight.leaf.grad is not None:
                self._arrived(weight)
        self._check_gradients()
        self.losses.append(total / examples)

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
            mend = "lower its step_size" if self.step else "mend the data or the model"
            raise AnalysisError(
                f"the loss of batch {piece.batch} is not finite in step {self.step} of the probe: {where}; {mend}."
            )
        if not losses.requires_grad:
            raise InputError("the loss does not depend on any weight that may move; widen target_modules.")
        return losses

    def _arrived(self, weight: MovingWeight) -> None:
        """The weight's gradient of this piece, with those of the earlier ones, is in its leaf."""
        if not self.voting:
            return
        gradient, weight.leaf.grad = weight.leaf.grad, None
        assert gradient is not None
        self.witnesses.append((weight.name, ops.vote(weight.votes, gradient)))
        if self.last and self.experiment.elements:
            self.single[weight] = ops.score(weight.votes, gradient)

    def _check_gradients(self) -> None:
        """Once per step, not once per weight: each look at a number waits for the device."""
        device = self.experiment.device
        finite = torch.stack([value.to(device, torch.float32) for _, value in self.witnesses]).isfinite().tolist()
        for (name, _), good in zip(self.witnesses, finite, strict=True):
            if not good:  # the first to come is the nearest to where it began
                raise AnalysisError(f"the gradient of {name} is not finite in step {self.step} of the probe.")

    # -- scores -----------------------------------------------------------------------------------------------------

    def _parts(self) -> ScoresByName:
        by_place = {(id(module), key): weight for weight in self.weights for module, key in weight.places}
        parts: ScoresByName = {}
        for info in self.experiment.inventory.modules:
            owner = self.model.get_submodule(info.owner)
            own = {key: by_place[id(owner), key] for key in owner._parameters if (id(owner), key) in by_place}
            its_type = layer_type(info.layer_type)
            sizes = its_type.laid_out(info, owner, {key: weight.votes.abs() for key, weight in own.items()})
            parts[info.name] = {part: value.float().cpu() for part, value in by_unit(info, sizes).items()}
            if self.experiment.elements:
                single = {key: self._single(weight) for key, weight in own.items()}
                names = {"weight": "element", "bias": "element_bias"}
                found = its_type.laid_out(info, owner, single)
                parts[info.name] |= {names[key]: value.contiguous() for key, value in found.items()}
        return parts

    def _single(self, weight: MovingWeight) -> Tensor:
        if weight not in self.single:  # the last step gave it no gradient
            self.single[weight] = ops.score(weight.votes, None)
        return self.single[weight]


def _seed(seed: int, step: int) -> int:
    """Of a step's random numbers, whatever came before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/probe/{step}".encode()).digest()[:8], "big") >> 1
