"""One training path for every method: transformers.Trainer, with defaults per method and what a step cost."""

from __future__ import annotations

import collections
import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, set_seed
from transformers.utils.hub import is_offline_mode

from reltune import reading
from reltune.config.training import check_amounts
from reltune.config.training_fields import DEFAULTS
from reltune.errors import InputError, first_line
from reltune.files import PARTIAL, discard, put_in_place, stored, write_text
from reltune.methods.planned import method_of as method_of
from reltune.methods.registry import METHODS
from reltune.metrics import largest_is_best
from reltune.processes import Processes
from reltune.runs.directory import checkpoints
from reltune.runs.graphed_step import replay_steps
from reltune.runs.halving import halve_where_memory_ends
from reltune.runs.kept_batch import STOPPED_AT
from reltune.runs.prefix_cache import PrefixCache, SavesIndex
from reltune.runs.progress import show_progress
from reltune.runs.watch import watch
from reltune.tasks.task import Examples, Task

# Learning rates measured per method (each in its file in methods/): the best one differs by more than an order of
# magnitude between methods, so one default for all would decide every comparison.
LEARNING_RATES = {method.rates: method.rate for method in METHODS.values()}
AHEAD = 100  # steps, at least, before a GPU's clock is read: long enough for it to be through with them
MOST = {method.rates: method.most for method in METHODS.values()}


def default_rate(method: str, task: Task, share: float = 1.0) -> float:
    """The learning rate of a method for a task where none is given: the rate in the table over √share. Of single weights that
    is their share of their matrices, of LoRA its rank; of most methods 1."""
    rate = {**LEARNING_RATES, **task.learning_rates}[method]
    return min(rate / share**0.5, MOST[method])


@dataclasses.dataclass
class TrainingCost:
    """What training took. Seconds per step is the median; peak memory is the accelerator's, or the process's on a CPU."""

    steps: int
    timed_steps: int  # those that this process ran, which are fewer after a resumption
    seconds_per_step: float | None
    peak_memory_bytes: int | None
    memory_before_bytes: int | None = None  # of the process on a CPU, when training began
    replayed_batches: int = 0  # as CUDA graphs


def machine() -> str:
    """What this runs on, and the versions of Python and the libraries that decide how."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{device}; Python {platform.python_version()}, {versions}"


def arguments(
    output_dir: str, method: str, seed: int, given: dict[str, Any], task: Task, share: float = 1.0, **forced: Any
) -> TrainingArguments:
    """The task's TrainingArguments for a method: its defaults, replaced by what the user gave, replaced by what is ``forced``.

    ``share``: what the learning rate follows, as in ``default_rate``.

    The best checkpoint is the one with the best ``task.best``, and checkpoints follow evaluations, unless told otherwise.
    Raises InputError for values that contradict each other or leave nothing to train.
    """
    rate = {"learning_rate": default_rate(method, task, share)}
    values = {**DEFAULTS, **_in_step_with_gpu(), **task.defaults, **rate, **given, **forced}
    if values.get("load_best_model_at_end"):
        if values["eval_strategy"] == "no":
            raise InputError(
                "load_best_model_at_end compares evaluations while training, and eval_strategy is no; write epoch or steps."
            )
        values["metric_for_best_model"], values["greater_is_better"] = compared_by(values, task)
        if "save_strategy" not in {**given, **forced}:
            values["save_strategy"] = values["eval_strategy"]
        if values["eval_strategy"] == "steps":  # Transformers evaluates as often as it logs, and saves every 500 steps
            values.setdefault("save_steps", values.get("eval_steps") or values["logging_steps"])
    if launched_on_cpus() or (values.get("bf16") and not torch.accelerator.is_available()):
        values["use_cpu"] = True  # without it Transformers takes bf16 to be for a GPU
    for name, mend in (("FSDP", "--fsdp and --fsdp_config, which hold"), ("DeepSpeed", "--deepspeed, which holds")):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            raise InputError(
                f"accelerate launch was told to use {name}, which would hold for all that a command does; leave it out there, "
                f"and pass {mend} for training."
            )
    if values.get("deepspeed"):
        _check_deepspeed(values["deepspeed"])
    try:
        args = task.make_arguments(output_dir=output_dir, seed=seed, **values)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training fields: {error}") from error
    check_amounts(vars(args))
    if (args.fsdp_plugin_args or {}).get("fsdp_version") == 1:
        raise InputError("fsdp_config asks for FSDP1, under which reltune cannot train; write version 2, or none.")
    if args.fsdp and _on_cpus(args):
        raise InputError(
            "fsdp spreads a model over accelerators, of which there are none; leave it out, and every process trains a whole "
            "copy of the model."
        )
    if args.fsdp and "RANK" not in os.environ:
        raise InputError(
            "fsdp wants a launcher, for one process too; start reltune with torchrun --nproc_per_node N -m reltune."
        )
    return args


def _in_step_with_gpu() -> dict[str, Any]:
    """Defaults on a GPU: batches go to it while it works on what it was given before."""
    return (
        {"dataloader_pin_memory": True, "accelerator_config": {"non_blocking": True}}
        if torch.cuda.is_available()
        else {}
    )


def compared_by(given: Mapping[str, Any], task: Task) -> tuple[str, bool]:
    """The metric by which checkpoints and trials are compared, and whether the best is the largest: the task's, unless the
    training fields name another. Transformers would take the largest perplexity for the best."""
    metric = given.get("metric_for_best_model") or task.best
    chosen = given.get("greater_is_better")
    return metric, largest_is_best(metric) if chosen is None else chosen


def _check_deepspeed(config: str | dict[str, Any]) -> None:
    """Raise InputError for a DeepSpeed config (or its JSON file) that training cannot follow here."""
    if isinstance(config, str):
        try:
            config = reading.read_json(config)
        except (OSError, reading.Damaged) as error:
            raise InputError(f"deepspeed {config} cannot be read as a DeepSpeed config in JSON ({error}).") from error
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if isinstance(zero, dict) and zero.get("stage") == 3:
        raise InputError(
            "deepspeed asks for ZeRO-3, which spreads the weights to train over processes; write stage 0, 1 or 2, or train under "
            "FSDP2 (--fsdp)."
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("deepspeed is given, and the package is not installed; run: pip install deepspeed")
    if "RANK" not in os.environ:
        raise InputError(
            "deepspeed wants a launcher, for one process too; start reltune with torchrun --nproc_per_node N -m reltune."
        )


def _on_cpus(args: TrainingArguments) -> bool:
    return args.device.type == "cpu"


def launched_on_cpus() -> bool:
    """Whether a launcher started several processes with no accelerator: told nothing, each would work by itself."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and not torch.accelerator.is_available()


