"""The base weight of a layer, and the one adapter whose columns, rows and single weights it holds at present.

At most one adapter is *written* into the base weight at a time. The base weight is changed outside any graph only:
after an optimizer step, on loading, on switching. What it held before is kept per adapter, so that it comes back bit
for bit. Into a weight that is spread over processes nothing is written at all (sharded.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, NoReturn

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from reltune.errors import InputError
from reltune.ops import stand_in
from reltune.ops.attach import LiveGraphs
from reltune.ops.attach_elements import Places
from reltune.ops.index_copy import Copy, index_copy
from reltune.plan.plan import ModulePlan
from reltune.tuner.checks import check_finite, check_indices
from reltune.tuner.sharded import is_managed, is_shard, put_in_shard

# Layers whose columns, rows or single weights are being trained, for the optimizer hook below.
in_training: weakref.WeakSet[WrittenWeight] = weakref.WeakSet()


VALUE_NAMES = ("reltune_columns", "reltune_rows", "reltune_elements")
INDEX_NAMES = ("reltune_column_indices", "reltune_row_indices", "reltune_element_indices")
STATE = frozenset({"_written", "_values", "_active_adapter"})  # what a switch sets in every layer
AT_ONCE = 32  # layers that are written in one go: more would keep the device waiting for the host


class Seen:
    """Remembers tensors, and tells whether one of them was replaced or written to since.

    Writes by fused optimizers and through ``.data`` go unnoticed.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._states: list[tuple[Tensor, tuple[int, int] | None]] = [(t, self._state(t)) for t in tensors]

    def still(self, tensors: list[Tensor]) -> bool:
        if len(tensors) != len(self._states):
            return False
        for now, (then, state) in zip(tensors, self._states, strict=True):
            if now is not then or self._state(now) != state:
                return False
        return True

    @staticmethod
    def _state(tensor: Tensor) -> tuple[int, int]:
        return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()

    # A copy, in this process or another, counts from the tensors that were copied along.

    def __getstate__(self) -> list[tuple[Tensor, bool]]:
        return [(tensor, self._state(tensor) == state) for tensor, state in self._states]

    def __setstate__(self, tensors: list[tuple[Tensor, bool]]) -> None:
        self._states = [(tensor, self._state(tensor) if same else None) for tensor, same in tensors]


Values = tuple[Tensor | None, Tensor | None, Tensor | None]  # of columns, rows and elements


@dataclasses.dataclass
class Originals:
    """What the base weight held at an adapter's columns, rows and elements, and where: enough to undo the adapter exactly.

    Of a weight that is spread over processes, only where: nothing is written into it, so that it still holds the rest.
    """

    indices: Seen  # the adapter's index buffers that the copies below were made from
    column_idx: Any = None  # these five: Tensor, or None where the adapter has no columns, rows or elements
    columns: Any = None
    row_idx: Any = None
    rows: Any = None
    elements: Any = None
    places: Any = None  # Places of the elements in the weight as it is stored, or None

    @property
    def values(self) -> Values:
        return self.columns, self.rows, self.elements

    @property
    def index(self) -> list[Tensor]:
        """What the adapter's index buffers held, in the order of INDEX_NAMES."""
        places = None if self.places is None else self.places.index
        return [idx for idx in (self.column_idx, self.row_idx, places) if idx is not None]

    def apply(self, function: Any) -> Originals:
        tensors = (self.column_idx, self.columns, self.row_idx, self.rows, self.elements)
        applied = Originals(self.indices, *(None if t is None else function(t) for t in tensors))
        applied.places = None if self.places is None else self.places.apply(function)
        return applied


