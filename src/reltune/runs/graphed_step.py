"""Training steps as CUDA graphs, for models so small that the GPU waits for Python.

A step of such a model is hundreds of kernels, each of which takes less time than Python takes to launch it. Here the loss of a batch and
its gradients are recorded once for each shape of batch, and replayed without Python (NVIDIA's CUDA programming guide, "CUDA graphs").
All else in a step is as ever, accumulation, clipping, the optimizer, the log: a replay is a loss that has gradients.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Trainer, TrainingArguments

from reltune.errors import InputError, first_line
from reltune.names import CONTINUING
from reltune.runs.sizes import multiple_for

SEEN = 2  # steps of a shape that run as ever before it is recorded: many a shape comes once
MOST = 64  # shapes that are recorded
SMALL = 500_000_000  # parameters of a base for which a comparison records steps unless told otherwise


def replay_steps(trainer: Trainer, model: nn.Module, required: bool = True) -> GraphedLoss | None:
    """Have a Trainer record the losses of its batches, and replay them. Where it cannot, it is left as it is, or if ``required``
    InputError is raised."""
    if why := _why_not(trainer.args, model):
        if required:
            raise InputError(f"cuda_graphs: {why}; leave it out.")
        return None
    collator: Any = trainer.data_collator
    if getattr(collator, "pad_to_multiple_of", 0) is None and (multiple := multiple_for(model.config)) > 1:
        collator.pad_to_multiple_of = multiple
    graphed = GraphedLoss(trainer.compute_loss, model, required)
    trainer.compute_loss = graphed.compute_loss  # type: ignore[method-assign]
    return graphed


def check_graphs(given: Mapping[str, Any], task: str) -> None:
    """Raise InputError where training fields, the task or the machine say already that nothing can be recorded."""
    if why := why_not_here(given, task):
        raise InputError(f"cuda_graphs: {why}; leave it out.")


def why_not_here(given: Mapping[str, Any], task: str) -> str:
    """Why nothing can be recorded, as far as training fields, the task and the machine say; else empty."""
    if not torch.cuda.is_available() or given.get("use_cpu"):
        return "steps are recorded on an NVIDIA GPU, and none is used here"
    return f"TRL's steps count in Python, and {task} trains by them" if task in CONTINUING else ""


def why_not_unasked(given: Mapping[str, Any], args: TrainingArguments, task: str, model: nn.Module) -> str:
    """Why a comparison with these fields, of this base ``model``, does not record steps unless told to; empty where it does."""
    if found := why_not_here({"use_cpu": args.use_cpu}, task) or _why_not(args, model):
        return found
    reasons = {
        "activations wait in host memory": given.get("activation_offloading"),
        "the base is held in few bits": any(map(given.get, ("load_in_4bit", "load_in_8bit", "frozen_dtype"))),
        "batch norms count their batches": any(isinstance(m, _BatchNorm) for m in model.modules()),
        f"the base has more than {SMALL:,} parameters": sum(p.numel() for p in model.parameters()) > SMALL,
        "gradient checkpointing asks for the state of random numbers": args.gradient_checkpointing,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _why_not(args: TrainingArguments, model: nn.Module) -> str:
    reasons = {
        "several processes add up their gradients in the middle of a step": args.world_size > 1,
        "several GPUs share each batch": args.n_gpu > 1,
        "DeepSpeed has steps of its own": bool(args.deepspeed),
        "torch_compile makes other kernels": args.torch_compile,
        "gradient checkpointing asks for the state of random numbers": getattr(
            model, "is_gradient_checkpointing", False
        ),
        "float16 scales losses by a number that changes; use bf16": args.fp16,
        "batch norms count their batches": any(isinstance(m, _BatchNorm) and m.training for m in model.modules()),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


class GraphedLoss:
    """The loss of a Trainer's batches, recorded where their shape comes again.

    Attributes:
        recorded: the shapes' recordings.
        required: whether it is an error where a step cannot be recorded.
        ended: whether nothing is recorded any more.
    """

    def __init__(self, loss_of: Callable[..., Any], model: nn.Module, required: bool = True) -> None:
        self.loss_of = loss_of
        self.required = required
        self.ended = False
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]  # of the last replay, whatever its shape
        self.replays = 0
        self.recorded: dict[Any, _Recorded] = {}
        self.seen: collections.Counter[Any] = collections.Counter()
        self.pool: Any = None
        self.places = self._places()

    def _places(self) -> list[int]:
        return [p.data_ptr() for p in self.parameters]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        shape = None if return_outputs or not model.training else _shape(inputs, num_items_in_batch)
        if shape is not None:
            if self.places != (places := self._places()):  # a recording reads and writes where tensors were
                self.recorded.clear()
                self.places = places
            found = self.recorded.get(shape)
            if found is None and not self.ended and self.seen[shape] >= SEEN and len(self.recorded) < MOST:
                found = self._record(shape, model, inputs, num_items_in_batch)
            self.seen[shape] += 1
            if found is not None:
                found.take(inputs, num_items_in_batch)
                self.replays += 1
                return _Replay.apply(self, found, *self.parameters)
        return self.loss_of(model, inputs, return_outputs, num_items_in_batch)

    def _record(self, shape: Any, model: nn.Module, inputs: dict[str, Any], count: Any) -> _Recorded | None:
        try:
            made = self.recorded[shape] = _Recorded(self, model, inputs, count)
        except _CannotRecord as error:
            if self.required:
                raise InputError(
                    f"cuda_graphs: a step of this model cannot be recorded ({error}); leave it out."
                ) from error
            why = str(error)
        else:
            return made
        self.end()
        warnings.warn(
            f"a step of this model cannot be recorded as a CUDA graph ({why}); training goes on without.", stacklevel=2
        )
        return None

    def end(self) -> bool:
        """Record nothing more, and give the memory of recordings back; whether that was not done before."""
        if self.ended:
            return False
        self.ended = True
        self.recorded.clear()
        self.gradients, self.pool = [], None
        return True


class _CannotRecord(Exception):
    """Something in a step does not go with recording it, memory apart."""


def _shape(inputs: Mapping[str, Any], count: Any) -> Any:
    """What batches have in common that one recording is for; None where they are more than tensors."""
    if not all(isinstance(value, Tensor) for value in inputs.values()):
        return None
    counted = count.shape if isinstance(count, Tensor) else count
    return counted, *((name, value.shape, value.dtype) for name, value in inputs.items())


class _Recorded:
    """The loss of batches of one shape and its gradients, which ``take`` computes of a batch, on the device."""

    def __init__(self, graphed: GraphedLoss, model: nn.Module, inputs: Mapping[str, Tensor], count: Any) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        self.count = count.clone() if isinstance(count, Tensor) else count
        self.gradients: list[Tensor | None] = []
        self.loss = torch.zeros((), device=graphed.parameters[0].device)

        def run() -> None:
            with torch.enable_grad():
                loss = graphed.loss_of(model, dict(self.inputs), num_items_in_batch=self.count)
                found = torch.autograd.grad(loss, graphed.parameters, allow_unused=True)
            self.gradients = [None if g is None else own for g, own in zip(found, graphed.gradients, strict=True)]
            reached = [own for own in self.gradients if own is not None]
            with torch.no_grad():
                torch._foreach_copy_(reached, [g for g in found if g is not None])
                self.loss.copy_(loss)

        try:
            self.replay = record(run, graphed)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if _ran_out(error):
                raise torch.OutOfMemoryError("out of memory while a step was recorded as a CUDA graph") from error
            raise _CannotRecord(first_line(error)) from error

    def take(self, inputs: Mapping[str, Tensor], count: Any) -> None:
        for name, value in inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)
        if isinstance(count, Tensor):
            self.count.copy_(count)
        self.replay()


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out first: to leave a recording that failed raises an error of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def record(run: Callable[[], None], graphed: GraphedLoss) -> Callable[[], None]:
    """What does again what ``run`` does on the GPU, without its Python."""
    device = graphed.parameters[0].device
    with torch.cuda.device(device):
        graphed.pool = graphed.pool or torch.cuda.graph_pool_handle()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        # What is made at a first call must be there: workspaces, compiled kernels. No random number is used up by it.
        with torch.random.fork_rng([device.index], device_type="cuda"), torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphed.pool):
            run()
    return graph.replay


class _Replay(torch.autograd.Function):
    """(its maker, the recording, the parameters) -> the loss of the batch that was taken last, whose gradients are there already."""

    @staticmethod
    def forward(ctx: Any, graphed: GraphedLoss, recorded: _Recorded, *parameters: Tensor) -> Tensor:
        ctx.graphed, ctx.recorded, ctx.replay = graphed, recorded, graphed.replays
        return recorded.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.replay != ctx.graphed.replays:
            raise RuntimeError(
                "another batch was replayed since; differentiate a replayed loss before the next one is computed."
            )
        gradients = ctx.recorded.gradients
        scaled = iter(torch._foreach_mul([own for own in gradients if own is not None], g))
        return None, None, *(None if own is None else next(scaled) for own in gradients)
