"""Two gloo processes train what one does: under DDP, and with the model spread over them by FSDP2."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from command_line import contents, review_rows, write_csv
from command_line import reltune as command
from distributed_worker import (
    FEW_BITS,
    SELECTIONS,
    SWEEP,
    TUNE,
    VECTORS,
    adam,
    batches,
    bert,
    decoder,
    loss_of,
    net,
    sgd,
    trainer,
    tuned_in_4_bits,
    vectors,
    with_saved,
)
from oracles import dense_update, directions
from reltune.runs import training as runs_training
from reltune.tasks.generation import continuations
from tiny_models import save_tiny_bert, save_tiny_llama

TESTS = Path(__file__).parents[1]


def surroundings() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def launched(module: str, *words: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", module, *map(str, words)]
    return subprocess.run(line, env=surroundings(), capture_output=True, text=True, timeout=300)


def torchrun(*words: object) -> subprocess.CompletedProcess:
    return launched("torch.distributed.run", "--standalone", "--nproc_per_node=2", *words)


def dense(chosen: str, make: Callable, steps: list, max_norm: float | None = None) -> nn.Module:
    """Plain autograd on whole weights, in one process, on the whole of every batch."""
    model = net()
    losses = [[lambda m, batch=batch, of=step: loss_of(m, batch) / len(of) for batch in step] for step in steps]
    if chosen == "directions":
        own = {
            name: torch.from_numpy(VECTORS[name][of["directions"]]).double() for name, of in SELECTIONS[chosen].items()
        }
        directions.train(model, directions.along(model, own).values(), make, losses, max_norm)
        return directions.finished(model).eval()
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


FUNCTIONS = (
    "trained",
    "resumed",
    "wrapped_by_hand",
    "bfloat16",
    "checkpointed",
    "in_few_bits",
    "by_trainer",
    "by_command",
    "swept",
    "generations",
    "refusals",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without dropout, which would draw otherwise in each process, and a file of reviews."""
    place = tmp_path_factory.mktemp("inputs")
    save_tiny_bert(place / "model")
    config = place / "model" / "config.json"
    config.write_text(config.read_text().replace('_dropout_prob": 0.1', '_dropout_prob": 0.0'))
    write_csv(place / "train.csv", review_rows(110))
    return place


def words(place: Path) -> list[object]:
    return ["--model_name_or_path", place / "model", "--train_file", place / "train.csv", "--max_length", 16]


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """Analyzed and selected in one process."""
    answer = command("analyze", *words(place), "--criteria", "fisher", "--output_dir", place / "run")
    assert answer.code == 0, answer.err
    assert command("select", place / "run", "--budget", "5%", "--granularity", "column,row,bias,norm").code == 0
    return place / "run"


