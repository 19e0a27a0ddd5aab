"""The PEFT tuner: puts ReltuneLayers in the place of the modules that a config names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from reltune.errors import InputError, nearest
from reltune.layers import deferred_logits
from reltune.layers.fingerprint import Base
from reltune.layers.float8 import Float8Linear, convertible, to_float8
from reltune.layers.fused import can_be_fused, fuse, restore
from reltune.layers.quantised import check_not_packed, keep_as_loaded
from reltune.layers.registry import layer_type_of, layer_types, why_not
from reltune.layers.units import ModuleInfo, by_unit
from reltune.plan.plan import ModulePlan
from reltune.tuner.checks import check_sizes
from reltune.tuner.config import ReltuneConfig
from reltune.tuner.float8 import ReltuneFloat8Linear
from reltune.tuner.layer import BASE, ReltuneLayer
from reltune.tuner.processes import check_agreement
from reltune.tuner.sharded import is_shard, refuse_sharded
from reltune.tuner.trainable import trainable_class
from reltune.tuner.written_weight import together


def _with_adapter_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


class ReltuneModel(BaseTuner):
    """Trains selected units of a frozen model; made by ``peft.get_peft_model(model, ReltuneConfig(…))``."""

    prefix: str = "reltune_"
    tuner_layer_cls = ReltuneLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        # A plan names modules in full; PEFT's matching by the end of a name could take a namesake elsewhere.
        if peft_config.units is not None:
            return key in peft_config.units
        return BaseTuner._check_target_module_exists(peft_config, key)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The buffers that DDP need not send to all processes before every pass: indices never change.

        DDP asks the PeftModel, which asks here.
        """
        ours = [name for name, _ in self.named_buffers() if f".{self.prefix}" in name]
        return [*getattr(self.model, "_ddp_params_and_buffers_to_ignore", ()), *(f"base_model.{name}" for name in ours)]

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if any(is_shard(p) for p in model.parameters()):
            refuse_sharded("an adapter cannot be added to", "add it before the model is sharded")
        if not peft_config.inference_mode:
            check_not_packed(model)
        keep_as_loaded(model)
        has_adapters = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        if not has_adapters:
            # Once adapters are there, the weights are no longer only the base's.
            recorded = peft_config.fingerprint
            self._base = Base.of(model, peft_config.always_trained, bool(peft_config.weights)) if recorded else Base()
        if peft_config.units is not None:
            names = [name for name, _ in model.named_modules()]
            missing = [name for name in peft_config.units if name not in names]
            if missing:
                raise InputError(
                    f"the plan names {missing[0]!r}, which this model does not have; {nearest(missing[0], names)}"
                )
        if not peft_config.force:
            peft_config.base.check(getattr(self, "_base", Base()), "the plan or adapter")
        self._find_convertible(peft_config, model, has_adapters)

    def _find_convertible(self, config: Any, model: nn.Module, has_adapters: bool) -> None:
        """Find the linear maps that are to be held in float8 once the adapter is in place."""
        self._to_float8: dict[str, nn.Linear] = {}
        # For inference columns are put into the base as it is, where they can be merged too.
        if config.frozen_dtype is None or config.inference_mode:
            return
        if any(isinstance(module, Float8Linear) for module in model.modules()):
            return  # it was converted with an earlier adapter
        if has_adapters:
            raise InputError(
                "the model has adapters on its weights in full precision, so that these cannot be held in float8 any more; "
                "give the first adapter frozen_dtype, and load one with is_trainable=True."
            )
        self._to_float8 = convertible(model, config.modules_to_save or [])

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BaseTunerLayer) and not isinstance(target, ReltuneLayer):
            raise InputError(
                f"{current_key} already has an adapter of another method ({type(target).__module__}); merge it into the model "
                "(merge_and_unload) or unload it first."
            )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        its_type = layer_type_of(base)
        if its_type is None or not its_type.trains:
            raise TypeError(
                f"{current_key} is a {' '.join([type(base).__name__, why_not(base)]).strip()}, which reltune cannot train; "
                f"supported are {', '.join(known.covers for known in layer_types() if known.trains)}."
            )
        owners = [
            name
            for name, p in self.model.named_parameters(remove_duplicate=False)
            if p is base.weight and name != f"{current_key}.weight"
        ]
        if owners and not isinstance(target, BaseTunerLayer):
            raise InputError(
                f"{current_key} shares its weight with {owners[0]}, which would change with it; choose other modules or "
                "untie the two."
            )
        (info,) = its_type.infos(current_key, base, "", 0)
        if isinstance(target, ReltuneLayer):
            weight = target._canonical(target._pristine_weight())
        else:
            weight = its_type.weights(info, base)["weight"]
        units = self._units(peft_config, info, weight)
        if units.bias and not info.bias:
            raise InputError(f"the plan trains the bias of {current_key}, which has no bias; set bias: false.")
        units.check_layer_type(info)
        if isinstance(target, ReltuneLayer):
            layer = target
        elif current_key in self._to_float8 and not (units.rows or units.weight):
            to_float8(target)
            layer = ReltuneFloat8Linear(target, unrounded=weight)
        else:
            layer = trainable_class(its_type.name)(target)
        layer.update_layer(
            adapter_name,
            units,
            peft_config.init_weights,
            peft_config.inference_mode,
            indices_follow=peft_config.units is not None and current_key not in peft_config._chosen,
        )
        self._to_float8.pop(current_key, None)  # converted, or to be left alone
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trained until it is set
            self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _units(config: ReltuneConfig, info: ModuleInfo, weight: Tensor) -> ModulePlan:
        key, shape = info.name, info.shape
        if key in config._chosen:
            units = config._chosen[key]
            if tuple(units.shape) != shape:
                raise InputError(
                    f"the plan gives {key} the shape {list(units.shape)}, and this model's has {list(shape)}; it is for "
                    "another model."
                )
            if units.groups != info.groups:
                raise InputError(
                    f"the plan gives {key} {units.groups} groups, and this model's has {info.groups}; it is for another model."
                )
            return units
        if config.units is not None:
            # An adapter is about to be loaded: sizes are known, indices come with the file.
            sizes = config.units[key]
            check_sizes(sizes, info)
            units = ModulePlan(
                shape,
                list(range(sizes["columns"])),
                list(range(sizes["rows"])),
                sizes["weight"],
                sizes["bias"],
                groups=info.groups,
            )
            # Adapters of older versions know nothing of these two.
            units.take_elements(torch.arange(sizes.get("elements", 0)))
            units.directions = list(range(sizes.get("directions", 0)))
            return units
        if info.is_vector:
            return ModulePlan(shape, weight=True, bias=info.bias)
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
        if weight.device.type == "meta":
            return ModulePlan(shape, list(range(min(r, info.columns))), groups=info.groups)
        norms = by_unit(info, {"weight": weight.detach().float().square()})["column"]
        largest = torch.topk(norms, min(r, info.columns)).indices.sort().values
        return ModulePlan(shape, largest.tolist(), groups=info.groups)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand ``adapter_names``, one per sample, to every layer for the time of one forward pass or generation."""
        names: list[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call eval() first.")
        unknown = sorted(set(names) - {BASE, *self.peft_config})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else self.model
        before_beams = set() if encoder is self.model else set(encoder.modules())
        handles = []
        for module in self.model.modules():
            if isinstance(module, ReltuneLayer | AuxiliaryTrainingWrapper):
                # Beam search repeats every sample, behind the encoder.
                own = names if module in before_beams else [name for name in names for _ in range(beams)]
                hook = partial(_with_adapter_names, adapter_names=own)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)
        for module in self._to_float8.values():
            to_float8(module)
        self._to_float8.clear()
        _unhook(model)
        # Hooks of the base model and not this class's forward, which PeftModel without a task type goes past.
        model.register_forward_pre_hook(_BeforeForward(), with_kwargs=True)
        model.register_forward_hook(_after_forward, always_call=True)
        self.__dict__.pop("_layers", None)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        # As PEFT does it, without its walk through thousands of modules, which would take longer than all the writing.
        with together():
            if "_layers" not in self.__dict__:
                self._layers = [module for module in self.model.modules() if isinstance(module, ReltuneLayer)]
                self._with_heads = any(isinstance(m, AuxiliaryTrainingWrapper) for m in self.model.modules())
            if self._with_heads:  # modules that are saved whole have their adapters too
                super().set_adapter(adapter_name, inference_mode=inference_mode)
                return
            for layer in self._layers:
                if layer.merged:
                    warnings.warn(
                        "Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2
                    )
                    layer.unmerge()
                layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "reltune adapters change different columns and rows and are not averaged into a new adapter; make several active "
            "at once (base_model.set_adapter([…])), which adds their changes, or export them (reltune export --to lora) and "
            "combine them there."
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, ReltuneLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # Unloading. PEFT would look for a weight of the module, which a new head of several layers does not have.
            setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        restore(self.model)
        _unhook(self.model)
        for module in self.model.modules():
            if isinstance(module, ReltuneLayer):
                module._restore()  # not every layer has the adapters that are merged
        return super()._unload_and_optionally_merge(*args, **kwargs)


class _BeforeForward:
    """Puts right, before each training pass, what others may have changed since the adapter was put in.

    Processes must train the same units, checkpointing must not lengthen the backward pass, norms and gated MLPs run fused, and
    a loss of language models does without all logits at a time.
    The modules to look at are found once: a walk through all of them would leave the device idle for milliseconds.
    """

    def __init__(self) -> None:
        self._checkpointed: list[nn.Module] | None = None
        self._fusable: list[nn.Module] = []

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        check_agreement(model)
        if self._checkpointed is None:
            self._checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
            self._fusable = [module for module in model.modules() if can_be_fused(module)]
        _end_backward_at_lowest_unit(model, self._checkpointed)
        fuse(self._fusable)
        deferred_logits.defer(model, kwargs)


def _after_forward(model: nn.Module, *_: Any) -> None:
    deferred_logits.undo(model)


def _unhook(model: nn.Module) -> None:
    """Take this class's hooks away, with all that torch remembers of them."""
    for hooks, extra in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs),
        (model._forward_hooks, model._forward_hooks_always_called),
    ):
        for key, hook in list(hooks.items()):
            if isinstance(hook, _BeforeForward) or hook is _after_forward:
                del hooks[key]
                extra.pop(key, None)


def _end_backward_at_lowest_unit(model: nn.Module, checkpointed: list[nn.Module]) -> None:
    """Let the backward pass end at the lowest trained unit also where activations are checkpointed.

    Transformers and PEFT then make the embeddings' output require a gradient, so that every layer is differentiated.
    Only checkpoints that re-enter autograd need that.
    """
    functions = [
        getattr(module, "_gradient_checkpointing_func", None)
        for module in checkpointed
        if module.gradient_checkpointing
    ]
    if not functions or any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions):
        return
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                del module._forward_hooks[key]
