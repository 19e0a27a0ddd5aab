"""What the methods have in common that PEFT has: adapters on linear maps, saved as PEFT saves them."""

from __future__ import annotations

import abc
import dataclasses
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reltune.errors import InputError, first_line
from reltune.files import read_json
from reltune.methods.contract import Base, Method, Trainable
from reltune.reading import FLOATS, Damaged, inside, read_header
from reltune.tensor_files import check_saved

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
KINDS = ("RELTUNE", "LORA", "SHIRA")  # PEFT's words for the adapters that the methods here make
# What those set of PEFT's LoraConfig. Other fields let a file copy layers, decompose the base's weights or name further files.
OF_LORA = frozenset(
    (
        *(
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
            "bias",
        ),
        *("use_rslora", "use_dora", "modules_to_save", "peft_type", "peft_version", "task_type", "auto_mapping"),
        *("base_model_name_or_path", "revision", "inference_mode"),
    )
)


class Adapter(Method):
    """Trains an adapter of PEFT's on linear maps: on all of them, or on those that ``target_modules`` names."""

    @abc.abstractmethod
    def peft_config(self, base: Base, names: list[str]) -> PeftConfig:
        """PEFT's config for an adapter on these modules."""

    @abc.abstractmethod
    def divisor(self, base: Base, config: Any, trained: int) -> float:
        """What the rate is divided by the root of, for PEFT's config and so many trained numbers."""

    @abc.abstractmethod
    def describe(self, config: Any) -> str:
        """The adapter in a few words: LoRA of rank 8, alpha 16."""

    def targets(self, base: Base) -> list[str]:
        """The linear maps that get an adapter."""
        return linear_maps(base)

    def check(self, base: Base) -> None:
        self.targets(base)

    def prepare(self, base: Base) -> Trainable:
        from peft import get_peft_model

        names = self.targets(base)
        everything = size(base.model)
        try:
            config = self.peft_config(base, names)
            if base.task_type:
                config.task_type = base.task_type
            config.modules_to_save = list(base.new_heads) or None  # type: ignore[attr-defined]
            model = get_peft_model(base.model, config)
        except (ValueError, TypeError, ImportError) as error:
            raise InputError(f"PEFT cannot put the method {self.name} on this model ({first_line(error)}).") from error
        heads = sum(
            p.numel() for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in name
        )
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - heads
        lines = [
            f"{self.describe(config)} on {len(names)} linear maps",
            *in_numbers(trained, everything - heads, heads),
        ]
        return Trainable(model, self.rates, self.divisor(base, config, trained), trained, heads, lines)

    def save(self, model: nn.Module, path: Path, state: Mapping[str, Any] | None = None) -> None:
        save_adapter(model, path, state)

    def load(self, base: nn.Module, path: Path) -> Any:
        return load_adapter(base, path)


