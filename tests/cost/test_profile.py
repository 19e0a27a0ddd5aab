"""The quick cost of a plan against the exact count of the tuned model."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from cost_cases import MACHINE, batch_for, bert, llama
from reltune import ReltuneConfig
from reltune.cost.devices import calibration_of, card
from reltune.cost.profile import Chosen, Profile
from reltune.cost.step import Conditions, count_step, counting
from reltune.cost.timing import step_time
from reltune.layers.inventory import take_inventory
from reltune.plan.plan import ModulePlan, Plan

LAYERS = 5


def profiled(make: Any, conditions: Conditions) -> tuple[Profile, Any]:
    with torch.device("meta"):
        model = make(LAYERS)
    inventory = take_inventory(model)
    return Profile(model, batch_for(model, "meta"), conditions, inventory), inventory


def exact(make: Any, chosen: dict[str, Chosen], conditions: Conditions) -> Any:
    with torch.device("meta"):
        model = make(LAYERS)
    modules = {}
    for name, units in chosen.items():
        shape = tuple(model.get_submodule(name).weight.shape)
        modules[name] = ModulePlan(
            shape, columns=list(range(units.columns)), rows=list(range(units.rows)), weight=units.weight
        )
        modules[name].take_elements(torch.arange(units.elements))
    plan = Plan(modules, "1", 10**9, 10**9, "")
    with counting(conditions):
        tuned = get_peft_model(model, ReltuneConfig(plan=plan)).train()
        return count_step(tuned, batch_for(model, "meta"), conditions)


def random_plan(inventory: Any, generator: random.Random) -> dict[str, Chosen]:
    maps = [info for info in inventory.modules if info.in_block and len(info.shape) == 2]
    lowest = generator.randrange(LAYERS)
    maps = [info for info in maps if any(f".{i}." in info.name for i in range(lowest, LAYERS))]
    forms = [
        lambda: Chosen(columns=generator.randint(1, 12)),
        lambda: Chosen(rows=generator.randint(1, 12)),
        lambda: Chosen(elements=generator.randint(1, 200)),
        lambda: Chosen(weight=True),
    ]
    return {info.name: generator.choice(forms)() for info in maps if generator.random() < 0.6} or {
        maps[0].name: Chosen(columns=4)
    }


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize("make", [llama, bert], ids=["llama", "bert"])
def test_the_sum_over_units_is_near_the_count_of_the_tuned_model(make: Any, cuda: bool) -> None:
    conditions = Conditions(cuda=cuda)

    def narrow(layers: int) -> nn.Module:
        return make(layers).bfloat16() if cuda else make(layers)

    profile, inventory = profiled(narrow, conditions)
    generator = random.Random(0)
    for _ in range(6):
        chosen = random_plan(inventory, generator)
        found, wanted = profile.cost(chosen), exact(narrow, chosen, conditions)
        assert found.trained == wanted.trained
        # The lowest block is differentiated in part, and tensors are tiny here: what is rounded up to 512 bytes counts.
        assert found.memory == pytest.approx(wanted.bytes, rel=0.12)
        assert found.lowest == min(int(name.split(".layer")[1].split(".")[1]) for name in chosen)


def test_a_lower_lowest_block_costs_the_whole_backward_pass_beneath_it() -> None:
    profile, _ = profiled(llama, Conditions(cuda=False))
    name = "model.layers.{}.mlp.down_proj"
    costs = [profile.cost({name.format(i): Chosen(columns=1)}) for i in range(LAYERS)]
    assert [cost.lowest for cost in costs] == list(range(LAYERS))
    assert all(low.memory > high.memory for low, high in itertools.pairwise(costs))
    kept = sum(block.kept for block in profile.blocks[1:])
    assert costs[0].memory - costs[-1].memory == pytest.approx(kept, rel=0.2)
    with pytest.raises(KeyError):
        profile.cost({"nothing": Chosen(columns=1)})


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("name", ["cpu", "h100-80gb", "t4-16gb"])
@pytest.mark.parametrize("make", [llama, bert], ids=["llama", "bert"])
def test_the_time_is_near_that_of_the_tuned_model(make: Any, name: str, replayed: bool) -> None:
    """Which waits for Python on a GPU, unless it is replayed."""
    machine = MACHINE if name == "cpu" else calibration_of(card(name))
    assert machine is not None
    conditions = Conditions(cuda=machine.device == "cuda")
    with torch.device("meta"):
        model = make(LAYERS)
    inventory = take_inventory(model)
    profile = Profile(model, batch_for(model, "meta"), conditions, inventory, machine, replayed=replayed)
    generator = random.Random(0)
    for _ in range(4):
        chosen = random_plan(inventory, generator)
        wanted = step_time(exact(make, chosen, conditions), machine, replayed).seconds
        assert profile.cost(chosen).seconds == pytest.approx(wanted, rel=0.2)


def feed_forward(layers: int) -> nn.Module:
    """MiniLM's shapes, of whose single weights a CPU gathers few, takes dot products of many, and the whole product of most."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "vocab_size": 256}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes))


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.3])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "mixed"])
@pytest.mark.parametrize("threads", [1, 2])
def test_single_weights_on_a_cpu_take_the_time_of_their_way(
    monkeypatch: pytest.MonkeyPatch, share: float, autocast: Any, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    laws = MACHINE.laws | {name.replace("float32", "bfloat16"): law for name, law in MACHINE.laws.items()}
    kinds = {f"{dtype} gather": [(1.0, 1e8)] for dtype in ("float32", "bfloat16")}  # as slow as to be seen
    machine, conditions = (
        dataclasses.replace(MACHINE, laws=laws, kinds=kinds),
        Conditions(cuda=False, autocast=autocast),
    )
    with torch.device("meta"):
        model = feed_forward(LAYERS)
    profile = Profile(model, batch_for(model, "meta"), conditions, take_inventory(model), machine)
    chosen = {
        f"bert.encoder.layer.{layer}.{name}": Chosen(elements=round(share * 384 * 1536))
        for layer in (3, 4)
        for name in ("intermediate.dense", "output.dense")
    }
    found = profile.cost(chosen).seconds
    wanted = step_time(exact(feed_forward, chosen, conditions), machine).seconds
    assert found == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_many_single_weights_cost_what_their_whole_matrix_does(cuda: bool) -> None:
    """Their gradients are then those of the whole product (ops/attach_elements.py)."""
    with torch.device("meta"):
        model = bert(LAYERS)
    profile = Profile(model, batch_for(model, "meta"), Conditions(cuda=cuda), take_inventory(model), MACHINE)
    name = "bert.encoder.layer.2.output.dense"
    size = model.get_submodule(name).weight.numel()
    whole = profile.cost({name: Chosen(weight=True)}).seconds
    few, some, many = (profile.cost({name: Chosen(elements=n)}).seconds for n in (size // 2000, size // 80, size // 4))
    operators = profile.cost({name: Chosen(elements=1)}).seconds - profile.seconds(
        2
    )  # which a whole weight has none of
    assert few < some <= many <= whole + operators


def test_a_search_can_ask_often() -> None:
    profile, inventory = profiled(llama, Conditions(cuda=False))
    chosen = random_plan(inventory, random.Random(1))
    started = time.process_time()
    for _ in range(200):
        profile.cost(chosen)
    assert time.process_time() - started < 5  # far from a second each
