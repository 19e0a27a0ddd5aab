"""A sign probe by two gloo processes under torchrun gives the votes of one process alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from data_parallel_worker import Examples
from measured_models import MODELS
from probe_worker import OTHER_WAYS, Branches, batches_of, branching, probe
from relevance_cases import data_for, split
from reltune.relevance.scores import RelevanceScores
from two_processes import torchrun

FUNCTIONS = ("same_loader", "own_parts", "prepared_by_accelerate", "errors", "out_of_memory", "interrupted")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What the functions of probe_worker.py saved, all in one go, since importing takes processes longest."""
    directory = tmp_path_factory.mktemp("by_two")
    done = torchrun(Path(__file__).parents[1] / "probe_worker.py", directory, *FUNCTIONS)
    assert done.returncode == 0, done.stderr
    return directory


def assert_votes(directory: Path, wanted: RelevanceScores) -> None:
    """Both processes have these votes, and equal fractions but for the order of additions."""
    for rank in (0, 1):
        found = RelevanceScores.load(directory / str(rank))
        assert found.inventory == wanted.inventory and found.fingerprint == wanted.fingerprint
        assert found.provenance["data"] == wanted.provenance["data"]
        assert found.provenance["examples"] == wanted.provenance["examples"]
        for name, parts in wanted.parts["movement"].items():
            for part, value in parts.items():
                if name.endswith(("key", "k_proj")) and part in ("bias", "element_bias"):
                    continue  # of rounding errors
                own = found.parts["movement"][name][part]
                assert (own.floor() == value.floor()).all(), (name, part)
                assert (own - value).abs().max() < 1e-3, (name, part)


@pytest.mark.parametrize("name", ["bert", "llama", "sequential"])
def test_each_step_is_shared(name, by_two):
    assert_votes(by_two / "same_loader" / name, probe(MODELS[name](), batches_of(name)))


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_with_every_option(name, by_two):
    wanted = probe(MODELS["sequential"](), batches_of("sequential"), **OTHER_WAYS[name])
    assert_votes(by_two / "same_loader" / name, wanted)


def test_a_weight_that_one_process_has_no_use_for(by_two):
    wanted = probe(Branches(), branching())
    assert wanted.parts["movement"]["second"]["weight"] > 0
    assert_votes(by_two / "same_loader" / "branches", wanted)


def test_each_process_has_batches_of_its_own(by_two):
    """The sampler deals 11 examples out in turn and repeats one to have 12: a step is that of both's batches."""
    inputs, labels = Examples(11).inputs, Examples(11).labels
    own = [list(range(rank, 11, 2)) for rank in (0, 1)]
    steps = [[row for of in own for row in of[start : start + 2]] for start in range(0, 6, 2)]
    wanted = probe(MODELS["sequential"](), [(inputs[rows], labels[rows]) for rows in steps])
    assert_votes(by_two / "own_parts" / "sampler", wanted)
    for rank in (0, 1):
        alone = probe(MODELS["sequential"](), [data_for(MODELS["sequential"](), seed=rank)])
        found = RelevanceScores.load(by_two / "own_parts" / "alone" / str(rank))
        assert found.provenance == alone.provenance


def test_accelerate_prepares_model_and_loader(by_two):
    """Accelerate's shards are every other batch."""
    batches = list(DataLoader(Examples(12), 4, shuffle=False))
    assert_votes(by_two / "prepared_by_accelerate", probe(MODELS["sequential"](), batches))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_is_short_on_one(where, by_two):
    assert_votes(by_two / "out_of_memory" / where, probe(MODELS["bert"](), batches_of("bert")))


def test_an_error_on_one_ends_both_with_its_words(by_two):
    assert (by_two / "errors").is_dir()  # the assertions stand in the function


def test_an_interrupted_probe_goes_on(by_two):
    model = MODELS["sequential"]()
    assert_votes(by_two / "interrupted", probe(model, split(data_for(model, range(12)), 4)))
    assert not (by_two / "interrupted" / "resume").is_dir() or not list((by_two / "interrupted" / "resume").iterdir())
