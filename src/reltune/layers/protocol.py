"""What a layer type is: all that reltune has to know of one type of module, behind one interface.

Every file of this folder that is named after a type of module has a class with these members, and
layers/registry.py knows them all. Nothing outside asks which type a module has; it asks the type. A new one is best made from ``SingleWeight``
(layers/single_weight.py) or from a type that it resembles, and is made known by ``registry.register``. What of it
is trained, and how, is said in a second class (tuner/trainable.py).
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor, nn

from reltune.layers.per_example import Shared, Statistics
from reltune.layers.units import ModuleInfo

HeadLayout = Literal["separate", "fused", ""]


class Handle(Protocol):
    """What ends an observation."""

    def remove(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Observer:
    """What is told of every use of a module, and may change what the module gives.

    Args:
        see: is called with the name of what was used (``ModuleInfo.stack``), its input, its output and its route (see
            ``Use``); the model goes on with the output that it returns. Uses of the module by ``see`` itself
            are not told.
        refuse: is called with a name and a reason where a use cannot be observed.
        rows: how many rows the model's input has. Where there are several, a module that would look something up once
            for all rows (positions, say) looks it up for each of them, so that each has a gradient of its own.
        first: see the output before other hooks of the module do, and not after them.
    """

    see: Callable[[str, Tensor, Tensor, Any], Tensor]
    refuse: Callable[[str, str], None]
    rows: Callable[[], int] = lambda: 1
    first: bool = False


class Use(NamedTuple):
    """One use of a module in a pass.

    ``route`` is what the type has to know beside input and gradient: None, except where a module uses only some of its
    matrices for each row of the input (layers/experts.py).
    """

    input: Any
    gradient: Tensor  # of the output
    route: Any = None


class LayerType(Protocol):
    """Everything that is particular to one type of module.

    ``x`` and ``g`` are inputs and output gradients as ``gathered`` lays them out, usually (examples, positions,
    features); ``weights`` are in their canonical shapes (layers/units.py).
    """

    name: str
    """The type's name in files and messages."""
    covers: str
    """The classes of modules, for messages: ``nn.Linear``."""
    trains: frozenset[str]
    """What of it can be trained: of column, row, element, direction, weight and bias. Empty: it is measured only."""
    packed: bool
    """Whether the numbers that its weight holds may stand for something else, as those of a quantised weight do."""
    head_layout: HeadLayout
    """Which projections of attention are known to have their rows head by head in this type: ``separate`` ones of query,
    key and value, or ``fused`` ones of several of them (layers/attention_heads.py). Empty: neither."""
    unseen: str
    """What to report where the loss did not reach a module and its gradient is therefore not known. Empty: the gradient
    of such a module is zero."""

    # -- which modules it is, and what they hold --

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the module is of this type."""

    @abstractmethod
    def why_not(self, module: nn.Module) -> str:
        """What keeps a module of a class that ``covers`` names from being of this type (``with max_norm``), or empty."""

    @abstractmethod
    def infos(self, name: str, module: nn.Module, layer: str, depth: int) -> list[ModuleInfo]:
        """The matrices or vectors that the module holds."""

    @abstractmethod
    def holder(self, name: str) -> str | None:
        """``ModuleInfo.holder`` of the one with that name."""

    @abstractmethod
    def weights(self, info: ModuleInfo, module: nn.Module) -> Mapping[str, Tensor]:
        """Its weight and bias in their canonical shapes, from the module that owns them: views where that can be."""

    @abstractmethod
    def laid_out(self, info: ModuleInfo, module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One number per weight, laid out as the module's parameters are and by their names, in the canonical shapes.

        Of packed weights the values have the canonical shape already.
        """

    @abstractmethod
    def parameters(self, info: ModuleInfo, module: nn.Module) -> tuple[str, ...]:
        """The names in the module of the parameters that hold it."""

    # -- how it is watched --

    @abstractmethod
    def observe(self, module: nn.Module, infos: Sequence[ModuleInfo], observer: Observer) -> list[Handle]:
        """Tell the observer of every use of these, which one module owns, until the handles are removed."""

    @abstractmethod
    def gathered(
        self, module: nn.Module, uses: Sequence[Use], examples: int, rows_per_example: int
    ) -> tuple[Any, Tensor]:
        """Inputs x and output gradients g of all uses in a pass, sorted by example.

        An example may have several rows of the model's input, which follow each other. Raises ValueError, saying what
        the input is, where it cannot be told which positions belong to which example.
        """

    @abstractmethod
    def reaches_others(self, x: Any, g: Tensor) -> bool:
        """Whether an example other than the first has a gradient."""

    # -- what is measured --

    @abstractmethod
    def statistics(
        self,
        info: ModuleInfo,
        module: nn.Module,
        x: Any,
        g: Tensor,
        wanted: Collection[str],
        shared: Shared | None = None,
    ) -> Statistics:
        """Sums over the examples (layers/per_example.py) for everything in the stack of ``info``."""

    @abstractmethod
    def squared_inputs(self, module: nn.Module, x: Tensor, mask: Tensor | None, route: Any) -> dict[str, Tensor]:
        """Σ x² of what each weight multiplies, over the positions of one use that are not padding by ``mask``.

        ``weight`` has ``input_size`` numbers, and ``bias`` () counts the positions.
        """

    @abstractmethod
    def input_size(self, info: ModuleInfo) -> int:
        """How many inputs there are for the weights to multiply."""

    @abstractmethod
    def input_weighted(
        self, info: ModuleInfo, weights: Mapping[str, Tensor], squares: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """|w| · ‖x_w‖ of every weight, from ``squared_inputs`` of all data."""

    @abstractmethod
    def own(self, info: ModuleInfo, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What belongs to ``info`` alone, from what was measured of its whole stack."""

    # -- what it gives when it is taken out --

    @abstractmethod
    def is_used(self, info: ModuleInfo, route: Any) -> bool:
        """Whether a use of the stack was one of ``info``."""

    @abstractmethod
    def output_rows(self, info: ModuleInfo, y: Tensor, mask: Tensor | None, examples: int, route: Any) -> Tensor:
        """What ``info`` gave in one use, without padding: (rows, features) in float64."""

    @abstractmethod
    def neutral(
        self, info: ModuleInfo, module: nn.Module, x: Tensor, y: Tensor, mean: Tensor | None, route: Any
    ) -> Tensor:
        """The output of a use in which ``info`` contributes nothing, or its mean output (features,) over the data."""
