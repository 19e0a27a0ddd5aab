"""What each of two processes runs in test_distributed_training.py: functions of this file by name, in a gloo group.

torchrun … tests/distributed_worker.py DIRECTORY FUNCTION …
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parent))

from command_line import reltune as command
from reltune.errors import InputError
from reltune.plan.plan import ModulePlan, Plan
from reltune.runs import training
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
    "directions": {"blocks.0.mixed": {"directions": [0, 2]}, "blocks.1.linear": {"directions": [1]}},
}
VECTORS = {  # of the modules with directions
    name: np.random.default_rng(seed).normal(size=(3, size)).astype(np.float32)
    for seed, (name, size) in enumerate({"blocks.0.mixed": 7, "blocks.1.linear": 8}.items())
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
        modules[name].vectors = VECTORS[name] if modules[name].directions else None
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


def shard_on_cpus() -> None:
    """Accelerate takes FSDP for something of accelerators and trains by DDP on CPUs; have it shard there too."""
    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        new = AcceleratorState._shared_state == {}
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if new and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def forget() -> None:
    """What an accelerator leaves for the next one."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)


def accelerator_for(kind: str, accumulate: int = 2, **fields: Any) -> Accelerator:
    """ddp, ddp static, full or sharded: the last two are FSDP2 with its two kinds of state dicts."""
    AcceleratorState._reset_state(True)
    forget()
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
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, FSDPModule) == (not kind.startswith("ddp"))
    return accelerator, model, optimizer


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
                assert not model.modules_buffers  # indices are not sent around before every pass
                same_on_all(model)
            save(accelerator, model, directory / f"{kind} {chosen}")


def same_on_all(model: nn.Module) -> None:
    """All processes hold the same numbers in every parameter and buffer, the written base weights among them."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        others = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(others, tensor.detach().contiguous())
        assert torch.equal(*others), name
    layers = [m for m in model.modules() if isinstance(m, ReltuneLayer)]
    assert layers and all(layer._written == "default" for layer in layers if layer.originals)


def resumed(directory: Path) -> None:
    """save_state in the middle, load_state into a fresh model, and the rest: bit for bit what was not interrupted."""
    for kind in ("ddp", "full", "sharded"):
        accelerator, model, optimizer = begin(kind, "everything")
        train(accelerator, model, optimizer, batches(4)[:2])
        place = directory / f"{kind} state"
        accelerator.save_state(str(place))
        train(accelerator, model, optimizer, batches(4)[2:])
        save(accelerator, model, directory / f"{kind} straight")
        accelerator, model, optimizer = begin(kind, "everything")
        accelerator.load_state(str(place))
        train(accelerator, model, optimizer, batches(4)[2:])
        save(accelerator, model, directory / f"{kind} resumed")


class Holder(nn.Module):
    """A model in a module of somebody else's, where DDP does not see which buffers need not be sent."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.held(tokens)


def two_graphs(model: nn.Module, batch: Batch) -> Tensor:
    """Two forward passes, and one of the base between them, before the backward pass: as preference tuning does it."""
    inner = model.module if hasattr(model, "module") else model
    adapted = next(m for m in inner.modules() if isinstance(m, PeftModel))
    first = loss_of(model, (batch[0][:2], batch[1][:2]))
    with adapted.disable_adapter(), torch.no_grad():
        kept = model(batch[0])
    second = loss_of(model, (batch[0][2:], batch[1][2:]))
    return (first + second) / 2 + 0 * kept.sum()


