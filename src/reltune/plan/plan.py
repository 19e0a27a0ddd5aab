"""The plan: the units chosen under a budget. A readable file that may be edited by hand and is checked on load.

It can be read without torch, for those who only look at it.
"""

from __future__ import annotations

import dataclasses
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from reltune import markup
from reltune.errors import InputError, nearest
from reltune.files import whole_file, write_text
from reltune.names import SPREADS
from reltune.reading import Damaged, inside, read_yaml
from reltune.tensor_files import load_arrays

if TYPE_CHECKING:
    import torch

    from reltune.layers.fingerprint import Base
    from reltune.layers.inventory import Inventory
    from reltune.layers.units import ModuleInfo

FORMAT = "reltune-plan-1"
# The words for what can be trained of a module (``trains`` in layers/protocol.py).
WORDS = {
    "column": "columns",
    "row": "rows",
    "element": "single weights",
    "direction": "input directions",
    "weight": "the whole weight",
    "bias": "the bias",
}
DIMENSIONS, LARGEST = 8, 2**63 - 1  # of a weight, and the numbers in it
INLINE_INDICES = 20_000  # more indices than this in all go to a file beside the plan
INDEX_FILE = "indices.safetensors"
INDEX_FIELDS = ("columns", "rows", "elements", "directions")
SHOWN = 10  # modules in a notebook
VECTOR_FILE = "directions.safetensors"  # the vectors that directions are counted in
HEADER = """\
# What reltune will train. May be edited: add or remove modules, columns, rows, or set weight/bias to true or false.
# columns are input features and rows output features of a linear map, counted from 0; input channels and filters of a
# convolution; features and tokens of an embedding. elements are single weights of a linear map: the one in row i and
# column j of shape [out, in] has the number i * in + j. directions are fixed directions of a linear map's input, along which it is
# trained: rows of its matrix in directions.safetensors, the strongest first. Checked when it is read.
"""


