"""Two gloo processes under torchrun get the scores of one process alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data_parallel_worker import CRITERIA, Examples, batches_of, scores
from relevance_cases import MODELS, data_for, measure
from reltune.relevance.scores import RelevanceScores

TESTS = Path(__file__).parent


def torchrun(*words: object, processes: int = 2) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([*launcher, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300)


def together(function: str, directory: Path, processes: int = 2) -> None:
    done = torchrun(TESTS / "data_parallel_worker.py", function, directory, processes=processes)
    assert done.returncode == 0, done.stderr


def assert_same(found: RelevanceScores, wanted: RelevanceScores, relative: float = 1e-12, skip: tuple = ()) -> None:
    """Every number, single weights too, and all that the scores say of where they come from."""
    assert found.provenance == wanted.provenance
    assert found.inventory == wanted.inventory and found.fingerprint == wanted.fingerprint
    for criterion in wanted.criteria:
        if criterion in skip:
            continue
        for name, parts in wanted.parts[criterion].items():
            assert found.parts[criterion][name].keys() == parts.keys()
        for part in {part for parts in wanted.parts[criterion].values() for part in parts}:
            of = [name for name, parts in wanted.parts[criterion].items() if part in parts]
            a = torch.cat([found.parts[criterion][name][part].reshape(-1) for name in of])
            b = torch.cat([wanted.parts[criterion][name][part].reshape(-1) for name in of])
            assert a.dtype == b.dtype
            # the variance in the signal to noise is a difference, and of keys' biases one of rounding errors
            bound = 1e-9 if criterion == "gradient_snr" else relative
            if criterion == "gradient_snr":
                a, b = a.clamp(max=1e3), b.clamp(max=1e3)
            assert (a - b).abs().max() <= bound * b.abs().max(), (criterion, part)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("by_two")
    together("same_loader", directory)
    return directory


@pytest.mark.parametrize("name", ["bert", "llama", "sequential"])
def test_the_same_loader_is_split(name, by_two):
    wanted = scores(name, batches_of(name))
    for rank in (0, 1):
        assert_same(RelevanceScores.load(by_two / name / str(rank)), wanted)


@pytest.mark.parametrize("processes", [2, 3])
def test_fewer_batches_than_processes(processes, tmp_path):
    together("fewer_batches_than_processes", tmp_path, processes)
    wanted = scores("llama", [data_for(MODELS["llama"]())])
    for rank in range(processes):
        assert_same(RelevanceScores.load(tmp_path / "llama" / str(rank)), wanted)


def test_examples_that_a_sampler_repeats_count_once(tmp_path):
    together("distributed_sampler", tmp_path)
    for count in (11, 12):
        wanted = scores("sequential", DataLoader(Examples(count), 4))
        assert wanted.provenance["examples"] == count
        for rank in (0, 1):  # labels are drawn batch by batch, and these are others
            found = RelevanceScores.load(tmp_path / str(count) / str(rank))
            assert_same(found, wanted, skip=("fisher_true",))


def test_accelerate_prepares_model_and_loader(tmp_path):
    together("prepared_by_accelerate", tmp_path)
    for place, count in (("prepared", 12), ("uneven", 11)):
        wanted = scores("sequential", DataLoader(Examples(count), 2))
        for rank in (0, 1):
            assert_same(RelevanceScores.load(tmp_path / place / str(rank)), wanted)


def test_own_parts_and_alone(tmp_path):
    together("own_parts", tmp_path)
    wanted = scores("bert", batches_of("bert"))
    for rank in (0, 1):
        assert_same(RelevanceScores.load(tmp_path / "bert" / str(rank)), wanted)
        alone = scores("sequential", [data_for(MODELS["sequential"](), seed=rank)])
        assert_same(RelevanceScores.load(tmp_path / "alone" / str(rank)), alone)


def test_what_could_be_silently_wrong_is_refused(tmp_path):
    together("refusals", tmp_path)


def test_an_error_on_one_ends_both(tmp_path):
    together("errors", tmp_path)


def test_memory_is_short_on_one(tmp_path):
    together("out_of_memory", tmp_path)
    wanted = measure(MODELS["bert"](), batches_of("bert"), None, ["fisher", "activation"])
    for rank in (0, 1):
        assert_same(RelevanceScores.load(tmp_path / "bert" / str(rank)), wanted)


def test_the_fingerprint_of_the_data_is_that_of_its_examples():
    model = MODELS["bert"]()
    one = measure(model, batches_of("bert"), None, ["fisher"]).provenance["data"]
    other_way = measure(model, batches_of("bert")[::-1], None, ["fisher"]).provenance["data"]
    alone = [
        {k: v[i : i + 1] for k, v in batch.items()} for batch in batches_of("bert") for i in range(len(batch["labels"]))
    ]
    assert one == other_way == measure(model, alone, None, ["fisher"]).provenance["data"]
    assert (
        len({one, *(measure(model, batches_of("bert", n), None, ["fisher"]).provenance["data"] for n in (2, 3))}) == 3
    )
    assert CRITERIA[0] == "fisher"