def wrapped_by_hand(directory: Path) -> None:
    """DDP and fully_shard without accelerate, in ways that meet what the layers keep."""
    rank = dist.get_rank()
    DDP = nn.parallel.DistributedDataParallel
    ways: dict[str, Callable] = {
        "ddp held": lambda m: DDP(Holder(m)),
        "ddp static": lambda m: DDP(m, static_graph=True),
        "ddp views": lambda m: DDP(m, gradient_as_bucket_view=True),
        "all in one group": fully_shard,
        "kept whole": lambda m: fully_shard(m, reshard_after_forward=False),
        "by layer": by_layer,
        "loaded": lambda m: by_layer(moved(m)),
        "from another device": lambda m: by_layer(replaced(m)),
    }
    for name, wrap in ways.items():
        model = tuned("everything")
        wrapped = wrap(model)
        optimizer = sgd(p for p in wrapped.parameters() if p.requires_grad)
        if name == "loaded":
            check_moved(wrapped)
        for step in batches(3, 1):
            for tokens, labels in step:
                loss = loss_of if name == "ddp static" else two_graphs
                loss(wrapped, (tokens.chunk(2)[rank], labels.chunk(2)[rank])).backward()
                optimizer.step()
                optimizer.zero_grad()
        if name.startswith("ddp"):
            same_on_all(wrapped)
        elif name != "kept whole":  # the base's own numbers are in the shards since the first step
            assert not any(m._written for m in wrapped.modules() if isinstance(m, ReltuneLayer) and m.originals)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        frozen = {k: v for k, v in state.items() if "base_layer.weight" in k}
        base = {f"base_model.model.{k}": v for k, v in net().state_dict().items()}
        assert frozen and all(torch.equal(v, base[k.replace(".base_layer", "")]) for k, v in frozen.items()), name
        if rank == 0:
            model.save_pretrained(directory / name, state_dict=state)
        model.eval()
        with torch.no_grad():
            tokens = batches(1)[0][0][0]
            logits = model(tokens)
            with model.disable_adapter():
                base_logits = model(tokens)
        save_file({"logits": logits, "base": base_logits}, directory / f"{name}-{rank}.safetensors")


def by_layer(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, ReltuneLayer):
            fully_shard(module)
    return fully_shard(model)


def replaced(model: nn.Module) -> nn.Module:
    """With other storages under all tensors, as fully_shard leaves them where it moves a model to its own device."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def moved(model: nn.Module) -> nn.Module:
    """With values other than the base's, which are in its weights by now."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5)
        model(batches(1)[0][0][0])
    return model


def check_moved(model: nn.Module) -> None:
    """Sharded while an adapter was in the weights, a model gives what it gave before; then start where the others did."""
    tokens = batches(1)[0][0][0]
    with torch.no_grad():
        before = moved(tuned("everything"))
        torch.testing.assert_close(model(tokens), before(tokens), rtol=0, atol=1e-12)
        with model.disable_adapter(), before.disable_adapter():
            torch.testing.assert_close(model(tokens), before(tokens), rtol=0, atol=1e-12)
        for p in model.parameters():
            if p.requires_grad:
                p.sub_(0.5)


def bfloat16(directory: Path) -> None:
    """float32 adapters on a bfloat16 base, in one group with it; and all in bfloat16 while float32 is kept."""
    for name, fields in {"as it is": {}, "mixed precision": {"mixed_precision": "bf16"}}.items():
        accelerator, model, optimizer = begin("full", "rows", sgd, torch.bfloat16, **fields)
        train(accelerator, model, optimizer, batches(5))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        state = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            model.save_pretrained(directory / name, state_dict=state)


def checkpointed(directory: Path) -> None:
    """FSDP2's own activation checkpointing, which runs forward passes again in the backward pass."""
    accelerator = accelerator_for("full")
    accelerator.state.fsdp_plugin.activation_checkpointing = True
    model = tuned("everything")
    model, optimizer = accelerator.prepare(model, adam(p for p in model.parameters() if p.requires_grad))
    train(accelerator, model, optimizer, batches(3))
    state = {k.replace("_checkpoint_wrapped_module.", ""): v for k, v in accelerator.get_state_dict(model).items()}
    save_file({k: v.contiguous() for k, v in state.items() if "reltune_" in k}, directory / f"{dist.get_rank()}.st")


FEW_BITS: dict[str, Selection] = {
    "single weights": {"0": {"elements": [0, 33, 700, 1023]}, "2": {"elements": [5, 31]}},
    "all together": {
        "0": {"columns": [3], "elements": [0, 33, 700]},
        "2": {"rows": [7], "elements": [5, 31], "bias": True},
    },
}


def four_bits() -> nn.Sequential:
    """Two linear maps in 4 bits, of a size that two processes share evenly, and a head."""
    torch.manual_seed(0)
    packed = []
    for _ in range(2):
        plain = nn.Linear(32, 32)
        map_of_4_bits = bitsandbytes.nn.Linear4bit(32, 32, compute_dtype=torch.float32, quant_type="nf4")
        map_of_4_bits.load_state_dict(plain.state_dict())
        packed.append(map_of_4_bits.to("cpu"))  # which packs it
    return nn.Sequential(packed[0], nn.Tanh(), packed[1], nn.Tanh(), nn.Linear(32, 3))


