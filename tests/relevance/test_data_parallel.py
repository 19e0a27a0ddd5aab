"""Two gloo processes under torchrun get the scores of one process alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from command_line import contents, review_rows, write_csv
from command_line import reltune as command
from data_parallel_worker import Examples, batches_of, scores
from measured_models import MODELS
from relevance_cases import data_for, measure
from reltune.relevance.scores import RelevanceScores
from reltune.runs.stages import train_new_heads
from tiny_models import save_tiny_bert
from two_processes import torchrun

TESTS = Path(__file__).parents[1]


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
            names = [name for name, parts in wanted.parts[criterion].items() if part in parts]
            bound = relative
            if criterion == "gradient_snr":
                # The variance in it is a difference. Of keys' biases, whose gradient is zero, it is one of rounding errors, which
                # depend on the processor and on the number of threads.
                bound = 1e-9
                if part in ("bias", "element_bias"):
                    names = [name for name in names if not name.endswith(("key", "k_proj", "c_attn"))]
            a = torch.cat([found.parts[criterion][name][part].reshape(-1) for name in names])
            b = torch.cat([wanted.parts[criterion][name][part].reshape(-1) for name in names])
            assert a.dtype == b.dtype
            if criterion == "gradient_snr":
                a, b = a.clamp(max=1e3), b.clamp(max=1e3)
            assert (a - b).abs().max() <= bound * b.abs().max(), (criterion, part)


FUNCTIONS = (
    "same_loader",
    "fewer_batches_than_processes",
    "distributed_sampler",
    "prepared_by_accelerate",
    "own_parts",
    "refusals",
    "errors",
    "out_of_memory",
)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """What the functions of data_parallel_worker.py saved, all in one go, since importing takes processes longest."""
    directory = tmp_path_factory.mktemp("by_two")
    done = torchrun(TESTS / "data_parallel_worker.py", directory, *FUNCTIONS)
    assert done.returncode == 0, done.stderr
    return directory


def loaded(directory: Path) -> list[RelevanceScores]:
    """The scores that each process ended with."""
    return [RelevanceScores.load(directory / str(rank)) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["bert", "llama", "sequential"])
def test_the_same_loader_is_split(name, by_two):
    wanted = scores(name, batches_of(name))
    for found in loaded(by_two / "same_loader" / name):
        assert_same(found, wanted)


def test_fewer_batches_than_processes(by_two):
    wanted = scores("llama", [data_for(MODELS["llama"]())])
    for found in loaded(by_two / "fewer_batches_than_processes" / "llama"):
        assert_same(found, wanted)


@pytest.mark.parametrize("count", [11, 12])
def test_examples_that_a_sampler_repeats_count_once(count, by_two):
    wanted = scores("sequential", DataLoader(Examples(count), 4))
    assert wanted.provenance["examples"] == count
    for found in loaded(by_two / "distributed_sampler" / str(count)):
        assert_same(found, wanted, skip=("fisher_true",))  # labels are drawn batch by batch, and these are others


@pytest.mark.parametrize(("place", "count"), [("prepared", 12), ("uneven", 11)])
def test_accelerate_prepares_model_and_loader(place, count, by_two):
    wanted = scores("sequential", DataLoader(Examples(count), 2))
    for found in loaded(by_two / "prepared_by_accelerate" / place):
        assert_same(found, wanted)


def test_own_parts_and_alone(by_two):
    wanted = scores("bert", batches_of("bert"))
    for found in loaded(by_two / "own_parts" / "bert"):
        assert_same(found, wanted)
    for rank, found in enumerate(loaded(by_two / "own_parts" / "alone")):
        assert_same(found, scores("sequential", [data_for(MODELS["sequential"](), seed=rank)]))


@pytest.mark.parametrize("function", ["refusals", "errors"])
def test_what_cannot_be_ends_both_with_a_sentence(function, by_two):
    assert (by_two / function).is_dir()  # the assertions stand in the function


def test_memory_is_short_on_one(by_two):
    wanted = measure(MODELS["bert"](), batches_of("bert"), None, ["fisher", "activation"])
    for found in loaded(by_two / "out_of_memory" / "bert"):
        assert_same(found, wanted)


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


# -- the command line -------------------------------------------------------------------------------------------------

COMMAND = "from reltune.cli.commands import main; main()"


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[object]:
    """Of an analysis of a tiny BERT without a head, with 96 training texts: three batches."""
    place = tmp_path_factory.mktemp("inputs")
    save_tiny_bert(place / "model")
    config = place / "model" / "config.json"  # dropout draws otherwise in each process
    config.write_text(config.read_text().replace('_dropout_prob": 0.1', '_dropout_prob": 0.0'))
    write_csv(place / "train.csv", review_rows(138))
    words = ["--model_name_or_path", place / "model", "--train_file", place / "train.csv", "--max_length", "16"]
    return [*words, "--criteria", "fisher,fisher_true,gradient,activation"]


@pytest.mark.parametrize("each", [None, 8])  # of the usual size, or half of what the one process takes
def test_reltune_analyze_under_torchrun(each, words, tmp_path, monkeypatch):
    run = tmp_path / "run"
    size = "--per_device_train_batch_size"
    two, one = ([*words, size, each], [*words, size, 2 * each]) if each else (words, words)
    done = torchrun("--no-python", sys.executable, "-c", COMMAND, "analyze", *two, "--output_dir", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("By fisher, layer") == done.stdout.count("Next: reltune select") == 1
    assert done.stderr.count("analyze: 100%") == 1

    trained = train_new_heads

    def same_heads(materials, model, epochs):
        trained(materials, model, epochs)
        head = load_file(run / "relevance" / "head.safetensors")
        for name, value in head.items():  # batches of the same texts, added up in another order
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-2, atol=1e-3)
        model.load_state_dict(head, strict=False)

    monkeypatch.setattr("reltune.runs.stages.train_new_heads", same_heads)
    alone = tmp_path / "alone"
    answer = command("analyze", *one, "--output_dir", alone)
    assert answer.code == 0, answer.err
    assert contents(run).keys() == contents(alone).keys()
    wanted = RelevanceScores.load(alone / "relevance")
    assert wanted.provenance["examples"] == 96
    assert_same(RelevanceScores.load(run / "relevance"), wanted, relative=1e-5)
    assert command("select", run, "--budget", "1%").code == 0  # in one process, as ever


@pytest.mark.slow
def test_an_error_on_one_ends_both_with_one_code(words, tmp_path):
    """The second process cannot read its file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = []
    for rank in (0, 1):
        own = [tmp_path / "gone.csv" if rank and word == words[3] else word for word in words]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        line = [sys.executable, "-c", COMMAND, "analyze", *map(str, own), "--output_dir", str(tmp_path / "run")]
        ended.append(subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in ended]
    assert [process.returncode for process in ended] == [2, 2], errors
    assert "reltune: error: process 1: " in errors[0] and "gone.csv" in errors[0]
    assert "reltune: error" not in errors[1]  # said once
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["select", "report", "export", "demo"])
def test_other_commands_are_for_one_process(verb, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    answer = command(verb, *([] if verb == "demo" else [tmp_path]))
    assert answer.code == 2 and f"`reltune {verb}` runs in one process" in answer.err
    monkeypatch.setenv("RANK", "1")
    assert command(verb).err == ""
