"""What each of two processes runs in test_probe_processes.py: a function of this file by name, in a gloo group.

torchrun … tests/probe_worker.py DIRECTORY FUNCTION…
"""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parent))

from data_parallel_worker import Examples
from measured_models import MODELS
from relevance_cases import data_for, measure, own_loss, split
from reltune.errors import InputError

OPTIONS = {"steps": 8, "step_size": 0.01, "relative": True, "move": "allowed", "training": False}


def probe(model, batches, loss=None, criteria="movement", resume=None, parallel="auto", **options):
    options = {"movement": {**OPTIONS, **options}}
    return measure(
        model, batches, loss, criteria, elements=True, options=options, resume_directory=resume, parallel=parallel
    )


def batches_of(name):
    """Batches of 3, 3, 1, 4 and 3 examples: in some steps a process has fewer examples than the other, or none."""
    model = MODELS[name]()
    return split(data_for(model), 3) + split(data_for(model, seed=1), 4)


class Branches(nn.Module):
    """The second part is for examples whose first number is positive, so that one process may have no use for it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(6, 3).double() for _ in range(3))

    def forward(self, x):
        positive = x[:, 0] > 0
        second = self.second(x[positive]) if positive.any() else x.new_zeros(0, 3)
        return self.first(x) + x.new_zeros(len(x), 3).index_copy(0, positive.nonzero()[:, 0], second)


def branching():
    inputs, labels = data_for(MODELS["sequential"](), range(12))
    order = inputs[:, 0].argsort()  # the positive ones at the end: with the second process
    return split((inputs[order], labels[order]), 6, range(12)) + split((inputs[order], labels[order]), 12)


# -- functions of the processes ---------------------------------------------------------------------------------------


def same_loader(directory: Path) -> None:
    for name in ("bert", "llama", "sequential"):
        probe(MODELS[name](), batches_of(name)).save(directory / name / str(dist.get_rank()))
    for name, options in OTHER_WAYS.items():
        found = probe(MODELS["sequential"](), batches_of("sequential"), **options)
        found.save(directory / name / str(dist.get_rank()))
    probe(Branches(), branching()).save(directory / "branches" / str(dist.get_rank()))


OTHER_WAYS = {
    "momentum": {"update": "momentum"},
    "accumulated": {"batch_size": 6},
    "sums": {"ties": "sum"},
    "auto": {"steps": "auto", "agreement": 0.3},
    "with others": {"criteria": ["movement", "fisher"]},
}


def own_parts(directory: Path) -> None:
    sampler = DistributedSampler(Examples(11), shuffle=False)
    found = probe(MODELS["sequential"](), DataLoader(Examples(11), 2, sampler=sampler), criteria=["movement", "fisher"])
    found.save(directory / "sampler" / str(dist.get_rank()))
    alone = probe(MODELS["sequential"](), [data_for(MODELS["sequential"](), seed=dist.get_rank())], parallel="off")
    alone.save(directory / "alone" / str(dist.get_rank()))


def prepared_by_accelerate(directory: Path) -> None:
    from accelerate import Accelerator

    model, loader = Accelerator(cpu=True).prepare(MODELS["sequential"](), DataLoader(Examples(12), 2))
    options = {"elements": True, "always_trained": (), "options": {"movement": OPTIONS}}
    measure(model, loader, None, "movement", **options).save(directory / str(dist.get_rank()))


def errors(directory: Path) -> None:
    """One process meets an error, in its forward or backward pass, or before: both end, with its words."""
    rank = dist.get_rank()
    model, batches = MODELS["sequential"](), batches_of("sequential")

    def failing(step, at):
        taken = []

        def loss(outputs, batch):
            taken.append(1)
            if rank == at and len(taken) == step + 1:
                outputs.register_hook(lambda g: 1 / 0)
            return own_loss(outputs, batch)

        return loss

    for step, at in ((0, 1), (2, 0)):
        expect("division by zero", (RuntimeError, ZeroDivisionError), model, batches, failing(step, at))

    broken = batches_of("sequential")
    broken[1][0][-1, 0] = torch.inf  # with the second process
    expect("the loss of batch 1 is not finite in step 1", InputError, model, broken)
    expect("the processes' loaders give different batches", InputError, model, batches[:: 1 - 2 * rank])
    expect("the loader gave no batch", InputError, model, [])
    expect("runs in one process", InputError, model, batches, update="adamw")
    with torch.no_grad():
        model[0].weight += rank
    expect("the processes have different models", InputError, model, batches)
    directory.mkdir(exist_ok=True)


def expect(sentence, kind, model, batches, loss=None, **options):
    try:
        probe(model, batches, loss, **options)
    except kind as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(f"no error: {sentence}")


def out_of_memory(directory: Path) -> None:
    """One process runs out of memory, in its third step, in forward or backward: both start anew with smaller pieces."""
    for where in ("forward", "backward"):
        model, tried = MODELS["bert"](), []

        def too_small(x, tried=tried):
            tried.append(len(x))
            if dist.get_rank() == 1 and len(x) > 1 and len(tried) > 2:
                raise torch.OutOfMemoryError("no memory")

        def hook(module, args, output, where=where, too_small=too_small):
            if where == "forward":
                too_small(output)
            else:
                output.register_hook(too_small)

        model.bert.encoder.layer[0].output.dense.register_forward_hook(hook)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = probe(model, batches_of("bert"))
        assert any("starts anew with 1 at a time" in str(w.message) for w in warned) == (dist.get_rank() == 0)
        found.save(directory / where / str(dist.get_rank()))


def interrupted(directory: Path) -> None:
    """Ctrl-C reaches both; called again, both go on from the first one's votes."""
    taken = []

    def loss(outputs, batch):
        taken.append(1)
        if len(taken) == 4:
            signal.raise_signal(signal.SIGINT)
        return own_loss(outputs, batch)

    model, batches = MODELS["sequential"](), split(data_for(MODELS["sequential"](), range(12)), 4)
    try:
        probe(model, batches, loss, resume=directory / "resume")
    except KeyboardInterrupt:
        assert len(taken) == 4
    else:
        raise AssertionError("was not interrupted")
    dist.barrier()
    found = probe(model, batches, loss, resume=directory / "resume")
    assert len(taken) == OPTIONS["steps"]
    found.save(directory / str(dist.get_rank()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for function in sys.argv[2:]:
        globals()[function](Path(sys.argv[1], function))
        dist.barrier()
    dist.destroy_process_group()