def check_arguments(
    model: nn.Module, args: TrainingArguments, examples: Examples, collator: Any, streamed: bool = False
) -> None:
    """Raise InputError for training fields that cannot work here (packages, devices, ranges), before hours are spent.

    ``examples`` are those of training, or the first of them where these are ``streamed``.
    """
    _check_hub(args)
    if args.fp16 and _on_cpus(args):
        raise InputError("fp16 has no effect on a CPU; leave it out, or write bf16.")
    with tempfile.TemporaryDirectory() as scratch, _sharing_for_itself(), frozen_base(model):
        args = copy.copy(args)
        args.output_dir, args.push_to_hub = scratch, False  # Trainer makes the directory, and a repository, at once
        try:
            trainer = Trainer(
                model=model, args=args, train_dataset=examples, eval_dataset=examples, data_collator=collator
            )
            batches = trainer.get_train_dataloader()
            trainer.get_eval_dataloader()
            trainer.create_optimizer_and_scheduler(num_training_steps=1)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"training fields: {error}") from error
    if not streamed and not len(batches):
        raise InputError(
            f"dataloader_drop_last leaves nothing to train on: the {len(examples)} training examples fill no batch of "
            f"{args.train_batch_size}; leave it out, or pass a smaller --per_device_train_batch_size."
        )


def _check_hub(args: TrainingArguments) -> None:
    """Raise InputError unless training may push to the Hugging Face Hub what it is to push there."""
    if not args.push_to_hub:
        return
    if is_offline_mode():
        raise InputError(
            "push_to_hub needs the Hugging Face Hub, and HF_HUB_OFFLINE is set; unset it, or leave --push_to_hub out."
        )
    try:
        HfApi().whoami(token=args.hub_token)
    except Exception as error:  # of the network, of the login
        raise InputError(
            f"push_to_hub cannot reach the Hugging Face Hub, or is not let in ({first_line(error)}); check the network, log in with "
            "`hf auth login`, or leave --push_to_hub out."
        ) from error


