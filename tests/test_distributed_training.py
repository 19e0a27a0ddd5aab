"""Two gloo processes train what one does: under DDP, and with the model spread over them by FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from distributed_worker import SELECTIONS, adam, batches, bert, loss_of, net, sgd, trainer, with_saved
from oracles import dense_update

TESTS = Path(__file__).parent

pytestmark = pytest.mark.usefixtures("one_thread")


def torchrun(*words: object) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([*launcher, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300)


def dense(chosen: str, make: Callable, steps: list, max_norm: float | None = None) -> nn.Module:
    """Plain autograd on whole weights, in one process, on the whole of every batch."""
    model = net()
    losses = [[lambda m, batch=batch, of=step: loss_of(m, batch) / len(of) for batch in step] for step in steps]
    dense_update.train(model, with_saved(chosen), make, losses, max_norm)
    return model.eval()


def check_same(directory: Path, expected: nn.Module, atol: float = 1e-9) -> None:
    """The saved adapter, loaded in one process, makes the expected model; and the processes computed what it computes."""
    model = PeftModel.from_pretrained(net(), directory).eval()
    tokens = batches(1)[0][0][0]
    with torch.no_grad():
        wanted, base = expected(tokens), net().eval()(tokens)
        torch.testing.assert_close(model(tokens), wanted, rtol=0, atol=atol)
    assert (wanted - base).abs().max() > 1e-2  # there was something to learn
    for rank in (0, 1):
        found = load_file(f"{directory}-{rank}.safetensors")
        torch.testing.assert_close(found["logits"], wanted, rtol=0, atol=atol)
        torch.testing.assert_close(found["base"], base, rtol=0, atol=1e-12)
    same_weights(model.merge_and_unload(), expected, atol)


def same_weights(found: nn.Module, expected: nn.Module, atol: float = 1e-9) -> None:
    state: dict[str, Tensor] = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


FUNCTIONS = ("trained", "resumed", "wrapped_by_hand", "bfloat16", "checkpointed", "by_trainer", "refusals")


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the functions of distributed_worker.py saved, all in one go, since importing takes processes longest."""
    directory = tmp_path_factory.mktemp("by_two")
    done = torchrun(TESTS / "distributed_worker.py", directory, *FUNCTIONS)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("chosen", SELECTIONS)
@pytest.mark.parametrize("kind", ["ddp", "ddp find", "full"])
def test_two_processes_train_the_same_adapter(kind: str, chosen: str, by_two: Path) -> None:
    expected = dense(chosen, *((adam, batches(5)) if chosen == "rows" else (sgd, batches(5), 0.1)))
    check_same(by_two / "trained" / f"{kind} {chosen}", expected)


@pytest.mark.parametrize("kind", ["ddp", "full", "sharded"])
def test_resumed_training_is_uninterrupted_training(kind: str, by_two: Path) -> None:
    place = by_two / "resumed"
    straight, resumed = (
        load_file(place / f"{kind} {how}" / "adapter_model.safetensors") for how in ("straight", "resumed")
    )
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-12)
    check_same(place / f"{kind} resumed", dense("everything", adam, batches(4)))


WAYS = ["ddp held", "ddp static", "ddp views", "all in one group", "kept whole", "by layer", "loaded"]


@pytest.mark.parametrize("way", WAYS)
def test_wrappers_without_accelerate(way: str, by_two: Path) -> None:
    """Most of them with two graphs and a pass without the adapter between two steps."""
    check_same(by_two / "wrapped_by_hand" / way, dense("everything", sgd, batches(3, 1)))


@pytest.mark.parametrize("how", ["as it is", "mixed precision"])
def test_bfloat16_bases_with_float32_adapters(how: str, by_two: Path) -> None:
    model = PeftModel.from_pretrained(net(torch.bfloat16), by_two / "bfloat16" / how).eval()
    expected, base = dense("rows", sgd, batches(5)), net()
    found = model.merge_and_unload().state_dict()
    for name, tensor in expected.state_dict().items():
        change = (tensor - base.state_dict()[name]).abs().max()
        torch.testing.assert_close(found[name].double(), tensor, rtol=2**-7, atol=0.1 * float(change) + 2**-8)


def test_activation_checkpointing_of_fsdp(by_two: Path) -> None:
    expected = dense("everything", adam, batches(3))
    found = {name.replace(".default", ""): value for name, value in load_file(by_two / "checkpointed" / "0.st").items()}
    model = PeftModel.from_pretrained(net(), by_two / "trained" / "full everything")
    set_peft_model_state_dict(model, found)
    same_weights(model.merge_and_unload(), expected)


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Trainer in one process, with batches of what the two take together."""
    made = trainer(tmp_path_factory.mktemp("by_one"), batch_size=6)
    made.train()
    return made.model.merge_and_unload()


@pytest.mark.parametrize("how", ["straight", "resumed"])
@pytest.mark.parametrize("kind", ["ddp", "full", "sharded"])
def test_trainer_under_torchrun(kind: str, how: str, by_two: Path, by_one: nn.Module) -> None:
    place = by_two / "by_trainer" / kind / how
    model = PeftModel.from_pretrained(bert(), place / "adapter")
    same_weights(model.merge_and_unload(), by_one)
    assert not torch.allclose(by_one.classifier.weight, bert().classifier.weight, atol=1e-2)
    if kind != "sharded":  # of which Trainer writes shards only
        last = PeftModel.from_pretrained(bert(), place / "checkpoint-4")
        same_weights(last.merge_and_unload(), by_one)


def test_what_cannot_be_ends_with_a_sentence(by_two: Path) -> None:
    assert (by_two / "refusals").is_dir()  # the assertions stand in the function
