"""The PEFT config: which units of which modules are trained."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from reltune.errors import InputError, nearest
from reltune.layers.fingerprint import Base
from reltune.names import FROZEN_DTYPES
from reltune.plan.plan import ModulePlan, Plan
from reltune.tuner.checks import check_fields, read_adapter_config
from reltune.tuner.registration import peft_type


@dataclass
class ReltuneConfig(PeftConfig):
    """Train selected columns, rows, single weights, input directions, biases, norms and whole matrices.

    With a ``plan`` (a ``Plan``, or the path of one) it trains what the plan says, and the modules of new heads.
    Without one it behaves like any PEFT config: ``r`` columns of every module that ``target_modules`` names, those of
    the largest weights.

    Args:
        plan: the plan. It is read when the config is made, and not saved with it; ``units`` is.
        r: columns per module, without a plan.
        target_modules: names or a regular expression, as in every PEFT config; from the plan when there is one.
        exclude_modules: names or a regular expression of modules to leave alone.
        rank_pattern: another ``r`` for modules whose name ends in (or matches) the key.
        layers_to_transform: restrict to layers by index, as in LoraConfig.
        layers_pattern: how their names begin, as in LoraConfig.
        modules_to_save: modules trained and saved whole, such as a classifier.
        init_weights: True starts as the base model; False moves the selected weights at random, for tests.
        trainable_token_indices: new tokens whose embeddings are trained, as in LoraConfig.
        frozen_dtype: "float8_e4m3fn" holds the base's frozen linear maps in float8 while the adapter is trained, whether it
            targets them or not: half the memory, and faster products on a GPU that multiplies
            float8. docs/float8.md says what it costs in accuracy. The base model is changed for good; an adapter that is loaded
            for inference leaves it as it is.
        units: per module, how many columns, rows, single weights and directions and whether weight and bias are trained; filled from
            the plan and saved, because tensor sizes must be known before an adapter is loaded.
        fingerprint, architecture, base_parameters, weights: what is recorded of the base model that the plan is for
            (layers/fingerprint.py); another base is refused.
        always_trained: the modules of its new heads.
        force: use another base model than the recorded one, as far as the shapes allow. What was trained are values to put in the place
            of the base's own: in another base they may make it worse than either. Not saved.
    """

    plan: Plan | str | os.PathLike | None = None
    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    frozen_dtype: str | None = None
    units: dict[str, dict[str, Any]] | None = None
    fingerprint: str = ""
    architecture: str = ""
    base_parameters: int = 0
    weights: str = ""
    force: bool = False
    always_trained: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        check_fields(self)
        # Indices come from the plan or, on loading, from the adapter's file; JSON never holds them.
        self._chosen: dict[str, ModulePlan] = {}
        if self.plan is not None:
            self._take(self.plan if isinstance(self.plan, Plan) else Plan.load(self.plan))
            self.plan = None
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform; give both.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform has no effect on target_modules given as a string; give a list of names."
            )
        if self.frozen_dtype is not None:
            self.frozen_dtype = str(self.frozen_dtype).removeprefix("torch.")  # torch.float8_e4m3fn itself will do
            if self.frozen_dtype not in FROZEN_DTYPES:
                raise InputError(
                    f"frozen_dtype {self.frozen_dtype!r} is unknown; {nearest(self.frozen_dtype, FROZEN_DTYPES)}"
                )
        if self.r < 1:
            raise ValueError(f"r is {self.r}; it must be at least 1.")

    def _take(self, plan: Plan) -> None:
        choices = ("target_modules", "exclude_modules", "layers_to_transform", "rank_pattern")
        if any(getattr(self, name) not in (None, {}) for name in choices):
            raise ValueError(f"a plan names its modules and units; leave out {', '.join(choices)}.")
        plan.check()
        plan.check_vectors()
        self._chosen = plan.modules
        self.units = {
            name: {
                "columns": len(m.columns),
                "rows": len(m.rows),
                "elements": len(m.elements),
                "directions": len(m.directions),
                "weight": m.weight,
                "bias": m.bias,
                "shape": list(m.shape),
            }
            for name, m in plan.modules.items()
        }
        self.target_modules = list(plan.modules)
        self.fingerprint, self.architecture, self.weights = plan.fingerprint, plan.architecture, plan.weights
        self.base_parameters = plan.base_parameters
        self.always_trained = plan.always_trained
        saved = [*(self.modules_to_save or []), *plan.always_trained]
        self.modules_to_save = list(dict.fromkeys(saved)) or None
        if self.task_type is None and plan.task_type:
            self.task_type = plan.task_type

    @property
    def base(self) -> Base:
        """What is recorded of the base model."""
        return Base(self.fingerprint, self.architecture, self.base_parameters, self.weights)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """As PEFT does it, and by the rules of docs/files.md."""
        return read_adapter_config(path_json_file)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("plan")
        values.pop("force")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(values[name], set):
                values[name] = sorted(values[name])  # a set's order differs from process to process
        return values
