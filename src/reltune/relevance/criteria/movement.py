"""Movement: how far each weight moves when all may move, after which everything is as before.

V(w) adds up the signs of the weight's gradient over k batches, while after each the weights move by η against the sign:
W ← W − η · sign(∂L/∂W), L the mean loss of a step's examples, batches in their order and again from the first. R(w) = |V(w)|,
from 0 to k, plus a fraction below 1 that orders weights with equal votes by the size of their gradient in the last step.
R(u) of a larger unit is the sum of |V| over its weights: never negative; a layer's is the sum of its modules'.

Gradient sizes at the starting point name weights that all do the same; along a path they show what is left to gain once
the others have moved. Movement: Ansell et al., ACL 2022. Sign updates: Bernstein et al., ICML 2018. Updates inside the
backward pass, which keep no gradient of the whole model: Lv et al. 2023.

η is ``step_size`` times the root mean square of the weight's tensor (of a bias: of its module's weight). The weights are
never written: W₀ − η V is computed where W₀ is read (probe/moving_weights.py), also where W₀ is held in few bits.
Memory beside the weights: one byte for each that may move (two from 128 steps on), and one weight's gradient; more where a
step is several pieces, whose gradients wait for one another. Cost: k forward and backward passes.

Options: ``steps``; ``update`` (``sign``, or ``adamw``: the distance |Δw| that torch's AdamW goes, at ``learning_rate``,
probe/adamw.py; it is also taken where a learning rate is given and no update); ``step_size``; ``batch_size`` (examples
per step; as the loader's batches are, if None); ``move`` (``allowed``: the modules that target_modules leaves, or ``all``).
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

SCORES = ("layer", "module", "head", "column", "row", "element", "bias", "norm")
UPDATES = ("sign", "adamw")
MOVES = ("allowed", "all")
LEARNING_RATE = 5e-5  # transformers' own default for full tuning


@dataclasses.dataclass(frozen=True)
class Options:
    steps: int = 50
    update: str | None = None
    step_size: float = 2e-3
    learning_rate: float | None = None
    batch_size: int | None = None
    move: str = "allowed"

    def __post_init__(self) -> None:
        whole_number("steps", self.steps, 1)
        if self.update is None:
            object.__setattr__(self, "update", "sign" if self.learning_rate is None else "adamw")
        known_words("update", [str(self.update)], UPDATES)
        known_words("move", [self.move], MOVES)
        if self.batch_size is not None:
            whole_number("batch_size", self.batch_size, 1)
        for name in ("step_size", "learning_rate"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise InputError(f"{name} is {value!r}; it must be a number above 0.")


def measure(experiment: Experiment) -> tuple[ScoresByName, dict[str, Any]]:
    options: Options = experiment.options
    if options.update == "adamw":
        return adamw.run(experiment, options.steps, options.learning_rate or LEARNING_RATE)
    return SignProbe(experiment, options.steps).run()
