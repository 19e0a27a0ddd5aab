"""A probe by torch's AdamW: how far it moves each weight in a few steps, after which the weights are put back.

Every floating-point parameter is trained, without weight decay, which would move weights that the data does not, and at a
constant rate. Parameters in half precision have float32 copies that the optimizer moves (a step of Adam is below
bfloat16's resolution for most weights) and of which the model sees the rounded values. Memory beside the weights: 12 bytes
a weight in float32 (gradient and the two states of AdamW), in half precision 18 (two gradients, copy and states), and a
copy of the weights on the host. Weights, gradients and the random state are as before afterwards, also after an
exception. One process; an interrupted probe is done anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from reltune.errors import AnalysisError, InputError, blaming
from reltune.layers.quantised import is_quantised
from reltune.layers.registry import canonical_weights
from reltune.layers.units import by_unit
from reltune.losses import rows_of
from reltune.relevance.batches import batch_size, forward, moved
from reltune.relevance.behaviour.experiment import Experiment, seeded
from reltune.relevance.criteria.contract import ScoresByName
from reltune.relevance.probe.directions import directions_of


def run(
    experiment: Experiment, steps: int, learning_rate: float, directions: int = 0
) -> tuple[ScoresByName, dict[str, Any]]:
    """The scores |Δw|, their sums over units, and so many directions of Δw."""
    model = experiment.model
    parts: ScoresByName = {}
    with _rewound(model) as before, torch.enable_grad():
        masters = _tune(experiment, steps, learning_rate)
        with torch.no_grad():  # the moves in the place of the weights: read out as each layer type lays its weights out
            for name, p in model.named_parameters():
                master = masters.pop(name)
                p.data = master - before[name].to(master)
                del master
        for info in experiment.inventory.modules:
            owner = model.get_submodule(info.owner)
            change = canonical_weights(info, owner)
            moves = {key: value.abs() for key, value in change.items()}
            parts[info.name] = {part: value.cpu() for part, value in by_unit(info, moves).items()}
            parts[info.name] |= directions_of(info, change, directions)
            if experiment.elements:
                names = {"weight": "element", "bias": "element_bias"}
                parts[info.name] |= {names[key]: move.cpu().contiguous() for key, move in moves.items()}
    return parts, {}


def _tune(experiment: Experiment, steps: int, learning_rate: float) -> dict[str, Tensor]:
    """Take the steps. Gives each parameter as the optimizer has it: itself, or its float32 copy."""
    model, loss = experiment.model, experiment.loss
    own = dict(model.named_parameters())
    masters = {name: p.detach().float().requires_grad_() if p.itemsize < 4 else p for name, p in own.items()}
    copies = [(own[name], master) for name, master in masters.items() if master is not own[name]]
    optimizer = torch.optim.AdamW(masters.values(), lr=learning_rate, weight_decay=0.0)
    seeded(experiment.device, experiment.seed)
    for step in tqdm(range(steps), desc=experiment.criterion, unit="step", disable=not experiment.progress):
        index = step % len(experiment.batches)
        batch = moved(experiment.batches[index], experiment.device)
        losses = loss.per_example(forward(model, rows_of(batch, loss)), batch)
        if losses.shape != (batch_size(batch),):
            raise InputError(
                f"loss_fn gave a tensor of shape {tuple(losses.shape)} for {batch_size(batch)} examples; it must give one "
                "loss per example: leave out the reduction."
            )
        if not torch.isfinite(losses).all():
            words = f"the loss of batch {index} is not finite in step {step} of the probe; lower its learning_rate."
            raise blaming(AnalysisError(words), batch)
        losses.mean().backward()
        for p, master in copies:
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, master in copies:
                p.copy_(master)
    return masters


@contextlib.contextmanager
def _rewound(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """All parameters can be trained, and are what they were when the context ends; gives copies of them by name."""
    own = dict(model.named_parameters())
    for name, p in own.items():
        if is_quantised(p):
            raise InputError(
                f"the probe by AdamW trains every weight, and {name} is quantised ({p.dtype}); use update=sign."
            )
    before = {name: p.detach().to("cpu", copy=True) for name, p in own.items()}
    places = {name: p.data for name, p in own.items()}
    gradients = {name: p.grad for name, p in own.items()}
    required = {name: p.requires_grad for name, p in own.items()}
    try:
        for p in own.values():
            p.grad = None
            p.requires_grad_(True)
        yield before
    finally:
        with torch.no_grad():
            for name, p in own.items():
                p.data = places[name]
                p.copy_(before[name])
                p.grad = gradients[name]
                p.requires_grad_(required[name])
