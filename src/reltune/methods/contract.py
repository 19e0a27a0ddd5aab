"""What a method is: which parameters of a model it trains, at which rate, and how they are saved, loaded and exported.

Everything outside asks ``registry.METHODS``. Its fields are in config/method.py. ``Planned``, ``Adapter`` and ``Freed`` have
most of the members; a file of this folder adds what is particular to one method. Torch and PEFT are imported where they are used, so
that what a method cannot do is said at once.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from reltune.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from reltune.config.run_config import RunConfig
    from reltune.plan.plan import Plan


@dataclasses.dataclass
class Base:
    """A base model and what a method has to know to train it.

    Attributes:
        model: with its new heads; it is changed.
        new_heads: the modules that no checkpoint has values for. Every method trains them, and counts them apart.
        not_tuned: modules that the task's Trainer cannot train parts of.
        task_type: a value of ``peft.TaskType``, or None.
        plan: the units chosen, where the config's method needs a plan.
    """

    config: RunConfig
    model: nn.Module
    new_heads: Sequence[str] = ()
    not_tuned: Sequence[str] = ()
    task_type: str | None = None
    plan: Plan | None = None


@dataclasses.dataclass
class Trainable:
    """A model of which exactly what is to be trained requires a gradient.

    Attributes:
        rate: the learning rate's key in ``LEARNING_RATES`` of runs/training.py.
        divisor: what the rate there is divided by the root of: a share or a rank.
        parameters: how many numbers are trained, without those of new heads.
        lines: what is trained, in words, one fact a line.
    """

    model: nn.Module
    rate: str
    divisor: float = 1.0
    parameters: int = 0
    head_parameters: int = 0
    lines: Sequence[str] = ()


class Size(NamedTuple):
    """A size that a method can have: the fields that set it, how many numbers are then trained (without those of new heads), and
    the setting in words."""

    fields: Mapping[str, Any]
    parameters: int
    words: str


class Method(abc.ABC):
    """A way to train.

    Attributes:
        name: key of ``registry.METHODS`` and of ``METHODS`` in config/method.py.
        rates: key of its learning rate: methods with one rate share the key.
        rate: AdamW's learning rate where none is given.
        most: no default rate is above it.
        few_bits: whether the base may be held in 4 or 8 bits.
        lora_file: whether what it trained can be written as a LoRA adapter; of a plan that depends on its units.
        not_for: tasks that it cannot train -> why.
    """

    name: ClassVar[str]
    rates: ClassVar[str]
    rate: ClassVar[float]
    most: ClassVar[float] = 1.0
    few_bits: ClassVar[bool] = True
    lora_file: ClassVar[bool] = True
    not_for: ClassVar[Mapping[str, str]] = {}

    def check_config(self, config: RunConfig) -> None:
        """Raise InputError for a base or a task that the method cannot train, as far as the config says."""
        if not self.few_bits and (config.load_in_4bit or config.load_in_8bit):
            field = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
            raise InputError(
                f"the method {self.name} cannot train a base held in 4 or 8 bits; leave {field} out, or choose the method lora or "
                "columns."
            )
        if config.task is not None and config.task in self.not_for:
            raise InputError(f"the method {self.name} cannot train {config.task}: {self.not_for[config.task]}.")

    @abc.abstractmethod
    def check(self, base: Base) -> None:
        """Raise InputError where the model has nothing for the method to train. Leaves the model as it is."""

    def nearest(self, base: Base, count: int) -> Size | None:
        """The size that comes nearest to ``count`` trained numbers; None where the method has one size only. Leaves the model as
        it is."""
        return None

    @abc.abstractmethod
    def prepare(self, base: Base) -> Trainable:
        """Make exactly what is to be trained require a gradient. Raises InputError as ``check`` does."""

    @abc.abstractmethod
    def save(self, model: nn.Module, path: Path, state: Mapping[str, Any] | None = None) -> None:
        """Write what was trained to a directory; ``state`` is the model's whole state where it is spread over processes."""

    @abc.abstractmethod
    def load(self, base: nn.Module, path: Path) -> Any:
        """The base model with what was trained. Its ``disable_adapter()`` gives the base back for a while.

        Raises InputError where the directory is another base's.
        """
