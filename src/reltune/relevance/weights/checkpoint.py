"""The parameters of a checkpoint on disk, read one at a time as loading would give them; the model is never in memory.

The names and conversions that loading applies (base-model prefixes, renamed and fused parameters) are those of transformers
itself, asked for every tensor that the files' headers list. What would not load is refused by name.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging

from reltune.errors import InputError, first_line
from reltune.layers.inventory import new_head_modules
from reltune.ops.row_blocks import row_blocks
from reltune.pretrained import load_config
from reltune.reading import inside, read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a file, from the file's header."""

    file: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: no floating-point numbers

    def read(self) -> Tensor:
        # A map of its own, which goes with the tensor: of a map that stayed, all pages ever read would count as memory, and
        # tensors read into the heap leave holes that later ones do not fit into.
        with safe_open(self.file, "pt") as file:
            return file.get_tensor(self.key)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: one stored tensor, or several that are converted."""

    tensors: tuple[tuple[str, Stored], ...]  # with the conversion's pattern that each matches
    converter: WeightConverter | None = None
    first: str = ""  # the conversion's first parameter


class Checkpoint:
    """A checkpoint, opened.

    ``model`` has every parameter on the meta device, with the dtype and the ties that it has when it is loaded. ``missing`` are
    the parameters that the checkpoint lacks, and ``heads`` the modules that hold them.
    """

    def __init__(self, path: str | os.PathLike, model_class: Any = None) -> None:
        self.name = os.fspath(path)
        config = load_config(self.name)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"{self.name} is quantised, and streaming reads plain weights; load it and analyze the model."
            )
        stored = _stored(self.name)
        dtype = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
        self.dtype: torch.dtype = dtype or next((t.dtype for t in stored.values() if t.dtype), torch.float32)
        self.model = _empty_model(model_class or _architecture(config, self.name), config, self.dtype, self.name)
        plan = self.model._get_dtype_plan(self.dtype)
        self.in_float32 = build_glob_alternation(list(plan))[0] if plan else None  # a pattern of names
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.origins = self._origins(stored)
        self._untie()
        self._converted: dict[str, Tensor] = {}

        # Parameters that are stored under none of their names.
        self.missing = sorted(n for n, p in self.model.named_parameters() if not self._name_in_files(n, p))
        base = {name for name in self.parameters if name.startswith(f"{self.model.base_model_prefix}.")}
        if not self.origins or (base and base <= set(self.missing)):
            raise InputError(
                f"{self.name} holds no weights of a {type(self.model).__name__}; name another model_class."
            )
        lost = [name for name in self.missing if any(part.isdigit() for part in name.split("."))]
        if lost:
            others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            warnings.warn(
                f"{self.name} lacks {lost[0]}{others}, which belong to no new head: loading would draw them at random. Their "
                "modules are treated as always trained and not scored.",
                RuntimeWarning,
                stacklevel=3,
            )
        self.heads = new_head_modules(self.model, self.missing)

    def read(self, name: str) -> Tensor:
        """The parameter as loading would give it. Nothing of it is kept here, once all parameters of a conversion are read."""
        stored_name = self._name_in_files(name, self.parameters[name])
        origin = self.origins[stored_name]
        if origin.converter is None:
            return self._cast(stored_name, origin.tensors[0][1].read())
        if stored_name not in self._converted:
            self._converted |= _convert(origin, self.model, lambda tensor: self._cast(origin.first, tensor.read()))
        return self._converted.pop(stored_name)

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        stays = self.in_float32 is not None and self.in_float32.search(name)
        return tensor.to(torch.float32 if stays else self.parameters[name].dtype)

    def _name_in_files(self, name: str, parameter: nn.Parameter) -> str:
        """The name under which the parameter, or one tied to it, is stored; empty where it is not."""
        if name in self.origins:
            return name
        return next((other for other, p in self.parameters.items() if p is parameter and other in self.origins), "")

    def _origins(self, stored: dict[str, Stored]) -> dict[str, Origin]:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        origins: dict[str, Origin] = {}
        converted: dict[str, list[tuple[str, Stored]]] = {}
        for key in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name not in self.parameters:
                continue  # it belongs to a head that this model does not have, or is a buffer
            if stored[key].dtype is None:
                raise InputError(
                    f"{self.name}: {key} holds no plain floating-point numbers; load and analyze the model."
                )
            if pattern is not None:
                converted.setdefault(name, []).append((pattern, stored[key]))
            else:
                self._check(name, stored[key].shape)
                origins[name] = Origin((("", stored[key]),))
        for first, tensors in converted.items():
            origin = Origin(tuple(tensors), by_pattern[tensors[0][0]], first)
            try:
                parameters = _convert(origin, self.model, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))
            except Exception as error:  # whatever the operations of a conversion raise
                raise InputError(
                    f"{self.name}: {first} cannot be made of {tensors[0][1].key} and its like ({first_line(error)}); load the "
                    "model and analyze that."
                ) from error
            for name, value in parameters.items():
                if name in self.parameters:
                    self._check(name, tuple(value.shape))
                    origins[name] = origin
        return origins

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        wanted = tuple(self.parameters[name].shape)
        if shape != wanted:
            raise InputError(
                f"The weights of {self.name} do not fit its config.json: {name} has shape {shape} and should have {wanted}. "
                "Use the config.json that was saved with these weights."
            )

    def _untie(self) -> None:
        """Give parameters that the config ties, but of which the files hold different values, a tensor each, as loading
        does."""
        for target, source in list(getattr(self.model, "all_tied_weights_keys", {}).items()):
            both = target in self.origins and source in self.origins
            if both and self.origins[target] != self.origins[source] and not self._equal(target, source):
                module, _, key = target.rpartition(".")
                own = self.parameters[target]
                setattr(self.model.get_submodule(module), key, nn.Parameter(torch.empty_like(own)))
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))

    def _equal(self, first: str, second: str) -> bool:
        a, b = self.origins[first].tensors[0][1], self.origins[second].tensors[0][1]
        return a.shape == b.shape and all(
            torch.equal(x, b_part.to(x.dtype)) for x, b_part in zip(_parts(a), _parts(b), strict=True)
        )


def _parts(stored: Stored) -> Iterator[Tensor]:
    """The tensor's rows, a few at a time."""
    with safe_open(stored.file, "pt") as file:
        rows = file.get_slice(stored.key)
        empty = torch.empty(stored.shape, device="meta")
        for at, _ in row_blocks(empty.flatten(1), torch.float32):
            yield rows[at]


