"""What each of several processes runs in test_data_parallel.py: a function of this file by name, in a gloo group.

torchrun … tests/data_parallel_worker.py FUNCTION DIRECTORY
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

sys.path.insert(0, str(Path(__file__).parent))

from measured_models import MODELS
from relevance_cases import data_for, measure, split
from reltune.errors import AnalysisError
from reltune.processes import Processes, unwrapped

CRITERIA = ["fisher", "fisher_true", "gradient", "taylor", "gradient_snr", "activation", "random"]


class Examples(Dataset):
    """Vectors with labels, as many as wanted."""

    def __init__(self, count: int = 11) -> None:
        self.inputs, self.labels = data_for(MODELS["sequential"](), range(count))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.inputs[index], self.labels[index]


def scores(name: str, batches, **options):
    return measure(MODELS[name](), batches, None, CRITERIA, elements=True, **options)


def batches_of(name: str, count: int = 1):
    """Seven batches of unequal sizes, or the first of them."""
    model = MODELS[name]()
    whole = [part for seed, size in ((0, 3), (1, 2)) for part in split(data_for(model, seed=seed), size)]
    return whole[:count] if count > 1 else whole


# -- functions of the processes ---------------------------------------------------------------------------------------


def same_loader(directory: Path) -> None:
    for name in ("bert", "llama", "sequential"):
        scores(name, batches_of(name)).save(directory / name / str(dist.get_rank()))


def fewer_batches_than_processes(directory: Path) -> None:
    whole = data_for(MODELS["llama"]())
    scores("llama", [whole]).save(directory / "llama" / str(dist.get_rank()))


def distributed_sampler(directory: Path) -> None:
    for count in (11, 12):
        data = Examples(count)
        sampler = DistributedSampler(data, shuffle=True)
        scores("sequential", DataLoader(data, 2, sampler=sampler)).save(directory / str(count) / str(dist.get_rank()))


def prepared_by_accelerate(directory: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True)
    data = Examples(12)
    model, loader = accelerator.prepare(MODELS["sequential"](), DataLoader(data, 2))
    assert isinstance(model, DistributedDataParallel)
    options = {"elements": True, "always_trained": ()}
    measure(model, loader, None, CRITERIA, **options).save(directory / "prepared" / str(dist.get_rank()))

    uneven = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    loader = uneven.prepare(DataLoader(Examples(11), 2))
    scores("sequential", loader).save(directory / "uneven" / str(dist.get_rank()))
    expect("accelerate's prepare has the loader repeat examples", accelerator.prepare(DataLoader(Examples(11), 2)))


def own_parts(directory: Path) -> None:
    parts = batches_of("bert")[dist.get_rank() :: 2]
    scores("bert", parts, parallel="sharded").save(directory / "bert" / str(dist.get_rank()))
    alone = scores("sequential", [data_for(MODELS["sequential"](), seed=dist.get_rank())], parallel="off")
    alone.save(directory / "alone" / str(dist.get_rank()))


def refusals(directory: Path) -> None:
    name, rank = "sequential", dist.get_rank()
    expect("the processes' loaders give different batches", batches_of(name)[:: 1 - 2 * rank])
    same_start = batches_of(name)
    expect("the processes' loaders give different batches", same_start if rank else same_start[:-1])
    expect("the processes' loaders give different batches", [] if rank else same_start)
    expect("the loader gave no batch", [])
    expect("resume_directory is for one process", same_start, resume_directory=directory)
    expect("criterion 'ablation' runs in one process", same_start, criteria=["ablation"])
    expect("parallel is 'both'", same_start, parallel="both")
    sampler = DistributedSampler(Examples(), num_replicas=2, rank=0)
    if rank == 1:
        try:
            Processes.joined().share(DataLoader(Examples(), sampler=sampler))
        except ValueError as error:
            assert "DistributedSampler is for process 0 of 2" in str(error)
    model = MODELS[name]()
    with torch.no_grad():
        model[0].weight += rank
    expect("the processes have different models", same_start, model=model)
    assert unwrapped(DistributedDataParallel(model)) is model


def errors(directory: Path) -> None:
    """One process meets an error, at its first batch, later, or in the loader: both end, with its words."""
    name, rank = "sequential", dist.get_rank()
    for at in (0, 1, 4, 5):
        broken = batches_of(name)
        broken[at][0][0, 0] = float("inf")
        expect(f"the loss of batch {at} is not finite", broken, kind=AnalysisError, elsewhere=at % 2)

    def interrupted():
        for index, batch in enumerate(batches_of(name)):
            if rank == 1 and index == 3:
                raise KeyboardInterrupt
            yield batch

    expect("", interrupted(), kind=KeyboardInterrupt)

    def of_the_loader():
        if rank == 1:
            raise OSError("the disk is gone")
        yield from batches_of(name)

    expect("the disk is gone", of_the_loader(), kind=(OSError, RuntimeError), elsewhere=1)
    assert scores(name, batches_of(name)).provenance["examples"] == 14  # and they can begin anew


def out_of_memory(directory: Path) -> None:
    """One process halves its batches and the other does not."""
    model = MODELS["bert"]()

    def too_small(module, args, kwargs):
        if dist.get_rank() == 1 and len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no memory")

    model.register_forward_pre_hook(too_small, with_kwargs=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = measure(model, batches_of("bert"), None, ["fisher", "activation"])
    assert any("out of memory" in str(w.message) for w in warned) == (dist.get_rank() == 1)
    found.save(directory / "bert" / str(dist.get_rank()))


def expect(sentence: str, loader, kind=ValueError, elsewhere: int | None = None, model=None, **options) -> None:
    criteria = options.pop("criteria", ["fisher"])
    try:
        measure(model or MODELS["sequential"](), loader, None, criteria, **options)
    except kind as error:
        assert sentence in str(error), error
        if elsewhere is not None:
            assert str(error).startswith(f"process {elsewhere}: ") == (dist.get_rank() != elsewhere), error
    else:
        raise AssertionError(f"no error: {sentence}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for function in sys.argv[2:]:
        place = Path(sys.argv[1], function)
        globals()[function](place)
        place.mkdir(exist_ok=True)
    dist.destroy_process_group()
