"""Losses that are recorded and replayed. A recording is made again here by the same Python, since a CPU has no CUDA graphs;
benchmarks/on_gpus.py compares real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command_line import assert_refused, reltune
from reltune.runs import graphed_step, materials
from runs.test_halving import ROWS
from task_cases import write_rows

TASKS = ("sequence_classification", "multilabel_classification", "token_classification", "seq2seq")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to recordings."""
    events: list[str] = []

    def record(run: Callable[[], None], graphed: Any) -> Callable[[], None]:
        run()  # as a warm-up
        events.append("recorded")

        def replay() -> None:
            events.append("replayed")
            run()

        return replay

    monkeypatch.setattr(graphed_step, "record", record)
    monkeypatch.setattr(materials, "check_graphs", lambda *_: None)
    return events


def run(place: Path, name: str, task: str, *flags: object) -> dict[str, torch.Tensor]:
    words = ("--model_name_or_path", place / "model", "--train_file", place / "rows.jsonl", "--task", task)
    words = (*words, "--output_dir", place / name, "--max_steps", 6, "--eval_strategy", "no", "--warmup_steps", 0)
    answer = reltune("run", *words, "--learning_rate", 0.01, *flags)
    assert answer.code == 0, answer
    files = list((place / name / "adapter").glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def made(place: Path, task: str) -> Path:
    save, row = ROWS[task]
    save(place / "model")
    for file in (place / "model").glob("config.json"):  # dropout would draw other numbers for padded batches
        words = file.read_text().replace('_dropout_prob": 0.1', '_dropout_prob": 0.0')
        file.write_text(words.replace('"dropout_rate": 0.1', '"dropout_rate": 0.0'))
    write_rows(place / "rows.jsonl", [row(n) for n in range(60)])
    return place


@pytest.mark.parametrize(
    ("task", "method", "flags"),
    [
        *((task, "lora", ()) for task in TASKS),
        ("sequence_classification", "weights", ("--gradient_accumulation_steps", 3)),
        ("sequence_classification", "columns", ("--bf16", "--use_cpu", "--label_smoothing_factor", 0.1)),
        ("sequence_classification", "full", ("--max_grad_norm", 0.1)),
    ],
    ids=str,
)
def test_weights_come_out_as_without(
    tmp_path: Path, task: str, method: str, flags: tuple[object, ...], recorded: list[str]
) -> None:
    made(tmp_path, task)
    flags = ("--method", method, "--per_device_train_batch_size", 4, *flags)
    wanted = run(tmp_path, "plain", task, *flags)
    assert not recorded
    found = run(tmp_path, "graphs", task, *flags, "--cuda_graphs")
    assert recorded.count("replayed") >= 2 * recorded.count("recorded") > 0
    assert found.keys() == wanted.keys() and found
    rounding = 3e-3 if "--bf16" in flags else 2e-4  # of steps of 0.01
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=rounding, atol=rounding, msg=lambda said, n=name: f"{n}: {said}"
        )


def test_a_replay_is_of_its_own_batch_and_adds_up() -> None:
    """Two batches of a shape, one after the other without a step between them, in all ways that a loss is used."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    unused = torch.nn.Parameter(torch.zeros(2))
    model.register_parameter("unused", unused)

    def loss_of(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        inputs.pop("labels")  # as Trainer does
        return model(inputs["x"]).square().sum() / (1 if num_items_in_batch is None else num_items_in_batch)

    graphed = graphed_step.GraphedLoss(loss_of, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphed_step, "record", lambda run, _: run)
        for count in (None, torch.tensor(3.0), 2):
            for _ in range(4):
                batches = [{"x": torch.randn(5, 3), "labels": torch.zeros(5)} for _ in range(2)]
                gradients = []
                for of in (graphed.compute_loss, loss_of):
                    model.zero_grad()
                    for batch, share in zip(batches, (0.5, 2.0), strict=True):
                        (of(model, dict(batch), num_items_in_batch=count) * share).backward()
                    gradients.append([p.grad for p in model.parameters() if p.grad is not None])
                assert len(gradients[0]) == len(gradients[1]) == 4
                for found, wanted in zip(*gradients, strict=True):
                    torch.testing.assert_close(found, wanted)
        first = graphed.compute_loss(model, dict(batches[0]))
        graphed.compute_loss(model, dict(batches[1])).backward()
        with pytest.raises(RuntimeError, match="another batch"):
            first.backward()
    assert len(graphed.recorded) == 3 and unused.grad is None


def test_recordings_end_where_tensors_are_put_elsewhere() -> None:
    model = torch.nn.Linear(2, 1)
    graphed = graphed_step.GraphedLoss(lambda model, inputs, *_, **__: model(inputs["x"]).sum(), model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphed_step, "record", lambda run, _: run)
        for _ in range(3):
            graphed.compute_loss(model, {"x": torch.ones(1, 2)})
        assert len(graphed.recorded) == 1
        model.weight.data = model.weight.data.clone()
        graphed.compute_loss(model, {"x": torch.ones(1, 2), "note": "words are not recorded"})
        graphed.compute_loss(model.eval(), {"x": torch.ones(1, 2)})
        assert len(graphed.recorded) == 1
        graphed.compute_loss(model.train(), {"x": torch.ones(1, 3)[:, :2]})
    assert graphed.places == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize(
    ("task", "flags", "words"),
    [
        ("sequence_classification", (), "none is used here"),
        ("sequence_classification", ("--cache_frozen_prefix", "on", "--method", "lora"), "begin at the lowest layer"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path: Path, task: str, flags: tuple[object, ...], words: str) -> None:
    made(tmp_path, task)
    given = ("--model_name_or_path", tmp_path / "model", "--train_file", tmp_path / "rows.jsonl", "--task", task)
    answer = reltune("run", *given, "--output_dir", tmp_path / "out", "--cuda_graphs", *flags)
    assert_refused(answer, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["causal_lm", "preference"])
def test_steps_of_trl_are_not_recorded(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(graphed_step.InputError, match="count in Python"):
        graphed_step.check_graphs({}, task)
    with pytest.raises(graphed_step.InputError, match="none is used here"):
        graphed_step.check_graphs({"use_cpu": True}, "sequence_classification")
    graphed_step.check_graphs({}, "sequence_classification")
