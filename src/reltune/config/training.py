"""The training: transformers' own fields, and what reltune adds to them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from reltune.config.fields import Subject, about
from reltune.errors import InputError
from reltune.files import parse_size
from reltune.names import PREFERENCE_LOSSES

MAY_BE_INFINITE = ("max_grad_norm",)  # which then cuts no gradient


@dataclasses.dataclass(kw_only=True)
class TrainingConfig(Subject):
    """The training: transformers' own fields, and what reltune adds to them."""

    beta: float = field(
        default=0.1,
        metadata=about(
            "For preference: beta of DPO, the strength of the pull towards the reference model, which is the base model.",
            "N",
            above=0,
        ),
    )
    loss_type: str = field(
        default="sigmoid",
        metadata=about(
            f"For preference: the loss of a pair of answers, by its name in TRL: {', '.join(PREFERENCE_LOSSES)}.",
            "NAME",
            PREFERENCE_LOSSES,
        ),
    )
    activation_offloading: bool = field(
        default=False,
        metadata=about(
            "Let what the forward pass keeps for the backward pass wait in host memory, copied there and back while the GPU computes: for long "
            "texts, together with --gradient_checkpointing."
        ),
    )
    cuda_graphs: bool | None = field(
        default=None,
        metadata=about(
            "Record the forward and backward pass for each shape of batch on an NVIDIA GPU and replay them, for models so small that the GPU "
            "waits for Python. Batches are padded to multiples of 32 tokens. Not for chats and plain text, nor in several processes. If not given, "
            "only `reltune compare` does so, where it can and the base has at most 500 million parameters."
        ),
    )
    cache_frozen_prefix: str = field(
        default="auto",
        metadata=about(
            "Compute the frozen layers below the lowest trained one once for each example, keep what they give on the disk, and begin later "
            "passes over the data above them. auto: where it saves time, fits and changes no result but its rounding: the frozen layers "
            "have no dropout. on: turn dropout off there, keep what fits, and refuse what cannot be kept. See docs/frozen_prefix.md.",
            "auto|on|off",
            ("auto", "on", "off"),
        ),
    )
    cache_size: str = field(
        default="20GiB",
        metadata=about(
            "The most that --cache_frozen_prefix may keep in the run's directory: 500MB, 20GiB. It is removed when training is done.",
            "SIZE",
        ),
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata=about(
            "Stop training after this many evaluations without a better result, and keep the best checkpoint.",
            "N",
            least=1,
        ),
    )
    sweep: dict[str, list[str]] = field(
        default_factory=dict,
        metadata=about(
            "Train once for each value of this field (any field of training, or budget) and keep the adapter that is best on "
            "validation data. Write values with commas between them, or a range LOW..HIGH to draw from. Give it again for "
            "another field, and all combinations are tried. See docs/sweeps.md.",
            "FIELD=1e-4,1e-3 or FIELD=1e-4..1e-2",
        ),
    )
    sweep_trials: int | None = field(
        default=None,
        metadata=about(
            "If a sweep has a range: how many times values are drawn and trained with. 20 if not given.", "N", least=1
        ),
    )
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata=about(
            "Fields of transformers.TrainingArguments, such as learning_rate. They may also be written outside this mapping."
        ),
    )

    def check(self) -> None:
        super().check()
        try:
            parse_size(self.cache_size)
        except ValueError as error:
            raise InputError(f"cache_size: {error}.") from error
        for name, value in self.training.items():
            if isinstance(value, float) and not math.isfinite(value) and name not in MAY_BE_INFINITE:
                raise InputError(f"{name} is {value}; it must be a finite number.")
        check_amounts({**self.training, "max_steps": 1} if "max_steps" in self.sweep else self.training)
        if self.sweep_trials is not None and not self.sweep:
            raise InputError("sweep_trials is given, but nothing is swept; give a sweep too, or leave it out.")
        if twice := [name for name in self.sweep if name in self.training]:
            raise InputError(f"{twice[0]} has a value and is swept too; keep one of them.")


def check_amounts(values: Mapping[str, Any]) -> None:
    """Raise InputError for numbers of steps, epochs or examples with which nothing would be trained. Flags may be words yet."""
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    amounts = {"max_steps": -1.0, "num_train_epochs": 1.0, **dict.fromkeys(sizes, 1.0)}
    for name in amounts:
        with contextlib.suppress(KeyError, TypeError, ValueError):  # what is no number is refused as such
            amounts[name] = float(values[name])
    steps, epochs = amounts["max_steps"], amounts["num_train_epochs"]
    if steps == 0 or (steps < 0 and epochs <= 0):
        name = "max_steps" if steps == 0 else "num_train_epochs"
        raise InputError(f"{name} is {amounts[name]:g}, so that nothing would be trained; write more.")
    for name in sizes:
        if amounts[name] < 1:
            raise InputError(f"{name} is {amounts[name]:g}; write 1 or more.")
