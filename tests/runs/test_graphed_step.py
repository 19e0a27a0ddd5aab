"""Losses that are recorded and replayed. A recording is made again here by the same Python, since a CPU has no CUDA graphs;
benchmarks/on_gpus.py compares real ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command_line import Answer, assert_refused, reltune
from reltune.runs import graphed_step
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
    monkeypatch.setattr(graphed_step, "why_not_here", lambda *_: "")
    return events


def trained(place: Path, name: str, task: str, *flags: object) -> tuple[Answer, dict[str, torch.Tensor]]:
    words = ("--model_name_or_path", place / "model", "--train_file", place / "rows.jsonl", "--task", task)
    words = (*words, "--output_dir", place / name, "--max_steps", 6, "--eval_strategy", "no", "--warmup_steps", 0)
    answer = reltune("run", *words, "--learning_rate", 0.01, *flags)
    files = list((place / name / "adapter").glob("*.safetensors"))
    return answer, {key: value for file in files for key, value in load_file(file).items()}


def run(place: Path, name: str, task: str, *flags: object) -> dict[str, torch.Tensor]:
    answer, found = trained(place, name, task, *flags)
    assert answer.code == 0, answer
    return found


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


def recorded_linear(patch: pytest.MonkeyPatch) -> tuple[torch.nn.Linear, graphed_step.GraphedLoss]:
    """A map from two numbers to one, three batches of one text after it was made: the third is replayed."""
    patch.setattr(graphed_step, "record", lambda run, _: run)
    model = torch.nn.Linear(2, 1)
    graphed = graphed_step.GraphedLoss(lambda model, inputs, *_, **__: model(inputs["x"]).sum(), model)
    for _ in range(3):
        graphed.compute_loss(model, {"x": torch.ones(1, 2)})
    return model, graphed


def test_recordings_end_where_tensors_are_put_elsewhere() -> None:
    with pytest.MonkeyPatch.context() as patch:
        model, graphed = recorded_linear(patch)
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


OUT = torch.OutOfMemoryError("CUDA out of memory")


def failing(error: BaseException, inside: BaseException | None = None) -> Callable[..., Any]:
    """A recording that fails: with ``inside`` the step has failed first, and leaving the recording raises ``error``."""

    def record(*_: Any) -> Any:
        try:
            if inside is not None:
                raise inside
        finally:
            raise error

    return record


@pytest.mark.parametrize(
    "record", [failing(OUT), failing(RuntimeError("operation failed due to a previous error"), OUT)], ids=["", "masked"]
)
@pytest.mark.parametrize("most", [4, 2], ids=["fits", "halved"])
def test_where_recordings_have_no_memory_training_goes_on(
    tmp_path: Path, record: Callable[..., Any], most: int, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them, and where that is not enough in halves of batches; the weights come out as with memory for all."""
    made(tmp_path, "sequence_classification")
    flags = ("--method", "lora", "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    wanted = run(tmp_path, "plain", "sequence_classification", *flags)
    monkeypatch.setattr(graphed_step, "record", record)
    from transformers import Trainer

    plain, calls = Trainer.training_step, []

    def step(self: Trainer, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(inputs["input_ids"]))
        if calls[-1] > most and len(calls) > 3:
            raise OUT
        return plain(self, model, inputs, *rest, **options)

    monkeypatch.setattr(Trainer, "training_step", step)
    answer, found = trained(tmp_path, "graphs", "sequence_classification", *flags, "--cuda_graphs")
    assert answer.code == 0, answer
    assert answer.err.count("training goes on without CUDA graphs") == 1, answer.err
    assert ("with 2 at a time" in answer.err) == (most == 2)
    assert answer.err.count("out of memory with") == 1 + (most == 2), answer.err
    assert json.loads((tmp_path / "graphs" / "training_cost.json").read_text())["replayed_batches"] == 0
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-4)


def test_memory_that_ends_later_ends_recordings_first() -> None:
    """They are given back before a batch is halved, and none is made again."""
    with pytest.MonkeyPatch.context() as patch:
        model, graphed = recorded_linear(patch)
        assert graphed.recorded and graphed.replays == 1
        assert graphed.end() and not graphed.end()
        for _ in range(3):
            loss = graphed.compute_loss(model, {"x": torch.ones(1, 2)})
    loss.backward()
    assert not graphed.recorded and not graphed.gradients and graphed.replays == 1
    torch.testing.assert_close(model.weight.grad, torch.ones(1, 2))


def test_what_cannot_be_recorded_ends_a_run_that_asked_for_it(
    tmp_path: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, "sequence_classification")
    monkeypatch.setattr(
        graphed_step, "record", failing(RuntimeError("operation not permitted when stream is capturing"))
    )
    flags = ("--method", "lora", "--per_device_train_batch_size", 4, "--cuda_graphs")
    answer, _ = trained(tmp_path, "graphs", "sequence_classification", *flags)
    assert answer.code == 2 and "cannot be recorded (operation not permitted" in answer.err, answer


# -- comparisons ------------------------------------------------------------------------------------------------------


def compare(place: Path, name: str, *flags: object) -> Answer:
    words = (
        "--model_name_or_path",
        place / "model",
        "--train_file",
        place / "rows.jsonl",
        "--output_dir",
        place / name,
    )
    words = (*words, "--methods", "lora,full", "--sizes", "usual", "--seeds", 1, "--rate_trials", 1, "--max_steps", 5)
    return reltune("compare", *words, "--per_device_train_batch_size", 4, "--head_epochs", 0.5, *flags)