def _convert(origin: Origin, model: PreTrainedModel, read: Any) -> dict[str, Tensor]:
    """Parameters by name, made of the stored tensors as loading makes them."""
    converter = copy.deepcopy(origin.converter)
    assert converter is not None
    for pattern, tensor in origin.tensors:
        converter.add_tensor(origin.first, tensor.key, pattern, partial(read, tensor))  # type: ignore[arg-type]
    parameters = converter.convert(origin.first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in parameters.items()}


def _architecture(config: PreTrainedConfig, name: str) -> Any:
    names = config.architectures or []
    if not names:
        return AutoModel
    model_class = getattr(transformers, names[0], None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise InputError(f"{name} is of class {names[0]}, which transformers does not have; name a model_class.")
    return model_class


def _empty_model(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype, name: str) -> PreTrainedModel:
    make = model_class.from_config if hasattr(model_class, "_model_mapping") else model_class._from_config
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = make(copy.deepcopy(config), dtype=dtype)
    except Exception as error:  # a config that does not fit the class fails in its own way
        raise InputError(f"{name} cannot be made into {model_class.__name__} ({first_line(error)}).") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.tie_weights()
    return model


def _stored(name: str) -> dict[str, Stored]:
    """Every tensor of the checkpoint, from its files' headers."""
    index = _find(name, SAFE_WEIGHTS_INDEX_NAME)
    wanted: dict[str, set[str] | None] = {SAFE_WEIGHTS_NAME: None}
    if _find(name, SAFE_WEIGHTS_NAME) is None and index is not None:
        try:
            by_file: dict[str, set[str]] = {}
            for key, place in read_json(index)["weight_map"].items():
                inside(Path(index).parent, place)
                by_file.setdefault(place, set()).add(key)
            wanted = {file: by_file[file] for file in sorted(by_file)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} cannot be read ({error}); copy or download the model again.") from error
    stored: dict[str, Stored] = {}
    for file, keys in wanted.items():
        path = _find(name, file)
        if path is None:
            raise InputError(
                f"{name} has no {file}; streaming reads safetensors files, which save_pretrained writes, and needs all of them."
            )
        try:
            with safe_open(path, "pt") as opened:
                held = set(opened.keys())
                if keys is not None and (absent := sorted(keys - held)):
                    raise InputError(f"{path} lacks {absent[0]}, which the index says it has; copy the model again.")
                for key in sorted(held):
                    part = opened.get_slice(key)
                    stored[key] = Stored(path, key, tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} cannot be read ({first_line(error)}); copy or download the model again."
            ) from error
    return stored


def _find(name: str, file: str) -> str | None:
    try:
        return cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None