class Writes:
    """Writes columns, rows and elements into base weights: at once, or in a ``together()`` context all together at its end.

    In such a context a weight may be restored and then written, and is not to be read before the end.
    """

    def __init__(self) -> None:
        self._depth = 0
        # Put back: columns, then rows and elements; then the same written.
        self._stages: list[list[Copy]] = [[], [], [], []]
        self._written: set[int] = set()  # layers with something in the last two

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.flush()

    def put(
        self,
        layer: WrittenWeight,
        kept: Originals,
        columns: Tensor | None,
        rows: Tensor | None,
        elements: Tensor | None,
        back: bool = False,
    ) -> None:
        weight = layer.weight
        if not self._depth or not layer.copies_by_index or not weight.is_contiguous():
            self.flush()  # what was put back before
            with torch.no_grad():
                layer._put(weight, kept, columns, rows, elements)
            return
        if id(layer) in self._written or (back and len(self._written) >= AT_ONCE):
            self.flush()
        if not back:
            self._written.add(id(layer))
        stage = 0 if back else 2
        if columns is not None:
            self._stages[stage].append(Copy(weight, layer.column_dim, kept.column_idx, columns))
        if rows is not None:
            self._stages[stage + 1].append(Copy(weight, layer.row_dim, kept.row_idx, rows))
        if elements is not None:
            self._stages[stage + 1].append(Copy(weight.detach().view(-1), 0, kept.places.index, elements))

    def flush(self) -> None:
        for stage in self._stages:
            if stage:
                index_copy(stage)
                stage.clear()
        self._written.clear()


_writes = Writes()
together = _writes.together