def train(
    model: nn.Module,
    args: TrainingArguments,
    task: Task,
    processor: Any,
    train_examples: Examples,
    held_out: Examples | None = None,
    resume_from_checkpoint: str | None = None,
    description: str = "train",
    callbacks: Sequence[TrainerCallback] = (),
    offload: bool = False,
    graphs: bool | None = False,
    cache: PrefixCache | None = None,
    also: Callable[[Trainer], None] | None = None,
) -> tuple[Trainer, TrainingCost]:
    """Train whatever of ``model`` requires a gradient. ``description`` names the progress bar. With ``offload`` activations wait
    in host memory, with ``graphs`` losses are replayed (None: where they can be), with a ``cache`` the frozen layers are computed once. ``also`` is told the
    Trainer before it begins. Of several processes each calls this; the cost is each one's own.

    Raises ArithmeticError when a loss, a gradient or a trained weight is infinite or not a number, and InputError when nothing that is
    trained gets a gradient.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing in the model requires a gradient, so there is nothing to train.")
    set_seed(args.seed)
    clock = _StepClock()
    evaluated = held_out if args.eval_strategy != "no" else None
    with scaled_in_float32(model, args):
        with _sharing_for_itself(), frozen_base(model):
            trainer = task.trainer(
                model,
                args,
                processor,
                train_examples,
                evaluated,
                callbacks=[clock, *([] if cache is None else [SavesIndex(cache)]), *callbacks],
            )
        if resume_from_checkpoint is not None:
            _goes_on_exactly(trainer, resume_from_checkpoint, streamed=not hasattr(train_examples, "__len__"))
        trainer.evaluate = _apart(trainer.evaluate)  # type: ignore[method-assign]
        if offload:
            trainer.training_step = _offloading(trainer.training_step, model)  # type: ignore[method-assign]
        show_progress(trainer, description)
        if also is not None:
            also(trainer)
        discard(Path(str(args.output_dir)) / STOPPED_AT)
        _read_in(model)
        with (
            PeakMemory() as memory,
            frozen_statistics(model),
            walked_through_once(model),
            liger_for_itself(model),
            _whole_checkpoints(trainer),
            contextlib.nullcontext() if cache is None else cache.used_by(trainer),
        ):
            graphed = None if graphs is False else replay_steps(trainer, model, required=graphs is not None)
            # around all that has a state for the time of a step
            halve_where_memory_ends(trainer, model, None if graphed is None else graphed.end)
            watch(trainer, model, processor)
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    with Processes.joined().together():
        trained: list[Any] = [p.detach() for p in model.parameters() if p.requires_grad]
        if not all(torch.isfinite(getattr(p, "_local_tensor", p)).all() for p in trained):
            raise ArithmeticError(
                "training diverged, some weights are not finite any more; try a lower --learning_rate."
            )
    # The first steps pay for warming up, once.
    times = clock.seconds[2:] or clock.seconds
    return trainer, TrainingCost(
        trainer.state.global_step,
        len(clock.seconds),
        statistics.median(times) if times else None,
        memory.peak,
        memory.before,
        0 if graphed is None else graphed.replays,
    )


def _apart(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """A function that evaluates in the same way, and afterwards sets torch's random state back to what it was before.

    An evaluation draws random numbers, since each data loader draws a seed. A training that is resumed from a checkpoint
    skips the evaluation that followed it, and still has to draw the same numbers as the training that was not interrupted.
    """

    @functools.wraps(evaluate)
    def evaluated(*args: Any, **options: Any) -> Any:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices, device_type="cuda"):
            return evaluate(*args, **options)

    return evaluated


def check_offloading(given: Mapping[str, Any]) -> None:
    """Raise InputError where there is no memory to free by moving activations to the host."""
    if not torch.cuda.is_available() or given.get("use_cpu"):
        raise InputError("activation_offloading moves activations off a GPU, and none is used here; leave it out.")


def _offloading(step: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """A training step in which activations wait in pinned host memory. They are copied beside the computation, as torchtune
    does it; with checkpointed layers only their inputs are."""
    offload = offloaded_activations(model)

    @functools.wraps(step)
    def offloading(*args: Any, **options: Any) -> Any:
        with offload:
            return step(*args, **options)

    return offloading


def offloaded_activations(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """What a forward pass of the model inside keeps for the backward pass waits in host memory; both must be inside."""
    from trl.models.activation_offloading import OffloadActivations

    offload: Any = OffloadActivations()
    offload.update_model_params(model)  # which stay where they are
    offload.param_storages |= {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    return offload


@contextlib.contextmanager
def frozen_base(model: nn.Module) -> Iterator[None]:
    """Let a Trainer that is made inside take a quantised model without an adapter: what is trained is a new head, or nothing."""
    marked = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    if marked:
        model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        if marked:
            model._hf_peft_config_loaded = False  # type: ignore[assignment]


@contextlib.contextmanager
def scaled_in_float32(model: nn.Module, args: TrainingArguments) -> Iterator[None]:
    """Under ``fp16``, hold float16 parameters that are trained (new heads of a float16 base) in float32 meanwhile: the gradient
    scaler takes no float16 gradients."""
    spread = args.fsdp or args.deepspeed
    narrow = [
        p for p in model.parameters() if p.requires_grad and p.dtype == torch.float16 and args.fp16 and not spread
    ]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in narrow:
            parameter.data = parameter.data.half()


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep batch norms with frozen parameters at the statistics that they came with: an adapter does not save others."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if not any(p.requires_grad for p in norm.parameters(recurse=False))]
    for norm in norms:
        norm.eval()
        norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign, misc]
    try:
        yield
    finally:
        for norm in norms:
            del norm.train


@contextlib.contextmanager
def walked_through_once(model: Any) -> Iterator[None]:
    """Answer without a walk through all modules what Trainer asks in every step: to be in the mode that the model is in already,
    and how many parameters it has."""
    train, names = model.train, ["train"]
    last: bool | None = None  # at first the modules inside may be in another mode than the model

    def in_mode(mode: bool = True) -> Any:
        nonlocal last
        if not last == mode == model.training:
            train(mode)
        last = mode
        return model

    model.train = in_mode
    if hasattr(model, "num_parameters"):
        model.num_parameters = functools.cache(model.num_parameters)
        names.append("num_parameters")
    try:
        yield
    finally:
        for name in names:
            del model.__dict__[name]


@contextlib.contextmanager
def liger_for_itself(model: nn.Module) -> Iterator[None]:
    """Take Liger's kernels out of the model's files and of torch at the end, where Trainer also puts them: every model that is
    made later would have them, and one on the meta device, of which a training is predicted, could not run."""
    files = [sys.modules[name] for name in {type(module).__module__ for module in model.modules()}]
    classes = [value for file in files for value in vars(file).values() if isinstance(value, type)]
    before = [(place, dict(vars(place))) for place in (*files, *classes, nn, nn.functional)]
    try:
        yield
    finally:
        for place, names in before:
            for name, value in names.items():
                now = getattr(place, name, None)
                if now is not value and str(getattr(now, "__module__", None)).startswith("liger_kernel"):
                    setattr(place, name, value)


def stops_early(patience: int) -> TrainerCallback:
    """Ends training when the best metric has not improved for so many evaluations."""
    return EarlyStoppingCallback(early_stopping_patience=patience)


class LogFile(TrainerCallback):
    """Writes everything that the Trainer logs to a file, one JSON object per line; resuming goes on after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            text = self.path.read_text(encoding="utf-8") if state.global_step and self.path.exists() else ""
            whole = text[: text.rfind("\n") + 1].splitlines()  # the last line may have been cut short
            try:
                kept = [line for line in whole if reading.parse_json(line)["step"] <= state.global_step]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path} cannot be read ({error}); remove it, and training goes on without."
                ) from error
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with stored(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def gathered_state(trainer: Trainer) -> dict[str, Any] | None:
    """The trained model's whole state where FSDP has spread it over processes, for the first one to save; else None.

    All processes must call this.
    """
    return trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None


@contextlib.contextmanager
def _sharing_for_itself() -> Iterator[None]:
    """Keep a Trainer that is made inside, and shares its model by FSDP or DeepSpeed, from deciding for later Trainers.

    Accelerate decides by environment variables, which such a Trainer sets; they are removed at the end.
    """
    try:
        yield
    finally:
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            os.environ.pop(name, None)


class EndsAfterStep(TrainerCallback):
    """Has signals that wait in a list (``deferred_signals``) take effect after the step that is being taken, and keeps a
    checkpoint of it."""

    def __init__(self, waiting: list[int]) -> None:
        self.waiting = waiting

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.waiting:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.waiting:
            signal.raise_signal(self.waiting.pop())


@contextlib.contextmanager
def _whole_checkpoints(trainer: Trainer) -> Iterator[None]:
    """Have a Trainer write each checkpoint into a hidden directory, and give it its name when all of it is on the disk.

    Older ones are removed by their number. Trainer goes by the time of their last change, and would remove the new one where the
    clock was set back; and what it was removing when it was killed would look like a checkpoint. Of several processes the
    first one renames and removes, when all have written.
    """
    args, save, push, processes = (
        trainer.args,
        trainer._save_checkpoint,
        trainer._push_from_checkpoint,
        Processes.joined(),
    )
    place, limit = Path(str(args.output_dir)), args.save_total_limit
    hidden = place / f".checkpoints{PARTIAL}"

    def save_checkpoint(model: Any, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        trainer._get_output_dir = lambda trial: str(hidden)  # type: ignore[method-assign]
        trainer._push_from_checkpoint = lambda checkpoint_folder: None  # type: ignore[method-assign]
        try:
            with processes.together():
                if processes.first:
                    shutil.rmtree(hidden, ignore_errors=True)
            with processes.together(), stored(place / name):
                save(model, trial)
            if trainer.state.best_model_checkpoint == str(hidden / name):
                trainer.state.best_model_checkpoint = str(place / name)
            with processes.together(), stored(place / name):
                if processes.first:
                    trainer.state.save_to_json(str(hidden / name / TRAINER_STATE_NAME))
                    put_in_place(hidden / name, place / name)
                    hidden.rmdir()
                    _remove_older(place, trainer.state, limit)
        except BaseException:
            if processes.first:
                shutil.rmtree(hidden, ignore_errors=True)
            raise
        finally:
            del trainer._get_output_dir, trainer._push_from_checkpoint
        if args.push_to_hub:
            push(str(place / name))

    trainer._save_checkpoint, args.save_total_limit = save_checkpoint, None  # type: ignore[method-assign]
    try:
        yield
        if processes.first and limit == 1 and (best := trainer.state.best_model_checkpoint) is not None:
            for checkpoint in checkpoints(place):
                if checkpoint != Path(best):
                    discard(checkpoint)
    finally:
        args.save_total_limit = limit


def _remove_older(place: Path, state: Any, limit: int | None) -> None:
    """Remove the oldest checkpoints above the limit, but neither the newest nor the best."""
    there = checkpoints(place)
    kept = {there[-1], Path(state.best_model_checkpoint or there[-1])}
    others = [path for path in there if path not in kept]
    for checkpoint in others[: max(0, len(there) - max(limit, len(kept)))] if limit else ():
        discard(checkpoint)


def _goes_on_exactly(trainer: Trainer, checkpoint: str, streamed: bool) -> None:
    """Mend how a Trainer goes on from a checkpoint, which else would not give what training without an interruption gives.

    It takes one more step where the checkpoint is of the last one, forgets how many evaluations have brought nothing better, and
    of ``streamed`` rows, of which it does not know how long a pass is, skips as many batches of the first pass as were trained on in
    all.
    """
    before = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    waits = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]
    for callback in waits:
        kept: Any = before.stateful_callbacks.get(EarlyStoppingCallback.__name__, {})
        callback.early_stopping_patience_counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)
    stopped = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in waits)
    run_epoch, begin = trainer._run_epoch, trainer._init_training_state

    def run_epoch_if_left(**options: Any) -> None:
        if stopped or trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            run_epoch(**options)

    def init_training_state(*given: Any) -> tuple[int, int]:
        trained = begin(*given)
        if not streamed or trainer.args.ignore_data_skip:
            return trained
        # Trainer counts passes so: whole ones, and of the last one the batches, in units of what all steps take.
        passes = int(before.epoch or 0)
        part = ((before.epoch or 0) - passes) * before.max_steps * trainer.args.gradient_accumulation_steps
        return passes, round(part)

    trainer._run_epoch = run_epoch_if_left  # type: ignore[method-assign, assignment]
    trainer._init_training_state = init_training_state  # type: ignore[method-assign, assignment]