@pytest.fixture(scope="module")
def by_two(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the functions of distributed_worker.py saved, all in one go, since importing takes processes longest."""
    directory = tmp_path_factory.mktemp("by_two")
    for kind in ("ddp", "full", "sharded"):
        shutil.copytree(run, directory / "by_command" / kind)
    shutil.copytree(run, directory / "swept" / "run")
    save_tiny_llama(directory / "decoder")
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


WAYS = [
    "ddp held",
    "ddp static",
    "ddp views",
    "all in one group",
    "kept whole",
    "by layer",
    "loaded",
    "from another device",
]


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


@pytest.mark.parametrize("chosen", FEW_BITS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_bases_in_4_bits(kind: str, chosen: str, by_two: Path) -> None:
    """As in one process, which tests/tuner/test_quantised.py compares with plain autograd."""
    model = tuned_in_4_bits(chosen)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adam(p for p in model.parameters() if p.requires_grad)
    for x, labels in vectors(5):
        loss_of(model, (x, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = load_file(by_two / "in_few_bits" / f"{kind} {chosen}.st")
    wanted = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        assert (value - before[name]).abs().max() > 1e-2
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


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


@pytest.fixture(scope="module")
def alone(run: Path) -> Path:
    """The same run tuned and evaluated by one process, with batches of what two take together."""
    shutil.copytree(run, run.parent / "alone")
    assert command("tune", run.parent / "alone", *TUNE, "--per_device_train_batch_size", 8).code == 0
    assert command("evaluate", run.parent / "alone").code == 0
    return run.parent / "alone"


@pytest.mark.parametrize("kind", ["ddp", "full", "sharded"])
def test_tune_and_evaluate_under_torchrun(kind: str, by_two: Path, run: Path, alone: Path) -> None:
    place = by_two / "by_command"
    found, wanted = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (place / kind, alone))
    start = load_file(run / "relevance" / "head.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    head = next(name for name in wanted if name.endswith("classifier.weight"))
    assert (wanted[head] - start["classifier.weight"]).abs().max() > 1e-2
    results = [json.loads((p / "all_results.json").read_text()) for p in (place / kind, alone)]
    cost = ("train_seconds_per_step", "train_peak_memory_bytes", "adapter_bytes")
    found, wanted = ({k: v for k, v in of.items() if k not in cost} for of in results)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert wanted["test_samples"] % 10 == 6  # the last batch of the second process has one text of its own
    printed = [(place / f"{kind}-{rank}.txt").read_text() for rank in (0, 1)]
    assert "Adapter: " in printed[0] and "test_accuracy" in printed[0] and printed[1] == ""
    written, usual = ({f for f in contents(p) if not f.startswith("checkpoint")} for p in (place / kind, alone))
    assert written == usual


def test_a_sweep_under_torchrun(by_two: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "alone")
    assert command("tune", tmp_path / "alone", *SWEEP, "--per_device_train_batch_size", 8).code == 0
    place = by_two / "swept" / "run"
    found, wanted = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (place, tmp_path / "alone"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    one, two = (json.loads((p / "sweep.json").read_text()) for p in (tmp_path / "alone", place))
    assert two["best"]["number"] == one["best"]["number"] == 1
    for mine, theirs in zip(two["trials"], one["trials"], strict=True):
        assert mine.pop("metric") == pytest.approx(theirs.pop("metric"), abs=1e-6) and mine == theirs
    printed = [(by_two / "swept" / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert "Best on validation data: learning_rate=0.02." in printed[0] and printed[1] == ""


def test_processes_share_what_is_written(by_two: Path) -> None:
    model, tokenizer, prompts = decoder(by_two / "decoder")
    expected = [continuations(model, tokenizer, some, 6, batch_size=8) for some in (prompts, prompts[:1], [])]
    assert len(set(expected[0])) > 3
    found = [json.loads((by_two / "generations" / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [texts for texts, _ in found] == [expected, expected]
    assert [taken for _, taken in found] == [[3, 1, 1], [3]]


SHORT = ["--granularity", "column", "--budget", "5%", "--max_steps", 2]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_run_under_a_launcher(launcher: str, place: Path, tmp_path: Path) -> None:
    line = ["-m", "reltune", "run", *words(place), "--output_dir", tmp_path / "run", *SHORT]
    if launcher == "torchrun":
        done = torchrun(*line)
    else:
        done = launched(
            "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_cpu_threads_per_process=1", *line
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_accuracy") == done.stdout.count("Report: ") == 1
    for bar in ("train the head", "analyze", "tune", "evaluate test"):
        assert f"{bar}: 100%" in done.stderr
    assert {"config.yaml", "relevance", "plan", "adapter", "all_results.json", "report.html"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    """The second process finds its plan damaged."""
    for rank in (0, 1):
        shutil.copytree(run, tmp_path / str(rank))
    (tmp_path / "1" / "plan" / "plan.yaml").write_text("modules: 7")
    before = contents(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = []
    for rank in (0, 1):
        environment = {**surroundings(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        line = [sys.executable, "-m", "reltune", "tune", str(tmp_path / str(rank))]
        ended.append(subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in ended]
    assert [process.returncode for process in ended] == [2, 2], errors
    assert "reltune: error: process 1: " in errors[0] and "reltune: error" not in errors[1]
    assert contents(tmp_path) == before


def test_fsdp_is_refused_where_it_cannot_be(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)
    answer = command("tune", run, "--fsdp")
    assert answer.code == 2 and "fsdp spreads a model over accelerators, of which there are none" in answer.err
    with monkeypatch.context() as of_gpus:
        of_gpus.setattr(runs_training, "_on_cpus", lambda args: False)
        answer = command("tune", run, "--fsdp")
        assert answer.code == 2 and "fsdp wants a launcher, for one process too" in answer.err
    (tmp_path / "one.json").write_text('{"version": 1}')
    answer = command("tune", run, "--fsdp", "--fsdp_config", tmp_path / "one.json")
    assert answer.code == 2 and "fsdp_config asks for FSDP1" in answer.err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    answer = command("tune", run)
    assert answer.code == 2 and "accelerate launch was told to use FSDP" in answer.err
    assert contents(run) == before


def test_deepspeed_is_refused_where_it_cannot_be(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(run)
    config = tmp_path / "ds.json"

    def refused(words: str) -> None:
        answer = command("tune", run, "--deepspeed", config)
        assert answer.code == 2 and words in answer.err, answer.err

    refused("cannot be read as a DeepSpeed config")
    config.write_text("{")
    refused("cannot be read as a DeepSpeed config")
    config.write_text('{"zero_optimization": {"stage": 3}}')
    refused("write stage 0, 1 or 2")
    config.write_text('{"zero_optimization": {"stage": 2}}')
    found = importlib.util.find_spec
    for spec, words in ((None, "pip install deepspeed"), (found("json"), "wants a launcher")):
        changed = {"deepspeed": spec}
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util, "find_spec", lambda name, *a, c=changed: c[name] if name in c else found(name, *a)
            )
            refused(words)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    answer = command("tune", run)
    assert answer.code == 2 and "accelerate launch was told to use DeepSpeed" in answer.err
    assert contents(run) == before


def test_what_cannot_be_ends_with_a_sentence(by_two: Path) -> None:
    assert (by_two / "refusals").is_dir()  # the assertions stand in the function
