"""Trainable units inside a frozen module.

Columns and rows of a linear map are trained where they are: the base weight holds the current values, so that the
forward pass is the base layer's one product, and ops/attach.py gives them their gradient. Whole weights, gains and
biases are trained as tensors of their own that stand in for the base's, which is never touched.

At most one adapter is *written* into the base weight at a time. The base weight is changed outside any graph only:
after an optimizer step, on loading, on switching. Whatever else is asked for (disabled adapters, another adapter while
a graph is alive, several adapters at once) is computed as a correction beside the product.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook

from reltune.ops.attach import AttachColumns, AttachRows, HoldWeight, LiveGraphs
from reltune.plan.plan import ModulePlan
from reltune.records import InputError

# Layers whose columns or rows are being trained, for the optimizer hook below.
_in_training: weakref.WeakSet[ReltuneLayer] = weakref.WeakSet()


class _Seen:
    """Tensors as they were once: has one been replaced or written to since?

    Fused optimizers and writes through ``.data`` go unnoticed.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._states: list[tuple[Tensor, tuple[int, int] | None]] = [(t, self._state(t)) for t in tensors]

    def still(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self._states) and all(
            now is then and self._state(now) == state for now, (then, state) in zip(tensors, self._states, strict=True)
        )

    @staticmethod
    def _state(tensor: Tensor) -> tuple[int, int]:
        return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()

    # A copy, in this process or another, counts from the tensors that were copied along.

    def __getstate__(self) -> list[tuple[Tensor, bool]]:
        return [(tensor, self._state(tensor) == state) for tensor, state in self._states]

    def __setstate__(self, tensors: list[tuple[Tensor, bool]]) -> None:
        self._states = [(tensor, self._state(tensor) if same else None) for tensor, same in tensors]


@dataclasses.dataclass
class _Originals:
    """What the base weight held at an adapter's columns and rows, and where: enough to undo the adapter exactly."""

    indices: _Seen  # the adapter's index buffers that the copies below were made from
    column_idx: Any = None  # these four: Tensor, or None where the adapter has no columns or rows
    columns: Any = None
    row_idx: Any = None
    rows: Any = None

    def apply(self, function: Any) -> _Originals:
        tensors = (self.column_idx, self.columns, self.row_idx, self.rows)
        return _Originals(self.indices, *(None if t is None else function(t) for t in tensors))