class WrittenWeight(nn.Module, BaseTunerLayer):
    """A module whose weight can hold the columns, rows and elements (single weights) of one adapter.

    Columns and rows are counted along dimensions of the weight that a subclass names. Trained columns and rows have
    the weight's own layout, with as many places along that dimension as are trained. Elements are counted in the weight's
    own layout too, and lie in none of the adapter's columns and rows.
    """

    column_dim: ClassVar[int] = 1
    row_dim: ClassVar[int] = 0
    copies_by_index: ClassVar[bool] = True  # whether _put_columns and _put_rows are the ones below
    reltune_columns: nn.ParameterDict
    reltune_rows: nn.ParameterDict
    reltune_elements: nn.ParameterDict
    reltune_column_indices: BufferDict
    reltune_row_indices: BufferDict
    reltune_element_indices: BufferDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.originals: dict[str, Originals] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._written: str | None = None
        self._values = Seen([])  # of the written adapter, when it was written
        self._awaited: set[str] = set()  # adapters whose indices have yet to be loaded
        self._units: dict[str, ModulePlan] = {}  # of each adapter, the module's full shape
        self._graphs = LiveGraphs()
        self._backup: dict[str, Tensor] = {}  # whole tensors replaced by merge
        self._beneath: Tensor | None = None  # the base's own weight while another one is being loaded
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)
        self.register_state_dict_pre_hook(_before_save)
        self.register_state_dict_post_hook(_after_save)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in STATE:  # nn.Module would look whether it is a parameter or a module, for a third of a switch's time
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # -- where columns, rows and elements lie ----------------------------------------------------------------------

    def _columns_of(self, weight: Tensor, idx: Tensor) -> Tensor:
        return weight.index_select(self.column_dim, idx)

    def _rows_of(self, weight: Tensor, idx: Tensor) -> Tensor:
        return weight.index_select(self.row_dim, idx)

    def _put_columns(self, weight: Tensor, idx: Tensor, columns: Tensor) -> None:
        weight.index_copy_(self.column_dim, idx, columns)

    def _put_rows(self, weight: Tensor, idx: Tensor, rows: Tensor) -> None:
        weight.index_copy_(self.row_dim, idx, rows)

    def _outside_rows(self, columns: Tensor, kept: Originals) -> Tensor:
        """Columns with zeros where they cross the adapter's rows: a cell in both belongs to the row."""
        return columns if kept.row_idx is None else columns.index_fill(self.row_dim, kept.row_idx, 0)

    @staticmethod
    def _elements_of(weight: Tensor, idx: Tensor) -> Tensor:
        return weight.reshape(-1).index_select(0, idx)

    @staticmethod
    def _put_elements(weight: Tensor, idx: Tensor, elements: Tensor) -> None:
        if weight.is_contiguous():
            weight.view(-1).index_copy_(0, idx.long(), elements)
        else:
            weight.put_(idx.long(), elements)

    def _put(
        self, weight: Tensor, kept: Originals, columns: Tensor | None, rows: Tensor | None, elements: Tensor | None
    ) -> None:
        """Write columns, then rows, into the weight: a cell in both belongs to the row. Elements lie outside of them.

        FSDP2 moves weights past nn.Module.to, which would take what is kept along.
        """
        device = weight.device
        if columns is not None:
            self._put_columns(weight, kept.column_idx.to(device), columns.detach().to(device, weight.dtype))
        if rows is not None:
            self._put_rows(weight, kept.row_idx.to(device), rows.detach().to(device, weight.dtype))
        if elements is not None:
            self._put_elements(weight, kept.places.index.to(device), elements.detach().to(device, weight.dtype))

    # -- what is kept of the base ----------------------------------------------------------------------------------

    def _indices(self, adapter_name: str) -> list[Tensor]:
        modules = self._modules
        indices = [modules[name]._buffers.get(adapter_name) for name in INDEX_NAMES]  # type: ignore[union-attr]
        return [idx for idx in indices if idx is not None]

    @torch.inference_mode(False)  # what is kept may have to enter a graph later
    @torch.no_grad()
    def _remember(self, adapter_name: str, pristine: Tensor) -> None:
        """Keep where the adapter's units lie in the base's own weight, and what is there; of a shard, only where."""
        kept, whole = Originals(Seen(self._indices(adapter_name))), not is_shard(pristine)
        if adapter_name in self.reltune_columns:
            kept.column_idx = self.reltune_column_indices[adapter_name].to(pristine.device, copy=True)
            kept.columns = self._columns_of(pristine, kept.column_idx) if whole else None
        if adapter_name in self.reltune_rows:
            kept.row_idx = self.reltune_row_indices[adapter_name].to(pristine.device, copy=True)
            kept.rows = self._rows_of(pristine, kept.row_idx) if whole else None
        if adapter_name in self.reltune_elements:
            idx = self.reltune_element_indices[adapter_name].to(pristine.device, copy=True)
            kept.places = Places(idx, (pristine.shape[0], pristine.shape[1:].numel()))
            kept.elements = self._elements_of(pristine, idx) if whole else None
        self.originals[adapter_name] = kept

    def _refresh(self, names: Iterable[str] | None = None) -> None:
        """Take in indices that were loaded, of these adapters or of all.

        Looked for whenever an adapter is used, as Transformers' load_adapter calls no hook.
        """
        changed = [
            name
            for name in (self.originals if names is None else names)
            if (kept := self.originals.get(name)) is not None
            # what a merge has replaced is needed to undo it, whatever was loaded since
            and name not in self.merged_adapters
            and not kept.indices.still(self._indices(name))
        ]
        if not changed:
            return
        if self._written in changed:
            self._restore()
        _writes.flush()
        with torch.no_grad():
            pristine = self._pristine_weight()
            for name in changed:
                self._check_indices(name)
                self._remember(name, pristine)
                self._awaited.discard(name)

    def _check_indices(self, name: str) -> None:
        """Raise InputError for indices that came with a file and are no units of the module."""
        units, (columns, rows, elements) = self._units[name], (self._get(held, name) for held in INDEX_NAMES)
        if elements is not None:
            out, inside = units.shape[0], units.shape[1:]
            stored = (math.prod(inside), out) if self.column_dim < self.row_dim else (out, math.prod(inside))
            Places(elements, stored).check()
        check_indices(units, columns, rows, elements, self.column_dim < self.row_dim)

    def _base_loaded(self, beneath: Tensor) -> None:
        """The base weight came with the file. It may hold the values of an adapter, which are not the base's."""
        weight = self.weight
        self._written = None
        with torch.no_grad():
            for name in self.originals:
                self._check_indices(name)
                self._remember(name, beneath)
                held = weight.detach().clone()
                self._put(held, self.originals[name], *self._values_of(name))
                if torch.equal(held, weight):
                    self._put(weight, self.originals[name], *self.originals[name].values)
                    break
            for name in self.originals:
                self._remember(name, weight)
                self._awaited.discard(name)

    def _check_loaded(self, names: list[str]) -> None:
        for name in names:
            if name in self._awaited:
                self._refuse_unloaded(name)

    @staticmethod
    def _refuse_unloaded(name: str) -> NoReturn:
        raise InputError(
            f"adapter {name!r} was made from a saved config, which says how many directions, columns, rows or single weights "
            "are trained but not which; load it with PeftModel.from_pretrained, or give ReltuneConfig the plan."
        )

    # -- the base weight -------------------------------------------------------------------------------------------

    def _pristine_weight(self) -> Tensor:
        """The base's own weight; a copy when an adapter is written into it. Of a shard only shape and place count."""
        weight = self.weight.detach()
        if "weight" in self._backup:
            return self._backup["weight"]
        if (self._written is None and not self.merged) or is_shard(weight):
            return weight
        weight = weight.clone()
        for name in [self._written, *self.merged_adapters]:
            if name in self.originals:
                self._put(weight, self.originals[name], *self.originals[name].values)
        return weight

    def _values_of(self, adapter_name: str) -> Values:
        modules = self._modules
        columns, rows, elements = [modules[name]._parameters.get(adapter_name) for name in VALUE_NAMES]  # type: ignore[union-attr]
        return columns, rows, elements

    def _trained(self, adapter_name: str) -> list[Tensor]:
        return [t for t in self._values_of(adapter_name) if t is not None]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 has spread the weight, or the trained tensors, over processes."""
        modules = self._modules
        return any(is_managed(modules[name]) for name in ("base_layer", *VALUE_NAMES))

    def _settle_shard(self) -> None:
        """Put the base's own numbers back into the shard, and drop the copies of them, which are then not needed."""
        if self.merged:
            return
        if not self._graphs:
            self._restore()
        if self._written is None:
            for kept in self.originals.values():
                kept.columns = kept.rows = kept.elements = None

    def _write(self, adapter_name: str) -> None:
        values = self._values_of(adapter_name)
        _writes.put(self, self.originals[adapter_name], *values)
        self._written = adapter_name
        self._graphs.differentiated = False
        self._values = Seen([t for t in values if t is not None])

    def _rewrite(self) -> None:
        """Write the adapter that is in the weight once more, without autograd counting it as a change.

        Its parameters may have changed unnoticed: through ``.data``, or by optimizers that step on flat copies. Where
        they have not, this changes nothing, and graphs that hold the weight remain valid.
        """
        if self._written is not None and not self.sharded:
            self._put(self.weight.data, self.originals[self._written], *self._values_of(self._written))
            self._graphs.differentiated = False

    def _restore(self) -> None:
        if self._written is not None:
            kept = self.originals[self._written]
            if self.sharded:
                if is_shard(self.weight):  # what is written while it is gathered would be lost
                    put_in_shard(self.weight, lambda weight: self._put(weight, kept, *kept.values))
                    self._written = None
                return
            _writes.put(self, kept, *kept.values, back=True)
            self._written = None

    def write_back(self) -> None:
        """Bring the base weight up to date with the trained columns, rows and elements; take them out of a weight that is spread."""
        if self.sharded:
            self._settle_shard()
        elif self._written is not None:
            self._write(self._written)

    def _settle(self, base_only: bool = False) -> None:
        """Write the adapter that is asked for into the base weight, unless a graph still needs what is there."""
        if not self.originals:
            return
        if base_only:
            self._refresh()  # samples may ask for any adapter
        if self.sharded:
            self._refresh()
            self._settle_shard()
            return
        if self.merged_adapters:
            self._refresh()
            return
        asked = [] if base_only or self._disable_adapters else self.active_adapters
        names = [name for name in asked if name in self.originals]
        self._refresh(names)
        wanted = names[0] if names else None
        if wanted is not None:
            # PEFT loads a file onto the accelerator, if there is one, and moves it to the base's device afterwards.
            device = self.weight.device
            absent = device.type == "meta" and not stand_in.standing()
            if absent or any(t.device != device for t in self._trained(wanted)):
                return
        if wanted != self._written and not self._graphs:
            self._restore()
            if wanted is not None:
                self._write(wanted)
        elif self._written is not None and (base_only or self._written in names):
            values = self._trained(self._written)
            if not self._values.still(values):
                self._write(self._written)  # replaced, or changed by hand
            elif self._graphs.differentiated and any(t.requires_grad for t in values):
                self._rewrite()  # an optimizer may have stepped since, without the hook below

    def _base_values(self, name: str) -> Values:
        """What the base's own weight holds at the adapter's columns, rows and elements."""
        kept = self.originals[name]
        return self._written_values(name) if all(t is None for t in kept.values) else kept.values

    def _written_values(self, name: str) -> Values:
        """The adapter's columns, rows and elements as the product has used them; the parameters may have changed since."""
        kept, weight = self.originals[name], self.weight.detach()
        return (
            None if kept.column_idx is None else self._columns_of(weight, kept.column_idx),
            None if kept.row_idx is None else self._rows_of(weight, kept.row_idx),
            None if kept.places is None else self._elements_of(weight, kept.places.index),
        )

    @property
    def weight(self) -> Tensor:
        return self._modules["base_layer"].weight  # type: ignore[union-attr, return-value]

    def _get(self, attribute: str, adapter_name: str) -> Any:
        """The adapter's tensor in that dictionary of the layer, or None.

        Goes past the dictionaries' own lookup, which would take most of a switch's time.
        """
        entries = self._modules[attribute]
        return (entries._parameters or entries._buffers).get(adapter_name)  # type: ignore[union-attr]