def facts(place: Path, name: str) -> tuple[Any, Any, dict[str, int]]:
    """What the directory remembers, what the record says, and how many batches each way replayed."""
    inputs, record = (json.loads((place / name / file).read_text()) for file in ("inputs.json", "comparison.json"))
    replayed = {one["cell"]: one["replayed_batches"] for one in record["trainings"]}
    return inputs["cuda_graphs"], record["cuda_graphs"], replayed


REPLAYED, NONE = {"lora-r8": 3, "full": 3}, {"lora-r8": 0, "full": 0}


def test_a_comparison_records_unasked_and_goes_on_as_it_began(
    tmp_path: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = made(tmp_path, "sequence_classification")
    told = "Steps are replayed as CUDA graphs"
    answer = compare(place, "unset")
    assert answer.code == 0 and told in answer.out, answer
    assert facts(place, "unset") == (True, True, REPLAYED)
    assert told in (place / "unset" / "report.html").read_text()

    answer = compare(place, "off", "--no_cuda_graphs")
    assert answer.code == 0 and told not in answer.out, answer
    assert facts(place, "off") == (None, False, NONE)
    answer = compare(place, "on", "--cuda_graphs")
    assert answer.code == 0 and facts(place, "on") == (None, True, REPLAYED), answer
    rows = [
        json.loads((place / name / "comparison.json").read_text())["tables"][0]["rows"] for name in ("unset", "off")
    ]
    for with_graphs, without in zip(*rows, strict=True):
        assert with_graphs["metrics"] == pytest.approx(without["metrics"], rel=1e-4)

    assert_refused(compare(place, "unset", "--no_cuda_graphs"), "cuda_graphs is not given there and False here")
    # What is left after an interruption, and on a machine where nothing can be recorded.
    for why, count in (("", 3), ("there is no GPU", 0)):
        monkeypatch.setattr(graphed_step, "why_not_here", lambda *_, why=why: why)
        shutil.rmtree(next((place / "unset" / "runs" / "full").glob("seed-*")))
        answer = compare(place, "unset")
        assert answer.code == 0 and ("what is left has not: there is no GPU" in answer.out) == bool(why), answer
        assert facts(place, "unset") == (True, not why, {**REPLAYED, "full": count})


def test_a_comparison_that_an_older_version_began_stays_without(tmp_path: Path, recorded: list[str]) -> None:
    place = made(tmp_path, "sequence_classification")
    assert compare(place, "old", "--no_cuda_graphs").code == 0
    for file, name in (("inputs.json", "cuda_graphs"), ("comparison.yaml", "cuda_graphs")):
        path = place / "old" / file
        kept = [line for line in path.read_text().splitlines() if name not in line]
        path.write_text("\n".join(kept).replace(",\n}", "\n}"))
    shutil.rmtree(place / "old" / "runs")
    answer = compare(place, "old")
    assert answer.code == 0 and facts(place, "old") == (False, False, NONE), answer
    assert not recorded


def test_a_comparison_goes_on_where_a_step_cannot_be_recorded(
    tmp_path: Path, recorded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = made(tmp_path, "sequence_classification")
    monkeypatch.setattr(
        graphed_step, "record", failing(RuntimeError("operation not permitted when stream is capturing"))
    )
    answer = compare(place, "out")
    assert answer.code == 0 and "cannot be recorded as a CUDA graph (operation not permitted" in answer.err, answer
    assert facts(place, "out") == (True, True, NONE)
    assert all(not one["failed"] for one in json.loads((place / "out" / "comparison.json").read_text())["trainings"])


@pytest.mark.parametrize(
    ("given", "fields", "model", "words"),
    [
        ({}, {}, torch.nn.Linear(2, 2), ""),
        ({"frozen_dtype": "float8_e4m3fn"}, {}, torch.nn.Linear(2, 2), "few bits"),
        ({"load_in_4bit": True}, {}, torch.nn.Linear(2, 2), "few bits"),
        ({"activation_offloading": True}, {}, torch.nn.Linear(2, 2), "host memory"),
        ({}, {"gradient_checkpointing": True}, torch.nn.Linear(2, 2), "random numbers"),
        ({}, {"torch_compile": True}, torch.nn.Linear(2, 2), "torch_compile"),
        ({}, {}, torch.nn.BatchNorm1d(2).eval(), "batch norms"),
        ({}, {}, torch.nn.Linear(500_000_001, 1, bias=False, device="meta"), "500,000,000"),
        ({}, {}, torch.nn.Linear(500_000_000, 1, bias=False, device="meta"), ""),
    ],
)
def test_where_a_comparison_records_unasked(
    given: dict[str, Any],
    fields: dict[str, Any],
    model: torch.nn.Module,
    words: str,
    tmp_path: Path,
    recorded: list[str],
) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **fields)
    found = graphed_step.why_not_unasked(given, args, "sequence_classification", model)
    assert words in found and bool(found) == bool(words)


def test_a_run_of_a_small_model_says_that_it_could_record(tmp_path: Path, recorded: list[str]) -> None:
    place, words = made(tmp_path, "sequence_classification"), "--cuda_graphs trains the same"
    plain, _ = trained(place, "plain", "sequence_classification", "--method", "lora")
    assert plain.code == 0 and words in plain.err and not recorded
    for name, flags in (("told", ("--no_cuda_graphs",)), ("within", ("--budget", "memory=2GiB"))):
        answer, _ = trained(place, name, "sequence_classification", "--method", "lora", *flags)
        assert answer.code == 0 and words not in answer.err
