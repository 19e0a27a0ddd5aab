"""The PEFT tuner: puts ReltuneLayers in the place of the modules that a config names."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from reltune.layers.fingerprint import fingerprint
from reltune.layers.inventory import layer_type
from reltune.plan.plan import TRAINABLE, ModulePlan
from reltune.records import InputError, nearest
from reltune.tuner.config import ReltuneConfig
from reltune.tuner.layer import ReltuneLayer
from reltune.tuner.linear import ReltuneLinear
from reltune.tuner.norm import ReltuneNorm

# Kind of module (layers/inventory.py) -> the layer that trains it; its keys are plan.TRAINABLE.
LAYER_CLASSES: dict[str, type[ReltuneLayer]] = {"linear": ReltuneLinear, "norm": ReltuneNorm}


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

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        has_adapters = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        if not has_adapters:
            # Once adapters are there, the weights are no longer only the base's.
            without = peft_config.always_trained
            self._fingerprint = fingerprint(model, without) if peft_config.fingerprint else ""
        found = getattr(self, "_fingerprint", "")
        if peft_config.units is not None:
            names = [name for name, _ in model.named_modules()]
            missing = [name for name in peft_config.units if name not in names]
            if missing:
                raise InputError(
                    f"the plan names {missing[0]!r}, which this model does not have; {nearest(missing[0], names)}"
                )
        if found and peft_config.fingerprint and found != peft_config.fingerprint:
            raise InputError(
                f"the plan or adapter was made for another base model (fingerprint {peft_config.fingerprint[:8]}…, this one "
                f"is {found[:8]}…); load the model it was made for, or analyze and select again."
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        found = layer_type(base)
        if found is None or found[0] not in TRAINABLE:
            raise TypeError(
                f"{current_key} is a {type(base).__name__}, which reltune cannot train; supported are nn.Linear, "
                "nn.LayerNorm and the RMSNorm family."
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
        weight: Any = target._pristine_weight() if isinstance(target, ReltuneLayer) else base.weight
        bias = getattr(base, "bias", None) is not None
        units = self._units(peft_config, current_key, weight, bias)
        if units.bias and not bias:
            raise InputError(f"the plan trains the bias of {current_key}, which has no bias; set bias: false.")
        if isinstance(target, ReltuneLayer):
            layer = target
        else:
            layer = LAYER_CLASSES[found[0]](target)
        layer.update_layer(
            adapter_name,
            units,
            peft_config.init_weights,
            peft_config.inference_mode,
            indices_follow=peft_config.units is not None and current_key not in peft_config._chosen,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trained until it is set
            self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _units(config: ReltuneConfig, key: str, weight: Tensor, bias: bool) -> ModulePlan:
        shape = tuple(weight.shape)
        if key in config._chosen:
            units = config._chosen[key]
            if tuple(units.shape) != shape:
                raise InputError(
                    f"the plan gives {key} the shape {list(units.shape)}, and this model's has {list(shape)}; it is for "
                    "another model."
                )
            return units
        if config.units is not None:
            # An adapter is about to be loaded: sizes are known, indices come with the file.
            sizes = config.units[key]
            units = ModulePlan(
                shape, list(range(sizes["columns"])), list(range(sizes["rows"])), sizes["weight"], sizes["bias"]
            )
            units.take_elements(torch.arange(sizes.get("elements", 0)))
            return units
        if len(shape) == 1:
            return ModulePlan(shape, weight=True, bias=bias)
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), key), config.r)
        if weight.device.type == "meta":
            return ModulePlan(shape, list(range(min(r, shape[1]))))
        norms = weight.detach().float().norm(dim=0)
        largest = torch.topk(norms, min(r, shape[1])).indices.sort().values
        return ModulePlan(shape, largest.tolist())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self._end_backward_at_lowest_unit()
        return super().forward(*args, **kwargs)

    def _end_backward_at_lowest_unit(self) -> None:
        """Undo that checkpointing differentiates every layer, down to the embeddings.

        Transformers and PEFT make the embeddings' output require a gradient when activations are checkpointed. Only
        checkpoints that re-enter autograd need that.
        """
        functions = [
            getattr(module, "_gradient_checkpointing_func", None)
            for module in self.model.modules()
            if getattr(module, "gradient_checkpointing", False)
        ]
        if not functions or any(getattr(f, "keywords", {}).get("use_reentrant", True) for f in functions):
            return
        for module in self.model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                    del module._forward_hooks[key]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, ReltuneLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # Unloading. PEFT would look for a weight of the module, which a new head of several layers does not have.
            setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        for module in self.model.modules():
            if isinstance(module, ReltuneLayer):
                module._restore()  # not every layer has the adapters that are merged
        return super()._unload_and_optionally_merge(*args, **kwargs)