def _before_save(module: Any, *_: Any) -> None:
    if is_shard(module.weight) and module.weight.is_meta:
        raise InputError(
            "cpu_ram_efficient_loading loads the base model in one process only, and the columns and rows to train are taken "
            "from it in each; set it to false."
        )
    if not module._graphs:
        module._restore()


def _after_save(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is saved as the base's weight is the base's own, as a copy where a graph needs the weight as it is."""
    key = f"{prefix}base_layer.weight"
    if module._written is None or key not in state_dict:
        return
    if is_shard(module.weight):
        kept, state_dict[key] = module.originals[module._written], state_dict[key].clone()
        put_in_shard(state_dict[key], lambda weight: module._put(weight, kept, *kept.values))
    else:
        state_dict[key] = module._pristine_weight()


def _before_load(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for attribute in (*module.adapter_layer_names, "reltune_direction_vectors"):
        for name in getattr(module, attribute):
            values = state_dict.get(f"{prefix}{attribute}.{name}")
            if values is not None and not is_shard(values):
                check_finite(f"{prefix}{attribute}", values)
    if f"{prefix}base_layer.weight" in state_dict and module.originals and not module.merged:
        if module.sharded:
            module._written = None
            return
        module._beneath = module._pristine_weight().clone()


def _after_load(module: Any, _: Any) -> None:
    if module._beneath is not None:
        module._base_loaded(module._beneath)
        module._beneath = None
    module._settle()


def _write_back_after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    with together():
        for layer in list(in_training):
            name = layer._written
            if name is not None and any(id(t) in stepped for t in layer._trained(name)):
                layer.write_back()


register_optimizer_step_post_hook(_write_back_after_step)
