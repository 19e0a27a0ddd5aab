"""What the methods have in common that train parameters of the plain model: they are set free, and saved by their names.

PEFT's ``modules_to_save`` would copy every module that it trains and knows no single bias, no parameter beside
modules and no tied weight. So the trained tensors are one safetensors file, which ``load_state_dict`` reads, and the model stays
a plain one: Trainer's own checkpoints are whole models, and a merged export is the model itself.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reltune.errors import InputError
from reltune.files import whole_file
from reltune.methods.adapter import in_numbers, size
from reltune.methods.contract import Base, Method, Trainable
from reltune.reading import Damaged, read_header
from reltune.tensor_files import check_saved, load_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "trained.safetensors"  # also in ADAPTER_FILES of runs/directory.py


class Freed(Method):
    """Trains parameters of the plain model."""

    few_bits = False
    lora_file = False

    @abc.abstractmethod
    def parameters(self, base: Base) -> list[str]:
        """The names of what is trained beside new heads. Raises InputError where there is nothing."""

    @abc.abstractmethod
    def describe(self, base: Base, names: Sequence[str]) -> str:
        """What is trained, in a few words."""

    def check(self, base: Base) -> None:
        self.parameters(base)

    def prepare(self, base: Base) -> Trainable:
        names = self.parameters(base)
        line = self.describe(base, names)
        free, trained, heads = set(names), 0, 0
        for name, parameter in base.model.named_parameters():
            new = inside(name, base.new_heads)
            parameter.requires_grad_(new or name in free)
            heads += parameter.numel() if new else 0
            trained += parameter.numel() if name in free and not new else 0
        lines = [line, *in_numbers(trained, size(base.model) - heads, heads)]
        return Trainable(base.model, self.rates, 1.0, trained, heads, lines)

    def save(self, model: nn.Module, path: Path, state: Mapping[str, Any] | None = None) -> None:
        from safetensors.torch import save_file

        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        holders = {name.rpartition(".")[0] for name in trained}
        buffers = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in holders}  # of batch norms
        values = model.state_dict() if state is None else state
        tensors = {
            name: values[name].detach().cpu().clone().contiguous()
            for name in sorted(trained | buffers)
            if name in values
        }
        frozen = {name: values[name] for name, p in model.named_parameters() if not p.requires_grad}
        with whole_file(path / FILE) as partial:
            save_file(tensors, partial, metadata={"method": self.name, "frozen": _fingerprint(frozen)})
            check_saved(partial, tensors)

    def load(self, base: nn.Module, path: Path) -> Any:
        from reltune.layers.fingerprint import is_forced

        try:
            about, tensors = read_header(path / FILE).metadata, load_tensors(path / FILE)
        except (OSError, Damaged) as error:
            raise InputError(f"{path / FILE} cannot be read ({error}); tune again, or copy it again.") from error
        own = dict(base.named_parameters()) | dict(base.named_buffers())
        for name, tensor in tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                has = f"shape {list(own[name].shape)}" if name in own else "no such tensor"
                raise InputError(
                    f"{path} was trained on another base model: {name} has shape {list(tensor.shape)} there, and this model {has}."
                )
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(
                    f"{path / FILE} has numbers in {name} that are not finite; tune again, or copy it again."
                )
        frozen = {name: p for name, p in base.named_parameters() if name not in tensors}
        if about.get("frozen") != _fingerprint(frozen) and not is_forced():
            raise InputError(
                f"{path} was trained on another base model: the weights that it leaves as they are differ; load the model it was trained "
                "on, or pass --force to use it nevertheless."
            )
        return _with_values(base, tensors)


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a parameter lies in one of the modules."""
    return name.startswith(tuple(f"{module}." for module in modules))


def _fingerprint(frozen: Mapping[str, Tensor]) -> str:
    """Of what was not trained, by which the base is known again; empty where everything was."""
    from reltune.layers.fingerprint import fingerprint_of, samples

    return fingerprint_of({name: (tuple(t.shape), samples(t)) for name, t in frozen.items()}) if frozen else ""


def _with_values(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The model with these values, and with ``disable_adapter()`` and ``adapter_enabled`` as an adapter would give it."""
    import torch

    def places() -> dict[str, Tensor]:  # anew each time: moving a model to a device makes new buffers
        return dict(model.named_parameters()) | dict(model.named_buffers())

    own = places()
    other = {name: own[name].detach().clone() for name in tensors}
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def swap() -> None:
        own = places()
        for name in other:
            held = other[name].to(own[name].device)
            other[name], own[name].data = own[name].data, held

    @contextlib.contextmanager
    def disable_adapter() -> Iterator[None]:
        swap()
        model.adapter_enabled = False
        try:
            yield
        finally:
            swap()
            model.adapter_enabled = True

    model.adapter_enabled, model.disable_adapter = True, disable_adapter
    return model
