"""Trainable units inside a frozen module.

Columns, rows and single weights of a linear map are trained where they are: the base weight holds the current values, so
that the forward pass is the base layer's one product, and ops/attach.py and ops/attach_elements.py give them their gradient. Whole weights, gains and
biases are trained as tensors of their own that stand in for the base's, which is never touched.

Along fixed directions of a linear map's input the map is trained beside its product (ops/add_directions.py).

At most one adapter is *written* into the base weight at a time (written_weight.py). Whatever else is asked for
(disabled adapters, another adapter while a graph is alive, several adapters at once, a weight that is spread over
processes) is computed as a correction beside the product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from reltune.ops.add_directions import AddDirections
from reltune.ops.attach import HoldWeight, LiveGraphs
from reltune.ops.attach_elements import AttachElements, SparseProduct
from reltune.plan.plan import ModulePlan
from reltune.tuner.sharded import check_gathered, refuse_sharded
from reltune.tuner.written_weight import Originals, Values, WrittenWeight, in_training

BASE = "__base__"  # PEFT's name for no adapter in a mixed batch


class ReltuneLayer(WrittenWeight):
    """A frozen module with trainable units, for any number of adapters.

    Per adapter: ``reltune_columns`` and ``reltune_rows`` like the weight, with the trained ones along ``column_dim`` or
    ``row_dim`` (of a linear map (out, c) and (r, in)), ``reltune_weight`` like the weight, ``reltune_bias`` like the
    bias; ``reltune_column_indices`` (c,) and ``reltune_row_indices`` (r,) in int64. ``reltune_elements`` (n,) and
    ``reltune_element_indices`` (n,), flat indices into the weight as it is stored, ascending, in int32 where that counts
    the weight. ``reltune_directions`` (out, k), what the map adds along its input's directions, which are fixed:
    ``reltune_direction_vectors`` (k, in).
    """

    adapter_layer_names = (
        "reltune_columns",
        "reltune_rows",
        "reltune_elements",
        "reltune_directions",
        "reltune_weight",
        "reltune_bias",
    )
    other_param_names = (
        "reltune_column_indices",
        "reltune_row_indices",
        "reltune_element_indices",
        "reltune_direction_vectors",
        "originals",
    )
    reltune_directions: nn.ParameterDict
    reltune_weight: nn.ParameterDict
    reltune_bias: nn.ParameterDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._without_vectors: set[str] = set()  # adapters whose directions have yet to be loaded
        self.reltune_column_indices = BufferDict(persistent=True)
        self.reltune_row_indices = BufferDict(persistent=True)
        self.reltune_element_indices = BufferDict(persistent=True)
        self.reltune_direction_vectors = BufferDict(persistent=True)
        shape = self._shape()
        self.in_features, self.out_features = shape[min(self.column_dim, len(shape) - 1)], shape[self.row_dim]

    # -- what a subclass knows of its base layer -------------------------------------------------------------------

    def _shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def _canonical(self, stored: Tensor) -> Tensor:
        """What is stored as the weight, or columns or rows of it, with rows first and columns second: a view."""
        return stored.mT if self._stored_transposed else stored

    def _base_bias(self) -> Tensor | None:
        return getattr(self.get_base_layer(), "bias", None)  # the RMSNorm classes have none, not even as None

    def _base_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The base layer's output with other tensors in place of its own."""
        with in_place(self.get_base_layer(), {"weight": weight, "bias": bias}):
            return self.get_base_layer()(x)

    def attach_columns(self, y: Tensor, x: Tensor, columns: Tensor, idx: Tensor, row_idx: Tensor | None) -> Tensor:
        """Hand y on unchanged, and give the columns their gradient in the backward pass (ops/attach.py)."""
        raise NotImplementedError

    def attach_rows(self, y: Tensor, x: Tensor, rows: Tensor, idx: Tensor) -> Tensor:
        """Hand y on unchanged, and give the rows their gradient in the backward pass (ops/attach.py)."""
        raise NotImplementedError

    def change_of_output(self, x: Tensor, kept: Originals, columns: Tensor | None, rows: Tensor | None) -> Tensor:
        """What a change of some columns and rows of the weight adds to the output.

        ``columns`` and ``rows`` are the changes of ``kept``'s columns and rows, in the weight's dtype; columns are zero
        where rows cross them. Costs a product of these columns and rows alone.
        """
        raise NotImplementedError

    @property
    def _stored_transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return self.column_dim < self.row_dim

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
        self._units[adapter_name] = dataclasses.replace(
            units, columns=[], rows=[], elements=[], directions=[], vectors=None
        )
        with torch.no_grad():
            pristine = self._pristine_weight()
            for unit, indices, select in (
                ("column", units.columns, self._columns_of),
                ("row", units.rows, self._rows_of),
            ):
                if indices:
                    idx = torch.tensor(indices, dtype=torch.int64, device=pristine.device)
                    getattr(self, f"reltune_{unit}_indices")[adapter_name] = idx
                    self._parameter(f"reltune_{unit}s", adapter_name, select(pristine, idx), init_weights)
            if units.elements:
                idx = units.index("elements")
                if self._stored_transposed:
                    out_features, in_features = units.shape
                    idx = (idx % in_features * out_features + idx // in_features).sort().values
                idx = idx.to(pristine.device)
                self.reltune_element_indices[adapter_name] = idx
                self._parameter("reltune_elements", adapter_name, self._elements_of(pristine, idx), init_weights)
            if units.directions:
                self._add_directions(adapter_name, units, init_weights)
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

    def _parameter(self, attribute: str, adapter_name: str, value: Tensor, init_weights: bool) -> None:
        value = value.detach().clone()
        if not init_weights:
            value = value + 0.1 * torch.randn_like(value)
        getattr(self, attribute)[adapter_name] = nn.Parameter(value)

    def _add_directions(self, adapter_name: str, units: ModulePlan, init_weights: bool) -> None:
        """The vectors, which are not numbers until an adapter's file is loaded where the plan is not there to give them."""
        weight = self.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32  # not what holds a weight in few bits
        chosen = units.chosen_vectors()
        shape = len(units.directions), self.in_features
        vectors = torch.full(shape, torch.nan) if chosen is None else torch.from_numpy(chosen)
        vectors = vectors.to(weight.device, torch.promote_types(dtype, torch.float32))
        self.reltune_direction_vectors[adapter_name] = vectors
        start = vectors.new_zeros(self.out_features, len(vectors), dtype=dtype)
        self._parameter("reltune_directions", adapter_name, start, init_weights)
        if chosen is None:
            self._without_vectors.add(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        modules = self._modules
        # As PEFT does it, without its lookups: a model has hundreds of layers.
        for attribute in self.adapter_layer_names:
            for name, parameter in modules[attribute]._parameters.items():  # type: ignore[union-attr]
                trained = name in names and not inference_mode
                if parameter is not None and parameter.requires_grad != trained:
                    parameter.requires_grad_(trained)
        self._active_adapter = names
        self._settle()

    def delete_adapter(self, adapter_name: str) -> None:
        if self._written == adapter_name:
            self._restore()
        super().delete_adapter(adapter_name)
        self._awaited.discard(adapter_name)
        self._without_vectors.discard(adapter_name)
        self._units.pop(adapter_name, None)
        self._settle()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        entries = [getattr(self, name) for name in self.adapter_layer_names]
        entries = [parameters for parameters in entries if adapter_name in parameters]
        trained = [parameters[adapter_name].requires_grad for parameters in entries]
        vectors = self._get("reltune_direction_vectors", adapter_name)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if vectors is not None:  # PEFT gives them the base's type, which may be a narrow one
            moved = self._get("reltune_direction_vectors", adapter_name)
            self.reltune_direction_vectors[adapter_name] = vectors.to(moved.device)
        for parameters, requires_grad in zip(entries, trained, strict=True):
            # a tensor that was really moved comes back trainable
            parameters[adapter_name].requires_grad_(requires_grad)
        self._settle()

    def train(self, mode: bool = True) -> ReltuneLayer:
        if mode != self.training:  # Trainer sets the mode it is in already before every step
            self._rewrite()
        super().train(mode)
        return self

    # -- forward -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None and not self.disable_adapters:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        # What is in the base weight, and which graphs need it, is decided anew in every call, in Python: a compiler would
        # take its state for constants and compile again after every optimizer step.
        if torch.compiler.is_compiling():
            return self._forward_uncompiled(x, *args, **kwargs)
        return self._forward(x, *args, **kwargs)

    @torch.compiler.disable
    def _forward_uncompiled(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_gathered(self.get_base_layer())
        self._settle()
        return self._output(x, [] if self.disable_adapters else self.active_adapters, *args, **kwargs)

    @torch.compiler.disable
    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each sample with the adapter that it names, or the base: the product is taken per adapter."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        check_gathered(self.get_base_layer())
        self._settle(base_only=True)
        asking = {
            name: torch.tensor([i for i, own in enumerate(adapter_names) if own == name], device=x.device)
            for name in dict.fromkeys(adapter_names)
        }
        parts = [
            self._output(x[samples], [] if name == BASE else [name], *args, **kwargs)
            for name, samples in asking.items()
        ]
        return torch.cat(parts)[torch.cat(list(asking.values())).argsort()]

    def _output(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The output with the changes of these adapters, whatever is written into the base weight."""
        y = self._product(x, names, *args, **kwargs)
        for name in names:
            change = self._get("reltune_directions", name)
            if change is not None:
                self._check_vectors(name)
                y = AddDirections.apply(y, x, self._get("reltune_direction_vectors", name), change)
        return y

    def _check_vectors(self, name: str) -> None:
        """Raise InputError where the adapter's directions should have come with a file, and have not."""
        if name in self._without_vectors:
            if torch.isnan(self.reltune_direction_vectors[name]).any():
                self._refuse_unloaded(name)
            self._without_vectors.discard(name)

    def _product(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base's product with what the adapters change in weight and bias, directions left out."""
        whole = [name for name in names if name in self.reltune_weight]
        biased = [name for name in names if name in self.reltune_bias]
        partial = [name for name in names if name in self.originals]
        self._check_loaded(partial)
        # The values of an adapter that is not asked for are in the weight, where a graph needs them. A copy without them
        # gives the base's output to the bit; it is not worth keeping for a backward pass.
        copied = self._written not in (None, *partial) and not (torch.is_grad_enabled() and x.requires_grad)
        if whole or biased or copied:
            weight = combined(self._pristine_weight() if whole or copied else self.weight, self.reltune_weight, whole)
            bias = self._base_bias()
            bias = None if bias is None else combined(bias, self.reltune_bias, biased)
            y = self._base_forward(x, weight, bias)
        else:
            y = self._base_product(x, *args, **kwargs)
        if not self.originals:
            return y
        in_product = None if whole or copied else self._written  # the adapter whose values the product has used
        sharded = self.sharded
        attached = None if sharded else in_product  # backward passes use the weight as it is gathered then
        if in_product is not None and (attached is None or in_product not in partial):
            y = y - self._correction(x, in_product, self._written_values(in_product))
        for name in partial:
            if name == attached:
                if torch.is_grad_enabled():
                    y = self._attach(y, x, name)
            else:
                y = y + self._correction(x, name, self._values_of(name))
        never_written = sharded and self._written is None
        if torch.is_grad_enabled() and y.requires_grad and not never_written:
            if sharded:  # until a step, when the weight is no longer gathered
                in_training.add(self)
            y = HoldWeight.apply(y, self._graphs)
        return y

    def _base_product(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output, from the weight as it is."""
        return self.base_layer(x, *args, **kwargs)

    def _attach(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        columns, rows, elements = self._values_of(name)
        kept = self.originals[name]
        if columns is not None and columns.requires_grad:
            y = self.attach_columns(y, x, columns, kept.column_idx, kept.row_idx)
            in_training.add(self)
        if rows is not None and rows.requires_grad:
            y = self.attach_rows(y, x, rows, kept.row_idx)
            in_training.add(self)
        if elements is not None and elements.requires_grad:
            y = AttachElements.apply(y, x, elements, kept.places, self._stored_transposed)
            in_training.add(self)
        return y

    def _change_dtype(self, x: Tensor) -> torch.dtype:
        """The type in which a correction is computed."""
        return self.weight.dtype

    def _correction(self, x: Tensor, name: str, values: Values) -> Tensor:
        """What the adapter's change of the weight adds to the output, with these as its values."""
        kept, dtype = self.originals[name], self._change_dtype(x)
        columns, rows, elements = (
            None if own is None or base is None else (own - base).to(dtype)
            for own, base in zip(values, self._base_values(name), strict=True)
        )
        total: Tensor | None = None
        if columns is not None or rows is not None:
            columns = None if columns is None else self._outside_rows(columns, kept)
            total = self.change_of_output(x, kept, columns, rows)
        if elements is not None:
            part = SparseProduct.apply(x, elements, kept.places, self._stored_transposed)
            total = part if total is None else total + part
        assert total is not None
        return total

    # -- merging -----------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the active adapters' values into the base layer; several add their changes."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self._all_available_adapter_names()]
        if not names:
            return
        if self.sharded:
            refuse_sharded("an adapter cannot be merged into", "save it and merge in one process")
        self._refresh()
        self._check_loaded(names)
        if safe_merge:
            for name in names:
                for attribute in self.adapter_layer_names:
                    trained = self._get(attribute, name)
                    if trained is not None and not torch.isfinite(trained.to(self.weight.dtype)).all():
                        raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self._restore()
        with torch.no_grad():
            for name in names:
                alone = not self.merged_adapters
                if name in self.reltune_directions and "weight" not in self._backup:
                    self._backup["weight"] = self._pristine_weight().clone()  # nothing less would undo it to the bit
                for part in ("weight", "bias"):
                    trained = self._get(f"reltune_{part}", name)
                    if trained is None:
                        continue
                    tensor: Tensor = getattr(self, part)
                    if part not in self._backup:
                        self._backup[part] = (self._pristine_weight() if part == "weight" else tensor).clone()
                    if alone:
                        tensor.copy_(trained)
                    else:
                        tensor.add_(trained.to(tensor.dtype) - self._backup[part])
                if name in self.originals:
                    if alone:
                        self._put(self.weight, self.originals[name], *self._values_of(name))
                    else:
                        self.weight.add_(self._change_in_place(name))
                if name in self.reltune_directions:
                    self.weight.add_(self._change_along_directions(name).to(self.weight.dtype))
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo every merge: the base layer is bit for bit what it was."""
        if self.merged and self.sharded:
            refuse_sharded("an adapter cannot be unmerged from", "unmerge before the model is sharded")
        with torch.no_grad():
            for name in self.merged_adapters:
                if name in self.originals:
                    kept = self.originals[name]
                    self._put(self.weight, kept, *kept.values)
            for part, tensor in self._backup.items():
                getattr(self, part).copy_(tensor)
        self._backup.clear()
        self.merged_adapters = []
        self._settle()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The adapter's change of the weight, dense, in the weight's dtype."""
        if self.sharded:
            refuse_sharded("no change can be made dense of", "save the adapter and load it in one process")
        self._refresh()
        self._check_loaded([adapter])
        change = self._change_in_place(adapter)
        if adapter in self.reltune_directions:
            change = change + self._change_along_directions(adapter).to(change.dtype)
        return change

    def _change_along_directions(self, adapter: str) -> Tensor:
        """B A in the weight's own layout, in the directions' type."""
        self._check_vectors(adapter)
        vectors, own = self.reltune_direction_vectors[adapter], self.reltune_directions[adapter].detach()
        return self._canonical(own.to(vectors.dtype) @ vectors)

    def _change_in_place(self, adapter: str) -> Tensor:
        """What the adapter's columns, rows, elements or whole weight change, dense, in the weight's own layout and dtype."""
        pristine = self._pristine_weight()
        if adapter in self.reltune_weight:
            return self.reltune_weight[adapter].to(pristine.dtype) - pristine
        changed = pristine.clone()
        if adapter in self.originals:
            self._put(changed, self.originals[adapter], *self._values_of(adapter))
        return changed - pristine

    # -- as a LoRA adapter -----------------------------------------------------------------------------------------

    def why_no_lora(self, adapter_name: str) -> str:
        """Why the adapter's change of this module cannot be a LoRA adapter, and what to do instead; or empty."""
        if adapter_name in self.reltune_elements:
            return (
                "trains single weights, whose change has no low rank that a LoRA adapter could carry; use --to merged, or run "
                "again with --granularity direction, which is made for LoRA files"
            )
        if adapter_name in self.reltune_weight or adapter_name in self.reltune_bias:
            return "trains a whole weight, a bias or a norm, which a LoRA adapter cannot carry; use --to merged"
        return ""

    def lora_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """lora_A (r, in) and lora_B (out, r) with lora_B lora_A the adapter's change of the map; r = columns + rows + directions.

        A change of columns idx is (D − W[:, idx]) Eᵀ with E one-hot, which is lora_B = D − W[:, idx] and lora_A = Eᵀ;
        of rows it is the other way round. Directions are lora_A as they are, and what was trained along them is lora_B. Of a
        convolution, whose columns have a kernel of k = h · w · … places, (r, in, h, w, …) and (out, r, 1, 1, …) with r = columns · k + rows.
        """
        a, b = [], []
        if adapter_name in self.reltune_directions:
            self._check_vectors(adapter_name)
            a.append(self.reltune_direction_vectors[adapter_name])
            b.append(self.reltune_directions[adapter_name].detach().to(a[0].dtype))
        kept = self.originals.get(adapter_name)
        if kept is None:
            return a[0], b[0]
        out_features, in_features = (self._shape()[dim] for dim in (self.row_dim, self.column_dim))
        if kept.columns is not None and kept.column_idx is not None:
            # a cell in both belongs to the row
            change = self._outside_rows((self.reltune_columns[adapter_name] - kept.columns).detach(), kept)
            change = self._canonical(change)
            kernel = change.shape[2:]
            one_hot = _one_hot(kept.column_idx, in_features, change)
            if kernel:
                places = torch.eye(kernel.numel()).to(change).unflatten(1, kernel)
                one_hot = torch.einsum("ci,k...->cki...", one_hot, places).flatten(0, 1)
            a.append(one_hot)
            b.append(change.flatten(1))
        if kept.rows is not None and kept.row_idx is not None:
            change = self._canonical((self.reltune_rows[adapter_name] - kept.rows).detach())
            a.append(change)
            b.append(_one_hot(kept.row_idx, out_features, change).mT)
        lora_a, lora_b = torch.cat(a, 0), torch.cat(b, 1)
        return lora_a, lora_b.reshape(*lora_b.shape, *(1 for _ in lora_a.shape[2:]))

    def lora_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """The factors under the names that PEFT's file has for them, behind the module's name."""
        lora_a, lora_b = self.lora_factors(adapter_name)
        return {"lora_A.weight": lora_a, "lora_B.weight": lora_b}

    @property
    def fan_in_fan_out(self) -> bool:
        """LoraConfig's word for a weight that is stored as (in, out)."""
        return self._stored_transposed

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # `reltune export --to lora` converts exactly, without a decomposition

    # -- housekeeping ------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self.originals = {name: kept.apply(fn) for name, kept in self.originals.items()}
        self._backup = {part: fn(tensor) for part, tensor in self._backup.items()}
        if self.weight.device.type != "meta":
            self._rewrite()  # a wider dtype holds the trained values more exactly
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": LiveGraphs()}  # graphs belong to this process and to this copy

    def __repr__(self) -> str:
        return "reltune." + super().__repr__()


def _one_hot(idx: Tensor, size: int, like: Tensor) -> Tensor:
    return like.new_zeros(len(idx), size).scatter_(1, idx[:, None], 1)


@contextmanager
def in_place(module: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Let the module find these tensors, or functions, as its own attributes; those that are None as they are.

    ``torch.func.functional_call`` exchanges registered parameters, past which FSDP puts plain attributes.
    """
    attributes, new = module.__dict__, {name: own for name, own in given.items() if own is not None}
    before = {name: attributes[name] for name in new if name in attributes}
    attributes.update(new)
    try:
        yield
    finally:
        for name in new:
            del attributes[name]
        attributes.update(before)


def combined(base: Tensor, trained: nn.ParameterDict, names: list[str]) -> Tensor:
    """The tensor to use in place of the base's: the adapter's own, or the base plus every adapter's change."""
    if not names:
        return base
    if len(names) == 1:
        return trained[names[0]].to(base.dtype)
    return base + sum(trained[name].to(base.dtype) - base for name in names)