def tuned_in_4_bits(chosen: str) -> PeftModel:
    modules = {name: ModulePlan((32, 32), **units) for name, units in FEW_BITS[chosen].items()}
    return get_peft_model(four_bits(), ReltuneConfig(plan=Plan(modules, "all", 10**6, 10**6, "")))


def vectors(steps: int) -> list[Batch]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 32, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(steps)]


def in_few_bits(directory: Path) -> None:
    """Bases in 4 bits under DDP and FSDP2, with the base's output between the passes."""
    rank = dist.get_rank()
    for kind, wrap in {"ddp": nn.parallel.DistributedDataParallel, "fsdp": fully_shard}.items():
        for chosen in FEW_BITS:
            model = tuned_in_4_bits(chosen)
            wrapped = wrap(model)
            optimizer = adam(p for p in wrapped.parameters() if p.requires_grad)
            for x, labels in vectors(5):
                two_graphs(wrapped, (x.chunk(2)[rank], labels.chunk(2)[rank])).backward()
                optimizer.step()
                optimizer.zero_grad()
            state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            if rank == 0:
                trained = {key: value for key, value in state.items() if ".reltune_" in key}
                save_file(
                    {key: value.contiguous() for key, value in trained.items()}, directory / f"{kind} {chosen}.st"
                )


BERT = {
    "bert.encoder.layer.0.attention.self.query": {"columns": [0, 9], "rows": [3], "elements": [1, 100, 255]},
    "bert.encoder.layer.1.output.dense": {"columns": [4, 5, 30], "bias": True},
    "bert.encoder.layer.1.output.LayerNorm": {"weight": True, "bias": True},
}
HEADS = ["bert.pooler", "classifier"]
EXAMPLES = 24


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**sizes, **dropout, intermediate_size=32, max_position_embeddings=16)
    return BertForSequenceClassification(config).double()


def tuned_bert() -> PeftModel:
    model = bert()
    modules = {name: ModulePlan(tuple(model.get_submodule(name).weight.shape), **own) for name, own in BERT.items()}  # type: ignore[union-attr,arg-type]
    plan = Plan(modules, "all", 10**9, 10**9, "", always_trained=HEADS, task_type="SEQ_CLS")
    return get_peft_model(model, ReltuneConfig(plan=plan))


def trainer(directory: Path, batch_size: int = 3, **fields: Any) -> Trainer:
    g = torch.Generator().manual_seed(3)
    examples = [
        {"input_ids": torch.randint(1, 20, (8,), generator=g), "labels": torch.randint(0, 3, (), generator=g)}
        for _ in range(EXAMPLES)
    ]
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        max_grad_norm=0.5,
        learning_rate=0.05,
        weight_decay=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
        logging_strategy="no",
        seed=7,
        dataloader_pin_memory=False,
        average_tokens_across_devices=False,  # else Trainer takes the mean loss for a sum, and multiplies it by two
        **fields,
    )
    return Trainer(tuned_bert(), arguments, train_dataset=examples)


def by_trainer(directory: Path) -> None:
    """transformers.Trainer as it is, to the end, and from its checkpoint to the end."""
    for kind in ("ddp", "full", "sharded"):
        fields: dict[str, Any] = {}
        if kind != "ddp":
            config = {"transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": f"{kind.upper()}_STATE_DICT"}
            fields = {"fsdp": True, "fsdp_config": config}
        for how in ("straight", "resumed"):
            forget()
            made = trainer(directory / kind / how, **fields)
            made.train(
                resume_from_checkpoint=str(directory / kind / "straight" / "checkpoint-2") if how == "resumed" else None
            )
            assert made.state.global_step == 4 and isinstance(made.model_wrapped, FSDPModule) == (kind != "ddp")
            state = made.accelerator.get_state_dict(made.model)
            if made.is_world_process_zero():
                made.model.save_pretrained(directory / kind / how / "adapter", state_dict=state)
            made.accelerator.wait_for_everyone()