def save_adapter(model: Any, path: Path, state: Mapping[str, Any] | None) -> None:
    """As PEFT saves it, and read back: raises StorageError where the file does not hold what was trained to the bit."""
    from peft import get_peft_model_state_dict

    model.save_pretrained(str(path), state_dict=state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT remarks it has remarked
        check_saved(path / WEIGHTS, get_peft_model_state_dict(model, state_dict=state))


def load_adapter(base: nn.Module, path: Path) -> Any:
    """The adapter on its base model. Its files may be anybody's (docs/files.md).

    Raises InputError where they are damaged, or do not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError

    kind, held = _checked(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # said below
            # low_cpu_mem_usage: a rank that a file only claims takes no memory. The units of reltune's own are checked.
            model = PeftModel.from_pretrained(base, str(path), low_cpu_mem_usage=kind == "LORA")
            own = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    except InputError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        RuntimeError,
        OSError,
        OverflowError,
        SafetensorError,
        re.error,
    ) as error:
        raise InputError(
            f"the adapter {path} does not fit the model ({_in_short(error)}); load the model it was made for."
        ) from error
    if missing := sorted(own - held):
        raise InputError(
            f"{path / WEIGHTS} lacks {missing[0]}, which its config says it has; save or copy the adapter again."
        )
    return model


def _checked(path: Path) -> tuple[str, set[str]]:
    """PEFT's word for an adapter's kind, and the names of its tensors. Raises InputError for files that are damaged, before anything is
    made of them."""
    from safetensors import safe_open

    if not (path / WEIGHTS).is_file() and any(path.glob("*.bin")):
        raise InputError(
            f"{path} has weights that are no safetensors file, in a format that can run code; save it as safetensors."
        )
    for file in (CONFIG, WEIGHTS):
        try:
            inside(path, file)
        except Damaged as error:
            raise InputError(f"{path} {error.reason}; copy the adapter with its own files.") from error
    config = read_json(path / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise InputError(f"{path / CONFIG} is no adapter's config; save or copy the adapter again.")
    if (kind := config["peft_type"]) not in KINDS:
        raise InputError(
            f"{path / CONFIG} is of an adapter of the kind {kind[:80]!r}, which reltune does not load; known are {', '.join(KINDS)}."
        )
    if kind != "RELTUNE":
        _check_fields(path / CONFIG, config)
    try:
        tensors = read_header(path / WEIGHTS).tensors
    except (OSError, Damaged) as error:
        raise InputError(f"{path / WEIGHTS} cannot be read ({error}); save or copy the adapter again.") from error
    with safe_open(path / WEIGHTS, "pt") as file:
        for name, (dtype, _) in tensors.items():
            if dtype in FLOATS and not file.get_tensor(name).isfinite().all():
                raise InputError(
                    f"{path / WEIGHTS} has numbers in {name} that are not finite; train it again, or copy it again."
                )
    return kind, set(tensors)


def _check_fields(file: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for a config of PEFT's that asks for more than an adapter, or for patterns that could take for ever to match."""
    from peft import LoraConfig

    if config["peft_type"] == "LORA":
        usual = LoraConfig().to_dict()
        for name, value in config.items():
            # Nothing is also an empty list: PEFT sets a Mixtral's target_parameters to none of them.
            if name not in OF_LORA and value not in (None, [], {}) and value != usual.get(name):
                raise InputError(
                    f"{file} sets {name[:80]!r}, which reltune does not take from an adapter; export it without that."
                )
    for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        words = config.get(field) or ()
        for word in [words] if isinstance(words, str) else words if isinstance(words, list | dict) else ():
            if isinstance(word, str) and not set("*+?{([").isdisjoint(word):
                raise InputError(f"{file} has patterns in {field}; it must name the modules.")


def _in_short(error: Exception) -> str:
    """The line of an error that says what is wrong: of ``load_state_dict`` not the one above its list."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(lines[min(1, len(lines) - 1)].rstrip(".: "), 300, placeholder=" …")


def linear_maps(base: Base) -> list[str]:
    """The linear maps that can have an adapter: all but the output layer over the vocabulary and new heads, or those named.

    Raises InputError for a pattern that matches none, and where there are none.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from reltune.layers.inventory import choose, take_inventory

    inventory = take_inventory(base.model, base.new_heads)
    model: Any = base.model
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules = dict(base.model.named_modules())
    fit = [
        info.name
        for info in inventory.modules
        if isinstance(modules.get(info.name), nn.Linear | Conv1D) and info.name not in base.not_tuned
    ]
    config = base.config
    if not config.target_modules:
        fit = [name for name in fit if modules[name] is not output]
    if not fit:
        raise InputError(
            "the model has no linear map that an adapter could be put on; choose the method full or bitfit."
        )
    return choose(
        dataclasses.replace(inventory, modules=[inventory[name] for name in fit]),
        config.target_modules,
        config.exclude_modules,
    )


def shapes_of(base: Base, names: Sequence[str]) -> list[tuple[int, int]]:
    """Output and input features of linear maps."""
    from reltune.layers.inventory import take_inventory

    inventory = take_inventory(base.model, base.new_heads)
    return [(inventory[name].shape[0], inventory[name].shape[1]) for name in names]


def size(model: nn.Module) -> int:
    """How many parameters a model has, packed ones counted as what they stand for."""
    from reltune.layers.quantised import numel

    return sum(numel(p) for p in model.parameters())


def in_numbers(trained: int, base: int, heads: int) -> Sequence[str]:
    """How much is trained, in the words of a plan."""
    said = [f"{trained:,} trainable parameters of {base:,} ({trained / base:.2%})"]
    return [*said, f"{heads:,} parameters of new heads are always trained and counted apart"] if heads else said
