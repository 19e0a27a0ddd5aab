"""Movement: how far each weight moves when all may move, after which everything is as before.

V(w) adds up the signs of the weight's gradient over k batches, while after each the weights move by η against the sign:
W ← W − η · sign(∂L/∂W), L the mean loss of a step's examples, batches in their order and again from the first. R(w) = |V(w)|,
from 0 to k, plus a fraction below 1 that orders weights with equal votes by the size of their gradient in the last step.
R(u) of a larger unit is the sum of |V| over its weights: never negative; a layer's is the sum of its modules'.

Of a linear map, V (out × in) has directions too: its right singular vectors, each a direction of the input with the singular value as
its relevance. The map can be trained along the first of them as a LoRA adapter whose A they are (ops/add_directions.py). By
``adamw`` they are those of the moves themselves. ops/singular_vectors.py states what they cost: on MiniLM a second of one
core, on an 8B model 2e13 operations in float32, and 4 bytes a number in the scores.

Gradient sizes at the starting point name weights that all do the same; along a path they show what is left to gain once
the others have moved. Movement: Ansell et al., ACL 2022. Sign updates: Bernstein et al., ICML 2018. Updates inside the
backward pass, which keep no gradient of the whole model: Lv et al. 2023.

η is ``step_size``, the same for all weights. The weights are never written: W₀ − η V is computed where W₀ is read
(probe/moving_weights.py), also where W₀ is held in few bits.
Memory beside the weights: one byte for each that may move (two from 128 steps on), and one weight's gradient; more where a
step is several pieces, whose gradients wait for one another. Cost: k forward and backward passes.

``steps: auto`` ends when the choice has settled: every 10 steps, of a sample of a million weights drawn evenly over all
that move, the 1% with the most votes are compared with those of the check before (equal votes in the order of the summed
gradient's size); if they have at least the share ``agreement`` in common, one more step closes the probe. At most 120.

Options:

- ``steps``: a number, or ``auto``.
- ``update``: ``sign``, of a step's gradient; ``momentum``, of the running mean of gradients, which is the sign of Adam's step
  and takes one more number per weight; or ``adamw``, which scores the distance |Δw| that torch's AdamW goes
  (probe/adamw.py). None: ``adamw`` where a learning rate is given, else ``sign``.
- ``step_size``: of sign and momentum. ``relative``: it is meant times the root mean square of the weight's tensor (of a bias: of
  its module's weight). ``learning_rate``: of adamw.
- ``batch_size``: examples of a step, over all processes; None: the loader's batches.
- ``move``: ``all``, with new heads and what has no units; or ``allowed``, the modules that target_modules leaves.
- ``training``: whether the model is in training mode, with dropout.
- ``ties``: equal votes in the order of the ``last`` step's gradient or of the ``sum``, which takes four more bytes per weight.
- ``directions``: how many directions of a linear map are kept, at most.
- ``agreement``: see above. ``diverged``: how many times the loss of ten steps may be what it was of the same examples with
  the weights where they were.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from reltune.errors import InputError
from reltune.relevance.behaviour.experiment import Experiment, known_words, whole_number
from reltune.relevance.criteria.contract import ScoresByName
from reltune.relevance.probe import adamw
from reltune.relevance.probe.sign_probe import SignProbe

SCORES = ("layer", "module", "head", "column", "row", "element", "direction", "bias", "norm")
SHARES_DATA = True  # several processes may measure it together
UPDATES = ("sign", "momentum", "adamw")
MOVES = ("allowed", "all")
TIES = ("last", "sum")
MOST_STEPS = 120  # of a probe that ends by itself
MOST_BY_SIGN = 2**15 - 1  # votes take two bytes at most
LEARNING_RATE = 5e-5  # transformers' own default for full tuning


@dataclasses.dataclass(frozen=True)
class Options:
    steps: int | str = 100
    update: str | None = None
    step_size: float = 1e-4
    relative: bool = False
    learning_rate: float | None = None
    batch_size: int | None = None
    move: str = "all"
    training: bool = True
    ties: str = "last"
    directions: int = 64
    agreement: float = 0.9
    diverged: float = 2.0

    def __post_init__(self) -> None:
        if self.steps != "auto":
            whole_number("steps", self.steps, 1)
        if self.update is None:
            object.__setattr__(self, "update", "sign" if self.learning_rate is None else "adamw")
        for name, known in (("update", UPDATES), ("move", MOVES), ("ties", TIES)):
            known_words(name, [getattr(self, name)], known)
        if self.update != "adamw" and self.most_steps > MOST_BY_SIGN:
            raise InputError(f"steps is {self.steps}; it must be at most {MOST_BY_SIGN}.")
        if self.update == "adamw" and self.steps == "auto":
            raise InputError("a probe by adamw does not end by itself; give steps a number.")
        if self.batch_size is not None:
            whole_number("batch_size", self.batch_size, 1)
        whole_number("directions", self.directions, 0)
        for name in ("step_size", "learning_rate", "agreement", "diverged"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (value is None and name == "learning_rate") and not (number and 0 < value < math.inf):
                raise InputError(f"{name} is {value!r}; it must be a number above 0.")
        if self.agreement > 1:
            raise InputError(f"agreement is {self.agreement!r}; it is a share and must be at most 1.")

    @property
    def most_steps(self) -> int:
        return MOST_STEPS if isinstance(self.steps, str) else self.steps


def measure(experiment: Experiment) -> tuple[ScoresByName, dict[str, Any]]:
    options: Options = experiment.options
    if options.update == "adamw":
        if experiment.processes.count > 1:
            raise InputError("a probe by adamw runs in one process; take update: sign.")
        rate = options.learning_rate or LEARNING_RATE
        return adamw.run(experiment, options.most_steps, rate, options.directions)
    return SignProbe(experiment).run()