class ReltuneLayer(nn.Module, BaseTunerLayer):
    """A frozen module with trainable units, for any number of adapters.

    Per adapter: ``reltune_columns`` (out, c), ``reltune_rows`` (r, in), ``reltune_weight`` like the weight,
    ``reltune_bias`` like the bias; ``reltune_column_indices`` (c,) and ``reltune_row_indices`` (r,) in int64.
    """

    adapter_layer_names = ("reltune_columns", "reltune_rows", "reltune_weight", "reltune_bias")
    other_param_names = ("reltune_column_indices", "reltune_row_indices", "originals")
    reltune_columns: nn.ParameterDict
    reltune_rows: nn.ParameterDict
    reltune_weight: nn.ParameterDict
    reltune_bias: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.reltune_column_indices = BufferDict(persistent=True)
        self.reltune_row_indices = BufferDict(persistent=True)
        self.originals: dict[str, _Originals] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._written: str | None = None
        self._values = _Seen([])  # of the written adapter, when it was written
        self._awaited: set[str] = set()  # adapters whose indices have yet to be loaded
        self._graphs = LiveGraphs()
        self._backup: dict[str, Tensor] = {}  # whole tensors replaced by merge
        shape = self._shape()
        self.in_features, self.out_features = shape[-1], shape[0]
        self._beneath: Tensor | None = None  # the base's own weight while another one is being loaded
        self.register_load_state_dict_pre_hook(_before_load)
        self.register_load_state_dict_post_hook(_after_load)
        self.register_state_dict_pre_hook(_before_save)

    # -- what a subclass knows of its base layer --------------------------------------------------------------

    def _shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def _base_bias(self) -> Tensor | None:
        return getattr(self.get_base_layer(), "bias", None)  # the RMSNorm classes have none, not even as None

    def _base_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The base layer's output with other tensors in place of its own."""
        raise NotImplementedError

    # -- adapters ----------------------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        units: ModulePlan,
        init_weights: bool = True,
        inference_mode: bool = False,
        indices_follow: bool = False,
    ) -> None:
        """Add an adapter that trains ``units``; until an adapter file is loaded its values are the base's.

        With ``indices_follow`` only the sizes are known, and the layer refuses to run before a file was loaded.
        """
        with torch.no_grad():
            pristine = self._pristine_weight()
            for field, dim in (("columns", 1), ("rows", 0)):
                idx = torch.tensor(getattr(units, field), dtype=torch.int64, device=pristine.device)
                if len(idx):
                    getattr(self, f"reltune_{field[:-1]}_indices")[adapter_name] = idx
                    self._parameter(f"reltune_{field}", adapter_name, pristine.index_select(dim, idx), init_weights)
            if units.weight:
                self._parameter("reltune_weight", adapter_name, pristine, init_weights)
            if units.bias:
                self._parameter("reltune_bias", adapter_name, self.bias, init_weights)
            if self._indices(adapter_name):
                self._remember(adapter_name, pristine)
                if indices_follow:
                    self._awaited.add(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _parameter(self, kind: str, adapter_name: str, value: Tensor, init_weights: bool) -> None:
        value = value.detach().clone()
        if not init_weights:
            value = value + 0.1 * torch.randn_like(value)
        getattr(self, kind)[adapter_name] = nn.Parameter(value)

    def _indices(self, adapter_name: str) -> list[Tensor]:
        kinds = (self.reltune_column_indices, self.reltune_row_indices)
        return [kind[adapter_name] for kind in kinds if adapter_name in kind]

    @torch.inference_mode(False)  # what is kept may have to enter a graph later
    @torch.no_grad()
    def _remember(self, adapter_name: str, pristine: Tensor) -> None:
        kept = _Originals(_Seen(self._indices(adapter_name)))
        if adapter_name in self.reltune_columns:
            kept.column_idx = self.reltune_column_indices[adapter_name].to(pristine.device, copy=True)
            kept.columns = pristine.index_select(1, kept.column_idx)
        if adapter_name in self.reltune_rows:
            kept.row_idx = self.reltune_row_indices[adapter_name].to(pristine.device, copy=True)
            kept.rows = pristine.index_select(0, kept.row_idx)
        self.originals[adapter_name] = kept

    def _refresh(self) -> None:
        """Take in indices that were loaded. Looked for here too, as Transformers' load_adapter calls no hook."""
        changed = [
            name
            for name, kept in self.originals.items()
            # what a merge has replaced is needed to undo it, whatever was loaded since
            if name not in self.merged_adapters and not kept.indices.still(self._indices(name))
        ]
        if not changed:
            return
        if self._written in changed:
            self._restore()
        with torch.no_grad():
            pristine = self._pristine_weight()
            for name in changed:
                self._remember(name, pristine)
                self._awaited.discard(name)

    def _base_loaded(self, beneath: Tensor) -> None:
        """The base weight came with the file. It may hold the values of an adapter, which are not the base's."""
        weight = self.weight
        self._written = None
        with torch.no_grad():
            for name in self.originals:
                self._remember(name, beneath)
                held = weight.detach().clone()
                _put(held, self.originals[name], *self._values_of(name))
                if torch.equal(held, weight):
                    _put(weight, self.originals[name], self.originals[name].columns, self.originals[name].rows)
                    break
            for name in self.originals:
                self._remember(name, weight)
                self._awaited.discard(name)

    def _check_loaded(self, names: list[str]) -> None:
        missing = [name for name in names if name in self._awaited]
        if missing:
            raise InputError(
                f"adapter {missing[0]!r} was made from a saved config, which says how many columns and rows are trained but "
                "not which; load it with PeftModel.from_pretrained, or give ReltuneConfig the plan."
            )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._settle()

    def delete_adapter(self, adapter_name: str) -> None:
        if self._written == adapter_name:
            self._restore()
        super().delete_adapter(adapter_name)
        self._awaited.discard(adapter_name)
        self._settle()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        kinds = [getattr(self, kind) for kind in self.adapter_layer_names if adapter_name in getattr(self, kind)]
        trained = [kind[adapter_name].requires_grad for kind in kinds]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for kind, requires_grad in zip(kinds, trained, strict=True):
            kind[adapter_name].requires_grad_(requires_grad)  # a tensor that was really moved comes back trainable
        self._settle()

    def train(self, mode: bool = True) -> ReltuneLayer:
        super().train(mode)
        self._rewrite()
        return self

    def _active(self, kinds: tuple[str, ...]) -> list[str]:
        return [name for name in self.active_adapters if any(name in getattr(self, kind) for kind in kinds)]

    # -- the base weight ---------------------------------------------------------------------------------------

    def _pristine_weight(self) -> Tensor:
        """The base's own weight; a copy when an adapter is written into it."""
        weight = self.weight.detach()
        if "weight" in self._backup:
            return self._backup["weight"]
        if self._written is None and not self.merged:
            return weight
        weight = weight.clone()
        for name in [self._written, *self.merged_adapters]:
            if name in self.originals:
                _put(weight, self.originals[name], self.originals[name].columns, self.originals[name].rows)
        return weight

    def _values_of(self, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
        return self._get(self.reltune_columns, adapter_name), self._get(self.reltune_rows, adapter_name)

    def _trained(self, adapter_name: str) -> list[Tensor]:
        return [t for t in self._values_of(adapter_name) if t is not None]

    def _write(self, adapter_name: str) -> None:
        columns, rows = self._values_of(adapter_name)
        with torch.no_grad():
            _put(self.weight, self.originals[adapter_name], columns, rows)
        self._written = adapter_name
        self._values = _Seen(self._trained(adapter_name))

    def _rewrite(self) -> None:
        """Write the written adapter again, past autograd's count of versions.

        Parameters may have changed where no version tells: by ``.data`` or by optimizers that step on flat copies.
        When they have not, this changes nothing, and graphs that hold the weight remain valid.
        """
        if self._written is not None:
            _put(self.weight.data, self.originals[self._written], *self._values_of(self._written))

    def _restore(self) -> None:
        if self._written is not None:
            kept = self.originals[self._written]
            with torch.no_grad():
                _put(self.weight, kept, kept.columns, kept.rows)
            self._written = None

    def write_back(self) -> None:
        """Bring the base weight up to date with the trained columns and rows."""
        if self._written is not None:
            self._write(self._written)

    def _settle(self) -> None:
        """Write the adapter that is asked for into the base weight, unless a graph still needs what is there."""
        if not self.originals:
            return
        self._refresh()
        if self.merged:
            return
        names = [] if self.disable_adapters else self._active(("reltune_columns", "reltune_rows"))
        wanted = names[0] if names else None
        if wanted is not None:
            # PEFT loads a file onto the accelerator, if there is one, and moves it to the base's device afterwards.
            devices = {t.device for t in (self.weight, *self._trained(wanted))}
            if len(devices) > 1 or self.weight.device.type == "meta":
                return
        if wanted != self._written and not self._graphs:
            self._restore()
            if wanted is not None:
                self._write(wanted)
        elif self._written in names:
            values = self._trained(self._written)
            if not self._values.still(values):
                self._write(self._written)  # replaced, or changed by hand
            elif torch.is_grad_enabled() and any(t.requires_grad for t in values):
                self._rewrite()

    # -- forward -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._forward(x, *args, **kwargs)

    # What is in the base weight, and which graphs need it, is decided anew in every call, in Python: a compiler would
    # take its state for constants and compile again after every optimizer step.
    @torch.compiler.disable
    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._settle()
        names = [] if self.disable_adapters else self.active_adapters
        whole = [name for name in names if name in self.reltune_weight]
        biased = [name for name in names if name in self.reltune_bias]
        partial = [name for name in names if name in self.originals]
        self._check_loaded(partial)
        if whole or biased:
            weight = _combined(self._pristine_weight() if whole else self.weight, self.reltune_weight, whole)
            bias = self._base_bias()
            bias = None if bias is None else _combined(bias, self.reltune_bias, biased)
            y = self._base_forward(x, weight, bias)
        else:
            y = self.base_layer(x, *args, **kwargs)
        if not self.originals:
            return y
        in_product = None if whole else self._written  # the adapter whose values the product has used
        if in_product is not None and in_product not in partial:
            y = y - self._correction(x, in_product, self._written_values(in_product))
        for name in partial:
            if name == in_product:
                if torch.is_grad_enabled():
                    y = self._attach(y, x, name)
            else:
                y = y + self._correction(x, name, self._values_of(name))
        if torch.is_grad_enabled() and y.requires_grad:
            y = HoldWeight.apply(y, self._graphs)
        return y

    def _attach(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        columns, rows = self._values_of(name)
        row_idx = self._get(self.reltune_row_indices, name)
        if columns is not None and columns.requires_grad:
            y = AttachColumns.apply(y, x, columns, self.reltune_column_indices[name], row_idx)
            _in_training.add(self)
        if rows is not None and rows.requires_grad:
            y = AttachRows.apply(y, x, rows, row_idx)
            _in_training.add(self)
        return y

    def _written_values(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """The adapter's columns and rows as the product has used them; the parameters may have changed since."""
        kept, weight = self.originals[name], self.weight.detach()
        return (
            None if kept.column_idx is None else weight.index_select(1, kept.column_idx),
            None if kept.row_idx is None else weight.index_select(0, kept.row_idx),
        )

    def _correction(self, x: Tensor, name: str, values: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """x ΔWᵀ for the adapter's change of the weight, at the cost of its columns and rows."""
        kept, (columns, rows) = self.originals[name], values
        dtype = self.weight.dtype
        total: Tensor | None = None
        if columns is not None:
            delta = (columns - kept.columns).to(dtype)
            if kept.row_idx is not None:
                delta = delta.index_fill(0, kept.row_idx, 0)
            total = F.linear(x.index_select(-1, kept.column_idx), delta)
        if rows is not None:
            part = F.linear(x, (rows - kept.rows).to(dtype))
            if total is None:
                total = part.new_zeros(*part.shape[:-1], self.out_features)
            total = total.index_add(-1, kept.row_idx, part)
        assert total is not None
        return total

    @staticmethod
    def _get(entries: Any, name: str) -> Any:
        return entries[name] if name in entries else None  # noqa: SIM401 - a BufferDict has no get

    # -- merging -----------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the active adapters' values into the base layer; several add their changes."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self._all_available_adapter_names()]
        if not names:
            return
        self._refresh()
        self._check_loaded(names)
        if safe_merge:
            for name in names:
                for kind in self.adapter_layer_names:
                    trained = self._get(getattr(self, kind), name)
                    if trained is not None and not torch.isfinite(trained.to(self.weight.dtype)).all():
                        raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self._restore()
        with torch.no_grad():
            for name in names:
                alone = not self.merged_adapters
                for kind in ("weight", "bias"):
                    trained = self._get(getattr(self, f"reltune_{kind}"), name)
                    if trained is None:
                        continue
                    tensor: Tensor = getattr(self, kind)
                    if kind not in self._backup:
                        self._backup[kind] = (self._pristine_weight() if kind == "weight" else tensor).clone()
                    if alone:
                        tensor.copy_(trained)
                    else:
                        tensor.add_(trained.to(tensor.dtype) - self._backup[kind])
                if name in self.originals:
                    if alone:
                        _put(self.weight, self.originals[name], *self._values_of(name))
                    else:
                        self.weight.add_(self.get_delta_weight(name))
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo every merge: the base layer is bit for bit what it was."""
        with torch.no_grad():
            for name in self.merged_adapters:
                if name in self.originals:
                    kept = self.originals[name]
                    _put(self.weight, kept, kept.columns, kept.rows)
            for kind, tensor in self._backup.items():
                getattr(self, kind).copy_(tensor)
        self._backup.clear()
        self.merged_adapters = []
        self._settle()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's change of the weight, dense, in the weight's dtype."""
        self._refresh()
        self._check_loaded([adapter])
        pristine = self._pristine_weight()
        if adapter in self.reltune_weight:
            return self.reltune_weight[adapter].to(pristine.dtype) - pristine
        changed = pristine.clone()
        if adapter in self.originals:
            _put(changed, self.originals[adapter], *self._values_of(adapter))
        return changed - pristine

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # `reltune export --to lora` converts exactly, without a decomposition

    # -- housekeeping ------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.originals = {name: kept.apply(fn) for name, kept in self.originals.items()}
        self._backup = {kind: fn(tensor) for kind, tensor in self._backup.items()}
        if self.weight.device.type != "meta":
            self._rewrite()  # a wider dtype holds the trained values more exactly
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": LiveGraphs()}  # graphs belong to this process and to this copy

    def __repr__(self) -> str:
        return "reltune." + super().__repr__()


class ReltuneLinear(ReltuneLayer):
    """nn.Linear."""

    def _base_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class ReltuneNorm(ReltuneLayer):
    """LayerNorm and the RMSNorm family: the gain and the bias."""

    def _base_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return functional_call(self.get_base_layer(), tensors, (x,))


LAYER_CLASSES: dict[str, type[ReltuneLayer]] = {"linear": ReltuneLinear, "norm": ReltuneNorm}


def _put(weight: Tensor, kept: _Originals, columns: Tensor | None, rows: Tensor | None) -> None:
    """Write columns, then rows, into the weight: a cell in both belongs to the row."""
    if columns is not None:
        weight.index_copy_(1, kept.column_idx, columns.detach().to(weight.dtype))
    if rows is not None:
        weight.index_copy_(0, kept.row_idx, rows.detach().to(weight.dtype))


def _combined(base: Tensor, trained: nn.ParameterDict, names: list[str]) -> Tensor:
    """The tensor to use in place of the base's: the adapter's own, or the base plus every adapter's change."""
    if not names:
        return base
    if len(names) == 1:
        return trained[names[0]].to(base.dtype)
    return base + sum(trained[name].to(base.dtype) - base for name in names)


def _before_save(module: Any, *_: Any) -> None:
    module._rewrite()


def _before_load(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if f"{prefix}base_layer.weight" in state_dict and module.originals and not module.merged:
        module._beneath = module._pristine_weight().clone()


def _after_load(module: Any, _: Any) -> None:
    if module._beneath is not None:
        module._base_loaded(module._beneath)
        module._beneath = None
    module._settle()


def _write_back_after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in list(_in_training):
        name = layer._written
        if name is not None and any(
            name in kind and id(kind[name]) in stepped for kind in (layer.reltune_columns, layer.reltune_rows)
        ):
            layer.write_back()


register_optimizer_step_post_hook(_write_back_after_step)