class _StepClock(TrainerCallback):
    """How long each step took; on a GPU by its own clock, because waiting for it would keep it idle afterwards."""

    def __init__(self) -> None:
        self._measured: list[float] = []
        self._marks: collections.deque[tuple[Any, Any]] = collections.deque()

    @property
    def seconds(self) -> list[float]:
        self._read(0)
        return self._measured

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._marks.append((self._started, self._now()))
        self._read(AHEAD)

    def _read(self, left: int) -> None:
        while len(self._marks) > left:
            started, ended = self._marks.popleft()
            if isinstance(ended, float):
                self._measured.append(ended - started)
            else:
                ended.synchronize()
                self._measured.append(started.elapsed_time(ended) / 1000)

    @staticmethod
    def _now() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _read_in(model: nn.Module) -> None:
    """Read what is trained on a CPU once: of a weight that is mapped from a file, parts that were not read yet are not in memory, and
    would be taken for what training adds."""
    for p in model.parameters():
        if p.requires_grad and p.device.type == "cpu":
            getattr(p, "_local_tensor", p).detach().sum()


class PeakMemory:
    """Peak memory of what runs inside: CUDA's own count, or the process's resident memory, sampled every 10 ms."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.peak: int | None = None
        self.before: int | None = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return self
        if sys.platform == "linux":
            # Hand freed memory back first, or this method would be charged for the one before it.
            with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
                ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._process = psutil.Process()
        self.peak = self.before = self._process.memory_info().rss
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak or 0, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
            return
        self._stop.set()
        self._sampler.join()