def by_command(directory: Path) -> None:
    """reltune tune and evaluate, on a run that the test has made; what they print, per process."""
    training._on_cpus = lambda args: False  # or they would refuse to spread a model over CPUs
    for kind in ("ddp", "full", "sharded"):
        run = directory / kind
        config = directory / f"{kind}.json"
        layers = {"transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": f"{kind.upper()}_STATE_DICT"}
        config.write_text(json.dumps(layers))
        words = [] if kind == "ddp" else ["--fsdp", "--fsdp_config", config]
        answers = [command("tune", run, *TUNE, "--per_device_train_batch_size", 4, *words), command("evaluate", run)]
        assert [answer.code for answer in answers] == [0, 0], answers
        (directory / f"{kind}-{dist.get_rank()}.txt").write_text("".join(answer.out for answer in answers))


def swept(directory: Path) -> None:
    """reltune tune with a sweep, on a run that the test has made."""
    answer = command("tune", directory / "run", *SWEEP, "--per_device_train_batch_size", 4)
    assert answer.code == 0, answer
    (directory / f"{dist.get_rank()}.txt").write_text(answer.out)


TUNE = ["--max_steps", 4, "--per_device_eval_batch_size", 5, "--eval_strategy", "no", "--learning_rate", 0.02]
SWEEP = [*TUNE[:-2], "--sweep", "learning_rate=0.05,0.02,1e30", "--metric_for_best_model", "loss"]


def generations(directory: Path) -> None:
    """What a decoder writes for seven prompts, for one and for none, and how many prompts this process took."""
    from reltune.tasks.generation import continuations

    model, tokenizer, prompts = decoder(directory.parent / "decoder")
    taken = []
    generate = model.generate
    model.generate = lambda **inputs: (taken.append(len(inputs["input_ids"])), generate(**inputs))[1]
    texts = [continuations(model, tokenizer, some, 6, batch_size=3) for some in (prompts, prompts[:1], [])]
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps([texts, taken]))


def decoder(directory: Path) -> tuple[Any, Any, list[list[int]]]:
    """A saved decoder with larger weights, so that what it writes depends on the prompt, its tokenizer, and prompts."""
    model, tokenizer = (of.from_pretrained(directory) for of in (AutoModelForCausalLM, AutoTokenizer))
    for parameter in model.parameters():
        parameter.data.mul_(20)
    drawn = torch.Generator().manual_seed(0)
    return model, tokenizer, [torch.randint(1, 12, (n,), generator=drawn).tolist() for n in (5, 1, 8, 2, 4, 3, 6)]


def refusals(directory: Path) -> None:
    rank = dist.get_rank()
    tokens = batches(1)[0][0][0]
    _, model, _ = begin("full", "everything")
    with expect("cannot be merged into weights that are spread over processes"):
        model.merge_adapter()
    with expect("cannot be added to weights that are spread over processes"):
        model.add_adapter("other", model.peft_config["default"])
    with expect("no change can be made dense"):
        model.base_model.model.blocks[0].linear.get_delta_weight("default")
    with expect("runs while its weight is spread over processes"):
        model.base_model.model.blocks[0].linear(torch.zeros(1, 8, dtype=torch.float64))
    SELECTIONS["of this process"] = {"words": {"rows": [rank, 4]}}
    for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
        other = wrap(tuned("of this process"))
        with expect("the processes train different units or different base models"):
            other(tokens)
    with expect("the processes train different units or different base models"):
        nn.parallel.DistributedDataParallel(tuned("rows", seed=rank))(tokens)
    SELECTIONS["of this process"] = {"blocks.1.linear": {"directions": [rank]}}
    with expect("the processes train different units or different base models"):
        nn.parallel.DistributedDataParallel(tuned("of this process"))(tokens)
    model = tuned("rows")
    base = model.base_model.model.blocks[1].linear.base_layer
    base.weight = base._parameters.pop("weight").data  # what FSDP1 does while a module runs; it is not there for CPUs
    with expect("not a parameter of its own, as under FSDP1"):
        model(tokens)
    model = tuned("rows")
    model.base_model.model.blocks[1].linear.base_layer.weight.ds_id = 0
    with expect("ZeRO-3"):
        model(tokens)
    accelerator = accelerator_for("full")
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = True
    model = tuned("rows")
    with expect("cpu_ram_efficient_loading"):
        accelerator.prepare(model, sgd(p for p in model.parameters() if p.requires_grad))


@contextlib.contextmanager
def expect(sentence: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(f"no error: {sentence}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shard_on_cpus()
    for function in sys.argv[2:]:
        place = Path(sys.argv[1], function)
        place.mkdir(exist_ok=True, parents=True)
        forget()
        globals()[function](place)
    dist.destroy_process_group()
