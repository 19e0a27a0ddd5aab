"""What each of two processes runs in test_distributed_training.py: functions of this file by name, in a gloo group.

torchrun … tests/distributed_worker.py DIRECTORY FUNCTION …
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parent))

from reltune.plan.plan import ModulePlan, Plan
from reltune.records import InputError
from reltune.tuner import ReltuneConfig
from reltune.tuner.layer import ReltuneLayer

Selection = dict[str, dict[str, Any]]
Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """A linear map, a norm and a Conv1D beside a residual; of sizes that two processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 7)
        self.norm = nn.LayerNorm(7)
        self.mixed = Conv1D(8, 7)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mixed(torch.tanh(self.norm(self.linear(h))))


class Net(nn.Module):
    """Every type of layer that the tuner trains: tokens (…, 6) -> logits (…, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.words(tokens)
        for block in self.blocks:
            h = block(h)
        h = torch.tanh(self.conv(h.unflatten(-1, (2, 4)).transpose(1, 2)))
        return self.head(h.mean((-1, -2)))


SELECTIONS: dict[str, Selection] = {
    "columns": {"blocks.0.linear": {"columns": [0, 5, 7]}, "blocks.1.mixed": {"columns": [1, 6]}},
    "rows": {"blocks.0.mixed": {"rows": [0, 7]}, "blocks.1.linear": {"rows": [2, 3]}, "words": {"rows": [1, 4]}},
    "everything": {
        "words": {"columns": [1, 6], "rows": [0, 3, 10]},
        "blocks.0.linear": {"columns": [0, 5], "rows": [2, 6], "elements": [1, 9, 39], "bias": True},
        "blocks.0.norm": {"weight": True, "bias": True},
        "blocks.0.mixed": {"columns": [1], "rows": [0, 7], "elements": [7, 23, 48]},
        "blocks.1.linear": {"weight": True, "bias": True},
        "blocks.1.norm": {"bias": True},
        "blocks.1.mixed": {"rows": [3], "elements": [0, 55], "bias": True},
        "conv": {"columns": [1], "rows": [0, 3], "bias": True},
        "head": {"columns": [2, 4], "bias": True},
    },
}
SAVED = {"columns": ["head"]}  # modules that are trained and saved whole


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def tuned(chosen: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PeftModel:
    model, units = net(dtype, seed), SELECTIONS[chosen]
    modules = {}
    for name, own in units.items():
        module = model.get_submodule(name)
        shape = tuple(module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape)  # type: ignore[union-attr]
        modules[name] = ModulePlan(shape, **own)
    plan = Plan(modules, "all", 10**9, 10**9, "", always_trained=SAVED.get(chosen, []))
    return get_peft_model(model, ReltuneConfig(plan=plan))


def with_saved(chosen: str) -> Selection:
    """The selection, with the modules that are trained whole."""
    return {**SELECTIONS[chosen], **{name: {"weight": True, "bias": True} for name in SAVED.get(chosen, [])}}


def batches(steps: int, accumulate: int = 2) -> list[list[Batch]]:
    """For every step as many batches of eight as are accumulated."""
    g = torch.Generator().manual_seed(1)

    def one() -> Batch:
        return torch.randint(0, 11, (8, 6), generator=g), torch.randint(0, 3, (8,), generator=g)

    return [[one() for _ in range(accumulate)] for _ in range(steps)]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).double(), batch[1])


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def accelerator_for(kind: str, accumulate: int = 2, **fields: Any) -> Accelerator:
    """ddp, ddp static, full or sharded: the last two are FSDP2 with its two kinds of state dicts."""
    AcceleratorState._reset_state(True)
    if kind.startswith("ddp"):
        handler = DistributedDataParallelKwargs(static_graph="static" in kind, find_unused_parameters="find" in kind)
        return Accelerator(cpu=True, gradient_accumulation_steps=accumulate, kwargs_handlers=[handler], **fields)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        state_dict_type=f"{kind.upper()}_STATE_DICT",
    )
    return Accelerator(cpu=True, gradient_accumulation_steps=accumulate, fsdp_plugin=plugin, **fields)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    steps: list[list[Batch]],
    max_norm: float | None = None,
    loss: Callable[[nn.Module, Batch], Tensor] = loss_of,
) -> None:
    """Each process on its half of every batch."""
    rank = dist.get_rank()
    for step in steps:
        for tokens, labels in step:
            with accelerator.accumulate(model):
                half = tokens.chunk(2)[rank], labels.chunk(2)[rank]
                accelerator.backward(loss(model, half))
                if max_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()


def begin(kind: str, chosen: str, make: Callable = adam, dtype: torch.dtype = torch.float64, **fields: Any) -> tuple:
    accelerator = accelerator_for(kind, **fields)
    model = tuned(chosen, dtype)
    optimizer = make(p for p in model.parameters() if p.requires_grad)
    return accelerator, *accelerator.prepare(model, optimizer)


def save(accelerator: Accelerator, model: nn.Module, directory: Path) -> None:
    """The adapter, from gathered state where it is spread; and what the trained model gives on the first batch."""
    state = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        unwrapped.save_pretrained(directory, state_dict=state)
    model.eval()
    with torch.no_grad():
        logits = model(batches(1)[0][0][0])
        with unwrapped.disable_adapter():
            base = model(batches(1)[0][0][0])
    save_file({"logits": logits, "base": base}, directory.parent / f"{directory.name}-{dist.get_rank()}.safetensors")


# -- functions of the processes ---------------------------------------------------------------------------------------


def trained(directory: Path) -> None:
    """Every selection under every wrapper, with accumulation, and with clipping where the optimizer heeds it."""
    for kind in ("ddp", "ddp find", "full"):
        for chosen in SELECTIONS:
            make, max_norm = (adam, None) if chosen == "rows" else (sgd, 0.1)
            accelerator, model, optimizer = begin(kind, chosen, make)
            train(accelerator, model, optimizer, batches(5), max_norm)
            if kind.startswith("ddp"):
                same_on_all(model)
            save(accelerator, model, directory / f"{kind} {chosen}")


def same_on_all(model: nn.Module) -> None:
    """All processes hold the same numbers in every parameter and buffer, the written base weights among them."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        others = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(others, tensor.detach().contiguous())
        assert torch.equal(*others), name
    layers = [m for m in model.modules() if isinstance(m, ReltuneLayer) and m.originals]
    assert layers and all(layer._written == "default" for layer in layers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for function in sys.argv[2:]:
        place = Path(sys.argv[1], function)
        place.mkdir(exist_ok=True, parents=True)
        globals()[function](place)
    dist.destroy_process_group()
