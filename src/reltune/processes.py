"""What several processes share that ``torchrun`` or ``accelerate launch`` started: messages, totals, errors and data.

Each process has the whole model and its own part of the data. Totals are added up in the precision in which each process
accumulated them. While they work the processes tell one another that all is well, so that an error in one of them ends them
all. Messages between them are JSON in tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from reltune.errors import AnalysisError, InputError, StorageError

DONE, RUNNING, FAILED = range(3)
BUCKET = 1 << 24  # numbers that are added up between processes at a time
SHARES = ("auto", "split", "sharded", "off")


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that work together; this one alone by default."""

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> Processes:
        """All processes of torch.distributed. Makes their group if a launcher started them and nobody has made it yet: of one process
        too, which FSDP2 and DeepSpeed need, and which has tensors in host memory to add up as well."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized():
            if not _launched():
                return cls()
            gpus = torch.cuda.device_count()
            if gpus:  # before a model is loaded: weights in few bits are put on the current device then
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or os.environ["RANK"]) % gpus)
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows progress."""
        return self.rank == 0

    # -- messages ---------------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks. A value is anything that JSON can hold."""
        if self.count == 1:
            return [value]
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_meeting_place())
        lengths = [message.new_zeros(1, dtype=torch.long) for _ in range(self.count)]
        dist.all_gather(lengths, message.new_tensor([len(message)], dtype=torch.long))
        longest = max(int(length) for length in lengths)
        padded = [message.new_zeros(longest) for _ in range(self.count)]
        dist.all_gather(padded, torch.cat([message, message.new_zeros(longest - len(message))]))
        return [json.loads(bytes(text[: int(n)].tolist())) for text, n in zip(padded, lengths, strict=True)]

    def agree_on(self, value: Any, sentence: str) -> None:
        """Raise InputError with the sentence, in all processes, unless all have the same value."""
        if any(other != value for other in self.gather(value)):
            raise _agreed(InputError(sentence))

    def add_up(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """The total of each tensor over the processes, under its name. A name that a process lacks counts as zeros."""
        if self.count == 1:
            return mine
        totals: dict[str, Tensor] = {}
        bucket: dict[str, Tensor] = {}  # sent together: tensors of one dtype and device
        for name, (shape, dtype, device) in self._gathered_layouts(mine).items():
            value = mine[name].to(device, dtype) if name in mine else torch.zeros(shape, dtype=dtype, device=device)
            others = next(iter(bucket.values()), value)
            size = sum(tensor.numel() for tensor in bucket.values())
            if (value.dtype, value.device) != (others.dtype, others.device) or size + value.numel() > BUCKET:
                totals |= _added_up(bucket)
                bucket = {}
            bucket[name] = value
        return totals | _added_up(bucket)

    def _gathered_layouts(self, mine: dict[str, Tensor]) -> dict[str, tuple[list[int], torch.dtype, str]]:
        """Shape, dtype (the widest that a process has, float32 at least) and device type of each name that any process
        has, in an order that is the same in all."""
        layouts: dict[str, tuple[list[int], torch.dtype, str]] = {}
        own = {name: [list(value.shape), str(value.dtype)[6:], value.device.type] for name, value in mine.items()}
        for process in self.gather(own):
            for name, (shape, dtype, device) in process.items():
                before = layouts[name][1] if name in layouts else torch.float32
                layouts[name] = (shape, torch.promote_types(getattr(torch, dtype), before), device)
        return dict(sorted(layouts.items(), key=lambda item: (str(item[1][1:]), item[0])))

    def add_up_in_place(self, tensor: Tensor) -> None:
        """Make the tensor the sum of all processes' tensors. They call this for tensors of one shape in one order."""
        sent = _reachable(tensor.contiguous())
        dist.all_reduce(sent)
        if sent is not tensor:
            tensor.copy_(sent)

    def take_from_first(self, modules: Iterable[nn.Module]) -> None:
        """Make the modules' parameters and buffers the first process's."""
        if self.count == 1:
            return
        with torch.no_grad():
            for tensor in (t for module in modules for t in module.state_dict().values()):
                sent = _reachable(tensor.contiguous())
                dist.broadcast(sent, 0)
                tensor.copy_(sent)

    # -- errors -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self) -> Iterator[Callable[[], None]]:
        """Make an error in one process end all of them: there with that error, elsewhere with one of the same class that
        says in which process it happened.

        Gives a function that a process calls now and then while it works, to hear of errors elsewhere. Processes need
        not call it equally often.
        """
        if self.count == 1:
            yield lambda: None
            return

        def still_at_work() -> None:
            if self._states(RUNNING) == FAILED:
                raise self._common_error(None)

        try:
            yield still_at_work
        except (Exception, KeyboardInterrupt) as error:
            if getattr(error, "agreed", False):  # all processes know of it already
                raise
            self._states(FAILED)
            common = self._common_error(error)
            if common is error:
                raise
            raise common from error
        while (state := self._states(DONE)) == RUNNING:
            pass
        if state == FAILED:
            raise self._common_error(None)

    def _states(self, own: int) -> int:
        state = torch.tensor([own], device=_meeting_place())
        dist.all_reduce(state, dist.ReduceOp.MAX)
        return int(state)

    def _common_error(self, own: BaseException | None) -> BaseException:
        """The error of the lowest process that has one."""
        errors = self.gather(None if own is None else [type(own).__name__, str(own)])
        rank = next(rank for rank, error in enumerate(errors) if error is not None)
        if rank == self.rank and own is not None:
            return _agreed(own)
        class_name, message = errors[rank]
        if class_name == "KeyboardInterrupt":
            return _agreed(KeyboardInterrupt())
        for known in (InputError, AnalysisError, ArithmeticError, StorageError):
            if class_name == known.__name__:
                return _agreed(known(f"process {rank}: {message}"))
        return _agreed(RuntimeError(f"process {rank}: {class_name}: {message}"))

    # -- data -------------------------------------------------------------------------------------------------------

    def share(self, loader: Iterable[Any], how: str = "auto") -> Share:
        """This process's part of the loader's batches; ``analyze`` explains the values of ``how`` (its ``parallel``).

        Raises InputError for a loader that repeats examples, to give every process equally many, where the repetitions
        cannot be told from the data.
        """
        if how not in SHARES:
            raise InputError(f"parallel is {how!r}; write one of {', '.join(SHARES)}.")
        if self.count == 1 or how == "off":
            return Share()
        if how == "split":
            return Share(self.rank, self.count, every=self.count)
        sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        if isinstance(sampler, DistributedSampler):
            if (sampler.num_replicas, sampler.rank) != (self.count, self.rank):
                raise InputError(
                    f"the loader's DistributedSampler is for process {sampler.rank} of {sampler.num_replicas}, but this is "
                    f"process {self.rank} of {self.count}; make it without num_replicas and rank."
                )
            own = None if sampler.drop_last else len(range(self.rank, len(sampler.dataset), self.count))  # type: ignore[arg-type]
            return Share(self.rank, self.count, examples=own)
        prepared = type(loader).__name__ in ("DataLoaderShard", "DataLoaderDispatcher")
        if how == "auto" and prepared and _repeats(batches):
            raise InputError(
                "accelerate's prepare has the loader repeat examples, to give every process equally many; pass the loader as "
                "it was before prepare, or make the Accelerator with "
                "dataloader_config=DataLoaderConfiguration(even_batches=False)."
            )
        if how == "sharded" or prepared:
            return Share(self.rank, self.count)
        return Share(self.rank, self.count, every=self.count)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which batches a process takes: every ``every``-th one from ``rank`` on, or, with ``every`` 1, all that its loader
    gives. With ``examples`` it takes no more than so many examples, because some samplers repeat examples at the end."""

    rank: int = 0
    count: int = 1
    every: int = 1
    examples: int | None = None

    def number(self, index: int) -> int | None:
        """The number, among the batches of all processes, of batch ``index`` of this loader; None if another process takes
        it."""
        if self.every > 1:
            return index if index % self.every == self.rank else None
        return index * self.count + self.rank


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch's wrappers, for data parallelism and of ``torch.compile``, which give its modules other names.
    Raises InputError where weights are spread over processes."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod" if hasattr(model, "_orig_mod") else "module")
    sharded = [type(m).__name__ for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"]
    sharded += [name for name, p in model.named_parameters() if type(p.data).__name__ == "DTensor"]
    if sharded:
        raise InputError(
            f"the model's weights are spread over processes ({sharded[0]}), and no process could see a whole gradient; "
            "analyze the model before it is wrapped."
        )
    return model


def _launched() -> bool:
    """Whether torchrun or the like started this process. Clusters set some of the variables for a process that was started by hand."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    return {"RANK", "MASTER_ADDR"} <= os.environ.keys() and (several or "LOCAL_RANK" in os.environ)


def _repeats(batches: Any) -> bool:
    """Whether accelerate's sampler of a prepared loader gives some examples twice."""
    if type(batches).__name__ != "BatchSamplerShard":
        return True  # a stream of examples, whose length nobody knows
    inner = batches.batch_sampler
    if not batches.even_batches or batches.drop_last:
        return False
    size = getattr(inner, "batch_size", None)
    if size is None or not hasattr(inner, "sampler"):
        return True
    return len(inner.sampler) % (size if batches.split_batches else size * batches.num_processes) != 0


def _agreed(error: Any) -> Any:
    error.agreed = True
    return error


def _meeting_place() -> torch.device:
    """A device from which this process can reach the others."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _reachable(tensor: Tensor) -> Tensor:
    return tensor if f"{tensor.device.type}:" in dist.get_backend_config() else tensor.to(_meeting_place())


def _added_up(bucket: dict[str, Tensor]) -> dict[str, Tensor]:
    if not bucket:
        return {}
    total = _reachable(torch.cat([value.reshape(-1) for value in bucket.values()]))
    dist.all_reduce(total)
    parts = total.split([value.numel() for value in bucket.values()])
    return {
        name: part.reshape(value.shape).to(value.device)
        for (name, value), part in zip(bucket.items(), parts, strict=True)
    }
