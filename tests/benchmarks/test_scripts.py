"""The benchmark scripts run from end to end on small models, and what they compare is the same quantity."""

from __future__ import annotations

import contextlib
import json
import sys

import pytest
import torch

import behaviour_agreement
import behaviour_trials
import peers
import relevance_overhead
import relevance_peers
from harness import Benchmark, Machine
from llama import TINY
from reltune.runs.training import LEARNING_RATES

IN_TORCH = [peer for peer in peers.PEERS if peer.run in (peers.loop, peers.vmap_of_grad)]


@pytest.fixture
def bench():
    return Benchmark("test", {}, {"commit": "abc"}, Machine(torch.device("cpu")))


@pytest.fixture(scope="module")
def case():
    return relevance_peers.llama_case(TINY, tokens=8, examples=3, device="cpu", dtype=torch.float32)


def test_the_overhead_of_the_analysis_is_recorded(tmp_path, monkeypatch):
    command = ["relevance_overhead", "--tiny", "--repeats", "2", "--threads", "1", "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", [*command, "--output_dir", str(tmp_path)])
    assert relevance_overhead.main() == 0
    found = json.loads((tmp_path / "relevance_overhead.json").read_text())
    assert [case["case"] for case in found["cases"]] == ["overhead", "elements"] and not found["problems"]
    assert all(len(method["seconds"]) == 2 for method in found["cases"][0]["methods"])
    exact = [check for check in found["checks"] if "float32" in check["check"]]
    assert len(exact) == 4 and all(check["passed"] for check in exact)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("peer", IN_TORCH, ids=lambda peer: peer.run.__name__)
def test_peers_give_the_same_numbers_whatever_part_of_the_batch_they_take(bench, case, peer, size):
    ours = relevance_peers.our_sums(case)
    assert len(ours) == 7 * TINY.layers
    assert relevance_peers.tried(bench, case, peer, size, ours)["difference"] < 1e-5
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in case.model.parameters())
    assert not case.model.training and not case.found


def test_numbers_that_differ_are_seen(bench, case):
    ours = relevance_peers.our_sums(case)
    name = next(iter(ours))
    ours[name][1][0] *= 1.1
    assert relevance_peers.tried(bench, case, IN_TORCH[0], 1, ours)["difference"] > 1e-3
    del ours[name]
    assert not relevance_peers.tried(bench, case, IN_TORCH[0], 1, ours)["difference"] <= 1


def test_a_peer_that_is_not_installed_is_on_record_with_the_way_to_install_it(bench, case, monkeypatch):
    monkeypatch.setitem(sys.modules, "backpack", None)
    monkeypatch.setattr(relevance_peers, "PEERS", [peers.PEERS[1]])
    found = relevance_peers.verify(bench, case)["BackPACK SumGradSquared"]
    assert "ModuleNotFoundError" in found["error"] and "pip install --no-deps backpack-for-pytorch" in found["error"]


def test_the_size_that_was_fastest_is_taken_and_the_failures_kept(bench, case):
    bench.machine.now = lambda: next(clock)
    ours = {"map": (torch.ones(2), torch.ones(3))}

    def run(case, size):
        if size == 3:
            raise MemoryError("too large")
        case.add("map", torch.ones(2), torch.ones(3))

    clock = iter([0.0, 0.0, 5.0, 10.0, 13.0])
    peer = peers.Peer("fake", run, lambda case: contextlib.nullcontext(), sizes=(1.0, 0.7, 0.0))
    size, every = relevance_peers.fastest_size(bench, case, peer, ours, limit=1e-4)
    assert size == 1 and every["3"] == {"error": "MemoryError: too large"}
    assert every["2"] == {"seconds": 5.0, "difference": 0.0} and every["1"]["seconds"] == 3.0


@pytest.mark.filterwarnings("ignore:the ranking of")
def test_behaviour_beside_plain_passes_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["behaviour_trials", "--tiny", "--repeats", "1", "--commit", "abc", "--output_dir", str(tmp_path)]
    )
    assert behaviour_trials.main() == 0
    found = json.loads((tmp_path / "behaviour_trials.json").read_text())
    assert [method["method"] for method in found["cases"][0]["methods"]] == ["plain pass", "ablation", "correlation"]
    # 4 modules of the embeddings, 16 in two blocks and the pooler; 2 layers; the plain pass.
    ideal = found["values"]["ablation: plain passes of the ideal plan"]
    assert ideal == 1 + (4 + 8 + 8 / 2) + 1 / 2 and found["values"]["ablation: facts"]["module"]["examples"] == 40
    assert len(found["checks"]) == 4


@pytest.mark.filterwarnings("ignore:the ranking of")
@pytest.mark.slow
def test_agreement_of_behaviour_with_gains_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["behaviour_agreement", "--tiny", "--commit", "abc", "--output_dir", str(tmp_path)]
    )
    assert behaviour_agreement.main() == 0
    assert {"layer": behaviour_agreement.RATE, "head": behaviour_agreement.HEAD_RATE}.items() <= LEARNING_RATES.items()
    layers, modules = json.loads((tmp_path / "behaviour_agreement.json").read_text())["records"]
    assert layers["kind"] == "layer" and len(layers["units"]) == 2 and len(modules["units"]) == 21
    for record in (layers, modules):
        assert {"correlation and ablation", "movement and gain in loss", "size and gain in loss"} <= set(
            record["spearman"]
        )
        assert all(len(values) == len(record["units"]) for values in record["scores"].values())
    assert max(modules["scores"]["gain in loss"]) > 0  # some module gains over the classifier alone