@dataclasses.dataclass
class ModulePlan:
    """What is trained of one module.

    ``shape`` is (out, in) of a linear map, (out, in / groups, height, width) of a convolution, (tokens, features) of an
    embedding or (features,) of a norm (layers/units.py). ``weight`` trains the whole matrix or gain and excludes
    ``columns``, ``rows`` and ``elements``. A cell in both a chosen row and a chosen column belongs to the row.
    ``elements`` are single weights of a linear map, as flat indices into ``shape`` (row · in + column), in none of the
    chosen columns and rows; held in ascending order in an ``array``, since there may be millions.
    ``directions`` of a linear map's input are rows of ``vectors`` (k, in), in float32, which is None where they are not known. They are
    fixed: trained is how the output follows the input along each, ``out`` numbers.
    """

    shape: tuple[int, ...]
    columns: list[int] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    weight: bool = False
    bias: bool = False
    groups: int = 1  # of a convolution
    elements: Sequence[int] = dataclasses.field(default_factory=list)
    directions: list[int] = dataclasses.field(default_factory=list)
    vectors: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._pack()

    def _pack(self) -> None:
        if isinstance(self.elements, list) and all(type(i) is int for i in self.elements):
            self.elements = _compact(sorted(self.elements))

    @property
    def column_count(self) -> int:
        """How many columns there are to choose from."""
        return self.shape[1] * self.groups if len(self.shape) > 1 else 0

    @property
    def parameters(self) -> int:
        """Trainable numbers; a cell in both a row and a column is held twice and counted twice."""
        size = math.prod(self.shape)
        column = size // self.column_count if self.column_count else 0
        parts = len(self.columns) * column + len(self.rows) * (size // self.shape[0]) + len(self.elements)
        parts += len(self.directions) * self.shape[0]
        return (size if self.weight else parts) + (self.shape[0] if self.bias else 0)

    @property
    def indices(self) -> int:
        return sum(len(getattr(self, field)) for field in INDEX_FIELDS)

    @property
    def fixed(self) -> int:
        """Numbers that the adapter's file holds and that are not trained: those of the directions."""
        return len(self.directions) * self.shape[-1]

    @property
    def index_bytes(self) -> int:
        """On disk, of what says where the trained numbers are: int64 for columns and rows, for elements the narrower type that fits,
        float32 vectors for directions."""
        elements = index_dtype(self.shape).itemsize * len(self.elements)
        return 8 * (len(self.columns) + len(self.rows)) + elements + 4 * self.fixed

    def check_layer_type(self, info: ModuleInfo) -> None:
        """Raise InputError, naming the module, for what cannot be trained of its layer type."""
        from reltune.layers.registry import layer_type

        can = layer_type(info.layer_type).trains
        if not can:
            raise InputError(
                f"plan: {info.name} cannot be trained by this plan: it is of layer type {info.layer_type}, which is "
                "measured only."
            )
        chosen = (self.columns, self.rows, self.elements, self.directions, self.weight, self.bias)
        cannot = [part for part, units in zip(WORDS, chosen, strict=True) if units and part not in can]
        if cannot:
            instead = ", ".join(word for part, word in WORDS.items() if part in can)
            raise InputError(
                f"plan: {WORDS[cannot[0]]} of {info.name} cannot be trained; choose from what can be trained of layer type "
                f"{info.layer_type}: {instead}."
            )

    def take_elements(self, index: torch.Tensor) -> None:
        """Make ``index`` (flat, ascending) the chosen elements."""
        self.elements = _compact(index.numpy())

    def index(self, field: str) -> torch.Tensor:
        """``columns``, ``rows``, ``elements`` or ``directions`` as a tensor, in the type that it has in files."""
        import torch

        return torch.from_numpy(self.index_array(field))

    def index_array(self, field: str) -> np.ndarray:
        """The same as an array."""
        return np.array(getattr(self, field), dtype=index_dtype(self.shape) if field == "elements" else np.int64)

    def chosen_vectors(self) -> np.ndarray | None:
        """The vectors of the chosen directions (directions, in); None where they are not known."""
        return None if self.vectors is None else self.vectors[self.directions]

    def check(self, name: str) -> None:
        """Raise InputError, naming the module, if what is trained of it contradicts itself."""
        sizes = 0 < len(self.shape) <= DIMENSIONS and all(
            type(size) is int and 0 < size <= LARGEST for size in self.shape
        )
        if not sizes or math.prod(self.shape) > LARGEST:
            raise InputError(
                f"plan: shape of {name} must be a list of sizes: [out, in] of a linear map, [out, in / groups, height, width] "
                "of a 2-D convolution, [tokens, features] of an embedding or [features] of a norm."
            )
        if type(self.groups) is not int or self.groups < 1 or self.shape[0] % self.groups:
            raise InputError(f"plan: groups of {name} must be a divisor of its {self.shape[0]} filters.")
        if self.groups > 1 and len(self.shape) < 3:
            raise InputError(
                f"plan: groups of {name} has no meaning, because only convolutions have groups; remove it."
            )
        parts = any(getattr(self, field) for field in INDEX_FIELDS)
        kinds = "columns or rows or elements" if not self.directions else "directions"
        if self.weight and parts:
            raise InputError(f"plan: {name} trains the whole weight and {kinds} of it; keep one of them.")
        if len(self.shape) == 1 and parts:
            raise InputError(f"plan: {name} is a norm and has no {kinds}; set weight: true instead.")
        if self.directions and (len(self.shape) != 2 or self.groups > 1):
            raise InputError(
                f"plan: {name} is a convolution, which has no directions to train along; choose columns or rows."
            )
        held, vectors = self.shape[-1], self.vectors
        if self.directions and vectors is not None:
            fit = vectors.dtype == np.float32 and vectors.ndim == 2 and vectors.shape[1] == held
            if not fit or not np.isfinite(vectors).all():
                raise InputError(
                    f"plan: the directions of {name} are no float32 vectors of {held} finite numbers; select again."
                )
            held = len(vectors)
        for field, size in (("columns", self.column_count), ("rows", self.shape[0]), ("directions", held)):
            values = getattr(self, field)
            if not isinstance(values, list) or any(type(i) is not int for i in values):
                raise InputError(f"plan: {field} of {name} must be a list of whole numbers.")
            wrong = [i for i in values if not 0 <= i < size]
            if wrong:
                kept = " in its file" if field == "directions" else ""
                raise InputError(f"plan: {name} has {size} {field}{kept}, counted from 0; {wrong[0]} is none of them.")
            if len(set(values)) < len(values):
                twice = Counter(values).most_common(1)[0][0]
                raise InputError(f"plan: {field} of {name} name {twice} twice; name it once.")
        self._check_elements(name)
        for field in ("weight", "bias"):
            if type(getattr(self, field)) is not bool:
                raise InputError(f"plan: {field} of {name} must be true or false.")
        if not self.parameters:
            raise InputError(f"plan: {name} trains nothing; remove it or choose something of it.")

    def _check_elements(self, name: str) -> None:
        self._pack()
        if not isinstance(self.elements, array):
            raise InputError(f"plan: elements of {name} must be a list of whole numbers.")
        if not self.elements:
            return
        if len(self.shape) != 2:
            raise InputError(
                f"plan: {name} is a convolution, whose single weights cannot be trained; choose columns or rows."
            )
        elements, in_features = np.sort(np.asarray(self.elements)), np.int64(self.shape[-1])  # which int32 may not hold
        size = math.prod(self.shape)
        if elements[0] < 0 or elements[-1] >= size:
            wrong = elements[0] if elements[0] < 0 else elements[-1]
            raise InputError(f"plan: {name} has {size} elements, counted from 0; {wrong} is none of them.")
        twice = elements[1:][np.diff(elements) == 0]
        if len(twice):
            raise InputError(f"plan: elements of {name} name {twice[0]} twice; name it once.")
        for field, places in (("columns", elements % in_features), ("rows", elements // in_features)):
            inside = elements[np.isin(places, getattr(self, field))]
            if len(inside):
                raise InputError(
                    f"plan: element {inside[0]} of {name} lies in one of its chosen {field} and would be trained twice; "
                    "leave it out."
                )


@dataclasses.dataclass
class Plan:
    """The units to train, by module name, with the budget they keep and the base model they belong to.

    ``budget`` is what the user asked for, ``budget_parameters`` the same as a count. ``always_trained`` names the
    modules of new heads, counted apart. ``task_type`` is PEFT's. ``architecture`` and ``weights`` are the class of the base model
    and the ``digest`` of its numbers (layers/fingerprint.py); plans of older versions have neither.
    """

    modules: dict[str, ModulePlan]
    budget: str
    budget_parameters: int
    base_parameters: int
    fingerprint: str
    criterion: str = ""
    granularity: list[str] = dataclasses.field(default_factory=list)
    spread: str = "global"
    model_name_or_path: str = ""
    task_type: str | None = None
    always_trained: list[str] = dataclasses.field(default_factory=list)
    head_parameters: int = 0
    architecture: str = dataclasses.field(default="", compare=False)  # older plans have neither of these
    weights: str = dataclasses.field(default="", compare=False)

    @property
    def parameters(self) -> int:
        """Trainable numbers, without the new heads."""
        return sum(module.parameters for module in self.modules.values())

    @property
    def indices(self) -> int:
        return sum(module.indices for module in self.modules.values())

    def by_layer(self, layers: Mapping[str, str]) -> dict[str, int]:
        """Trainable parameters in each layer, from the input on; layers without any hold 0. ``layers``: module -> layer."""
        totals = dict.fromkeys(layers.values(), 0)
        for name, module in self.modules.items():
            layer = layers.get(name, name)  # a module that was added by hand may not have been measured
            totals[layer] = totals.get(layer, 0) + module.parameters
        return totals

    def __str__(self) -> str:
        return "\n".join(self.describe())

    def _repr_html_(self) -> str:
        """The plan in words, and the modules that have the most of it."""
        largest = sorted(self.modules.items(), key=lambda item: -item[1].parameters)
        rows = [
            (name, f"{module.parameters:,}", f"{module.parameters / math.prod(module.shape):.2%}")
            for name, module in largest[:SHOWN]
        ]
        if others := largest[SHOWN:]:
            rows.append((f"{len(others)} others", f"{sum(module.parameters for _, module in others):,}", ""))
        return markup.paragraphs(self.describe()) + markup.table(["", "trainable", "of the module's weights"], rows)

    def describe(self) -> list[str]:
        """The plan in words, one fact a line."""
        counts = {
            "columns": sum(len(m.columns) for m in self.modules.values()),
            "rows": sum(len(m.rows) for m in self.modules.values()),
            "single weights": sum(len(m.elements) for m in self.modules.values()),
            "input directions": sum(len(m.directions) for m in self.modules.values()),
            "whole matrices": sum(m.weight and len(m.shape) > 1 for m in self.modules.values()),
            "norms": sum((m.weight or m.bias) and len(m.shape) == 1 for m in self.modules.values()),
            "biases": sum(m.bias and len(m.shape) > 1 for m in self.modules.values()),
        }
        chosen = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        first = next(iter(self.modules))
        fixed = [f"{self.fixed:,} numbers of the directions are fixed: part of the adapter's file and not trained"]
        heads = [f"{self.head_parameters:,} parameters of new heads are always trained and counted apart"]
        return [
            f"{chosen} in {len(self.modules)} modules, by {self.criterion or 'hand'}" + self._spread_in_words(),
            f"{self.parameters:,} trainable parameters of {self.base_parameters:,} "
            f"({self.parameters / self.base_parameters:.2%}), budget {self.budget} = {self.budget_parameters:,}",
            *(fixed if self.fixed else []),
            *(heads if self.head_parameters else []),
            f"adapter on disk about {self.adapter_bytes():,} bytes, AdamW states {8 * self.trained_numbers():,} bytes",
            f"the backward pass ends at {first}: nothing below it is differentiated or kept",
        ]

    def _spread_in_words(self) -> str:
        if self.spread == "even" and self.granularity == ["direction"]:
            return ", the same number of every module"
        return f", {SPREADS[self.spread]}" if self.spread != "global" and self.spread in SPREADS else ""

    @property
    def fixed(self) -> int:
        """Numbers in the adapter's file that are not trained: those of the directions."""
        return sum(module.fixed for module in self.modules.values())

    def trained_numbers(self) -> int:
        return self.parameters + self.head_parameters

    def adapter_bytes(self) -> int:
        """float32 values with their indices and directions, file headers left out."""
        return 4 * self.trained_numbers() + sum(module.index_bytes for module in self.modules.values())

    def check(self) -> None:
        """Raise InputError if the plan contradicts itself. Runs on load, after any edit by hand."""
        if not self.modules:
            raise InputError("plan: it chooses no module; add at least one.")
        if self.base_parameters < 1 or self.head_parameters < 0:
            raise InputError(
                "plan: parameters and head_parameters of model are the numbers of its parameters; select again."
            )
        for name, module in self.modules.items():
            module.check(name)
        if self.parameters > self.budget_parameters:
            raise InputError(
                f"plan: it trains {self.parameters:,} parameters, above its budget of {self.budget_parameters:,}; "
                "choose fewer or raise budget.parameters."
            )

    def check_vectors(self) -> None:
        """Raise InputError unless the vectors of all chosen directions are there."""
        for name, module in self.modules.items():
            if module.directions and module.vectors is None:
                raise InputError(f"plan: the vectors of the directions of {name} are missing; select again.")

    @property
    def base(self) -> Base:
        """What the plan records of its base model."""
        from reltune.layers.fingerprint import Base

        return Base(self.fingerprint, self.architecture, self.base_parameters, self.weights)

    def check_model(self, inventory: Inventory, base: Base | str) -> None:
        """Raise InputError if the plan was not made for this model. ``base`` is what is known of that: its fingerprint alone will do."""
        from reltune.layers.fingerprint import Base

        for name, module in self.modules.items():
            if name not in inventory:
                known = [info.name for info in inventory.modules]
                reason = next((why for key, why in inventory.left_out.items() if key.startswith(name + ".")), "")
                if reason:
                    raise InputError(f"plan: {name} cannot be trained by this plan: {reason}.")
                raise InputError(f"plan: this model has no module {name!r}; {nearest(name, known)}")
            info = inventory[name]
            module.check_layer_type(info)
            if info.shape != module.shape:
                raise InputError(
                    f"plan: {name} has shape {list(info.shape)} in this model and {list(module.shape)} in the plan; "
                    "the plan is for another model."
                )
            if info.groups != module.groups:
                raise InputError(
                    f"plan: {name} has {info.groups} groups in this model and {module.groups} in the plan; the plan is for "
                    "another model."
                )
            if module.bias and not info.bias:
                raise InputError(f"plan: {name} has no bias in this model; set bias: false.")
        self.base.check(Base(base) if isinstance(base, str) else base, "plan: it", self.model_name_or_path)

    def save(self, directory: str | os.PathLike) -> None:
        """Write ``plan.yaml``, beside it ``indices.safetensors`` when there are too many indices to read, and
        ``directions.safetensors`` with all vectors that directions were chosen from."""
        self.check_vectors()
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        beside = self.indices > INLINE_INDICES
        arrays: dict[str, np.ndarray] = {}
        modules: dict[str, Any] = {}
        for name, module in self.modules.items():
            entry: dict[str, Any] = {"shape": _Inline(module.shape)}
            if module.groups > 1:
                entry["groups"] = module.groups
            for field in INDEX_FIELDS:
                values = getattr(module, field)
                if values and beside:
                    arrays[f"{name}/{field}"] = module.index_array(field)
                    entry[field] = f"{len(values)} in {INDEX_FILE}"
                elif values:
                    entry[field] = _Inline(values)
            entry.update({field: True for field in ("weight", "bias") if getattr(module, field)})
            modules[name] = entry
        vectors = {name: module.vectors for name, module in self.modules.items() if module.vectors is not None}
        for file, held in ((INDEX_FILE, arrays), (VECTOR_FILE, vectors)):
            if held:
                with whole_file(directory / file) as partial:
                    save_file(held, partial)
            else:
                (directory / file).unlink(missing_ok=True)
        values = {
            "format": FORMAT,
            "model": {
                "name_or_path": self.model_name_or_path,
                "fingerprint": self.fingerprint,
                **{name: value for name in ("architecture", "weights") if (value := getattr(self, name))},
                "parameters": self.base_parameters,
                "head_parameters": self.head_parameters,
                "task_type": self.task_type,
            },
            "criterion": self.criterion,
            "granularity": _Inline(self.granularity),
            "spread": self.spread,
            "budget": {"asked": self.budget, "parameters": self.budget_parameters},
            "predicted": {  # for the reader; worked out anew on load
                "trainable_parameters": self.parameters,
                **({"fixed_numbers": self.fixed} if self.fixed else {}),
                "adapter_bytes": self.adapter_bytes(),
                "backward_ends_at": next(iter(self.modules)),
            },
            "always_trained": self.always_trained,
            "modules": modules,
        }
        text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
        write_text(directory / "plan.yaml", HEADER + text)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Read and check a plan from ``plan.yaml`` or the directory that holds it."""
        path = Path(path)
        if path.is_dir():
            path = path / "plan.yaml"
        try:
            values = read_yaml(path, finite=True)
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist; run `reltune select` first.") from error
        except (OSError, Damaged) as error:
            raise InputError(f"{path} cannot be read as a plan: {error}; run `reltune select` again.") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InputError(f"{path} is no plan of format {FORMAT!r}; run `reltune select` again.")
        known = "format model criterion granularity spread budget predicted always_trained modules".split()
        _known_keys(values, known, str(path))
        try:
            model, budget = values["model"], values["budget"]
            _known_keys(
                model,
                "name_or_path fingerprint architecture weights parameters head_parameters task_type".split(),
                f"{path}: model",
            )
            _known_keys(budget, ("asked", "parameters"), f"{path}: budget")
            plan = cls(
                modules=_read_modules(values["modules"], path),
                budget=str(budget["asked"]),
                budget_parameters=int(budget["parameters"]),
                base_parameters=int(model["parameters"]),
                fingerprint=str(model["fingerprint"]),
                criterion=str(values.get("criterion", "")),
                granularity=_names(values.get("granularity"), f"{path}: granularity"),
                spread=str(values.get("spread", "global")),
                model_name_or_path=str(model.get("name_or_path", "")),
                task_type=model.get("task_type"),
                always_trained=_names(values.get("always_trained"), f"{path}: always_trained"),
                head_parameters=int(model["head_parameters"]),
                architecture=str(model.get("architecture", "")),
                weights=str(model.get("weights", "")),
            )
        except KeyError as error:
            raise InputError(f"{path} lacks the field {error}; run `reltune select` again.") from error
        except InputError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{path} has a field of the wrong kind: {error}") from error
        try:
            plan.check()
            plan.check_vectors()
        except InputError as error:
            raise InputError(f"{path}: {str(error).removeprefix('plan: ')}") from error
        return plan


def index_dtype(shape: Sequence[int]) -> np.dtype:
    """The type of flat indices into a weight of this shape."""
    return np.dtype(np.int32 if math.prod(shape) <= np.iinfo(np.int32).max else np.int64)


def _compact(values: Sequence[int] | np.ndarray) -> array:
    """Ascending whole numbers in 4 bytes each, or in 8 where they need it."""
    narrow = len(values) == 0 or (values[0] >= -(2**31) and values[-1] < 2**31)
    try:
        return array("i" if narrow else "q", np.asarray(values, dtype=np.int32 if narrow else np.int64).tobytes())
    except OverflowError:  # far beyond any weight: kept as it is for `check` to refuse
        return values  # type: ignore[return-value]


def _known_keys(values: Any, known: Iterable[str], where: str) -> None:
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a mapping of fields.")
    for key in values:
        if key not in known:
            raise InputError(f"{where} has an unknown field {key!r}; {nearest(str(key), known)}")


def _names(values: Any, where: str) -> list[str]:
    values = [] if values is None else values
    if not isinstance(values, list) or any(not isinstance(name, str) for name in values):
        raise InputError(f"{where} must be a list of names.")
    return values


def _read_modules(entries: Any, path: Path) -> dict[str, ModulePlan]:
    if not isinstance(entries, dict):
        raise InputError(f"{path}: modules must map module names to what is trained of them.")
    arrays: dict[str, np.ndarray] = {}
    vectors: dict[str, np.ndarray] | None = None
    modules = {}
    for name, entry in entries.items():
        _known_keys(entry, ("shape", "groups", *INDEX_FIELDS, "weight", "bias"), f"{path}: {name}")
        for field in INDEX_FIELDS:
            if isinstance(entry.get(field), str):
                if not arrays:
                    arrays = _load_beside(path, INDEX_FILE)
                if f"{name}/{field}" not in arrays:
                    raise InputError(f"{path.parent / INDEX_FILE} holds no {field} of {name}.")
                held = arrays[f"{name}/{field}"]
                if field == "elements" and held.ndim == 1 and held.dtype in (np.int32, np.int64):
                    entry[field] = _compact(np.sort(held))
                else:
                    entry[field] = held.tolist() if held.ndim == 1 else None
        if "shape" not in entry:
            raise InputError(f"{path}: {name} lacks its shape.")
        module = modules[str(name)] = ModulePlan(**{**entry, "shape": tuple(entry["shape"])})
        if module.directions:
            vectors = _load_beside(path, VECTOR_FILE) if vectors is None else vectors
            module.vectors = vectors.get(str(name))
    return modules


def _load_beside(path: Path, file: str) -> dict[str, np.ndarray]:
    try:
        return load_arrays(inside(path.parent, file))
    except (OSError, Damaged) as error:
        raise InputError(f"{path.parent / file} cannot be read: {error}; run `reltune select` again.") from error


class _Inline(list):
    """A list that YAML writes on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Inline, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))
